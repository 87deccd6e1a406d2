"""The gradient of a product with respect to its matrix: outer products summed over all positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.cases import product_cases
from usf_kernels.kernels.configs import Config, pick
from usf_kernels.kernels.launch import (
    aligned,
    bound,
    cdiv,
    is_recording,
    launch,
    product_precision,
    runtime,
    walk,
)
from usf_kernels.kernels.layout import View
from usf_kernels.kernels.plain import full_precision
from usf_kernels.kernels.products import dot, power_of_2
from usf_kernels.kernels.replay import replayed

UNSPECIALIZED = [*runtime(*"ax"), "M", "N", "blocks", "run"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def outer_kernel(
    a, a_b, a_c, a_p,  # (b, M, P) in
    x, x_b, x_c, x_p,  # (b, N, P) in
    out,  # (S, M, N), contiguous: the sums over each of S runs of blocks of positions
    M, N, P, blocks, run,  # blocks of positions: in total, and per run
    PRECISION: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_p = tl.cdiv(P, BLOCK_P)
    program = tl.program_id(0)
    s = program // (tiles_m * tiles_n)
    m = program // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        m_at = m.to(tl.int64)
        n_at = n.to(tl.int64)
    else:
        m_at = m
        n_at = n
    a_at = a + walk(m_at, a_c, UNIT)[:, None]
    x_at = x + walk(n_at, x_c, UNIT)[None, :]
    a_inside = (m < bound(M, a_c, UNIT))[:, None]
    x_inside = (n < bound(N, x_c, UNIT))[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(s * run, tl.minimum(s * run + run, blocks)):
        b = (block // tiles_p).to(tl.int64)
        p = block % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
        if WIDE:
            p = p.to(tl.int64)
        left = tl.load(
            a_at + b * aligned(a_b, UNIT) + walk(p, a_p, UNIT)[None, :],
            mask=a_inside & (p < bound(P, a_p, UNIT))[None, :],
            other=0.0,
        )
        right = tl.load(
            x_at + b * aligned(x_b, UNIT) + walk(p, x_p, UNIT)[:, None],
            mask=x_inside & (p < bound(P, x_p, UNIT))[:, None],
            other=0.0,
        )
        acc = dot(left, right, acc, PRECISION)
    at = out + s.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(at, acc, mask=(m < M)[:, None] & (n < N)[None, :])


@replayed
def outer(a: Tensor, x: Tensor) -> Tensor:
    """Sum over the batch and all positions of `a x^T`: (M, N) in float32.

    a (B, M, *spatial) and x (B, N, *spatial) are multiplied in their common dtype, or in float32.

    Positions are summed in runs, then the runs' sums are summed, so that the same input gives the same bits.
    Large float32 products go to the vendor's library; cuBLAS promises the same.
    """
    rows, columns = a.shape[1], x.shape[1]
    if rows * columns == 0:
        return a.new_empty((rows, columns), dtype=torch.float32)
    if _vendor_is_faster(a, x):
        return vendor_outer(a, x)
    view = View([a, x])

    def run(config: Config) -> Tensor:
        blocks = view.batch * cdiv(view.positions, config["BLOCK_P"])
        tiles_mn = cdiv(rows, config["BLOCK_M"]) * cdiv(columns, config["BLOCK_N"])
        length = max(4, cdiv(blocks, cdiv(256, tiles_mn)))
        runs = max(1, cdiv(blocks, length))
        partial = a.new_empty((runs, rows, columns), dtype=torch.float32)
        launch(
            outer_kernel, runs * tiles_mn, *view.arguments(), partial, rows, columns, view.positions, blocks,
            length, PRECISION=product_precision(), UNIT=view.unit(rows, columns), WIDE=view.is_wide(),
            device=a.device, **config,
        )  # fmt: skip
        return partial[0] if runs == 1 else partial.sum(0)

    if a.dtype == x.dtype != torch.float32:
        shapes = ((64, 64, 64, 4), (128, 128, 64, 8))
    elif product_precision() == "tf32":
        shapes = ((64, 64, 32, 4), (128, 128, 32, 8))
        shapes = shapes[::-1] if min(rows, columns) >= 384 else shapes
    else:
        shapes = ((64, 32, 16, 4),)
    candidates = [
        {
            "BLOCK_M": power_of_2(rows, 16, block_m), "BLOCK_N": power_of_2(columns, 16, block_n),
            "BLOCK_P": block_p, "num_warps": warps, "num_stages": 3,
        }
        for block_m, block_n, block_p, warps in shapes
    ]  # fmt: skip
    return pick("outer", (a.dtype, x.dtype), candidates, run, a.device)


def _vendor_is_faster(a: Tensor, x: Tensor) -> bool:
    if is_recording() or not (a.dtype == x.dtype == torch.float32):
        return False
    channels_last = a.ndim == 2 or (a.stride(1) == 1 and x.stride(1) == 1)
    return min(a.shape[1], x.shape[1]) >= 64 and (channels_last or product_precision() == "ieee")


def vendor_outer(a: Tensor, x: Tensor) -> Tensor:
    """`outer` by the vendor's library; a and x share one dtype."""
    with full_precision(x):
        return _flat(a) @ _flat(x).mT


def _flat(x: Tensor) -> Tensor:
    """Reshape x to (C, B * positions), without a copy if it is channels-last."""
    if x.ndim > 2 and x.stride(1) != 1:
        return x.movedim(1, 0).flatten(1)
    return x.movedim(1, -1).flatten(0, -2).mT


COMPILE_CASES = [
    case
    for channels_last in (False, True)
    for case in product_cases(
        "outer",
        "outer_kernel",
        lambda new: outer(new(8, 256, 28, 28), new(8, 256, 28, 28)),
        channels_last,
    )
]
