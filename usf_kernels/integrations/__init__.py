"""Existing FrEIA and anomalib models on this package's operations: one call there, one call back."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib import import_module

from torch import nn

# A module of a package that was never imported has no instances, so nothing is imported for nothing.
_PACKAGES = {"FrEIA": "usf_kernels.integrations.freia", "anomalib": "usf_kernels.integrations.anomalib"}


@dataclass(frozen=True)
class Replacement:
    """What `replace_blocks` did.

    Attributes:
        replaced: names of the modules that have a faster class now.
        left: names of those that could have had one, and why they have not.
    """

    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Of the modules replaced."""
        return len(self.replaced)

    def __str__(self) -> str:
        lines = [
            f"{self.count} modules replaced",
            *(f"left {name}: {why}" for name, why in self.left.items()),
        ]
        return "\n".join(lines)


def replace_blocks(model: nn.Module) -> Replacement:
    """Give FrEIA's and anomalib's flow modules inside `model` faster classes, in place.

    `AllInOneBlock`s compute the same with fewer passes, in training too; a `SequenceINN` of them runs in its
    inference form (`FlowSequence.fuse`) where it is in evaluation mode and no gradients are recorded. All
    parameters stay the objects that they are, so optimisers, wrappers and hooks keep working, and checkpoints
    go both ways. Permutations must not be edited by hand afterwards; loading them is fine.

    Args:
        model: any module; changed in place.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: not a module.
        ValueError: nothing in it that could be replaced; the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    classes = _classes()
    report = Replacement()
    for name, module in model.named_modules():
        fast = classes.get(type(module))
        if fast is None:
            continue
        if getattr(module, "GIN", False):
            report.left[name] = "a GIN block; its log scales depend on the whole image"
            continue
        module.__class__ = fast
        module.begin_fast()
        report.replaced.append(name)
    if not report.replaced:
        found = "; ".join(f"{name}: {why}" for name, why in report.left.items())
        raise ValueError(
            "model: expected an AllInOneBlock or SequenceINN of FrEIA or anomalib in it, found "
            + (found or "none")
        )
    return report


def restore_blocks(model: nn.Module) -> int:
    """Undo `replace_blocks`: give the modules their original classes back.

    Returns:
        How many there were.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    originals = {fast: original for original, fast in _classes().items()}
    count = 0
    for module in model.modules():
        original = originals.get(type(module))
        if original is not None:
            module.end_fast()
            module.__class__ = original
            count += 1
    return count


def _classes() -> dict[type, type]:
    """Original class to faster class, of the packages that are in use."""
    found: dict[type, type] = {}
    for package, integration in _PACKAGES.items():
        if package in sys.modules:
            found.update(import_module(integration).CLASSES)
    return found
