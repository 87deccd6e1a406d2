"""Anomaly maps of several scales, in two launches whatever the number of scales.

The first launch reads every latent once and writes small maps of inner products; the second resizes and
averages these. In a single launch, each tile of the result would have to reduce the latents under and around
it again.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.arithmetic import one_minus_exp
from usf_kernels.kernels.configs import Config, pick
from usf_kernels.kernels.launch import Case, aligned, cdiv, launch, warp_size
from usf_kernels.kernels.layout import View
from usf_kernels.kernels.replay import replayed
from usf_kernels.kernels.score import reduce


@triton.jit
def source(out, scale, n):
    """Two source indices and their weights for pixels `out` of a resized axis, with align_corners=False."""
    position = (out.to(tl.float32) + 0.5) * scale - 0.5
    position = tl.minimum(tl.maximum(position, 0.0), (n - 1).to(tl.float32))
    first = position.to(tl.int32)
    weight = position - first.to(tl.float32)
    return first, tl.minimum(first + 1, n - 1), 1 - weight, weight


@triton.jit
def blend(pairs, neighbours, row0, row1, v0, v1):
    """Squared norms of v0 * z[i] + v1 * z[j], given those of z[i] and z[j] at row0 and row1 of `pairs`, and
    the product of z[i] and z[j] at row0 of `neighbours`."""
    ends = v0 * v0 * tl.load(pairs + row0) + v1 * v1 * tl.load(pairs + row1)
    return ends + 2 * v0 * v1 * tl.load(neighbours + row0)


@triton.jit(
    do_not_specialize=["offsets", "channels", "heights", "widths", "ratios_y", "ratios_x", "batch", "H", "W"]
)
def resize_kernel(
    maps, offsets, channels, heights, widths, ratios_y, ratios_x,  # of each scale
    out, batch, H, W,  # (batch, H, W)
    LATENT: tl.constexpr, UNIT: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Average the resized maps of all scales. With LATENT, average 1 - exp(-u / 2C), where u is the squared
    norm of the resized latents, a quadratic form in the maps of products."""
    program = tl.program_id(0)
    W = aligned(W, UNIT)
    tiles_x, tiles_y = tl.cdiv(W, BLOCK_X), tl.cdiv(H, BLOCK_Y)
    b = (program // (tiles_x * tiles_y)).to(tl.int64)
    y = (program // tiles_x % tiles_y * BLOCK_Y + tl.arange(0, BLOCK_Y))[:, None]
    x = (program % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    total = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    for i in tl.static_range(len(heights)):
        h, w = heights[i], widths[i]
        y0, y1, v0, v1 = source(y, ratios_y[i], h)
        x0, x1, u0, u1 = source(x, ratios_x[i], w)
        own = maps + offsets[i] + b * h * w
        if LATENT:
            size = batch.to(tl.int64) * h * w
            right, down, diagonals = own + size, own + 2 * size, own + 3 * size
            upper = blend(own + y0 * w, right + y0 * w, x0, x1, u0, u1)
            lower = blend(own + y1 * w, right + y1 * w, x0, x1, u0, u1)
            crossed = u0 * u0 * tl.load(down + y0 * w + x0) + u1 * u1 * tl.load(down + y0 * w + x1)
            crossed += u0 * u1 * tl.load(diagonals + y0 * w + x0)
            norm = v0 * v0 * upper + v1 * v1 * lower + 2 * v0 * v1 * crossed
            norm = tl.where(norm < 0, 0.0, norm)  # rounding errors, where the corners cancel
            total += one_minus_exp(norm / (2.0 * channels[i]))
        else:
            upper = u0 * tl.load(own + y0 * w + x0) + u1 * tl.load(own + y0 * w + x1)
            lower = u0 * tl.load(own + y1 * w + x0) + u1 * tl.load(own + y1 * w + x1)
            total += v0 * upper + v1 * lower
    tl.store(out + (b * H + y) * W + x, total / len(heights), mask=(y < H) & (x < W))


# --------------------------------------------------------------------------------------------- launchers


@replayed
def anomaly_map(latents: list[Tensor], size: list[int], latent: bool) -> Tensor:
    """Launch: see `usf_kernels.ops.anomaly_map`; `latent` for interpolate="latent"."""
    batch, device = latents[0].shape[0], latents[0].device
    height, width = size
    kinds = 4 if latent else 1
    lengths = [kinds * batch * z.shape[2] * z.shape[3] for z in latents]
    offsets = [sum(lengths[:i]) for i in range(len(lengths))]
    maps = torch.empty(sum(lengths), dtype=torch.float32, device=device)
    views = [View([z], merge_batch=False) for z in latents]
    reduce(views, maps, offsets, neighbours=latent, likelihood=not latent)
    out = torch.empty((batch, 1, height, width), dtype=torch.float32, device=device)
    heights, widths = [z.shape[2] for z in latents], [z.shape[3] for z in latents]

    def run(config: Config) -> Tensor:
        blocks = batch * cdiv(height, config["BLOCK_Y"]) * cdiv(width, config["BLOCK_X"])
        launch(
            resize_kernel, blocks, maps, tuple(offsets), tuple(z.shape[1] for z in latents),
            tuple(heights), tuple(widths), tuple(h / height for h in heights),
            tuple(w / width for w in widths), out, batch, height, width,
            LATENT=latent, UNIT=math.gcd(8, width), device=device, **config,
        )  # fmt: skip
        return out

    candidates = [
        {"BLOCK_Y": rows * warp_size() // 32, "BLOCK_X": 128, "num_warps": warps}
        for rows, warps in ((4, 4), (1, 1), (8, 4))
    ]
    return pick("resize", (latent, len(latents), batch * height * width > 2**18), candidates, run, device)


# ------------------------------------------------------------------------------------------ compiled offline


def _cases(dtype: torch.dtype, memory_format: torch.memory_format) -> list[Case]:
    shapes = ((8, 816, 28, 28), (8, 192, 16, 16))
    scales = [
        torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format) for shape in shapes
    ]
    needs = {"reduce_kernel": "vector loads", "resize_kernel": "vector stores"}
    calls = {
        "likelihood map": lambda: anomaly_map(scales, [448, 448], False),
        "latent map": lambda: anomaly_map(scales, [448, 448], True),
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
