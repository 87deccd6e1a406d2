"""`autograd.Function` with a faster call, and the gradients of additive couplings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def additive_gradients(grad: Tensor, split: int, inverse: bool) -> tuple[Tensor, Tensor]:
    """Gradients of an additive coupling's x and shift, given its output's gradient.

    They are views of `grad` where possible. The shift's is copied where the slice is dense: autograd could
    keep both as gradients of leaves, and accumulate into the memory that they share.
    """
    # Not `grad[:, split:]`: with a split of 0 that is an alias, which has no rule for batched gradients.
    grad_shift = grad.narrow(1, split, grad.shape[1] - split)
    if inverse:
        return grad, -grad_shift
    return grad, grad_shift.clone() if split == 0 or len(grad) == 1 else grad_shift


class Function(torch.autograd.Function):
    """`torch.autograd.Function` with a cheaper `apply`, for subclasses with a `setup_context` and positional
    arguments only.

    PyTorch inspects the signature of such a `forward` and binds the arguments to it at every call, which
    takes longer than a kernel on a small map. Where no compiler or transform would see the call, `apply` uses
    the same functions in the older form, in which `forward` takes the context. Forward-mode AD
    differentiates the operations of `forward`.
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
        """Call `apply` where gradients are recorded, else `forward` alone. So under `torch.jit.trace`, too,
        which traces again without gradients and compares the two graphs."""
        recorded = torch.is_grad_enabled() and not torch.jit.is_tracing()
        return (cls.apply if recorded else cls.forward)(*arguments)

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """Run `forward` and add a node to autograd's graph."""
        if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
            return cls.forward(*arguments)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return cls._plain.apply(*arguments)
