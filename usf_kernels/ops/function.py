"""Where autograd functions come from."""

from __future__ import annotations

import inspect
from typing import Any

import torch


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
