"""A bias, a map of biases and an activation in one pass, around products of the vendor's library.

PyTorch adds a bias per channel to maps at less than half of the memory bandwidth, and applies the activation
in another pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.configs import elementwise
from usf_kernels.kernels.launch import Case, aligned, bound, cdiv, launch, narrow, runtime, tile, walk
from usf_kernels.kernels.layout import View, contiguous
from usf_kernels.kernels.replay import replayed


@triton.jit(do_not_specialize=[*runtime("x", "a", "y"), "factor"])
def finish_kernel(
    x, x_b, x_c, x_p,  # (b, C, P) in
    bias_map, a_b, a_c, a_p,  # (b, C, P), or None
    y, y_b, y_c, y_p,  # (b, C, P) out; may be x itself
    bias,  # (C,), or None
    C, P, factor,
    RELU: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C = bound(C, y_c, UNIT)
    P = bound(P, y_p, UNIT)
    b, c, p = tile(C, P, BLOCK_C, BLOCK_P, WIDE)
    inside = (c < C) & (p < P)
    value = tl.load(x + b * aligned(x_b, UNIT) + walk(c, x_c, UNIT) + walk(p, x_p, UNIT), mask=inside)
    value = value.to(tl.float32)
    if bias is not None:
        value += factor * tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    if bias_map is not None:
        at = bias_map + b * aligned(a_b, UNIT) + walk(c, a_c, UNIT) + walk(p, a_p, UNIT)
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays NaN
    y_at = y + b * aligned(y_b, UNIT) + walk(c, y_c, UNIT) + walk(p, y_p, UNIT)
    tl.store(y_at, narrow(value, y), mask=inside)


@replayed
def finish(
    x: Tensor, bias: Tensor | None, bias_map: Tensor | None, relu: bool, factor: int, y: Tensor
) -> Tensor:
    """Write `x + factor * bias + bias_map`, or its ReLU, to y, which has the shape of x, and return y.

    x (B, C, *spatial); bias (C,); bias_map (B, C, *spatial), at any strides. y may be x.
    """
    (bias,) = contiguous(bias)
    view = View([x, *(() if bias_map is None else (bias_map,)), y])
    arguments = view.arguments()
    if bias_map is None:
        arguments[4:4] = [None] * 4
    channels, channels_last = x.shape[1], view.strides[-1].channel == 1
    unit = view.unit(channels)

    operands = 2 if bias_map is None else 3
    sizes = view.batch, channels, view.positions
    # No other configuration is ever tried: a second launch would add the bias again.
    config = elementwise(y.element_size(), operands, *sizes, channels_last)[0]
    blocks = view.batch * cdiv(channels, config["BLOCK_C"]) * cdiv(view.positions, config["BLOCK_P"])
    launch(
        finish_kernel, blocks, *arguments, bias, channels, view.positions, float(factor),
        RELU=relu, UNIT=unit, WIDE=view.is_wide(), device=x.device, **config,
    )  # fmt: skip
    return y


def _case(dtype: torch.dtype, memory_format: torch.memory_format) -> Case:
    x = torch.empty((8, 256, 28, 28), dtype=dtype, device="meta").to(memory_format=memory_format)
    bias = torch.empty(256, dtype=dtype, device="meta")
    name = f"bias and relu, {dtype}, {memory_format}".replace("torch.", "")
    return Case(name, lambda: finish(x, bias, x, True, 1, x), {"finish_kernel": "vectors"})


COMPILE_CASES = [
    _case(dtype, memory_format)
    for dtype in (torch.float32, torch.bfloat16)
    for memory_format in (torch.contiguous_format, torch.channels_last)
]
