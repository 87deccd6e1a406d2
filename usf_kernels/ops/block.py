"""Conjugated blocks whose conditioner sees one position at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usf_kernels.kernels.layout import empty_output
from usf_kernels.ops.checks import check_choice, check_features, check_float, check_shape, promoted_dtype
from usf_kernels.ops.dispatch import define, implementation, kernel
from usf_kernels.ops.function import Function
from usf_kernels.ops.linear import Linear, Outer, position_sum

ACTIVATIONS = ("relu", "none")


def residual_mlp(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    last: Tensor,
    last_bias: Tensor | None,
    *,
    bias_map: Tensor | None = None,
    activation: str = "relu",
    inverse: bool = False,
    impl: str | None = None,
) -> Tensor:
    """`y = x + last @ act(first @ x + first_bias + bias_map) + last_bias` at every position, or x minus that.

    A block `A^-1 . C . A` of a uniformly scaling flow (arXiv:2510.09452), C an additive coupling
    with two layers of 1x1 convolutions and A linear, is of this form: the rows of A that feed the conditioner
    fold into `first`, the columns of A^-1 that it moves into `last`. Then `first @ last = 0` and, with no
    `last_bias` in directions that `first` sees (`first @ last_bias = 0`), `inverse=True` undoes the block.

    Args:
        x: (B, C, *spatial), any strides; the memory format is kept.
        first: (N, C), weight of the layer with N hidden units.
        first_bias: (N,), or None.
        last: (C, N), weight of the output layer.
        last_bias: (C,), or None.
        bias_map: (B, N, *spatial) or (1, N, *spatial), or None: what a condition, such as CFlow's encoding of
            positions, adds to the hidden units; the same for every image if the first size is 1.
        activation: "relu" or "none".
        inverse: subtract the residual instead of adding it.
        impl: None picks by device; "reference" or "triton" force one.

    Returns:
        (B, C, *spatial) in the promoted dtype of all arguments. Factors of products are in that dtype too,
        sums in float32 at least. Autocast changes nothing.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
        RuntimeError: an `impl` that cannot run here.
    """
    check_features("x", x)
    check_float("first", first)
    if first.ndim != 2 or first.shape[1] != x.shape[1]:
        raise ValueError(f"first: expected shape (N, C) = (N, {x.shape[1]}), found {tuple(first.shape)}")
    hidden, channels = first.shape
    check_shape("last", last, (channels, hidden), "(C, N)")
    if first_bias is not None:
        check_shape("first_bias", first_bias, (hidden,), "(N,)")
    if last_bias is not None:
        check_shape("last_bias", last_bias, (channels,), "(C,)")
    if bias_map is not None:
        check_float("bias_map", bias_map)
        batch = bias_map.shape[0] if bias_map.ndim and bias_map.shape[0] == 1 else x.shape[0]
        check_shape("bias_map", bias_map, (batch, hidden, *x.shape[2:]), "(B or 1, N, *spatial)")
    check_choice("activation", activation, ACTIVATIONS)
    arguments = (x, first, first_bias, last, last_bias, bias_map)
    return implementation("residual_mlp", impl, *arguments)(*arguments, activation, inverse)


# ------------------------------------------------------------------------------------- as torch ops, Triton


def _residual_mlp_fake(x: Tensor, first: Tensor, *rest: Any) -> Tensor:
    return empty_output(x, promoted_dtype(x, first))


_residual_mlp_op = define(
    "residual_mlp(Tensor x, Tensor first, Tensor? first_bias, Tensor last, Tensor? last_bias, "
    "Tensor? bias_map, str activation, bool inverse) -> Tensor",
    _residual_mlp_fake,
    "block.residual_mlp",
)


class _ResidualMLP(Function):
    """Saves its inputs only; the backward pass computes the hidden units again."""

    @staticmethod
    def forward(x: Tensor, first: Tensor, first_bias: Tensor | None, last: Tensor, last_bias: Tensor | None,
                bias_map: Tensor | None, activation: str, inverse: bool) -> Tensor:  # fmt: skip
        # Arguments are named one by one: Dynamo counts them to tell whether a context is among them.
        return _residual_mlp_op(x, first, first_bias, last, last_bias, bias_map, activation, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.activation, ctx.inverse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, first, first_bias, last, last_bias, bias_map = ctx.saved_tensors
        hidden = Linear.apply(x, first, first_bias)
        if bias_map is not None:
            hidden = hidden + bias_map.to(hidden.dtype)
        grad_out = -grad if ctx.inverse else grad
        grad_hidden = Linear.apply(grad_out, last.mT, None)
        if ctx.activation == "relu":
            grad_hidden = grad_hidden * (hidden > 0)
            hidden = torch.relu(hidden)
        grad_map = None
        if bias_map is not None:
            grad_map = grad_hidden.sum_to_size(bias_map.shape).to(bias_map.dtype)
        return (
            (grad + Linear.apply(grad_hidden, first.mT, None)).to(x.dtype),
            Outer.apply(grad_hidden, x).to(first.dtype),
            None if first_bias is None else position_sum(grad_hidden).to(first_bias.dtype),
            Outer.apply(grad_out, hidden).to(last.dtype),
            None if last_bias is None else position_sum(grad_out).to(last_bias.dtype),
            grad_map,
            None,
            None,
        )


@kernel("residual_mlp")
def _residual_mlp(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    last: Tensor,
    last_bias: Tensor | None,
    bias_map: Tensor | None,
    activation: str,
    inverse: bool,
) -> Tensor:
    dtype = promoted_dtype(x, first, first_bias, last, last_bias, bias_map)
    return _ResidualMLP.run(
        x, first.to(dtype), first_bias, last.to(dtype), last_bias, bias_map, activation, inverse
    )
