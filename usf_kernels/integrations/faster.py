"""Base of the classes that `replace_blocks` gives to existing instances: inference forms, pickling."""

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

# Packages whose classes are known to read nothing but their parameters and options.
KNOWN = ("torch.nn.", "usf_kernels.nn.", "usf_kernels.integrations.")


class Faster:
    """Mixin for subclasses of a class of FrEIA or anomalib, listed before it in the bases. Parameters and
    checkpoints stay the same.

    `restore_blocks` calls `end_fast` of every module that has it, and gives the module the first class of its
    bases that does not.

    Attributes:
        needs: names of attributes that every instance of the original has, in all known versions.
        uniform: whether the log-determinant does not depend on the input.
        correction: what `accelerate` makes differ from the original, unless `exact`; empty for nothing.
        outdated: whether statistics inside were fitted to values that are corrected now.
    """

    needs: tuple[str, ...] = ()
    uniform = True
    correction = ""
    outdated = False

    def begin_fast(self) -> None:
        """Add the attributes that the original does not have. Undone by `end_fast`."""

    def end_fast(self) -> None:
        """Remove all that `begin_fast` added."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with named functions for FrEIA's lambdas, which do not pickle."""
        inherited = getattr(super(), "__getstate__", None)  # every class has it from Python 3.11 on
        state = self.__dict__ if inherited is None else inherited()
        return {
            name: named(value) if isinstance(value, LambdaType) else value for name, value in state.items()
        }


def runs_as_one(module: nn.Module) -> bool:
    """Whether an inference form may stand in for the module: nothing in it is in training mode (it may draw
    dropout masks) or of a user's class (which may read anything), and there are no hooks except those of
    weight_norm and spectral_norm, and no `forward` set on an instance. Nor for replicas of nn.DataParallel,
    whose weights are no parameters."""
    for part in parts_of(module):
        known = type(part).__module__.startswith(KNOWN)
        if part.training or not known or is_heard(part) or "_is_replica" in part.__dict__:
            return False
    return True


def parts_of(*modules: nn.Module) -> list[nn.Module]:
    """Return all modules in these. It runs at every call, and `modules()` takes four times as long."""
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
        blocks: blocks that fold.
        dtype: dtype of the flow.
    """

    def __init__(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self._parts = parts_of(*blocks)
        self._weights, self._rest = Weights(self._parts), self._other(blocks, dtype)
        self._digest, self._suspected = digest(self._weights.tensors), False
        parts = [part for block in blocks for part in block.flow_parts()]
        self.flow = fuse_parts(parts, dtype, self._weights.tensors[0].device)

    def is_of(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> bool:
        """Whether this is still the form of these blocks, as far as changes can be noticed: see `Weights`."""
        same = self._rest == self._other(blocks, dtype) and self._parts == parts_of(*blocks)
        if not same or self._weights.outdated:
            return False
        if self._suspected and not torch.equal(self._digest, digest(self._weights.tensors)):
            return False
        self._suspected = False
        return True

    def suspect(self) -> None:
        """Look for writes through `.data`, which leave no trace, when next asked. Making the form anew would
        take longer: anomalib's Cflow changes its mode twice in every forward pass."""
        self._suspected = True

    @staticmethod
    def _other(blocks: Sequence[nn.Module], dtype: torch.dtype) -> tuple:
        return dtype, *(getattr(block, "clamp", None) for block in blocks)


def digest(tensors: Sequence[Tensor]) -> Tensor:
    """Return bytes that change with the values of tensors on one device, but for very rare coincidences.

    A tensor's bytes are read as rows of integers. The sums of columns notice what a sum of everything does
    not, such as values that change places or signs; what fills no row is returned as it is.
    """
    columns, parts = 1021, []  # a prime: the rows do not line up with those of a matrix
    for tensor in tensors:
        flat = tensor.detach().contiguous().flatten()
        if flat.data_ptr() % 8:  # integers of 64 bits, whose sums do not wrap as soon, are aligned
            flat = flat.clone()
        bits = flat.view(torch.uint8)
        length = bits.numel() // (8 * columns) * (8 * columns)
        rows = bits[:length].view(torch.int64).view(-1, columns)
        parts += [rows.sum(0).view(torch.uint8), bits[length:]]
    return torch.cat(parts)


def is_heard(module: nn.Module) -> bool:
    """Whether a module has hooks, other than those that make its weights, or a `forward` of its own."""
    hooks = module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    if hooks or "forward" in module.__dict__:
        return True
    return not all(
        isinstance(hook, (WeightNorm, SpectralNorm)) for hook in module._forward_pre_hooks.values()
    )


def scale_sigmoid(raw: Tensor) -> Tensor:
    """The "SIGMOID" of `AllInOneBlock`."""
    return 10 * torch.sigmoid(raw - 2.0)


def scale_softplus(raw: Tensor) -> Tensor:
    """The "SOFTPLUS" of `AllInOneBlock`."""
    return 0.1 * F.softplus(raw, beta=0.5)


def scale_exp(raw: Tensor) -> Tensor:
    """The "EXP" of `AllInOneBlock`."""
    return torch.exp(raw)


def clamp_atan(raw: Tensor) -> Tensor:
    """The "ATAN" of FrEIA's coupling blocks."""
    return 0.636 * torch.atan(raw)


def clamp_sigmoid(raw: Tensor) -> Tensor:
    """The "SIGMOID" of FrEIA's coupling blocks."""
    return 2.0 * (torch.sigmoid(raw) - 0.5)


def identity(raw: Tensor) -> Tensor:
    """The clamp of `NICECouplingBlock`."""
    return raw


NAMED = (scale_sigmoid, scale_softplus, scale_exp, clamp_atan, clamp_sigmoid, identity)


def named(function: Callable) -> Callable:
    """Return the function of this file that computes what a lambda of FrEIA does; other functions as is."""
    if getattr(function, "__name__", None) != "<lambda>" or not function.__module__.startswith("FrEIA."):
        return function
    probe = torch.tensor([-1.7, 0.0, 0.9], dtype=torch.float64, device="cpu")
    values = function(probe)
    same = (known for known in NAMED if torch.allclose(known(probe), values, rtol=1e-12, atol=0))
    return next(same, function)
