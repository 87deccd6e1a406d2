"""`replace_blocks`, which decides everything before it changes anything, and `restore_blocks`."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from usf_kernels.integrations.all_in_one import AllInOneMixin
from usf_kernels.integrations.faster import Faster
from usf_kernels.ops.checks import check_choice, check_clamp

# Integrations are imported only for packages in use: one that was never imported has no instances.
_PACKAGES = {"FrEIA": "usf_kernels.integrations.freia", "anomalib": "usf_kernels.integrations.anomalib"}
_UNIFORM = "usf_kernels.integrations.uniform"
_TESTED = {"FrEIA": "0.2", "anomalib": "2.7"}


@dataclass(frozen=True)
class Replacement:
    """Report of `replace_blocks`.

    Attributes:
        replaced: names of the modules that have another class now.
        left: names of the modules that were considered but not replaced, and why.
        notes: for replaced modules that no longer compute the same, what was kept or what differs.
    """

    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of modules replaced."""
        return len(self.replaced)

    def __str__(self) -> str:
        lines = [
            f"{self.count} modules replaced",
            *(f"of which {count}: {note}" for note, count in Counter(self.notes.values()).items()),
            *(f"left {name}: {why}" for name, why in self.left.items()),
        ]
        return "\n".join(lines)


def replace_blocks(model: nn.Module, *, to: str = "exact", compact: bool = False) -> Replacement:
    """Give FrEIA's and anomalib's flow modules inside `model` other classes, in place.

    With `to="exact"` they compute the same, faster. `AllInOneBlock`s (every option) and FrEIA's GLOW, NICE
    and RNVP coupling blocks take fewer passes, in training too; a `SequenceINN` of `AllInOneBlock`s runs in
    its inference form (`FlowSequence.fuse`) where all of it is in evaluation mode, without hooks, and no
    gradients are recorded; writes through `.data` take effect at the next `train()` or `eval()`. All
    parameters stay the same objects, so optimisers, wrappers and hooks keep working, and checkpoints go both
    ways. Permutations must not be edited by hand afterwards; loading them is fine.

    With `to="usf"` the flow also becomes uniformly scaling: every `AllInOneBlock` gets an additive coupling
    and an LU map (`usf_kernels.integrations.uniform` says what it keeps; blocks with `gin_block` are
    uniformly scaling already). The model has other parameters and keys afterwards: convert it before making
    an optimiser or a DistributedDataParallel, then train.

    Args:
        model: any module; changed in place.
        to: "exact" or "usf".
        compact: from now on save an index instead of dense permutation matrices in the state_dicts of
            `AllInOneBlock`s. Such a checkpoint loads into replaced models only.

    Returns:
        Report of what was replaced, and what was left and why.

    Warns:
        UserWarning: for a version of FrEIA or anomalib that this was not tested with.

    Raises:
        TypeError: if it is not a module.
        ValueError: for an unknown `to`, or if nothing could be replaced. The model is unchanged.
    """
    check_module(model)
    check_choice("to", to, ("exact", "usf"))
    report = replace_known(model, to, compact)
    if not report.replaced:
        raise ValueError(_nothing(model, report))
    return report


def replace_known(model: nn.Module, to: str = "exact", compact: bool = False) -> Replacement:
    """Do what `replace_blocks` does, but accept a model with nothing to replace."""
    report, plan = _decide(model, _classes(), to)
    _warn_of_versions({step.original for step in plan})
    for step in plan:
        step.take(compact)
    return report


def restore_blocks(model: nn.Module) -> int:
    """Undo `replace_blocks`: give modules back their original classes, and contents that `to="usf"` replaced.

    Parameters are the same objects as before. Those that `to="usf"` put aside have not been trained since.

    Returns:
        Number of modules restored.

    Raises:
        TypeError: if it is not a module.
        ValueError: if a replaced module has parametrizations; nothing is changed then.
    """
    check_module(model)
    replaced = [module for module in model.modules() if hasattr(type(module), "end_fast")]
    for module in replaced:
        if is_parametrized(module):  # its class was made for that, and would be lost
            raise ValueError(f"model: a {type(module).__name__} has parametrizations, remove them first")
    for module in replaced:
        fast = type(module)
        module.end_fast()
        if type(module) is fast:  # `UniformBlock.end_fast` restores class and contents itself
            module.__class__ = next(base for base in fast.__mro__ if not hasattr(base, "end_fast"))
    return len(replaced)


