"""The triangles of LU maps: with their diagonals, and in products that leave out their zeros.

For gradients by hand and for what nobody sees: nothing is recorded but by `diagonal_of`, nothing is checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usf_kernels.ops.matrices import apply_matrix, matrix_gradient


def diagonal_of(signs: Tensor, log_diagonal: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """(C,) `signs * exp(log_diagonal)`, computed in `dtype` where that is given; differentiable."""
    if dtype is not None:
        signs, log_diagonal = signs.to(dtype), None if log_diagonal is None else log_diagonal.to(dtype)
    return signs if log_diagonal is None else signs * log_diagonal.exp()


def unit_lower(lower: Tensor) -> Tensor:
    """The strict lower triangle, with ones on the diagonal."""
    triangle = torch.tril(lower, -1)
    triangle.diagonal().fill_(1)
    return triangle


def upper_with(upper: Tensor, diagonal: Tensor) -> Tensor:
    """The strict upper triangle, with this diagonal."""
    triangle = torch.triu(upper, 1)
    triangle.diagonal().copy_(diagonal)
    return triangle


def times(matrix: Tensor, x: Tensor, *, triangle: int = 0) -> Tensor:
    """`matrix @ x`, of a lower (-1) or upper (1) triangular matrix, or any (0)."""
    return apply_matrix(matrix, x[None], None, triangle=triangle)[0]


def outer(a: Tensor, b: Tensor, *, triangle: int = 0) -> Tensor:
    """`a @ b^T`, of which a lower (-1) or upper (1) triangle is right, or all (0)."""
    return matrix_gradient(a[None], b[None], triangle=triangle)
