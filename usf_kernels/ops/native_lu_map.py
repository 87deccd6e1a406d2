"""An LU map from its parameters, and its gradients, each in one call of the extension.

The dozen operations of `usf_kernels.ops.lu_map` take longer to dispatch than to compute. Callers must ask
`accepts` first.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from usf_kernels import _core
from usf_kernels.ops import native, products
from usf_kernels.ops.native import address


class LUParameters(NamedTuple):
    """Parameters of an ActNorm and the LU map after it: the arguments of `usf_kernels.ops.lu_map.lu_map`."""

    lower: Tensor
    upper: Tensor
    signs: Tensor
    log_diagonal: Tensor | None
    bias: Tensor | None
    log_scale: Tensor | None
    offset: Tensor | None


def accepts(given: LUParameters) -> bool:
    """Whether the extension may read these parameters."""
    rows = given.lower.stride(1) == 1 and given.upper.stride(1) == 1
    return products.MULTIPLIES and rows and native.accepts(*given)


def lu_map(given: LUParameters) -> tuple[Tensor, Tensor | None, Tensor]:
    """`usf_kernels.ops.lu_map.lu_map`, except that the bias is None if there is no log_scale."""
    given, lower = _dense(given), given.lower
    matrix, log_det, memory = lower.new_empty(lower.shape), lower.new_empty(()), _memory(lower, 2)
    bias = moved = None
    if given.log_scale is not None:
        bias, moved = given.bias, lower.new_empty(len(lower))
    made = matrix.data_ptr(), address(moved), log_det.data_ptr()
    _core.lu_map(_map(given), address(bias), *made, memory.data_ptr(), _threads(lower))
    return matrix, moved, log_det


def gradients(
    given: LUParameters, matrix: Tensor, grad: Tensor, grad_moved: Tensor | None, grad_log_det: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of lower, upper, log_diagonal, log_scale and offset; None for those that are None.

    Args:
        given, matrix: the argument of `lu_map`, and the matrix that it returned.
        grad, grad_moved, grad_log_det: gradients of its results.
    """
    given, lower = _dense(given), given.lower
    grad, grad_moved = grad.contiguous(), None if grad_moved is None else grad_moved.contiguous()
    wanted = lower, given.upper, given.log_diagonal, given.log_scale, given.offset
    found = [None if v is None else v.new_empty(v.shape) for v in wanted]
    memory = _memory(lower, 3)
    of_results = grad.data_ptr(), address(grad_moved), grad_log_det.data_ptr()
    _core.lu_map_gradients(
        _map(given), matrix.data_ptr(), *of_results, *map(address, found), memory.data_ptr(), _threads(lower)
    )
    return tuple(found)


def _dense(given: LUParameters) -> LUParameters:
    """Return `given` with contiguous vectors."""
    vectors = (None if v is None else v.contiguous() for v in given[2:])
    return LUParameters(given.lower, given.upper, *vectors)


def _map(given: LUParameters) -> tuple:
    """Return the map as the extension takes it: its size, factors and vectors."""
    factors = ((matrix.data_ptr(), matrix.stride(0)) for matrix in (given.lower, given.upper))
    vectors = given.signs, given.log_diagonal, given.log_scale, given.offset
    return (len(given.lower), *factors, *map(address, vectors))


def _memory(like: Tensor, matrices: int) -> Tensor:
    return like.new_empty((matrices, *like.shape))


def _threads(lower: Tensor) -> int:
    return products.threads_for(len(lower) ** 3 // 2)