@dataclass(frozen=True)
class _Step:
    """The planned replacement of one module.

    Attributes:
        original: class of the module before any replacement.
        fast: class that it gets; None where it gets `flow`.
    """

    module: nn.Module
    original: type
    fast: type | None
    flow: nn.Module | None = None

    def take(self, compact: bool) -> None:
        """Change the module."""
        if self.flow is not None:
            if type(self.module) is not self.original:
                self.module.end_fast()
            self.module.__class__ = import_module(_UNIFORM).UniformBlock
            self.module.become(self.original, self.flow)
            return
        self.module.__class__ = self.fast
        self.module.begin_fast()
        if compact and isinstance(self.module, AllInOneMixin):
            self.module.compact = True


def _decide(model: nn.Module, classes: dict[type, type], to: str) -> tuple[Replacement, list[_Step]]:
    """Return the report and the steps that lead to it; nothing is changed yet."""
    originals = {fast: original for original, fast in classes.items()}
    report, plan = Replacement(), []
    for path, module in model.named_modules():
        name = path or type(module).__name__
        original = originals.get(type(module), type(module))
        fast = classes.get(original)
        if fast is None:
            base = next((known for known in classes if isinstance(module, known)), None)
            if base is not None:
                report.left[name] = f"a subclass of {base.__name__}, which may compute something else"
            continue
        missing = [attribute for attribute in fast.needs if not hasattr(module, attribute)]
        if missing:
            report.left[name] = f"no attribute {missing[0]!r}, so of a version that is not known"
        elif _odd_clamp(module):
            report.left[name] = f"its clamp is {module.clamp!r}, expected a positive number"
        elif to == "exact" or fast.uniform or getattr(module, "GIN", False):
            if type(module) is original:
                plan.append(_Step(module, original, fast))
                report.replaced.append(name)
        elif not issubclass(fast, AllInOneMixin):
            report.left[name] = "an affine coupling; only those of AllInOneBlocks become uniformly scaling"
        else:
            uniform = import_module(_UNIFORM)
            try:
                plan.append(_Step(module, original, None, uniform.uniform_flow(module)))
            except uniform.CannotConvert as why:
                report.left[name] = str(why)
            else:
                report.replaced.append(name)
                report.notes[name] = uniform.NOTE
    return report, plan


def _odd_clamp(module: nn.Module) -> bool:
    """Whether an affine block has a clamp that no coupling of this package takes."""
    if not hasattr(module, "GIN") or module.GIN:
        return False
    try:
        check_clamp(module.clamp)
    except (TypeError, ValueError):
        return True
    return False


def _nothing(model: nn.Module, report: Replacement) -> str:
    """Return a message saying what was expected, and why there is nothing to replace."""
    if report.left:
        found = "; ".join(f"{name}: {why}" for name, why in report.left.items())
    elif any(isinstance(module, Faster) for module in model.modules()):
        found = (
            "only modules that are replaced already (restore_blocks undoes that, also to give other options)"
        )
    else:
        found = "none"
    return (
        "model: expected an AllInOneBlock of anomalib, or an AllInOneBlock, SequenceINN, or GLOW, NICE or "
        f"RNVPCouplingBlock of FrEIA in it, found {found}"
    )


def _warn_of_versions(originals: set[type]) -> None:
    """Warn if a class belongs to a package version that this was not tested with."""
    for package in sorted({original.__module__.partition(".")[0] for original in originals}):
        found, tested = _version(package), _TESTED[package]
        if found != tested and not found.startswith(tested + "."):
            warnings.warn(
                f"{package} {found}: replace_blocks is tested with {tested}; compare outputs before and "
                f"after, or install {package}=={tested}.*",
                stacklevel=4,  # the caller of `replace_blocks` or `accelerate`
            )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a copy on the path
        return "of unknown version"


def check_module(model: object) -> None:
    """Raise TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")


def _classes() -> dict[type, type]:
    """Map original classes to faster ones (`Faster`), for the packages that are in use."""
    found: dict[type, type] = {}
    for package, integration in _PACKAGES.items():
        if package in sys.modules:
            found.update(import_module(integration).CLASSES)
    return found
