"""Coupling layers: half of the channels pass unchanged and determine how the other half is transformed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usf_kernels.kernels.layout import empty_output
from usf_kernels.ops.checks import (
    check_clamp,
    check_features,
    check_float,
    check_int,
    check_shape,
    promoted_dtype,
)
from usf_kernels.ops.dispatch import define, implementation, kernel
from usf_kernels.ops.function import Function, additive_gradients
from usf_kernels.ops.step import fused_step


def additive_coupling(
    x: Tensor, shift: Tensor, *, split: int, inverse: bool = False, impl: str | None = None
) -> Tensor:
    """Additive coupling: `y = [x1, x2 + shift]`, or `[x1, x2 - shift]` for the inverse.

    The log-determinant is 0. NICE (Dinh et al., arXiv:1410.8516), section 3.2.

    Args:
        x: (B, C, *spatial), any number of spatial dimensions, any strides.
        shift: (B, C - split, *spatial), the conditioner's output for the passive half x1 = x[:, :split].
        split: number of passive channels, 0..C. The modules use C - C//2.
        inverse: undo instead of apply.
        impl: None picks by device; "reference" or "triton" force one.

    Returns:
        (B, C, *spatial) in the promoted dtype of x and shift.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
        RuntimeError: an `impl` that cannot run here.
    """
    check_features("x", x)
    split = check_int("split", split, 0, x.shape[1])
    batch, channels, *spatial = x.shape
    check_shape("shift", shift, (batch, channels - split, *spatial), "(B, C - split, *spatial)")
    return implementation("additive_coupling", impl, x, shift)(x, shift, split, bool(inverse))


def masked_additive_coupling(
    x: Tensor, shift: Tensor, mask: Tensor, *, inverse: bool = False, impl: str | None = None
) -> Tensor:
    """Additive coupling with a mask: `y = x + (1 - mask) * shift`, with minus for the inverse.

    `shift` must be a function of `mask * x` for the inverse to be one; the log-determinant is then 0.
    RealNVP (Dinh et al., arXiv:1605.08803), equation 9 without its scale.

    Args:
        x: (B, C, *spatial).
        shift: the same shape as x.
        mask: 1 (or True) where x passes, 0 where it is shifted; bool or floating, broadcastable to x, for
            example (1, C, 1, 1) for a channel mask or (H, W) for a checkerboard. Its values are not read
            for checking.
        inverse: undo instead of apply.
        impl: None picks by device; "reference" or "triton" force one.

    Returns:
        (B, C, *spatial) in the promoted dtype of x and shift.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
        RuntimeError: an `impl` that cannot run here.
    """
    check_features("x", x)
    check_shape("shift", shift, tuple(x.shape), "the shape of x")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        check_float("mask", mask)
    fits = mask.ndim <= x.ndim and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask: expected a shape that broadcasts to x's {tuple(x.shape)}, found {tuple(mask.shape)}"
        )
    return implementation("masked_additive_coupling", impl, x, shift, mask)(x, shift, mask, inverse)


def affine_coupling(
    x: Tensor,
    params: Tensor,
    *,
    split: int,
    clamp: float = 2.0,
    inverse: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Affine coupling in the convention of FrEIA's and anomalib's `AllInOneBlock`.

    With `a = 0.1 * params`, `s = clamp * tanh(a[:, :c])` and `t = a[:, c:]`, c = C - split:
    `y = [x1, x2 * exp(s) + t]`, or `[x1, (x2 - t) * exp(-s)]` for the inverse. RealNVP (Dinh et al.,
    arXiv:1605.08803), equations 4 and 5, with a soft clamp.

    Args:
        x: (B, C, *spatial).
        params: (B, 2 * (C - split), *spatial), the conditioner's output: raw scales, then raw shifts.
        split: number of passive channels, 0..C. The modules use C - C//2.
        clamp: bound on |s|, positive.
        inverse: undo instead of apply.
        impl: None picks by device; "reference" or "triton" force one.

    Returns:
        y: (B, C, *spatial) in the promoted dtype of x and params.
        log_det: (B,) log|det| of the direction computed, in nats, float32 (float64 for float64): the sum of
            s over all but the batch, or its negative for the inverse.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
        RuntimeError: an `impl` that cannot run here.
    """
    check_features("x", x)
    split, clamp = check_int("split", split, 0, x.shape[1]), check_clamp(clamp)
    batch, channels, *spatial = x.shape
    check_shape("params", params, (batch, 2 * (channels - split), *spatial), "(B, 2 * (C - split), *spatial)")
    return implementation("affine_coupling", impl, x, params)(x, params, split, clamp, bool(inverse))


# ------------------------------------------------------------------------------------------- as torch ops


def _additive_fake(x: Tensor, shift: Tensor, split: int, inverse: bool) -> Tensor:
    return empty_output(x, promoted_dtype(x, shift))


def _masked_fake(x: Tensor | None, shift: Tensor, mask: Tensor, inverse: bool) -> Tensor:
    return empty_output(shift if x is None else x, promoted_dtype(x, shift))


_additive_op = define(
    "additive_coupling(Tensor x, Tensor shift, SymInt split, bool inverse) -> Tensor",
    _additive_fake,
    "coupling.additive_coupling",
)
_masked_op = define(
    "masked_shift(Tensor? x, Tensor shift, Tensor mask, bool inverse) -> Tensor",
    _masked_fake,
    "masked.masked_shift",
)


class _Additive(Function):
    @staticmethod
    def forward(x: Tensor, shift: Tensor, split: int, inverse: bool) -> Tensor:
        return _additive_op(x, shift, split, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, shift, ctx.split, ctx.inverse = inputs
        ctx.dtypes = x.dtype, shift.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad_x, grad_shift = additive_gradients(grad, ctx.split, ctx.inverse)  # differentiable again
        return grad_x.to(ctx.dtypes[0]), grad_shift.to(ctx.dtypes[1]), None, None


class _Masked(Function):
    """`x + (1 - mask) * shift`. Without x, the second term alone: the gradient of shift has that form too."""

    @staticmethod
    def forward(x: Tensor | None, shift: Tensor, mask: Tensor, inverse: bool) -> Tensor:
        return _masked_op(x, shift, mask, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, shift, mask, ctx.inverse = inputs
        ctx.x_dtype, ctx.shift_dtype = None if x is None else x.dtype, shift.dtype
        ctx.save_for_backward(shift if ctx.needs_input_grad[2] else None, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        shift, mask = ctx.saved_tensors
        grad_x = None if ctx.x_dtype is None else grad.to(ctx.x_dtype)
        grad_mask = None
        if shift is not None:
            grad_mask = (grad if ctx.inverse else -grad) * shift
            grad_mask = grad_mask.sum_to_size(mask.shape).to(mask.dtype)
        return grad_x, _Masked.run(None, grad, mask, ctx.inverse).to(ctx.shift_dtype), grad_mask, None


kernel("additive_coupling")(_Additive.run)
kernel("masked_additive_coupling")(_Masked.run)


@kernel("affine_coupling")
def _affine(x: Tensor, params: Tensor, split: int, clamp: float, inverse: bool) -> tuple[Tensor, Tensor]:
    return fused_step(x, params, None, None, None, split, clamp, inverse)
