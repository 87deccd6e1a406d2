"""Couplings in one pass over their tensors."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.configs import Config, elementwise, pick
from usf_kernels.kernels.launch import aligned, bound, cdiv, launch, narrow, tile, walk
from usf_kernels.kernels.layout import View, empty_output

SIZES = ["C", "P", "split"]
STRIDES = [f"{name}_{axis}" for name in ("x", "t", "y") for axis in "bcp"]


@triton.jit(do_not_specialize=SIZES + STRIDES)
def coupling_kernel(
    x, x_b, x_c, x_p,  # (b, C, P) in
    t, t_b, t_c, t_p,  # (b, C - split, P), the conditioner's output
    y, y_b, y_c, y_p,  # (b, C, P) out
    C, P, split,
    INVERSE: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C = bound(C, y_c, UNIT)
    P = bound(P, y_p, UNIT)
    split = bound(split, y_c, UNIT)
    b, c, p = tile(C, P, BLOCK_C, BLOCK_P, WIDE)
    inside = (c < C) & (p < P)
    active = inside & (c >= split)
    x_at = x + b * aligned(x_b, UNIT) + walk(c, x_c, UNIT) + walk(p, x_p, UNIT)
    t_at = t + b * aligned(t_b, UNIT) + walk(c - split, t_c, UNIT) + walk(p, t_p, UNIT)
    y_at = y + b * aligned(y_b, UNIT) + walk(c, y_c, UNIT) + walk(p, y_p, UNIT)
    value = tl.load(x_at, mask=inside).to(tl.float32)
    shift = tl.load(t_at, mask=active, other=0.0).to(tl.float32)
    value = value - shift if INVERSE else value + shift
    tl.store(y_at, narrow(value, y), mask=inside)


def additive_coupling(x: Tensor, shift: Tensor, split: int, inverse: bool) -> Tensor:
    """Launch: see `usf_kernels.ops.additive_coupling`."""
    y = empty_output(x, torch.promote_types(x.dtype, shift.dtype))
    view = View([x, shift, y], group=math.gcd(split, x.shape[1] - split))
    channels, split = x.shape[1] // view.group, split // view.group
    unit, channels_last = view.unit(channels, split), view.strides[-1].channel == 1

    def run(config: Config) -> Tensor:
        blocks = view.batch * cdiv(channels, config["BLOCK_C"]) * cdiv(view.positions, config["BLOCK_P"])
        launch(
            coupling_kernel, blocks, *view.arguments(), channels, view.positions, split,
            INVERSE=inverse, UNIT=unit, WIDE=view.is_wide(), device=x.device, **config,
        )  # fmt: skip
        return y

    candidates = elementwise(y.element_size(), channels, view.positions, channels_last)
    key = (x.dtype, shift.dtype, unit, channels_last, *candidates[0].values())
    return pick("coupling", key, candidates, run, x.device)
