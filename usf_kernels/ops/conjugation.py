"""The two halves of a map and of its inverse that a conjugated block needs, from the map's triangles.

A coupling between A = L U and its inverse reads through the first rows Q of A and writes through the last
columns R of its inverse. In blocks (1 for the rows that condition, 2 for those that are shifted)

    Q = L11 [U11 U12],    R = [-U11^-1 U12 S; S],    S = U22^-1 L22^-1.

No block is larger than half of A, and L21 appears in neither. Q R = 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from usf_kernels.kernels.plain import full_precision
from usf_kernels.ops.dispatch import differentiates_again, gradients_through
from usf_kernels.ops.matrices import triangular_inverse
from usf_kernels.ops.native import is_grads_batched, is_observed
from usf_kernels.ops.triangles import diagonal_of, outer, strict_, times, unit_lower, upper_with


def conjugation(
    lower: Tensor, upper: Tensor, signs: Tensor, log_diagonal: Tensor | None, split: int
) -> tuple[Tensor, Tensor]:
    """Return the first `split` rows of L U and the last C - `split` columns of its inverse.

    They are computed in float64 and rounded once: the block's inverse is as inexact as Q R = 0 is, and every
    step of a reversible backward pass adds to that error.

    Args:
        lower, upper, signs, log_diagonal: as for `usf_kernels.ops.lu_map.lu_map`.
        split: 0 < split < C.

    Returns:
        (split, C) and (C, C - split).
    """
    run = _plain if is_observed() else _Halves.apply
    return run(lower, upper, signs, log_diagonal, split)


def _plain(
    lower: Tensor, upper: Tensor, signs: Tensor, log_diagonal: Tensor | None, split: int
) -> tuple[Tensor, Tensor]:
    dtype, wide = upper.dtype, torch.float32 if upper.device.type == "mps" else torch.float64
    lower, upper = lower.to(wide), upper.to(wide)
    diagonal = diagonal_of(signs, log_diagonal, wide)
    eye = torch.eye(len(upper), dtype=wide, device=upper.device)
    lower, upper = torch.tril(lower, -1) + eye, torch.triu(upper, 1) + torch.diag(diagonal)
    lower1, lower2 = lower[:split, :split], lower[split:, split:]
    upper1, upper2 = upper[:split, :split], upper[split:, split:]
    with full_precision(upper):
        rows = lower1 @ upper[:split]
        if torch.compiler.is_exporting():  # ONNX has no triangular solver
            corner = triangular_inverse(upper2) @ triangular_inverse(lower2)
            above = triangular_inverse(upper1) @ (upper[:split, split:] @ corner)
        else:
            corner = solve_triangular(lower2, eye[split:, split:], upper=False, unitriangular=True)
            corner = solve_triangular(upper2, corner, upper=True)
            above = solve_triangular(upper1, upper[:split, split:] @ corner, upper=True)
    return rows.to(dtype), torch.cat([-above, corner]).to(dtype)


class _Halves(torch.autograd.Function):
    """`_plain` in few passes over memory, with a gradient made of half-size products, where autograd would
    repeat every solve in float64. Solvers read one triangle only, so the other one is not cleared."""

    @staticmethod
    def forward(
        ctx: Any, lower: Tensor, upper: Tensor, signs: Tensor, log_diagonal: Tensor | None, split: int
    ) -> tuple[Tensor, Tensor]:
        dtype, wide = upper.dtype, torch.float32 if upper.device.type == "mps" else torch.float64
        first, second = slice(None, split), slice(split, None)
        diagonal = diagonal_of(signs, log_diagonal, wide)
        lower1, lower2, top, upper2 = (
            t.to(wide, copy=True)
            for t in (lower[first, first], lower[second, second], upper[first], upper[second, second])
        )
        top.triu_(1).diagonal().copy_(diagonal[first])
        upper2.diagonal().copy_(diagonal[second])
        columns = upper.new_empty(len(upper), len(upper2))
        with full_precision(upper):
            rows = torch.addmm(top, lower1.tril_(-1), top)
            eye = torch.eye(len(upper2), dtype=wide, device=upper.device)
            corner = solve_triangular(lower2, eye, upper=False, unitriangular=True)
            corner = solve_triangular(upper2, corner, upper=True)
            above = solve_triangular(top[:, first], torch.mm(top[:, second], corner).neg_(), upper=True)
        columns[first], columns[second] = above, corner
        ctx.split = split
        ctx.save_for_backward(lower, upper, signs, log_diagonal, columns)
        return rows.to(dtype), columns

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple:
        lower, upper, signs, log_diagonal, columns = ctx.saved_tensors
        if differentiates_again() or is_grads_batched(grad_rows, grad_columns):
            given = lower, upper, signs, log_diagonal
            found = gradients_through(partial(_plain, split=ctx.split), given, (grad_rows, grad_columns))
            return *found[:2], None, found[3], None
        first, second = slice(None, ctx.split), slice(ctx.split, None)
        diagonal = diagonal_of(signs, log_diagonal, upper.dtype)
        top = upper_with(upper[first], diagonal[first])
        upper2 = upper_with(upper[second, second], diagonal[second])
        lower1, lower2 = (unit_lower(lower[half, half]) for half in (first, second))
        corner = columns[second]  # S; above it -U11^-1 U12 S
        grad_lower, grad_upper = torch.zeros_like(lower), torch.zeros_like(upper)
        with full_precision(upper):
            grad_product = solve_triangular(top[:, first].mT, grad_columns[first], upper=False).neg_()
            grad_corner = times(top[:, second].mT, grad_product).add_(grad_columns[second])
            inverted = times(corner.mT, outer(grad_corner, corner)).neg_()  # gradient of L22 U22
            grad_upper[first] = times(lower1.mT, grad_rows, triangle=1).add_(outer(grad_product, columns))
            grad_upper[second, second] = times(lower2.mT, inverted, triangle=1)
            grad_lower[first, first] = outer(grad_rows, top, triangle=-1)
            grad_lower[second, second] = outer(inverted, upper2, triangle=-1)
        grad_log_diagonal = None if log_diagonal is None else grad_upper.diagonal() * diagonal
        strict_(grad_lower, upper=False)
        strict_(grad_upper, upper=True)
        return grad_lower, grad_upper, None, grad_log_diagonal, None
