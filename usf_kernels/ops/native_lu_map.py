"""An LU map from its parameters, and its gradients, each in one call of the extension.

The dozen operations of `usf_kernels.ops.lu_map` take longer to dispatch than to compute. Callers must ask
`accepts` first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usf_kernels import _core
from usf_kernels.ops import native, products
from usf_kernels.ops.native import address

Given = tuple[Tensor | None, ...]  # lower, upper, signs, log_diagonal, bias, log_scale, offset


def accepts(given: Given) -> bool:
    """Whether the extension may read these parameters."""
    rows = all(matrix.stride(1) == 1 for matrix in given[:2])
    return products.MULTIPLIES and rows and native.accepts(*given)


def lu_map(given: Given) -> tuple[Tensor, Tensor | None, Tensor]:
    """`usf_kernels.ops.lu_map.lu_map`, except that the bias is None if there is no log_scale."""
    given = _dense(given)
    lower, *_, bias, log_scale, _ = given
    bias = None if log_scale is None else bias
    matrix, log_det, memory = lower.new_empty(lower.shape), lower.new_empty(()), _memory(lower, 2)
    moved = None if log_scale is None else lower.new_empty(len(lower))
    made = matrix.data_ptr(), address(moved), log_det.data_ptr()
    _core.lu_map(_map(given), address(bias), *made, memory.data_ptr(), _threads(lower))
    return matrix, moved, log_det


def gradients(
    given: Given, matrix: Tensor, grad: Tensor, grad_moved: Tensor | None, grad_log_det: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of lower, upper, log_diagonal, log_scale and offset; None for those that are None.

    Args:
        given, matrix: the argument of `lu_map`, and the matrix that it returned.
        grad, grad_moved, grad_log_det: gradients of its results.
    """
    given = _dense(given)
    lower, upper, _, log_diagonal, _, log_scale, offset = given
    grad, grad_moved = grad.contiguous(), None if grad_moved is None else grad_moved.contiguous()
    found = [
        None if v is None else v.new_empty(v.shape) for v in (lower, upper, log_diagonal, log_scale, offset)
    ]
    memory = _memory(lower, 3)
    of_results = grad.data_ptr(), address(grad_moved), grad_log_det.data_ptr()
    _core.lu_map_gradients(
        _map(given), matrix.data_ptr(), *of_results, *map(address, found), memory.data_ptr(), _threads(lower)
    )
    return tuple(found)


def _dense(given: Given) -> Given:
    """Return `given` with contiguous vectors."""
    return (*given[:2], *(None if v is None else v.contiguous() for v in given[2:]))


def _map(given: Given) -> tuple:
    """Return the map as the extension takes it: its size, factors and vectors."""
    lower, upper, signs, log_diagonal, _, log_scale, offset = given
    factors = ((matrix.data_ptr(), matrix.stride(0)) for matrix in (lower, upper))
    return (len(lower), *factors, *map(address, (signs, log_diagonal, log_scale, offset)))


def _memory(like: Tensor, matrices: int) -> Tensor:
    return torch.empty((matrices, *like.shape), dtype=like.dtype)


def _threads(lower: Tensor) -> int:
    return products.threads_for(len(lower) ** 3 // 2)
