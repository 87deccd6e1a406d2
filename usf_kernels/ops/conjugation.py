"""The two halves of a map and of its inverse that a conjugated block needs, from the map's triangles.

A coupling between A = L U and its inverse reads the first rows Q of A, and writes by the last columns R of
its inverse. In blocks (1 for the rows that condition, 2 for those that are shifted)

    Q = L11 [U11 U12],    R = [-U11^-1 U12 S; S],    S = U22^-1 L22^-1,

of which no block is larger than half of A; L21 is in neither. Q R = 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from usf_kernels.ops.dispatch import differentiates_again, gradients_through
from usf_kernels.ops.matrices import full_precision, triangular_inverse
from usf_kernels.ops.native import somebody_looks


def conjugation(
    lower: Tensor, upper: Tensor, signs: Tensor, log_diagonal: Tensor | None, split: int
) -> tuple[Tensor, Tensor]:
    """The first `split` rows of L U and the other columns of its inverse.

    Found in float64 and rounded once: how far they are from Q R = 0 is how far the block's inverse is from
    undoing it, and every step of a reversible backward pass adds to that.

    Args:
        lower, upper, signs, log_diagonal: as for `usf_kernels.ops.lu_map.lu_map`.
        split: 0 < split < C.

    Returns:
        (split, C) and (C, C - split).
    """
    run = _Halves.apply if torch.is_grad_enabled() and not somebody_looks() else _plain
    return run(lower, upper, signs, log_diagonal, split)


def _plain(
    lower: Tensor, upper: Tensor, signs: Tensor, log_diagonal: Tensor | None, split: int
) -> tuple[Tensor, Tensor]:
    dtype, wide = upper.dtype, torch.float32 if upper.device.type == "mps" else torch.float64
    lower, upper, signs = lower.to(wide), upper.to(wide), signs.to(wide)
    diagonal = signs if log_diagonal is None else signs * log_diagonal.to(wide).exp()
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
    """The gradient by hand: products of half the size, where autograd would repeat every solve in float64."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        rows, columns = _plain(*given)
        ctx.split = given[-1]
        ctx.save_for_backward(*given[:-1], columns)
        return rows, columns

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor, of_columns: Tensor) -> tuple:
        lower, upper, signs, log_diagonal, columns = ctx.saved_tensors
        if differentiates_again():
            given = lower, upper, signs, log_diagonal
            found = gradients_through(partial(_plain, split=ctx.split), given, (of_rows, of_columns))
            return *found[:2], None, found[3], None
        first, second = slice(None, ctx.split), slice(ctx.split, None)
        diagonal = signs if log_diagonal is None else signs * log_diagonal.exp()
        lower, upper = torch.tril(lower, -1), torch.triu(upper, 1)
        lower.diagonal().fill_(1)
        upper.diagonal().copy_(diagonal)
        above, corner = columns[first], columns[second]  # -U11^-1 U12 S, and S
        with full_precision(upper):
            of_product = -solve_triangular(upper[first, first].mT, of_columns[first], upper=False)
            of_corner = torch.addmm(of_columns[second], upper[first, second].mT, of_product)
            inverted = torch.mm(torch.mm(corner.mT, of_corner), corner.mT).neg_()  # of L22 U22
            of_upper, of_lower = torch.zeros_like(upper), torch.zeros_like(lower)
            torch.mm(lower[first, first].mT, of_rows, out=of_upper[first])
            of_upper[first, first].addmm_(of_product, above.mT)
            of_upper[first, second].addmm_(of_product, corner.mT)
            of_upper[second, second] = torch.mm(lower[second, second].mT, inverted)
            of_lower[first, first] = torch.mm(of_rows, upper[first].mT)
            of_lower[second, second] = torch.mm(inverted, upper[second, second].mT)
        of_log_diagonal = None if log_diagonal is None else of_upper.diagonal() * diagonal
        return of_lower.tril_(-1), of_upper.triu_(1), None, of_log_diagonal, None
