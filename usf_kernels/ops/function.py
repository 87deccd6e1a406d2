"""Where autograd functions come from."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class Function(torch.autograd.Function):
    """`torch.autograd.Function` for those that have a `setup_context`.

    PyTorch inspects the signature of their `forward` at every call, which takes as long as a kernel on a
    small map: here it finds it ready.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.forward.__signature__ = inspect.signature(cls.forward)
