"""Squared norms of latents over channels, alone or with the products that an anomaly map needs."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.arithmetic import one_minus_exp
from usf_kernels.kernels.configs import Config, elementwise, pick, reduction
from usf_kernels.kernels.launch import (
    Case,
    aligned,
    bound,
    cdiv,
    launch,
    narrow,
    runtime,
    tile,
    walk,
)
from usf_kernels.kernels.layout import View, empty_output
from usf_kernels.kernels.replay import replayed

LATENTS = ("z_b", "z_c", "z_p", "channels", "positions", "widths", "offsets", "starts")


@triton.jit
def load_channels(z, c, p, z_c, z_p, C, P, UNIT: tl.constexpr):
    """Values at channels c and positions p as float32, 0 outside."""
    at = z + walk(c, z_c, UNIT) + walk(p, z_p, UNIT)
    return tl.load(at, mask=(c < C) & (p < P), other=0.0).to(tl.float32)


@triton.jit
def reduce_channels(
    z, z_b, z_c, z_p, C, P, W,  # (b, C, P) with rows of W positions
    maps, program, batch,
    NEIGHBOURS: tl.constexpr, LIKELIHOOD: tl.constexpr,
    UNIT: tl.constexpr, ROW_UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store the squared norm over channels at each position, or 1 - exp(-norm / 2C). With NEIGHBOURS, also
    store the inner products with the right and with the lower neighbour, and the sum of those along both
    diagonals. maps: (1 or 4, batch, P)."""
    channels = C
    C = bound(C, z_c, UNIT)
    tiles = tl.cdiv(P, BLOCK_P)
    b = (program // tiles).to(tl.int64)
    p = (program % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    c = tl.arange(0, BLOCK_C)[:, None]
    if WIDE:
        p = p.to(tl.int64)
        c = c.to(tl.int64)
    end = bound(P, z_p, UNIT)
    z += b * aligned(z_b, UNIT)
    own = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    if NEIGHBOURS:
        right = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        down = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        diagonals = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        in_row = p % W < W - 1
        W = aligned(W, ROW_UNIT)
    for _ in range(0, C, BLOCK_C):
        value = load_channels(z, c, p, z_c, z_p, C, end, UNIT)
        own += value * value
        if NEIGHBOURS:
            below = load_channels(z, c, p + W, z_c, z_p, C, end, UNIT)
            beside = load_channels(z, c, p + 1, z_c, z_p, C, end, UNIT)
            corner = load_channels(z, c, p + W + 1, z_c, z_p, C, end, UNIT)
            down += value * below
            right += value * beside
            diagonals += value * corner + below * beside
        c += BLOCK_C
    norm = tl.sum(own, 0, keep_dims=True)
    row = maps + b * P + p
    inside = p < P
    if LIKELIHOOD:
        norm = one_minus_exp(norm / (2.0 * channels))
    tl.store(row, norm, mask=inside)
    if NEIGHBOURS:
        size = batch.to(tl.int64) * P
        # At the end of a row, p + 1 is the first position of the next row, which is no neighbour.
        tl.store(row + size, tl.where(in_row, tl.sum(right, 0, keep_dims=True), 0.0), mask=inside)
        tl.store(row + 2 * size, tl.sum(down, 0, keep_dims=True), mask=inside)
        tl.store(row + 3 * size, tl.where(in_row, tl.sum(diagonals, 0, keep_dims=True), 0.0), mask=inside)


@triton.jit(do_not_specialize=[*LATENTS, "batch"])
def reduce_kernel(
    latents, z_b, z_c, z_p, channels, positions, widths,  # of each scale
    maps, offsets,  # where each scale's maps begin
    starts,  # the first program of each scale
    batch,
    NEIGHBOURS: tl.constexpr, LIKELIHOOD: tl.constexpr,
    UNITS: tl.constexpr, ROW_UNITS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for i in tl.static_range(len(latents)):
        if (program >= starts[i]) & (program < starts[i + 1]):
            reduce_channels(
                latents[i], z_b[i], z_c[i], z_p[i], channels[i], positions[i], widths[i],
                maps + offsets[i], program - starts[i], batch,
                NEIGHBOURS, LIKELIHOOD, UNITS[i], ROW_UNITS[i], WIDE, BLOCK_C, BLOCK_P,
            )  # fmt: skip


@triton.jit(do_not_specialize=runtime("g", "z", "gz"))
def squared_norm_backward_kernel(
    g, g_b, g_c, g_p,  # (b, 1, P), gradient of the norms
    z, z_b, z_c, z_p,  # (b, C, P)
    gz, gz_b, gz_c, gz_p,  # (b, C, P) out
    C, P,
    UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C = bound(C, gz_c, UNIT)
    P = bound(P, gz_p, UNIT)
    b, c, p = tile(C, P, BLOCK_C, BLOCK_P, WIDE)
    grad = tl.load(g + b * g_b + walk(p, g_p, 1), mask=p < P, other=0.0).to(tl.float32)
    value = load_channels(z + b * aligned(z_b, UNIT), c, p, z_c, z_p, C, P, UNIT)
    gz_at = gz + b * aligned(gz_b, UNIT) + walk(c, gz_c, UNIT) + walk(p, gz_p, UNIT)
    tl.store(gz_at, narrow(2 * grad * value, gz), mask=(c < C) & (p < P))


# --------------------------------------------------------------------------------------------- launchers


@replayed
def squared_norm(z: Tensor) -> Tensor:
    """Launch: see `usf_kernels.ops.squared_norm`."""
    norms = z.new_empty((z.shape[0], *z.shape[2:]), dtype=torch.float32)
    view = View([z, norms.unsqueeze(1)])
    return reduce([view], norms, [0], neighbours=False, likelihood=False)


@replayed
def squared_norm_backward(grad: Tensor, z: Tensor) -> Tensor:
    """Gradient of z, given that of its squared norms."""
    grad_z = empty_output(z, z.dtype)
    view = View([grad.unsqueeze(1), z, grad_z])
    channels, channels_last = z.shape[1], view.strides[-1].channel == 1
    unit = view.unit(channels, first=1)

    def run(config: Config) -> Tensor:
        blocks = view.batch * cdiv(channels, config["BLOCK_C"]) * cdiv(view.positions, config["BLOCK_P"])
        launch(
            squared_norm_backward_kernel, blocks, *view.arguments(), channels, view.positions,
            UNIT=unit, WIDE=view.is_wide(), device=z.device, **config,
        )  # fmt: skip
        return grad_z

    candidates = elementwise(z.element_size(), 2, view.batch, channels, view.positions, channels_last)
    key = (z.dtype, grad.dtype, unit, channels_last)
    return pick("squared_norm_backward", key, candidates, run, z.device)


def reduce(
    views: list[View], maps: Tensor, offsets: list[int], *, neighbours: bool, likelihood: bool
) -> Tensor:
    """Reduce the channels of all views in one launch, and write to `maps` at `offsets`."""
    latents = [view.tensors[0] for view in views]
    strides = list(zip(*(view.arguments()[1:4] for view in views), strict=True))
    channels, positions = tuple(z.shape[1] for z in latents), [view.positions for view in views]
    widths = [z.shape[-1] if neighbours else 1 for z in latents]
    units = tuple(view.unit(view.tensors[0].shape[1], last=1) for view in views)
    row_units = tuple(math.gcd(8, width) for width in widths)
    wide, batch = any(view.is_wide() for view in views), views[0].batch

    def run(config: Config) -> Tensor:
        programs = [batch * cdiv(count, config["BLOCK_P"]) for count in positions]
        starts = tuple(sum(programs[:i]) for i in range(len(programs) + 1))
        launch(
            reduce_kernel, starts[-1], tuple(latents), *strides, channels, tuple(positions), tuple(widths),
            maps, tuple(offsets), starts, batch,
            NEIGHBOURS=neighbours, LIKELIHOOD=likelihood, UNITS=units, ROW_UNITS=row_units, WIDE=wide,
            device=maps.device, **config,
        )  # fmt: skip
        return maps

    largest = max(range(len(views)), key=lambda i: latents[i].numel())
    channels_last = views[largest].strides[0].channel == 1
    itemsize, operands = max(z.element_size() for z in latents), 4 if neighbours else 1
    candidates = reduction(itemsize, operands, channels[largest], batch * positions[largest], channels_last)
    key = (latents[largest].dtype, neighbours, units[largest], channels_last)
    return pick("reduce", key, candidates, run, maps.device)


# ------------------------------------------------------------------------------------------ compiled offline


def _cases(dtype: torch.dtype, memory_format: torch.memory_format) -> list[Case]:
    z = torch.empty((8, 256, 32, 32), dtype=dtype, device="meta").to(memory_format=memory_format)
    needs = {"reduce_kernel": "vector loads", "squared_norm_backward_kernel": "vectors"}
    many = z.repeat(8, 1, 2, 2).to(memory_format=memory_format)
    calls = {
        "squared norm": lambda: squared_norm(z),
        "squared norm of many positions": lambda: squared_norm(many),
        "squared norm backward": lambda: squared_norm_backward(z.select(1, 0).float().contiguous(), z),
    }
    return [
        Case(f"{name}, {dtype}, {memory_format}".replace("torch.", ""), call, needs)
        for name, call in calls.items()
    ]


COMPILE_CASES = [
    case
    for dtype in (torch.float32, torch.bfloat16)
    for memory_format in (torch.contiguous_format, torch.channels_last)
    for case in _cases(dtype, memory_format)
]
