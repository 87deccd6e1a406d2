"""Matrices of 1x1 convolutions: formed from triangles, inverted, applied to maps, and their gradient.

Reference operations and modules share these functions. They are plain PyTorch, differentiable to any order;
where nothing is recorded, `apply_matrix` and `matrix_gradient` may run in the extension. Nothing is checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from usf_kernels.kernels.plain import full_precision, has_rows, plain_product
from usf_kernels.ops import native, products
from usf_kernels.ops.checks import to_double

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (matrix, x, bias) to y, like `plain_product`
_forms_products: ContextVar[bool] = ContextVar("forms_products", default=False)


def apply_matrix(matrix: Tensor, x: Tensor, bias: Tensor | None, *, triangle: int = 0) -> Tensor:
    """`matrix @ x + bias` at every position, in x's memory format. All share one dtype. `triangle` tells the
    extension that the matrix is lower (-1) or upper (1) triangular; 0 for neither."""
    if _extension_multiplies(len(matrix), x, matrix, bias):
        if x.ndim > 2 and products.walks_maps(x):
            return products.map_product(matrix, x, bias=bias, triangle=triangle)
        if has_rows(x) and products.row_stride(x) is not None:
            return products.row_product(matrix, x, bias=bias)
    return plain_product(matrix, x, bias)


def matrix_gradient(grad: Tensor, x: Tensor, *, triangle: int = 0) -> Tensor:
    """Gradient of the matrix of `apply_matrix`: the sum of the outer products of grad and x, which share a
    dtype. With a `triangle`, lower (-1) or upper (1), only that part of it is correct."""
    if _extension_multiplies(grad.shape[1], x, grad) and all(_walks(t) for t in (x, grad)):
        return products.outer_product(grad, x, triangle)
    if x.ndim == 2 or (x.stride(1) == 1 and grad.stride(1) == 1):
        grad, x = (t.movedim(1, -1).flatten(0, -2) for t in (grad, x))
        return grad.mT @ x
    grad, x = grad.flatten(2), x.flatten(2)
    if len(grad) == 0:
        return grad.new_zeros(grad.shape[1], x.shape[1])
    # Images are added to one matrix in turn: a batched product would write a matrix per image.
    total = torch.mm(grad[0], x[0].mT)
    return total if len(grad) == 1 else total.addbmm_(grad[1:], x[1:].mT)


def _walks(x: Tensor) -> bool:
    return products.walks_maps(x) or products.row_stride(x) is not None


def _extension_multiplies(outputs: int, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the extension should multiply the channels of x to give `outputs` channels: in float32 on the
    CPU, where nothing is recorded. For a few rows, PyTorch is faster."""
    if not products.MULTIPLIES or torch.is_grad_enabled() or not native.accepts(x, *others):
        return False
    return (x.ndim > 2 and x.stride(1) != 1) or x.numel() * outputs >= products.WORTH_THREADS


def lu_matrix(lower: Tensor, upper: Tensor) -> Tensor:
    """Return L U, (C, C). Both factors share one dtype, float32 at least."""
    upper = torch.triu(upper)
    with full_precision(upper):
        return torch.addmm(upper, torch.tril(lower, -1), upper)


def factors_pay(x: Tensor, channels: int) -> bool:
    """Whether applying U and then L takes less time than their product, with gradients or without.

    It always takes fewer multiplications, but passes over memory twice, and pays while there are fewer than
    7/4 as many positions as channels. It does not pay on a GPU, where the number of operations counts. It is
    not done in compiled graphs, which serve any number of positions, nor within `forming_products`.
    """
    if x.is_cuda or torch.compiler.is_compiling() or _forms_products.get():
        return False
    return x.numel() < 1.75 * channels * channels


@contextlib.contextmanager
def forming_products() -> Iterator[None]:
    """Context in which LU maps are applied as one matrix however few the positions, for maps that are to be
    undone: rounding errors between the factors grow with their condition numbers, which are thousands in a
    rotation of 2048 channels."""
    token = _forms_products.set(True)
    try:
        yield
    finally:
        _forms_products.reset(token)


def apply_lu(lower: Tensor, upper: Tensor, x: Tensor, bias: Tensor | None, multiply: Product) -> Tensor:
    """`L U x + bias` at every position, in x's memory format. All share one dtype, float32 or wider."""
    if not factors_pay(x, len(lower)):
        return multiply(lu_matrix(lower, upper), x, bias)
    y = multiply(torch.triu(upper), x, None)
    unit = torch.tril(lower, -1) + torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return multiply(unit, y, bias)


def lu_inverse(lower: Tensor, upper: Tensor) -> Tensor:
    """Return the inverse of L U, (C, C). Both factors share one dtype, float32 at least."""
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    if torch.compiler.is_exporting():  # ONNX has no triangular solver
        return triangular_inverse(torch.triu(upper)) @ triangular_inverse(torch.tril(lower, -1) + eye)
    # Two triangular solves against the identity (C columns), to be applied as one product. That was measured
    # to be as accurate as solving for the data and up to eight times faster on the CPU; a solve for B*P
    # columns is wrong on CUDA when there are very many.
    matrix = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, matrix, upper=True)


def accurate_inverse(matrix: Tensor) -> Tensor:
    """Invert in float64 the rounded product: inverses of its factors would be up to 25 times further from
    undoing it, and every step of a reversible backward pass adds to the error."""
    if products.MULTIPLIES and native.accepts(matrix) and not matrix.requires_grad:
        inverse = products.inverse(matrix)
        if inverse is not None:
            return inverse
    # `inv_ex` does not wait for a GPU to report a singular matrix; the results are then not finite.
    return torch.linalg.inv_ex(to_double(matrix)).inverse.to(matrix)


def triangular_inverse(matrix: Tensor) -> Tensor:
    """Invert a triangular matrix (C, C), lower or upper, in log2(C) steps of two products.

    Each step is a block substitution for all blocks of a size at once: with X the inverse of the diagonal
    blocks, and N the other entries of the diagonal blocks of twice the size, their inverse is X - X N X.
    """
    index = torch.arange(len(matrix), device=matrix.device)
    inverse, size = torch.diag(1 / torch.diagonal(matrix)), 1
    while size < len(matrix):
        block, pair = index // size, index // (2 * size)
        beside = (pair[:, None] == pair) & (block[:, None] != block)
        inverse, size = inverse - inverse @ (matrix * beside) @ inverse, 2 * size
    return inverse
