"""Matrices applied to the channels of float32 maps on the CPU, by the extension: of maps or rows as they lie.

Who calls them has asked `native.fits` first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from usf_kernels import _core
from usf_kernels.ops.native import address

WORTH_THREADS = 1 << 19  # multiplications; below, waking threads takes longer than they save
MULTIPLIES = hasattr(_core, "map_product")  # compilers without vector types build none


def threads_for(multiplications: int) -> int:
    """That are worth waking for so many."""
    return torch.get_num_threads() if multiplications >= WORTH_THREADS else 1


def walks_maps(x: Tensor) -> bool:
    """Whether each channel's positions lie side by side."""
    expected = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def map_product(
    matrix: Tensor,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
    transposed: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """`matrix @ x + bias` at every position of an x that `walks_maps`, (B, C, *spatial): dense.

    Args:
        matrix: (N, C, ...) with nothing behind, or (C, N, ...) if `transposed`.
        bias: (N,), or None.
        relu: put the result through a ReLU.
        mask: of the result's shape, dense; where it is not positive the result is 0. Without `relu`.
    """
    matrix, bias = matrix.contiguous(), None if bias is None else bias.contiguous()
    outputs, (batch, inputs, *spatial) = matrix.shape[1 if transposed else 0], x.shape
    y = x.new_empty((batch, outputs, *spatial))
    sizes = batch, outputs, inputs, math.prod(spatial)
    of_matrix, threads = (matrix.data_ptr(), transposed), threads_for(y.numel() * inputs)
    ending = address(bias), relu, address(mask), y.data_ptr(), threads
    _core.map_product(sizes, *of_matrix, _maps_of(x), *ending)
    return y


def row_product(
    matrix: Tensor,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
    transposed: bool = False,
    mask: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """`map_product` of an x in channels-last memory, (B, C, H, W), to which the result and the mask keep.

    Args:
        matrix, bias, relu, transposed, mask: of `map_product`.
        share: (1, N, H, W), added to the result of every sample in front of the ReLU. Without a mask.
    """
    matrix = matrix.flatten(1)
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    bias = None if bias is None else bias.contiguous()
    share = None if share is None else share.contiguous(memory_format=torch.channels_last)
    outputs, (batch, inputs, *spatial) = matrix.shape[1 if transposed else 0], x.shape
    shape = batch, outputs, *spatial
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sizes, channels = (batch, math.prod(spatial)), (outputs, inputs)
    of_matrix = matrix.data_ptr(), matrix.stride(0), transposed
    ending = address(bias), relu, address(mask), address(share), y.data_ptr()
    _core.row_product(sizes, of_matrix, channels, x.data_ptr(), *ending, threads_for(y.numel() * inputs))
    return y


def map_outer(a: Tensor, x: Tensor) -> Tensor:
    """Sum over the batch and all positions of `a x^T`, (M, N); both `walks_maps`."""
    batch, inputs, *spatial = x.shape
    out = x.new_empty((a.shape[1], inputs))
    sizes = batch, a.shape[1], inputs, math.prod(spatial)
    threads = threads_for(a.numel() * inputs)
    _core.map_outer(sizes, _maps_of(a), _maps_of(x), out.data_ptr(), threads)
    return out


def _maps_of(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)
