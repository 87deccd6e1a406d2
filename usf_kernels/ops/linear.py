"""Matrices applied to the channels of features: the products of which other operations consist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usf_kernels.kernels.layout import empty_output
from usf_kernels.ops import eager
from usf_kernels.ops.checks import check_features, check_float, check_shape, promoted_dtype
from usf_kernels.ops.dispatch import define, implementation, kernel
from usf_kernels.ops.function import Function


def linear_squared_norm(
    x: Tensor, matrix: Tensor, bias: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """`||matrix @ x + bias||^2` at every position: the score of a flow whose last map is linear.

    The kernel never writes the latents. This is U-Flow's statistic (arXiv:2211.12353), and that of the
    likelihood under a white normal distribution.

    Args:
        x: (B, C, *spatial), any strides.
        matrix: (N, C); N may differ from C.
        bias: (N,), or None.
        impl: None picks by device; "reference" or "triton" force one.

    Returns:
        (B, *spatial), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: an `impl` that cannot run here.
    """
    check_features("x", x)
    check_float("matrix", matrix)
    if matrix.ndim != 2 or matrix.shape[1] != x.shape[1]:
        raise ValueError(f"matrix: expected shape (N, C) = (N, {x.shape[1]}), found {tuple(matrix.shape)}")
    if bias is not None:
        check_shape("bias", bias, (matrix.shape[0],), "(N,)")
    return implementation("linear_squared_norm", impl, x, matrix, bias)(x, matrix, bias)


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`matrix @ x + bias` at every position of x (B, C, *spatial), in the promoted dtype of x and matrix.

    Autocast does not reduce the precision. Arguments are not checked: modules call this.
    """
    if eager.by_hand(x, matrix, bias):
        return eager.product(matrix, x, bias)
    return implementation("linear", None, x, matrix, bias)(x, matrix, bias)


# ------------------------------------------------------------------------------------- as torch ops, Triton


def _linear_fake(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return empty_output(x, promoted_dtype(x, matrix), matrix.shape[0])


def _outer_fake(a: Tensor, x: Tensor) -> Tensor:
    return a.new_empty((a.shape[1], x.shape[1]), dtype=torch.float32)


def _squared_norm_fake(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:]), dtype=torch.float32)


linear_op = define(
    "linear(Tensor x, Tensor matrix, Tensor? bias) -> Tensor", _linear_fake, "products.matrix_product"
)
_outer_op = define("outer(Tensor a, Tensor x) -> Tensor", _outer_fake, "outer.outer")
_squared_norm_op = define(
    "linear_squared_norm(Tensor x, Tensor matrix, Tensor? bias) -> Tensor",
    _squared_norm_fake,
    "linear_norm.linear_squared_norm",
)


def position_sum(x: Tensor) -> Tensor:
    """Sum over the batch and all positions, (C,) in float32."""
    return x.sum(dim=(0, *range(2, x.ndim)), dtype=torch.float32)


def _linear_gradients(
    needed: tuple[bool, ...], x: Tensor, matrix: Tensor, bias_dtype: torch.dtype | None, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, matrix and bias, given that of `matrix @ x + bias`."""
    return (
        Linear.run(grad, matrix.mT, None).to(x.dtype) if needed[0] else None,
        Outer.run(grad, x).to(matrix.dtype) if needed[1] else None,
        position_sum(grad).to(bias_dtype) if needed[2] else None,
    )


class Linear(Function):
    """`matrix @ x + bias` at every position, (B, N, *spatial) in the promoted dtype of x and matrix.

    Together with `Outer` it is closed under differentiation: gradients of each are made of the two.
    """

    @staticmethod
    def forward(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        return linear_op(x, matrix, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, matrix, bias = inputs
        ctx.save_for_backward(x, matrix)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _linear_gradients(ctx.needs_input_grad, *ctx.saved_tensors, ctx.bias_dtype, grad)


kernel("linear")(Linear.run)


class Outer(Function):
    """Sum over the batch and all positions of `a x^T`, (M, N) in float32."""

    @staticmethod
    def forward(a: Tensor, x: Tensor) -> Tensor:
        return _outer_op(a, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, x = ctx.saved_tensors
        return (
            Linear.apply(x, grad, None).to(a.dtype) if ctx.needs_input_grad[0] else None,
            Linear.apply(a, grad.mT, None).to(x.dtype) if ctx.needs_input_grad[1] else None,
        )


class _LinearSquaredNorm(Function):
    @staticmethod
    def forward(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        return _squared_norm_op(x, matrix, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, matrix, bias = ctx.saved_tensors
        z = Linear.apply(x, matrix, bias)  # recomputed: the forward pass has not written it
        grad = (2 * grad.unsqueeze(1) * z).to(z.dtype)
        return _linear_gradients(ctx.needs_input_grad, x, matrix, None if bias is None else bias.dtype, grad)


kernel("linear_squared_norm")(_LinearSquaredNorm.run)
