"""Squared norms of the outputs of linear maps, without writing the outputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.cases import product_cases
from usf_kernels.kernels.configs import Config, pick
from usf_kernels.kernels.launch import aligned, bound, cdiv, launch, product_precision, runtime, walk
from usf_kernels.kernels.layout import View, contiguous
from usf_kernels.kernels.products import (
    contract,
    matrix_arguments,
    place,
    tiles,
)
from usf_kernels.kernels.replay import replayed
from usf_kernels.kernels.score import squared_norm
from usf_kernels.kernels.vendor import vendor_is_faster, vendor_linear

UNSPECIALIZED = [*runtime(*"xu"), "m_n", "m_k", "N", "K", "run"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def squared_norm_kernel(
    x, x_b, x_c, x_p,  # (b, K, P) in
    u, u_b, u_c, u_p,  # (b, S, P) out: the sums over each of S runs of outputs
    matrix, m_n, m_k,  # (N, K)
    bias,  # (N,), or None
    N, K, P, run,  # outputs per run, a multiple of BLOCK_N
    PRECISION: tl.constexpr, UNIT: tl.constexpr, MATRIX_UNIT: tl.constexpr, WIDE: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, p, s = place(tl.cdiv(N, run), P, WIDE, BLOCK_P, 1)
    inside = p < bound(P, u_p, UNIT)
    x_at = x + b * aligned(x_b, UNIT) + walk(p, x_p, UNIT)[:, None]
    first = tl.program_id(0) % tl.cdiv(N, run) * run
    total = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(first, tl.minimum(first + run, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        z = contract(
            x_at, inside[:, None], x_c, matrix, m_n, m_k, n, N, K,
            PRECISION, UNIT, MATRIX_UNIT, WIDE, BLOCK_P, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if bias is not None:
            z += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if RAGGED:  # outputs past the last are NaN if x is infinite
            z = tl.where((n < N)[None, :], z, 0.0)
        total += tl.sum(z * z, axis=1)
    at = u + b * aligned(u_b, UNIT) + walk(p, u_p, UNIT)[:, None] + walk(s, u_c, UNIT)[None, :]
    tl.store(at, total[:, None], mask=inside[:, None])


@replayed
def linear_squared_norm(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`||matrix @ x + bias||^2` at every position, (B, *spatial) in float32; arguments as in `linear`."""
    if vendor_is_faster(x, matrix):
        return squared_norm(vendor_linear(x, matrix, bias))
    (bias,) = contiguous(bias)
    outputs, inputs = matrix.shape
    if outputs == 0:
        return x.new_zeros((x.shape[0], *x.shape[2:]), dtype=torch.float32)
    matrix_arguments_, matrix_unit = matrix_arguments(matrix)
    sizes = x.shape[0], x.shape[2:]
    whole = View([x, x.new_empty((sizes[0], 1, *sizes[1]), dtype=torch.float32)])

    def run(config: Config) -> Tensor:
        # One run over all outputs if the positions occupy the GPU; else several, summed afterwards.
        tiles_n = cdiv(outputs, config["BLOCK_N"])
        tiles_p = whole.batch * cdiv(whole.positions, config["BLOCK_P"])
        length = cdiv(tiles_n, min(tiles_n, cdiv(128, max(1, tiles_p)))) * config["BLOCK_N"]
        runs = cdiv(outputs, length)
        u = x.new_empty((sizes[0], runs, *sizes[1]), dtype=torch.float32)
        view = View([whole.tensors[0], u])
        unit = min(view.unit(inputs, last=1), view.unit(runs, first=1, last=2))
        programs = runs * view.batch * cdiv(view.positions, config["BLOCK_P"])
        launch(
            squared_norm_kernel, programs, *view.arguments(), *matrix_arguments_, bias, outputs, inputs,
            view.positions, length, PRECISION=product_precision(), UNIT=unit,
            MATRIX_UNIT=matrix_unit, WIDE=view.is_wide(), RAGGED=outputs % config["BLOCK_N"] != 0,
            device=x.device, **config,
        )  # fmt: skip
        return u[:, 0] if runs == 1 else u.sum(1)

    candidates = tiles(torch.promote_types(x.dtype, matrix.dtype), matrix, whole, sums=True)
    key = (x.dtype, matrix.dtype)
    return pick("linear_squared_norm", key, candidates, run, x.device)


COMPILE_CASES = [
    case
    for channels_last in (False, True)
    for name, size in (("", (8, 256, 28, 28)), (", many positions", (64, 256, 64, 64)))
    for case in product_cases(
        f"linear_squared_norm{name}",
        "squared_norm_kernel",
        lambda new, size=size: linear_squared_norm(new(*size), new(256, 256), new(256)),
        channels_last,
    )
]
