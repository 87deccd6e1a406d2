"""Matrices applied by the extension to the channels of float32 maps or rows on the CPU, which are not copied.

Where PyTorch's library for products does not use the widest vectors of a processor, the extension takes half
the time. Callers must ask `native.accepts` first, and `walks_maps` or `row_stride`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from usf_kernels import _core
from usf_kernels.memory import in_huge_pages
from usf_kernels.ops.native import address

WORTH_THREADS = 1 << 19  # multiplications; below, waking threads takes longer than they save
MULTIPLIES = hasattr(_core, "map_product")  # False if the compiler had no vector types
MULTIPLIES_BFLOAT16 = getattr(_core, "MULTIPLIES_PAIRS", False)


def has_amx() -> bool:
    """Whether bfloat16 products use AMX rather than AVX-512: processor and operating system must allow it."""
    return MULTIPLIES_BFLOAT16 and _core.has_amx()


def threads_for(multiplications: int) -> int:
    """Number of threads for this many multiplications."""
    return torch.get_num_threads() if multiplications >= WORTH_THREADS else 1


def walks_maps(x: Tensor) -> bool:
    """Whether each channel's positions lie side by side."""
    return x.is_contiguous() or _position_stride(x) in (1, None)


def row_stride(x: Tensor) -> int | None:
    """Number of elements from one position to the next, over the whole batch, or None if there is no such
    stride or the channels of a position do not lie side by side."""
    if x.numel() == 0 or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.shape[1]
    if x.stride(1) != 1 and x.shape[1] != 1:
        return None
    stride = _position_stride(x)
    if stride is None:
        return x.stride(0)
    one_walk = len(x) == 1 or x.stride(0) == stride * math.prod(x.shape[2:])
    return stride if stride > 0 and one_walk else None


def _position_stride(x: Tensor) -> int | None:
    """Stride between positions of an image; None for a single position, 0 if the stride is not uniform."""
    stride, count = None, 1
    for size, own in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1:
            stride = own if stride is None else stride
            if own != stride * count:
                return 0
        count *= size
    return stride


