"""Where autograd functions come from."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def additive_gradients(grad: Tensor, split: int, inverse: bool) -> tuple[Tensor, Tensor]:
    """Those of x and of the shift from that of an additive coupling's output: it as it is, and a slice of it.

    Nothing is written, unless a sign asks for it, or autograd could keep both as the gradients of leaves: in
    one memory, into which it adds later ones. It keeps what is dense.
    """
    grad_shift = grad[:, split:]
    if inverse:
        return grad, -grad_shift
    return grad, grad_shift.clone() if split == 0 or len(grad) == 1 else grad_shift


class Function(torch.autograd.Function):
    """`torch.autograd.Function` for those that have a `setup_context`.

    PyTorch inspects the signature of their `forward` and binds the arguments to it at every call, which takes
    longer than a kernel on a small map: here it finds the one ready, and nothing left to do for the other.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.forward.__signature__ = _Signature(inspect.signature(cls.forward).parameters.values())


class _Signature(inspect.Signature):
    """For calls that give every argument by its place, as all do here."""

    __slots__ = ()

    def bind(self, *arguments: Any, **named: Any) -> Any:
        if named or len(arguments) != len(self.parameters):
            return super().bind(*arguments, **named)
        return _Bound(arguments)


class _Bound:
    """The part of `inspect.BoundArguments` that PyTorch reads."""

    __slots__ = ("args", "kwargs")

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.args, self.kwargs = arguments, {}

    def apply_defaults(self) -> None:
        """There are none to apply."""
