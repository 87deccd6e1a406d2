"""Invertible 1x1 convolution, parameterised by its LU factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usf_kernels.kernels.plain import full_precision
from usf_kernels.ops import reference
from usf_kernels.ops.checks import check_features, check_float, check_int, check_shape, promoted_dtype
from usf_kernels.ops.dispatch import define, implementation, kernel
from usf_kernels.ops.function import Function
from usf_kernels.ops.linear import Linear


def lu_conv1x1(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    bias: Tensor | None = None,
    *,
    inverse: bool = False,
    impl: str | None = None,
) -> Tensor:
    """`y = L U x + bias` at every position, or `U^-1 L^-1 (x - bias)` for the inverse.

    Glow (Kingma and Dhariwal, arXiv:1807.03039), equation 10 without its permutation. The matrices keep
    full precision under autocast: rounding them would cost the inverse its exactness.

    Args:
        x: (B, C, *spatial), any strides; the memory format is kept.
        lower: (C, C). Only the strict lower triangle is read; L has ones on its diagonal.
        upper: (C, C). Only the upper triangle is read, with the diagonal, which must have no zero.
        bias: (C,), or None.
        inverse: undo instead of apply.
        impl: None picks by device; "reference" or "triton" force one.

    Returns:
        (B, C, *spatial) in the promoted dtype of all arguments. It is computed in float32 at least, except
        that the Triton kernel multiplies in half precision, with float32 sums, if all arguments share such a
        dtype. The log-determinant is `lu_log_det(upper, positions)`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: an `impl` that cannot run here.
    """
    check_features("x", x)
    channels = x.shape[1]
    check_shape("lower", lower, (channels, channels), "(C, C)")
    check_shape("upper", upper, (channels, channels), "(C, C)")
    if bias is not None:
        check_shape("bias", bias, (channels,), "(C,)")
    return implementation("lu_conv1x1", impl, x, lower, upper, bias)(x, lower, upper, bias, inverse)


def lu_log_det(upper: Tensor, positions: int) -> Tensor:
    """log|det| of the map of `lu_conv1x1` on one image: `positions * sum_i log|u_ii|`.

    Glow (arXiv:1807.03039), equation 11. It depends on no data, so it is one number for a whole batch.

    Args:
        upper: (C, C). Only the diagonal is read.
        positions: number of positions P = H * W of the input; 1 for vectors.

    Returns:
        0-d tensor in nats, float32 (float64 for float64). -inf where the diagonal has a zero.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
    """
    check_float("upper", upper)
    if upper.ndim != 2 or upper.shape[0] != upper.shape[1]:
        raise ValueError(f"upper: expected shape (C, C), found {tuple(upper.shape)}")
    check_int("positions", positions, 0)
    return reference.lu_log_det(upper, positions)


# ------------------------------------------------------------------------------------- as torch ops, Triton


def _matrix_fake(lower: Tensor, upper: Tensor, inverse: bool, dtype: torch.dtype) -> Tensor:
    return lower.new_empty(lower.shape, dtype=dtype)


matrix_op = define(
    "lu_matrix(Tensor lower, Tensor upper, bool inverse, ScalarType dtype) -> Tensor",
    _matrix_fake,
    "lu_conv.lu_matrix",
)


class LUMatrix(Function):
    """`L U`, or `U^-1 L^-1`, (C, C), computed in float32."""

    @staticmethod
    def forward(lower: Tensor, upper: Tensor, inverse: bool, dtype: torch.dtype) -> Tensor:
        return matrix_op(lower, upper, inverse, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.inverse, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        lower, upper = ctx.saved_tensors
        with full_precision(grad):
            grad = grad.float()
            if ctx.inverse:  # d(A^-1) = -A^-1 dA A^-1
                transposed = LUMatrix.apply(lower, upper, True, torch.float32).mT
                grad = -(transposed @ grad @ transposed)
            strict, upper_triangle = torch.tril(lower.float(), -1), torch.triu(upper.float())
            grad_lower = torch.tril(grad @ upper_triangle.mT, -1)
            grad_upper = torch.triu(torch.addmm(grad, strict.mT, grad))
        return grad_lower.to(lower.dtype), grad_upper.to(upper.dtype), None, None


@kernel("lu_conv1x1")
def _lu_conv1x1(x: Tensor, lower: Tensor, upper: Tensor, bias: Tensor | None, inverse: bool) -> Tensor:
    dtype = promoted_dtype(x, lower, upper, bias)
    matrix = LUMatrix.run(lower, upper, inverse, dtype)
    if inverse and bias is not None:
        # Not a matrix product: autocast would round the one in its gradient, whatever context this runs in.
        bias = -(matrix.float() * bias.float()).sum(1)
    return Linear.run(x, matrix, bias)