def map_product(
    matrix: Tensor,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
    transposed: bool = False,
    mask: Tensor | None = None,
    triangle: int = 0,
) -> Tensor:
    """`matrix @ x + bias` at every position of x (B, C, *spatial), which `walks_maps`; contiguous.

    Args:
        matrix: (N, C), or (C, N) if `transposed`; further dimensions must have size 1.
        bias: (N,), or None.
        relu: put the result through a ReLU.
        mask: of the result's shape, contiguous; the result is 0 where it is not positive. Not with `relu`.
        triangle: -1 or 1 if the matrix that multiplies x is lower or upper triangular; 0 for neither.
    """
    matrix, bias = _lying(matrix), None if bias is None else bias.contiguous()
    outputs, (batch, inputs, *spatial) = matrix.shape[1 if transposed else 0], x.shape
    y = in_huge_pages(x.new_empty((batch, outputs, *spatial)))
    sizes = batch, outputs, inputs, math.prod(spatial)
    threads = threads_for(y.numel() * inputs // (2 if triangle else 1))
    ending = address(bias), relu, address(mask), y.data_ptr(), threads
    _core.map_product(sizes, _matrix(matrix, transposed), triangle, _view(x, None), *ending)
    return y


def inverse(matrix: Tensor) -> Tensor | None:
    """Invert a matrix (C, C) in float64 without exchanging rows, two to three times as fast as LAPACK with
    them; None where that loses digits, which it does not for products of an LU map's factors."""
    matrix, out = matrix.contiguous(), matrix.new_empty(matrix.shape)
    done = _core.invert(matrix.data_ptr(), len(matrix), out.data_ptr(), threads_for(len(matrix) ** 3))
    return out if done else None


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
    """`map_product` for an x (B, C, *spatial) that has a `row_stride`; the result is channels-last.

    Args:
        matrix, bias, relu, transposed: see `map_product`.
        mask: see `map_product`, but in channels-last memory.
        share: (1, N, *spatial), added to the result of every sample before the ReLU. Not with a mask.
    """
    matrix, bias = _lying(matrix), None if bias is None else bias.contiguous()
    share = None if share is None else share.movedim(1, -1).contiguous()
    outputs, (batch, inputs, *spatial) = matrix.shape[1 if transposed else 0], x.shape
    y = in_huge_pages(x.new_empty((batch, *spatial, outputs)))
    sizes, channels = (batch, math.prod(spatial)), (outputs, inputs)
    rows = x.data_ptr(), row_stride(x)
    ending = address(bias), relu, address(mask), address(share), y.data_ptr()
    of_matrix = _matrix(matrix, transposed)
    _core.row_product(sizes, of_matrix, channels, rows, *ending, threads_for(y.numel() * inputs))
    return y.movedim(-1, 1).detach()  # not a view: autograd forbids writing to those


def factor_product(
    matrix: Tensor,
    diagonal: Tensor | None,
    x: Tensor,
    *,
    upper: bool,
    transposed: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """`triangle @ x + bias` at every position of x, which `walks_maps` or has a `row_stride`.

    Args:
        matrix: (C, C); only one strict triangle is read.
        diagonal: (C,), the triangle's diagonal; None for ones.
        x: (B, C, *spatial).
        upper: read the upper triangle of the matrix, not the lower one.
        transposed: multiply by the transpose of the triangle.
        bias: (C,), or None.

    Returns:
        (B, C, *spatial), dense, in the memory format of x.
    """
    matrix = _lying(matrix)
    diagonal, bias = (None if v is None else v.contiguous() for v in (diagonal, bias))
    batch, channels, *spatial = x.shape
    positions, threads = math.prod(spatial), threads_for(x.numel() * channels // 2)
    factor = _matrix(matrix, transposed), upper != transposed, address(diagonal), address(bias)
    if x.ndim > 2 and walks_maps(x):
        y = in_huge_pages(x.new_empty(x.shape))
        _core.factor_maps(*factor, (batch, channels, positions), _view(x, None), y.data_ptr(), threads)
        return y
    y = in_huge_pages(x.new_empty((batch, *spatial, channels)))
    rows = x.data_ptr(), row_stride(x), batch * positions
    _core.factor_rows(*factor, channels, rows, y.data_ptr(), threads)
    return y.movedim(-1, 1)


def outer_product(a: Tensor, x: Tensor, triangle: int = 0) -> Tensor:
    """Sum over the batch and all positions of `a x^T`, (M, N); each `walks_maps` or has a `row_stride`.

    With a `triangle`, lower (-1) or upper (1), only that part of the result is correct.
    """
    (batch, inputs, *spatial), outputs = x.shape, a.shape[1]
    strides = row_stride(a), row_stride(x)
    together = None not in strides  # then the batch is one image
    positions = math.prod(spatial)
    sizes = (1, outputs, inputs, batch * positions) if together else (batch, outputs, inputs, positions)
    out = x.new_empty((outputs, inputs))
    threads = threads_for(a.numel() * inputs // (2 if triangle else 1))
    views = (_view(t, stride) for t, stride in zip((a, x), strides, strict=True))
    _core.outer_product(sizes, *views, triangle, out.data_ptr(), threads)
    return out


def _lying(matrix: Tensor) -> Tensor:
    """Return a matrix (N, C, 1, ...) as (N, C), copied if neither dimension has a stride of 1."""
    matrix = matrix.flatten(1)
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _matrix(matrix: Tensor, transposed: bool) -> tuple[int, int, bool]:
    if matrix.stride(1) == 1:
        return matrix.data_ptr(), matrix.stride(0), transposed
    return matrix.data_ptr(), matrix.stride(1), not transposed


def _view(x: Tensor, row_stride: int | None) -> tuple[int, int, int, bool]:
    if row_stride is None:
        return x.data_ptr(), x.stride(0), x.stride(1), False
    return x.data_ptr(), x.stride(0), row_stride, True
