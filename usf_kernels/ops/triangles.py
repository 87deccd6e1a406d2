"""The triangles of LU maps: with their diagonals, and in products that leave out their zeros.

These are helpers for hand-written gradients: autograd records only `diagonal_of`, and nothing is checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usf_kernels import _core
from usf_kernels.ops import native, products
from usf_kernels.ops.matrices import apply_matrix, matrix_gradient


def diagonal_of(signs: Tensor, log_diagonal: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """`signs * exp(log_diagonal)`, (C,), computed in `dtype` if that is given; differentiable."""
    if dtype is not None:
        signs, log_diagonal = signs.to(dtype), None if log_diagonal is None else log_diagonal.to(dtype)
    return signs if log_diagonal is None else signs * log_diagonal.exp()


def unit_lower(lower: Tensor) -> Tensor:
    """The strict lower triangle, with ones on the diagonal."""
    return _triangle(lower, lower.new_ones(len(lower)), lower.new_empty(lower.shape), upper=False)


def upper_with(upper: Tensor, diagonal: Tensor) -> Tensor:
    """The strict upper triangle of a matrix at least as wide as high, with this diagonal."""
    return _triangle(upper, diagonal, upper.new_empty(upper.shape), upper=True)


def strict_(matrix: Tensor, *, upper: bool) -> Tensor:
    """Clear the matrix in place except for one strict triangle, and return it."""
    return _triangle(matrix, matrix.new_zeros(len(matrix)), matrix, upper=upper)


def _triangle(matrix: Tensor, diagonal: Tensor, out: Tensor, *, upper: bool) -> Tensor:
    """Write the strict triangle and the diagonal to `out`, which may be the matrix itself. Torch alone takes
    three times as long."""
    dense = matrix.stride(1) == 1 and diagonal.is_contiguous() and out.is_contiguous()
    if dense and native.accepts(matrix, diagonal, out):
        of_matrix = matrix.data_ptr(), matrix.stride(0), tuple(matrix.shape)
        memory = diagonal.data_ptr(), out.data_ptr()
        _core.copy_triangle(*of_matrix, upper, *memory, native.threads_over(matrix))
        return out
    part, offset = (torch.triu, 1) if upper else (torch.tril, -1)
    part(matrix, offset, out=out)
    out.diagonal().copy_(diagonal)
    return out


def apply_factor(
    matrix: Tensor,
    diagonal: Tensor | None,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    upper: bool,
    transposed: bool = False,
) -> Tensor:
    """Multiply x (B, C, *spatial) at every position by a triangle, and add the bias; in x's memory format.

    The triangle is the strict upper or lower one of `matrix` with the given diagonal (None for ones), or its
    transpose.
    """
    fits = products.MULTIPLIES and not torch.is_grad_enabled() and native.accepts(matrix, diagonal, x, bias)
    if fits and ((x.ndim > 2 and products.walks_maps(x)) or products.row_stride(x) is not None):
        return products.factor_product(matrix, diagonal, x, upper=upper, transposed=transposed, bias=bias)
    diagonal = matrix.new_ones(len(matrix)) if diagonal is None else diagonal
    factor = _triangle(matrix, diagonal, matrix.new_empty(matrix.shape), upper=upper)
    return apply_matrix(
        factor.mT if transposed else factor, x, bias, triangle=1 if upper != transposed else -1
    )


def times(matrix: Tensor, x: Tensor, *, triangle: int = 0) -> Tensor:
    """`matrix @ x` for a lower (-1) or upper (1) triangular matrix, or any matrix (0)."""
    return apply_matrix(matrix, x[None], None, triangle=triangle)[0]


def outer(a: Tensor, b: Tensor, *, triangle: int = 0) -> Tensor:
    """`a @ b^T`, of which only the lower (-1) or upper (1) triangle is correct, or all (0)."""
    return matrix_gradient(a[None], b[None], triangle=triangle)
