"""An LU-parameterised map as one operation on its parameters: its matrix, bias and log-determinant or, for
few positions, its factors applied one after the other.

Written out, it takes a dozen operations on small tensors and matrices, each with a node in autograd's graph.
On a GPU, and for small maps, these take longer than applying the matrix. Here they are one node with a
hand-written gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usf_kernels.kernels.plain import full_precision
from usf_kernels.ops import native_lu_map
from usf_kernels.ops.dispatch import define, differentiates_again, gradients_through, runs_triton
from usf_kernels.ops.eager import by_hand, channel_sums, per_channel
from usf_kernels.ops.lu_conv import LUMatrix
from usf_kernels.ops.matrices import apply_matrix, lu_matrix, matrix_gradient
from usf_kernels.ops.native import accepts, is_grads_batched, is_observed
from usf_kernels.ops.native_lu_map import LUParameters
from usf_kernels.ops.triangles import (
    apply_factor,
    diagonal_of,
    outer,
    strict_,
    times,
    unit_lower,
    upper_with,
)


def lu_map(
    lower: Tensor,
    upper: Tensor,
    signs: Tensor,
    log_diagonal: Tensor | None,
    bias: Tensor | None,
    log_scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`y = L U (exp(log_scale) x + offset) + bias` as `matrix @ x + bias`: an ActNorm, then an LU map.

    Args:
        lower, upper: (C, C); only the strict triangles are read. L has ones on its diagonal, U has `signs *
            exp(log_diagonal)`.
        signs, log_diagonal: (C,); None for the second means zeros.
        bias, log_scale, offset: (C,) each, or None; log_scale and offset are both None or neither is.

    All arguments share one dtype, float32 or float64.

    Returns:
        matrix (C, C); bias (C,), or None if nothing is added; log-determinant per position, 0-d.
    """
    run = _plain if is_observed() else _Map.apply
    if log_scale is None:
        matrix, _, log_det = run(lower, upper, signs, log_diagonal, None, None, None)
        return matrix, bias, log_det
    return run(lower, upper, signs, log_diagonal, bias, log_scale, offset)


