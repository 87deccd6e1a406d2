"""Additive coupling with a mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.configs import Config, elementwise, pick
from usf_kernels.kernels.launch import Case, aligned, bound, cdiv, launch, narrow, runtime, tile, walk
from usf_kernels.kernels.layout import View, empty_output
from usf_kernels.kernels.replay import replayed


@triton.jit(do_not_specialize=runtime("m", "x", "t", "y"))
def masked_kernel(
    m, m_b, m_c, m_p,  # (b, C, P), the mask, with strides of 0 where it is broadcast
    x, x_b, x_c, x_p,  # (b, C, P), or None for zeros
    t, t_b, t_c, t_p,  # (b, C, P), what is added where the mask is 0
    y, y_b, y_c, y_p,  # (b, C, P) out
    C, P,
    INVERSE: tl.constexpr, MASK_UNIT: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C = bound(C, y_c, UNIT)
    P = bound(P, y_p, UNIT)
    b, c, p = tile(C, P, BLOCK_C, BLOCK_P, WIDE)
    inside = (c < C) & (p < P)
    t_at = t + b * aligned(t_b, UNIT) + walk(c, t_c, UNIT) + walk(p, t_p, UNIT)
    m_at = m + b * aligned(m_b, MASK_UNIT) + walk(c, m_c, MASK_UNIT) + walk(p, m_p, MASK_UNIT)
    shift = tl.load(t_at, mask=inside).to(tl.float32) * (1 - tl.load(m_at, mask=inside).to(tl.float32))
    value = -shift if INVERSE else shift
    if x is not None:
        x_at = x + b * aligned(x_b, UNIT) + walk(c, x_c, UNIT) + walk(p, x_p, UNIT)
        value += tl.load(x_at, mask=inside).to(tl.float32)
    tl.store(
        y + b * aligned(y_b, UNIT) + walk(c, y_c, UNIT) + walk(p, y_p, UNIT), narrow(value, y), mask=inside
    )


@replayed
def masked_shift(x: Tensor | None, shift: Tensor, mask: Tensor, inverse: bool) -> Tensor:
    """Launch: x + (1 - mask) * shift, with minus for the inverse; without x the second term alone."""
    like = shift if x is None else x
    y = empty_output(like, torch.promote_types(like.dtype, shift.dtype))
    view = View([mask.expand(y.shape), *(() if x is None else (x,)), shift, y])
    arguments = view.arguments()
    if x is None:
        arguments[4:4] = None, 0, None, None
    channels, channels_last = y.shape[1], view.strides[-1].channel == 1
    unit = view.unit(channels, first=1)
    mask_unit = view.unit(channels, last=1)

    def run(config: Config) -> Tensor:
        blocks = view.batch * cdiv(channels, config["BLOCK_C"]) * cdiv(view.positions, config["BLOCK_P"])
        launch(
            masked_kernel, blocks, *arguments, channels, view.positions,
            INVERSE=inverse, MASK_UNIT=mask_unit, UNIT=unit, WIDE=view.is_wide(), device=y.device, **config,
        )  # fmt: skip
        return y

    candidates = elementwise(y.element_size(), 3, view.batch, channels, view.positions, channels_last)
    key = (like.dtype, shift.dtype, mask.dtype, unit, channels_last)
    return pick("masked", key, candidates, run, y.device)


def _case(dtype: torch.dtype, memory_format: torch.memory_format, with_x: bool) -> Case:
    shift = torch.empty((8, 256, 28, 28), dtype=dtype, device="meta").to(memory_format=memory_format)
    mask = torch.empty((28, 28), device="meta") > 0
    name = f"{'masked' if with_x else 'masked backward'}, {dtype}, {memory_format}".replace("torch.", "")
    return Case(
        name,
        lambda: masked_shift(shift if with_x else None, shift, mask, False),
        {"masked_kernel": "vectors"},
    )


COMPILE_CASES = [
    _case(dtype, memory_format, with_x)
    for dtype in (torch.float32, torch.bfloat16)
    for memory_format in (torch.contiguous_format, torch.channels_last)
    for with_x in (True, False)
]
