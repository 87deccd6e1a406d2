"""Matrix products over the channels of (B, C, *spatial) tensors, and what follows them, in one kernel.

A tile holds positions along its rows and output channels along its columns, whatever the memory format:
tensor cores want at least 64 rows, which maps have, while channels may be as few as 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.cases import product_cases
from usf_kernels.kernels.configs import MANY_POSITIONS, Config, kind_of, pick
from usf_kernels.kernels.launch import (
    INTERPRETED,
    Case,
    aligned,
    bound,
    capability,
    cdiv,
    launch,
    narrow,
    product_precision,
    runtime,
    walk,
    warp_size,
)
from usf_kernels.kernels.layout import View, contiguous, empty_output
from usf_kernels.kernels.replay import replayed
from usf_kernels.kernels.vendor import vendor_is_faster, vendor_linear


def power_of_2(n: int, low: int, high: int) -> int:
    """The smallest power of 2 that is at least n, limited to [low, high]."""
    return min(max(triton.next_power_of_2(n), low), high)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, summed in float32; multiplied in the dtype of a and b, or in float32 if these differ."""
    if a.dtype != b.dtype or (
        INTERPRETED and a.dtype == tl.bfloat16
    ):  # the interpreter would multiply bits as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """ReLU, or no activation. NaN stays NaN."""
    if ACTIVATION == "relu":
        value = tl.where(value < 0, 0.0, value)
    return value


