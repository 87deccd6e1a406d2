"""Matrices of 1x1 convolutions: formed of triangles, inverted, applied to maps, and their gradient.

Reference operations and modules share them. Plain PyTorch, differentiable to any order; but `apply_matrix`
and `matrix_gradient` may be done by the extension where nothing is recorded. Nothing is checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from usf_kernels.kernels.plain import full_precision, has_rows, plain_product
from usf_kernels.ops import native, products

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of `matrix, x, bias`, as `plain_product`
_forms_products: ContextVar[bool] = ContextVar("forms_products", default=False)


def apply_matrix(matrix: Tensor, x: Tensor, bias: Tensor | None, *, triangle: int = 0) -> Tensor:
    """`matrix @ x + bias` at every position, in x's memory format. All of one dtype. `triangle`: the matrix
    is lower (-1) or upper (1) triangular, which the extension makes use of; 0 for neither."""
    if _extension_multiplies(len(matrix), x, matrix, bias):
        if x.ndim > 2 and products.walks_maps(x):
            return products.map_product(matrix, x, bias=bias, triangle=triangle)
        if has_rows(x) and products.row_stride(x) is not None:
            return products.row_product(matrix, x, bias=bias)
    return plain_product(matrix, x, bias)


def matrix_gradient(grad: Tensor, x: Tensor, *, triangle: int = 0) -> Tensor:
    """(C, C) gradient of the matrix of `apply_matrix`: outer products of grad and x, summed. One dtype. With
    a `triangle`, lower (-1) or upper (1), only that part of it is right."""
    if _extension_multiplies(grad.shape[1], x, grad) and all(_walks(t) for t in (x, grad)):
        return products.outer_product(grad, x, triangle)
    if x.ndim == 2 or (x.stride(1) == 1 and grad.stride(1) == 1):
        grad, x = (t.movedim(1, -1).flatten(0, -2) for t in (grad, x))
        return grad.mT @ x
    grad, x = grad.flatten(2), x.flatten(2)
    if len(grad) == 0:
        return grad.new_zeros(grad.shape[1], x.shape[1])
    # Image after image into one matrix, where a batched product would write one for each.
    total = torch.mm(grad[0], x[0].mT)
    return total if len(grad) == 1 else total.addbmm_(grad[1:], x[1:].mT)


def _walks(x: Tensor) -> bool:
    return products.walks_maps(x) or products.row_stride(x) is not None


def _extension_multiplies(outputs: int, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the extension is to multiply channels of x by as many outputs: in float32 on the CPU, where
    nothing is recorded. PyTorch's way is shorter for a few rows."""
    if not products.MULTIPLIES or torch.is_grad_enabled() or not native.fits(x, *others):
        return False
    return (x.ndim > 2 and x.stride(1) != 1) or x.numel() * outputs >= products.WORTH_THREADS


def lu_matrix(lower: Tensor, upper: Tensor) -> Tensor:
    """L U, (C, C). Both of one dtype, of which float32 is the narrowest."""
    upper = torch.triu(upper)
    with full_precision(upper):
        return torch.addmm(upper, torch.tril(lower, -1), upper)


def factors_pay(x: Tensor, channels: int) -> bool:
    """Whether U and then L take less time than their product, with gradients as without. They always take
    fewer multiplications, but pass over memory twice: it pays up to 7/4 as many positions as
    channels. Not on a GPU, where it is the number of operations that counts, not in traced graphs, which are
    for any number of positions, and not within `forming_products`."""
    if x.is_cuda or torch.compiler.is_compiling() or _forms_products.get():
        return False
    return x.numel() < 1.75 * channels * channels


@contextlib.contextmanager
def forming_products() -> Iterator[None]:
    """Within, an LU map is its matrix however few the positions: for what is to be undone. Rounding errors
    between the factors grow with their condition numbers, thousands in a rotation of 2048 channels."""
    token = _forms_products.set(True)
    try:
        yield
    finally:
        _forms_products.reset(token)


def apply_lu(lower: Tensor, upper: Tensor, x: Tensor, bias: Tensor | None, multiply: Product) -> Tensor:
    """`L U x + bias` at every position, in x's memory format. All of one dtype, float32 or wider."""
    if not factors_pay(x, len(lower)):
        return multiply(lu_matrix(lower, upper), x, bias)
    y = multiply(torch.triu(upper), x, None)
    unit = torch.tril(lower, -1) + torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return multiply(unit, y, bias)


def lu_inverse(lower: Tensor, upper: Tensor) -> Tensor:
    """The inverse of L U, (C, C). Both of one dtype, of which float32 is the narrowest."""
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    if torch.compiler.is_exporting():  # ONNX has no triangular solver
        return triangular_inverse(torch.triu(upper)) @ triangular_inverse(torch.tril(lower, -1) + eye)
    # Two triangular solves against the identity (C columns), then one product. Measured as accurate as
    # solving for the data and up to eight times faster on CPU; and a solve for B*P columns is wrong on
    # CUDA when they are very many.
    matrix = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, matrix, upper=True)


def accurate_inverse(matrix: Tensor) -> Tensor:
    """Found in float64, of the product as it was rounded: the inverses of its factors would be up to 25 times
    further from undoing it, and every step of a reversible backward pass adds to the error."""
    device = "cpu" if matrix.device.type == "mps" else matrix.device  # which has no float64
    # Without waiting for a GPU to say whether it is singular: what is made of it then is not finite.
    return torch.linalg.inv_ex(matrix.to(device, torch.float64)).inverse.to(matrix)


def triangular_inverse(matrix: Tensor) -> Tensor:
    """The inverse of a triangular (C, C), lower or upper, in log2(C) steps of two products.

    Block substitution, for all blocks of a size at once: with X the inverse of the blocks of the diagonal and
    N what is beside them within blocks of twice the size, X - X N X is the inverse of those.
    """
    index = torch.arange(len(matrix), device=matrix.device)
    inverse, size = torch.diag(1 / torch.diagonal(matrix)), 1
    while size < len(matrix):
        block, pair = index // size, index // (2 * size)
        beside = (pair[:, None] == pair) & (block[:, None] != block)
        inverse, size = inverse - inverse @ (matrix * beside) @ inverse, 2 * size
    return inverse
