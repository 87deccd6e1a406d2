"""Couplings with a split in one pass over their tensors: additive and affine, forward and inverse, with the
scale, the shift and the permutation that follow them in a flow."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.arithmetic import tanh
from usf_kernels.kernels.configs import Config, elementwise, pick
from usf_kernels.kernels.launch import Case, aligned, bound, cdiv, launch, narrow, runtime, tile, walk
from usf_kernels.kernels.layout import View, contiguous, empty_output
from usf_kernels.kernels.replay import replayed


@triton.jit(do_not_specialize=[*runtime("x", "t", "y"), "split", "clamp"])
def coupling_kernel(
    x, x_b, x_c, x_p,  # (b, C, P) in
    t, t_b, t_c, t_p,  # (b, C - split, P), or twice the channels: raw scales, then raw shifts
    y, y_b, y_c, y_p,  # (b, C, P) out
    index, scale, bias,  # (C,) each, or None
    partial,  # this program's part of the log-determinant; per position, one row for each tile of channels
    C, P, split, clamp,
    AFFINE: tl.constexpr, INVERSE: tl.constexpr, PER_POSITION: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The coupled channel `inner`, scaled and shifted, becomes channel `outer`, with inner = index[outer].
    Forward, x is the inner side and y the outer one; the inverse goes the other way."""
    C = bound(C, y_c, UNIT)
    P = bound(P, y_p, UNIT)
    split = bound(split, y_c, UNIT)
    b, outer, p = tile(C, P, BLOCK_C, BLOCK_P, WIDE)
    inside = (outer < C) & (p < P)
    inner = outer
    if index is not None:
        inner = tl.load(index + outer, mask=outer < C, other=0).to(outer.dtype)
    x_at = x + b * aligned(x_b, UNIT) + walk(outer if INVERSE else inner, x_c, UNIT) + walk(p, x_p, UNIT)
    y_at = y + b * aligned(y_b, UNIT) + walk(inner if INVERSE else outer, y_c, UNIT) + walk(p, y_p, UNIT)
    t_at = t + b * aligned(t_b, UNIT) + walk(inner - split, t_c, UNIT) + walk(p, t_p, UNIT)
    active = inside & (inner >= split)
    value = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if INVERSE and scale is not None:
        gain = tl.load(scale + inner, mask=outer < C, other=1.0).to(tl.float32)
        value = (value - tl.load(bias + inner, mask=outer < C, other=0.0).to(tl.float32)) / gain
    if AFFINE:
        raw = tl.load(t_at, mask=active, other=0.0).to(tl.float32)
        shift = 0.1 * tl.load(t_at + walk((C - split).to(outer.dtype), t_c, UNIT), mask=active, other=0.0).to(
            tl.float32
        )
        log_scale = clamp * tanh(0.1 * raw)
        if INVERSE:
            log_scale = -log_scale
            value = (value - shift) * tl.exp(log_scale)
        else:
            value = value * tl.exp(log_scale) + shift
        if PER_POSITION:
            row = partial + (tl.program_id(0) // tl.cdiv(P, BLOCK_P)).to(tl.int64) * P
            tl.store(row + p, tl.sum(log_scale, 0, keep_dims=True), mask=p < P)
        else:
            tl.store(partial + tl.program_id(0), tl.sum(log_scale))
    else:
        shift = tl.load(t_at, mask=active, other=0.0).to(tl.float32)
        value = value - shift if INVERSE else value + shift
    if not INVERSE and scale is not None:
        gain = tl.load(scale + inner, mask=outer < C, other=1.0).to(tl.float32)
        value = value * gain + tl.load(bias + inner, mask=outer < C, other=0.0).to(tl.float32)
    tl.store(y_at, narrow(value, y), mask=inside)


# --------------------------------------------------------------------------------------------- launchers


class Tiles:
    """The tiles of one launch: its operands as the kernel walks them (the last has all C channels), and what
    the configuration may depend on."""

    def __init__(self, tensors: list[Tensor], split: int, affine: bool, fixed_channels: bool) -> None:
        x = tensors[-1]
        # Vectors have a log-determinant per row, so they may share tiles; those of images must not mix.
        self.per_position = affine and math.prod(x.shape[2:]) == 1
        group = 1 if fixed_channels else math.gcd(split, x.shape[1] - split)
        self.view = View(tensors, group=group, merge_batch=self.per_position or not affine)
        self.channels, self.split = x.shape[1] // self.view.group, split // self.view.group
        self.unit = self.view.unit(self.channels, self.split)
        self.channels_last = self.view.strides[-1].channel == 1
        self.itemsize = max([tensor.element_size() for tensor in tensors])

    def candidates(self, operands: int, permuted: bool = False) -> list[Config]:
        gathers = permuted and self.channels_last
        if gathers:
            operands = 8  # counted as many: an address per value takes registers
        return elementwise(
            self.itemsize, operands, self.view.batch, self.channels, self.view.positions, self.channels_last,
            whole=gathers,
        )  # fmt: skip

    def counts(self, config: Config) -> tuple[int, int]:
        """Number of tiles along channels, and along positions."""
        return cdiv(self.channels, config["BLOCK_C"]), cdiv(self.view.positions, config["BLOCK_P"])

    def key(self, *flags: object) -> tuple:
        dtypes = [tensor.dtype for tensor in self.view.tensors]
        return *dtypes, self.unit, self.channels_last, *flags


def additive_coupling(x: Tensor, shift: Tensor, split: int, inverse: bool) -> Tensor:
    """Launch: see `usf_kernels.ops.additive_coupling`."""
    return coupling_step(x, shift, None, None, None, split, None, inverse)[0]


@replayed
def coupling_step(
    x: Tensor,
    params: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    split: int,
    clamp: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Launch: see `usf_kernels.ops.step.coupling_step`. Additive where `clamp` is None; the
    log-determinant is then empty."""
    affine = clamp is not None
    index, scale, bias = contiguous(index, scale, bias)
    y = empty_output(x, torch.promote_types(x.dtype, params.dtype))
    tiles = Tiles([x, params, y], split, affine, index is not None or scale is not None)
    view = tiles.view

    def run(config: Config) -> tuple[Tensor, Tensor]:
        tiles_c, tiles_p = tiles.counts(config)
        shape = (tiles_c, view.positions) if tiles.per_position else (view.batch, tiles_c * tiles_p)
        partial = x.new_empty(shape, dtype=torch.float32) if affine else None
        launch(
            coupling_kernel, view.batch * tiles_c * tiles_p, *view.arguments(), index, scale, bias, partial,
            tiles.channels, view.positions, tiles.split, clamp or 0.0,
            AFFINE=affine, INVERSE=inverse, PER_POSITION=tiles.per_position,
            UNIT=tiles.unit, WIDE=view.is_wide(), device=x.device, **config,
        )  # fmt: skip
        if partial is None:
            return y, x.new_empty(0, dtype=torch.float32)
        return y, partial.sum(0 if tiles.per_position else 1)

    key = tiles.key(affine, index is None, scale is None)
    return pick("coupling", key, tiles.candidates(3 if affine else 2, index is not None), run, x.device)


# ------------------------------------------------------------------------------------------ compiled offline


def coupling_case_inputs(
    dtype: torch.dtype, channels_last: bool
) -> tuple[Tensor, tuple[None, None, None], tuple[Tensor, Tensor, Tensor]]:
    """Return x and two exits of a coupling: none, and a permutation, scale and bias."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty((8, 256, 28, 28), dtype=dtype, device="meta").to(memory_format=memory_format)
    vector = torch.empty(256, device="meta")
    return x, (None, None, None), (vector.to(torch.int64), vector, vector)


def coupling_cases(
    calls: dict[str, Callable], kernel: str, dtype: torch.dtype, channels_last: bool
) -> list[Case]:
    """Make a case of each call; the kernel has to move whole vectors, except in channels-last steps."""
    layout = "channels last" if channels_last else "contiguous"

    def needs(name: str) -> dict[str, str]:
        # A permutation along the contiguous axis gathers one value at a time.
        return {} if channels_last and "step" in name else {kernel: "vectors"}

    return [
        Case(f"{name}, {dtype}, {layout}".replace("torch.", ""), call, needs(name))
        for name, call in calls.items()
    ]


def _cases(dtype: torch.dtype, channels_last: bool) -> list[Case]:
    x, no_exit, full_exit = coupling_case_inputs(dtype, channels_last)

    def step(exits: tuple, inverse: bool) -> Callable:
        return lambda: coupling_step(x, x, *exits, 128, 2.0, inverse)

    calls = {
        "additive": lambda: additive_coupling(x, x[:, 128:], 128, False),
        "affine": step(no_exit, False),
        "affine step": step(full_exit, False),
        "affine step inverse": step(full_exit, True),
    }
    return coupling_cases(calls, "coupling_kernel", dtype, channels_last)


COMPILE_CASES = [
    case
    for dtype in (torch.float32, torch.bfloat16)
    for channels_last in (False, True)
    for case in _cases(dtype, channels_last)
]
