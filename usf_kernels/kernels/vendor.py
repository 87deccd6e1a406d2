"""Products by the vendor's library (cuBLAS, for example), and where these are faster than our kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from usf_kernels.kernels.configs import (
    MANY_POSITIONS,
    VENDOR_CHANNELS,
    VENDOR_CHANNELS_OF_MANY,
    kind_of,
)
from usf_kernels.kernels.finish import finish
from usf_kernels.kernels.launch import is_recording
from usf_kernels.kernels.layout import empty_output
from usf_kernels.kernels.plain import full_precision, has_rows, plain_product


def vendor_linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`matrix @ x + bias` by torch, which calls the vendor's library, in the layout that `linear` returns."""
    dtype = torch.promote_types(x.dtype, matrix.dtype)
    matrix, bias = (None if v is None else v.to(dtype) for v in (matrix, bias))
    x = x if x.dtype == dtype else empty_output(x, dtype).copy_(x)  # keeps x's layout, even if x is expanded
    with full_precision(x):
        if bias is None or has_rows(x):  # for rows, the library adds the bias itself
            return plain_product(matrix, x, bias)
        y = plain_product(matrix, x, None)
    return finish(y, bias, None, False, 1, y)


def has_many_positions(x: Tensor) -> bool:
    """Whether x keeps the whole device busy for long, so that only throughput counts."""
    return x.shape[0] * math.prod(x.shape[2:]) >= MANY_POSITIONS


def vendor_is_faster(x: Tensor, matrix: Tensor) -> bool:
    """Whether products of this size, precision and layout go to the vendor's library."""
    return min(matrix.shape) >= vendor_channels(x, matrix)


def vendor_channels(x: Tensor, matrix: Tensor, *, alone: bool = True) -> float:
    """Smallest number of channels for which products of x with such matrices go to the vendor's library; set
    `alone` if nothing surrounds them that a kernel of ours would do in the same pass."""
    if is_recording():
        return math.inf
    kind = kind_of(torch.promote_types(x.dtype, matrix.dtype))
    many = has_many_positions(x) and (alone or kind == "ieee")
    bands = VENDOR_CHANNELS_OF_MANY if many else VENDOR_CHANNELS
    return bands[kind][x.ndim == 2 or x.stride(1) == 1]