@triton.jit
def place(N, P, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Image (64 bits), positions (BLOCK_P,) and outputs (BLOCK_N,) of this program. Programs that differ only
    in their outputs are neighbours: all but the first find x in the cache."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_p = tl.cdiv(P, BLOCK_P)
    program = tl.program_id(0)
    p0 = program // tiles_n % tiles_p
    n0 = program % tiles_n
    if WIDE:
        p0 = p0.to(tl.int64)
        n0 = n0.to(tl.int64)
    p = p0 * BLOCK_P + tl.arange(0, BLOCK_P)
    n = n0 * BLOCK_N + tl.arange(0, BLOCK_N)
    return (program // (tiles_n * tiles_p)).to(tl.int64), p, n


@triton.jit
def contract(
    x_at, inside, x_c, matrix, m_n, m_k, n, N, K,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, MATRIX_UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Product (BLOCK_P, BLOCK_N) of x at the positions `x_at` with the rows `n` of the (N, K) matrix."""
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    x_inputs = bound(K, x_c, UNIT)
    matrix_inputs = bound(K, m_k, MATRIX_UNIT)
    rows = matrix + walk(n, m_n, MATRIX_UNIT)[None, :]
    rows_inside = (n < bound(N, m_n, MATRIX_UNIT))[None, :]
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if WIDE:
            k = k.to(tl.int64)
        value = tl.load(x_at + walk(k, x_c, UNIT)[None, :], mask=inside & (k < x_inputs)[None, :], other=0.0)
        weight = tl.load(
            rows + walk(k, m_k, MATRIX_UNIT)[:, None],
            mask=rows_inside & (k < matrix_inputs)[:, None],
            other=0.0,
        )
        acc = dot(value, weight, acc, PRECISION)
    return acc


UNSPECIALIZED = [*runtime(*"xary"), "m_n", "m_k", "N", "K"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_kernel(
    x, x_b, x_c, x_p,  # (b, K, P) in
    bias_map, a_b, a_c, a_p,  # (b, N, P), added before the activation, or None
    residual, r_b, r_c, r_p,  # (b, N, P), added after it, or None
    y, y_b, y_c, y_p,  # (b, N, P) out
    matrix, m_n, m_k,  # (N, K)
    bias,  # (N,), or None
    N, K, P,
    ACTIVATION: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, MATRIX_UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, p, n = place(N, P, WIDE, BLOCK_P, BLOCK_N)
    p_inside = (p < bound(P, y_p, UNIT))[:, None]
    inside = p_inside & (n < bound(N, y_c, UNIT))[None, :]
    x_at = x + b * aligned(x_b, UNIT) + walk(p, x_p, UNIT)[:, None]
    value = contract(
        x_at, p_inside, x_c, matrix, m_n, m_k, n, N, K,
        PRECISION, UNIT, MATRIX_UNIT, WIDE, BLOCK_P, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if bias_map is not None:
        at = bias_map + b * aligned(a_b, UNIT) + walk(p, a_p, UNIT)[:, None] + walk(n, a_c, UNIT)[None, :]
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION)
    if residual is not None:
        at = residual + b * aligned(r_b, UNIT) + walk(p, r_p, UNIT)[:, None] + walk(n, r_c, UNIT)[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32) + SIGN * value
    at = y + b * aligned(y_b, UNIT) + walk(p, y_p, UNIT)[:, None] + walk(n, y_c, UNIT)[None, :]
    tl.store(at, narrow(value, y), mask=inside)


# --------------------------------------------------------------------------------------------- launchers


def matrix_arguments(matrix: Tensor) -> tuple[list[Any], int]:
    """Return the matrix and its strides in the form of `View.arguments`, and its unit like `View.unit`."""
    strides = matrix.stride()
    numbers = [s for s in strides if s != 1]
    numbers += [n for n, s in zip(matrix.shape, strides, strict=True) if s == 1]
    return [matrix, *(None if s == 1 else s for s in strides)], math.gcd(8, *numbers)


def tiles(dtype: torch.dtype, matrix: Tensor, view: View, *, sums: bool = False) -> list[Config]:
    """Candidates for a product of this dtype with an (N, K) matrix at the positions of a view; set `sums` if
    the kernel keeps sums of its own in registers. Tiles have enough outputs for x to be read few times, and
    their positions are halved until the tiles occupy a large GPU."""
    last, hopper = view.strides[0].channel == 1, capability(matrix.device) == 90
    sizes = *matrix.shape, view.batch, view.positions
    return _tiles(kind_of(dtype), *sizes, last, sums, hopper, warp_size())


@functools.lru_cache(4096)
def _tiles(
    kind: str,
    outputs: int,
    inputs: int,
    batch: int,
    positions: int,
    channels_last: bool,
    sums: bool,
    hopper: bool,
    warp: int,
) -> list[Config]:
    if kind == "ieee":  # no tensor cores: operands are in registers
        small = (64, 64, 16, 8, 3)
        if hopper:  # other devices run out of registers with these
            large = (64, 64, 32, 4, 3) if sums and channels_last else (128, 64, 32, 4, 2 if sums else 3)
        else:
            large = small if sums else (128, 64, 16, 8, 3)
        shapes = (large, small)
    elif kind == "half":
        shapes = ((64, 128, 64, 4, 3), (64, 64, 32, 4, 3))
        if outputs >= 512:
            shapes = ((128, 128, 64, 8, 3), *shapes)
        elif outputs >= 128 and hopper and batch * positions >= MANY_POSITIONS:
            shapes = ((128, 128, 64, 4, 3), *shapes)
    elif channels_last:
        shapes = ((64, 128, 32, 4, 4), (128, 128, 32, 8, 3))
        shapes = shapes[::-1] if outputs >= 384 else shapes
    else:
        shapes = ((32, 64, 32, 4, 3), (64, 128, 32, 4, 3))
    configs = []
    for most_p, most_n, most_k, warps, stages in shapes:
        block_n = power_of_2(outputs, 16, most_n)
        block_p = power_of_2(positions, 16, most_p)
        while block_p > 16 and batch * cdiv(positions, block_p) * cdiv(outputs, block_n) < 128:
            block_p //= 2
        config = {"BLOCK_P": block_p, "BLOCK_N": block_n, "BLOCK_K": power_of_2(inputs, 16, most_k)}
        # Small tiles get fewer warps, so that each thread still loads 16 bytes at a time.
        warps = max(1, min(warps, block_p * block_n // (16 * warp)))
        configs.append({**config, "num_warps": warps, "num_stages": stages})
    return configs


@replayed
def linear(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    bias_map: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    sign: int = 1,
) -> Tensor:
    """`residual + sign * activation(matrix @ x + bias + bias_map)` at every position.

    x (B, K, *spatial), matrix (N, K), bias (N,), bias_map and residual (B, N, *spatial) have any dtypes but
    float64. Products are in the promoted dtype of x and matrix, and accumulated in float32. Returns
    (B, N, *spatial) in the promoted dtype of x, matrix and residual.
    """
    dtype = torch.promote_types(x.dtype, matrix.dtype)
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    (bias,) = contiguous(bias)
    y = empty_output(x, dtype, matrix.shape[0])
    view = View([x, *(t for t in (bias_map, residual) if t is not None), y])
    operands = iter(view.arguments())
    arguments = []
    for tensor in (x, bias_map, residual, y):
        arguments += [None] * 4 if tensor is None else [next(operands) for _ in range(4)]
    matrix_arguments_, matrix_unit = matrix_arguments(matrix)
    unit = view.unit(*matrix.shape)

    def run(config: Config) -> Tensor:
        blocks = (
            view.batch * cdiv(view.positions, config["BLOCK_P"]) * cdiv(matrix.shape[0], config["BLOCK_N"])
        )
        launch(
            linear_kernel, blocks, *arguments, *matrix_arguments_, bias, *matrix.shape, view.positions,
            ACTIVATION=activation, SIGN=sign, PRECISION=product_precision(), UNIT=unit,
            MATRIX_UNIT=matrix_unit, WIDE=view.is_wide(), device=x.device, **config,
        )  # fmt: skip
        return y

    candidates = tiles(torch.promote_types(x.dtype, matrix.dtype), matrix, view)
    return pick("linear", (x.dtype, matrix.dtype, unit), candidates, run, x.device)


def matrix_product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`matrix @ x + bias` by `linear` or `vendor_linear`, whichever is faster at this size."""
    return (vendor_linear if vendor_is_faster(x, matrix) else linear)(x, matrix, bias)


# ---------------------------------------------------------------------------------- work, compiled offline


def _linear_cases(channels_last: bool) -> Iterator[Case]:
    def whole(new: Callable[..., Tensor]) -> None:
        linear(new(8, 256, 28, 28), new(256, 256), new(256))

    def with_epilogue(new: Callable[..., Tensor]) -> None:
        y = new(8, 256, 28, 28)
        linear(new(8, 64, 28, 28), new(256, 64), new(256), y, y, "relu", -1)

    def odd(new: Callable[..., Tensor]) -> None:
        linear(new(8, 19, 28, 28), new(19, 19), new(19))

    def many(new: Callable[..., Tensor]) -> None:
        linear(new(64, 256, 64, 64), new(256, 256), new(256))

    yield from product_cases("linear", "linear_kernel", whole, channels_last)
    yield from product_cases("linear, many positions", "linear_kernel", many, channels_last)
    yield from product_cases("linear with epilogue", "linear_kernel", with_epilogue, channels_last)
    if not channels_last:  # in channels-last memory, no row of 19 channels is aligned
        yield from product_cases("linear, 19 channels", "linear_kernel", odd, channels_last)


COMPILE_CASES = [*_linear_cases(False), *_linear_cases(True)]
