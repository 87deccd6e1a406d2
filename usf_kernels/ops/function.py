"""Where autograd functions come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


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
    """`torch.autograd.Function` for those that have a `setup_context`, and are given all arguments by place.

    PyTorch inspects the signature of such a `forward` and binds the arguments to it at every call, which
    takes longer than a kernel on a small map. Where no compiler or transform would see the call, it is made
    of the same functions in the older form, with one `forward` that has a context. Forward-mode AD goes
    through the operations of `forward`.
    """

    generate_vmap_rule = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = cls.forward(*arguments)
            cls.setup_context(ctx, arguments, output)
            return output

        both = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls._plain = type(cls.__name__, (torch.autograd.Function,), both)

    @classmethod
    def run(cls, *arguments: Any) -> Any:
        """The results: `apply` where gradients are recorded, `forward` alone where they are not."""
        return (cls.apply if torch.is_grad_enabled() else cls.forward)(*arguments)

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """The results, with a node in autograd's graph."""
        if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
            return cls.forward(*arguments)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return cls._plain.apply(*arguments)
