"""What the classes share that `replace_blocks` gives to existing instances, and how those pickle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import LambdaType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from usf_kernels.nn.fusing import fuse_parts
from usf_kernels.nn.weights import Weights

# Where the classes are that read nothing but parameters and options.
KNOWN = ("torch.nn.", "usf_kernels.nn.", "usf_kernels.integrations.")


class Faster:
    """In front of a class of FrEIA or anomalib in a class's bases: the same parameters and checkpoints.

    `restore_blocks` calls `end_fast` of every module that has it, and gives it the first of its classes that
    has none.

    Attributes:
        needs: names of attributes that every instance of the original has, in the versions that are known.
        uniform: whether the log-determinant does not depend on the input.
    """

    needs: tuple[str, ...] = ()
    uniform = True

    def begin_fast(self) -> None:
        """What an instance needs beyond the original's attributes. Undone by `end_fast`."""

    def end_fast(self) -> None:
        """Leave nothing behind."""

    def __getstate__(self) -> dict[str, Any]:
        """With names for FrEIA's lambda functions, which do not pickle."""
        inherited = getattr(super(), "__getstate__", None)  # of every class from Python 3.11 on
        state = self.__dict__ if inherited is None else inherited()
        return {
            name: named(value) if isinstance(value, LambdaType) else value for name, value in state.items()
        }


def runs_as_one(module: nn.Module) -> bool:
    """Whether nobody could tell an inference form from the module: nothing in it is in training mode (it may
    draw dropout masks) or of a class of the user's (which may read what only it knows of), and nobody hears
    of its parts but what makes their weights."""
    for part in parts_of(module):
        known = type(part).__module__.startswith(KNOWN)
        if part.training or not known or _is_heard(part):
            return False
    return True


def parts_of(*modules: nn.Module) -> list[nn.Module]:
    """All modules in these; at every call, and `modules()` takes four times as long."""
    found, rest = [], list(modules)
    while rest:
        part = rest.pop()
        if part is not None:
            found.append(part)
            rest.extend(part._modules.values())
    return found


class InferenceForm:
    """A fused flow of replaced blocks as they were when it was made.

    Args:
        blocks: which must fold.
        dtype: of the flow.
    """

    def __init__(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self._parts = parts_of(*blocks)
        self._weights, self._rest = Weights(self._parts), self._other(blocks, dtype)
        parts = [part for block in blocks for part in block.flow_parts()]
        self.flow = fuse_parts(parts, dtype, self._weights.tensors[0].device)

    def is_of(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> bool:
        """Whether it is still that of these, as far as that can be seen: see `Weights`."""
        same = self._rest == self._other(blocks, dtype) and self._parts == parts_of(*blocks)
        return same and not self._weights.outdated

    @staticmethod
    def _other(blocks: Sequence[nn.Module], dtype: torch.dtype) -> tuple:
        return dtype, *(getattr(block, "clamp", None) for block in blocks)


def _is_heard(module: nn.Module) -> bool:
    if module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return True
    return not all(
        isinstance(hook, (WeightNorm, SpectralNorm)) for hook in module._forward_pre_hooks.values()
    )


def scale_sigmoid(raw: Tensor) -> Tensor:
    """The "SIGMOID" of `AllInOneBlock`."""
    return 10 * torch.sigmoid(raw - 2.0)


def scale_softplus(raw: Tensor) -> Tensor:
    """Its "SOFTPLUS"."""
    return 0.1 * F.softplus(raw, beta=0.5)


def scale_exp(raw: Tensor) -> Tensor:
    """Its "EXP"."""
    return torch.exp(raw)


def clamp_atan(raw: Tensor) -> Tensor:
    """The "ATAN" of FrEIA's coupling blocks."""
    return 0.636 * torch.atan(raw)


def clamp_sigmoid(raw: Tensor) -> Tensor:
    """Their "SIGMOID"."""
    return 2.0 * (torch.sigmoid(raw) - 0.5)


def identity(raw: Tensor) -> Tensor:
    """What `NICECouplingBlock` has for a clamp."""
    return raw


NAMED = (scale_sigmoid, scale_softplus, scale_exp, clamp_atan, clamp_sigmoid, identity)


def named(function: Callable) -> Callable:
    """The function of this file that does what one of FrEIA's lambda functions does; others as they are."""
    if getattr(function, "__name__", None) != "<lambda>" or not function.__module__.startswith("FrEIA."):
        return function
    probe = torch.tensor([-1.7, 0.0, 0.9], dtype=torch.float64, device="cpu")
    values = function(probe)
    same = (known for known in NAMED if torch.allclose(known(probe), values, rtol=1e-12, atol=0))
    return next(same, function)