def _plain(*given: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    lower, upper, signs, log_diagonal, bias, log_scale, offset = given
    diagonal = diagonal_of(signs, log_diagonal)
    log_det = signs.new_zeros(()) if log_diagonal is None else log_diagonal.sum()
    with full_precision(upper):
        matrix = _product(lower, torch.triu(upper, 1) + torch.diag(diagonal))
        if log_scale is None:
            return matrix, None, log_det
        moved = torch.mv(matrix, offset)
    bias = moved if bias is None else bias + moved
    return matrix * log_scale.exp(), bias, log_det + log_scale.sum()


def _product(lower: Tensor, upper: Tensor) -> Tensor:
    """Return L U, given an upper triangular `upper`."""
    if runs_triton("lu_conv1x1", lower, upper):  # full precision whatever the setting for TF32
        return LUMatrix.apply(lower, upper, False, lower.dtype)
    return lu_matrix(lower, upper)


# ------------------------------------------------------------------------------------------- as torch ops


def _fake(lower: Tensor, upper: Tensor, signs: Tensor, log_diagonal: Tensor | None, bias: Tensor | None,
          log_scale: Tensor | None, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shift = lower.new_empty(0 if log_scale is None else len(lower))
    return lower.new_empty(lower.shape), shift, lower.new_empty(())


def _gradients_fake(lower: Tensor, upper: Tensor, signs: Tensor, *others: Tensor | None) -> tuple:
    found = lower, upper, *others[:3]
    return tuple(lower.new_empty(0 if v is None else v.shape) for v in found)


_PARAMETERS = "Tensor lower, Tensor upper, Tensor signs, Tensor? log_diagonal"
_map_op = define(
    f"lu_map({_PARAMETERS}, Tensor? bias, Tensor? log_scale, Tensor? offset) -> (Tensor, Tensor, Tensor)",
    _fake,
    "lu_map.lu_map",
)
_gradients_op = define(
    f"lu_map_gradients({_PARAMETERS}, Tensor? log_scale, Tensor? offset, Tensor matrix, Tensor grad, "
    "Tensor? grad_shift, Tensor grad_log_det) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradients_fake,
    "lu_map.lu_map_gradients",
)


def _launch(given: LUParameters) -> tuple[Tensor, Tensor | None, Tensor]:
    matrix, shift, log_det = _map_op(*given)
    return matrix, None if given.log_scale is None else shift, log_det


def _launch_gradients(given: LUParameters, *of_results: Tensor | None) -> tuple[Tensor | None, ...]:
    act_norm = given.log_scale, given.offset
    found = _gradients_op(*given[:4], *act_norm, *of_results)
    optional = given.log_diagonal, *act_norm
    return *found[:2], *(None if v is None else f for v, f in zip(optional, found[2:], strict=True))


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        given = LUParameters(*parameters)
        lower, upper, signs, log_diagonal, bias, log_scale, offset = given
        ctx.native, ctx.gradients = native_lu_map.accepts(given), None
        if runs_triton("lu_conv1x1", *given):
            run, ctx.gradients = _launch, _launch_gradients
        elif ctx.native:
            run, ctx.gradients = native_lu_map.lu_map, native_lu_map.gradients
        if ctx.gradients is not None:
            found = run(given)
            ctx.save_for_backward(*given, found[0])
            return found
        diagonal, scale = diagonal_of(signs, log_diagonal), None
        log_det = signs.new_zeros(()) if log_diagonal is None else log_diagonal.sum()
        upper = upper_with(upper, diagonal)
        with full_precision(upper):
            matrix = times(unit_lower(lower), upper, triangle=-1)
            if log_scale is not None:
                bias = torch.mv(matrix, offset) if bias is None else torch.addmv(bias, matrix, offset)
                scale, log_det = log_scale.exp(), log_det + log_scale.sum()
                matrix *= scale
        ctx.save_for_backward(*given, matrix, upper, diagonal, scale)
        return matrix, bias, log_det

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_bias: Tensor | None, grad_log_det: Tensor) -> tuple:
        saved = ctx.saved_tensors  # read once: a checkpoint recomputes them at every access
        given, (matrix, *kept) = LUParameters(*saved[:7]), saved[7:]
        grads = grad, grad_bias, grad_log_det
        if differentiates_again() or is_grads_batched(*grads) or (ctx.native and not accepts(*grads)):
            found = gradients_through(_plain, given, grads)
            return *found[:2], None, *found[3:]
        grad_given_bias = None if given.bias is None else grad_bias
        if ctx.gradients is not None:
            grad_lower, grad_upper, grad_log_diagonal, *grad_exit = ctx.gradients(given, matrix, *grads)
            return grad_lower, grad_upper, None, grad_log_diagonal, grad_given_bias, *grad_exit
        upper, diagonal, scale = kept
        with full_precision(grad):
            grad_product, grad_log_scale, grad_offset = grad, None, None
            if scale is not None:
                grad_product = torch.addr(grad * scale, grad_bias, given.offset)
                grad_log_scale = (grad * matrix).sum(0) + grad_log_det
                grad_offset = torch.mv(matrix.mT, grad_bias).div_(scale)
            grad_lower = outer(grad_product, upper, triangle=-1)
            grad_upper = times(unit_lower(given.lower).mT, grad_product, triangle=1)
        grad_log_diagonal = None
        if given.log_diagonal is not None:
            grad_log_diagonal = grad_upper.diagonal() * diagonal + grad_log_det
        strict_(grad_lower, upper=False)
        strict_(grad_upper, upper=True)
        return grad_lower, grad_upper, None, grad_log_diagonal, grad_given_bias, grad_log_scale, grad_offset


def apply_factors(x: Tensor, *given: Tensor | None) -> Tensor:
    """Apply the map of `lu_map(*given)` to x (B, C, *spatial) without forming its matrix: U, then L. Call it
    where `factors_pay` and `eager.by_hand` are true."""
    return _Factors.apply(x, *given)


def _factors_plain(x: Tensor, *given: Tensor | None) -> Tensor:
    matrix, bias, _ = _plain(*given)
    return apply_matrix(matrix, x, LUParameters(*given).bias if bias is None else bias)


class _Factors(torch.autograd.Function):
    """Applies the ActNorm to x rather than to the factors, because x has fewer elements."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Tensor | None) -> Tensor:
        lower, upper, signs, log_diagonal, bias, log_scale, offset = given
        diagonal, scale, v = diagonal_of(signs, log_diagonal), None, x
        if log_scale is not None:
            scale = per_channel(log_scale.exp(), x)
            v = torch.addcmul(per_channel(offset, x), x, scale)
        with full_precision(x):
            w = apply_factor(upper, diagonal, v, upper=True)
            y = apply_factor(lower, None, w, bias, upper=False).detach()
        ctx.save_for_backward(*given, x, v, w, diagonal, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *parameters, x, v, w, diagonal, scale = ctx.saved_tensors
        given = LUParameters(*parameters)
        if differentiates_again() or not by_hand(grad):
            grad_x, *found = gradients_through(_factors_plain, (x, *given), (grad,))
            return grad_x, *found[:2], None, *found[3:]
        grad_log_diagonal = grad_log_scale = grad_offset = None
        with full_precision(grad):
            grad_w = apply_factor(given.lower, None, grad, upper=False, transposed=True)
            grad_v = apply_factor(given.upper, diagonal, grad_w, upper=True, transposed=True)
            grad_lower = matrix_gradient(grad, w, triangle=-1)
            grad_upper = matrix_gradient(grad_w, v, triangle=1)
        if given.log_diagonal is not None:
            grad_log_diagonal = grad_upper.diagonal() * diagonal
        strict_(grad_lower, upper=False)
        strict_(grad_upper, upper=True)
        if scale is not None:
            grad_offset = channel_sums(grad_v)
            grad_v *= scale
            grad_log_scale = channel_sums(grad_v * x)
        grad_bias = None if given.bias is None else channel_sums(grad)
        return grad_v, grad_lower, grad_upper, None, grad_log_diagonal, grad_bias, grad_log_scale, grad_offset
