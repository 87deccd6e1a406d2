"""Operations on chosen columns of rows (N, C), in one pass each: select, add, affine coupling."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.arithmetic import tanh
from usf_kernels.kernels.configs import Config, choose, elementwise, pick, reduction
from usf_kernels.kernels.launch import Case, cdiv, launch, narrow, walk
from usf_kernels.kernels.replay import replayed

# Sizes, strides and factors: a change of their values must not compile a new kernel.
UNSPECIALIZED = ["N", "M", "rows_n", "rows_c", "values_n", "values_c", "factor", "clamp"]


@triton.jit
def columns_at(rows, rows_n, rows_c, n, column):
    """Pointers to the elements in these rows and columns, which come in any order. The strides of the other
    operands get no divisibility hints: with them the compiler gives each thread a vector of columns, and a
    warp then gathers from many rows at once."""
    return rows + n * rows_n + walk(column, rows_c, 1)


@triton.jit
def rows_tile(M, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows (BLOCK_P, 1), in 64 bits, and places (1, BLOCK_C) in the index of columns, of this program."""
    tiles = tl.cdiv(M, BLOCK_C)
    first = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_P
    m = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    return (first + tl.arange(0, BLOCK_P))[:, None], m[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_rows_kernel(
    rows, rows_n, rows_c,  # (N, C) in
    out,  # (N, M) contiguous
    index,  # (M,)
    N, M,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, m = rows_tile(M, BLOCK_C, BLOCK_P)
    inside = (n < N) & (m < M)
    column = tl.load(index + m, mask=m < M, other=0)
    value = tl.load(columns_at(rows, rows_n, rows_c, n, column), mask=inside, other=0.0)
    tl.store(out + n * M + m, value, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def add_rows_kernel(
    rows, rows_n, rows_c,  # (N, C), added to
    values, values_n, values_c,  # (N, M) in
    index,  # (M,)
    N, M, factor,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, m = rows_tile(M, BLOCK_C, BLOCK_P)
    inside = (n < N) & (m < M)
    column = tl.load(index + m, mask=m < M, other=0)
    at = columns_at(rows, rows_n, rows_c, n, column)
    values_at = values + n * values_n + walk(m.to(tl.int64), values_c, 1)
    more = tl.load(values_at, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32) + factor * more
    tl.store(at, narrow(total, rows), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def affine_rows_kernel(
    rows, rows_n, rows_c,  # (N, C), coupled in place
    values, values_n, values_c,  # (N, 2M) in: raw scales, then shifts t
    index, shift,  # (M,) each
    log_det,  # (N,) out
    N, M, clamp,
    INVERSE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Each program owns whole rows, so that log-determinants need neither another pass nor atomics."""
    n = (tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    m = tl.arange(0, BLOCK_C)[None, :]
    values_at = values + n * values_n
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for _ in range(0, M, BLOCK_C):
        inside = (n < N) & (m < M)
        column = tl.load(index + m, mask=m < M, other=0)
        offset = tl.load(shift + m, mask=m < M, other=0.0).to(tl.float32)
        wide = m.to(tl.int64)  # channels may be a whole map apart
        raw = tl.load(values_at + walk(wide, values_c, 1), mask=inside, other=0.0).to(tl.float32)
        t = tl.load(values_at + walk(M + wide, values_c, 1), mask=inside, other=0.0).to(tl.float32)
        at = columns_at(rows, rows_n, rows_c, n, column)
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        log_scale = clamp * tanh(raw)
        if INVERSE:
            log_scale = -log_scale
            value = (value - t) * tl.exp(log_scale) - offset
        else:
            value = (value + offset) * tl.exp(log_scale) + t
        tl.store(at, narrow(value, rows), mask=inside)
        total += log_scale
        m += BLOCK_C
    tl.store(log_det + n, tl.sum(total, 1, keep_dims=True), mask=n < N)


# --------------------------------------------------------------------------------------------- launchers


@replayed
def select_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Launch: see `usf_kernels.ops.row_kernels.select_rows`."""
    count, chosen = rows.shape[0], index.shape[0]
    out = rows.new_empty(count, chosen)

    def run(config: Config) -> Tensor:
        launch(
            select_rows_kernel, _programs(count, chosen, config), *_walked(rows), out, index.contiguous(),
            count, chosen, device=rows.device, **config,
        )  # fmt: skip
        return out

    candidates = _elementwise(rows, chosen)
    return pick("select_rows", (rows.dtype,), candidates, run, rows.device)


@replayed
def add_rows(rows: Tensor, index: Tensor, values: Tensor, factor: int) -> None:
    """Launch: see `usf_kernels.ops.row_kernels.add_rows`."""
    count, chosen = values.shape

    def launch_on(target: Tensor, config: Config) -> None:
        launch(
            add_rows_kernel, _programs(count, chosen, config), *_walked(target), *_walked(values),
            index.contiguous(), count, chosen, float(factor), device=rows.device, **config,
        )  # fmt: skip

    candidates = _elementwise(values, chosen)
    key = (rows.dtype, values.dtype)
    _launch_in_place("add_rows", key, candidates, launch_on, rows)


@replayed
def affine_rows(
    rows: Tensor, index: Tensor, outputs: Tensor, shift: Tensor, clamp: float, inverse: bool
) -> Tensor:
    """Launch: see `usf_kernels.ops.row_kernels.affine_rows`."""
    count, chosen = rows.shape[0], index.shape[0]
    log_det = rows.new_empty(count, dtype=torch.float32)

    def launch_on(target: Tensor, config: Config) -> None:
        launch(
            affine_rows_kernel, cdiv(count, config["BLOCK_P"]), *_walked(target), *_walked(outputs),
            index.contiguous(), shift.contiguous(), log_det, count, chosen, clamp,
            INVERSE=inverse, device=rows.device, **config,
        )  # fmt: skip

    itemsize = max(rows.element_size(), outputs.element_size())
    candidates = reduction(itemsize, 4, chosen, count, channels_last=True)
    key = (rows.dtype, outputs.dtype)
    _launch_in_place("affine_rows", key, candidates, launch_on, rows)
    return log_det


def _launch_in_place(
    name: str,
    key: tuple,
    candidates: list[Config],
    launch_on: Callable[[Tensor, Config], None],
    rows: Tensor,
) -> None:
    """Call `launch_on(rows, config)` once, with the configuration to use; tuning works on a copy of rows."""
    copies: list[Tensor] = []

    def attempt(config: Config) -> None:
        if not copies:
            copies.append(rows.clone())
        launch_on(copies[0], config)

    launch_on(rows, choose(name, key, candidates, attempt, rows.device))


def _elementwise(rows: Tensor, chosen: int) -> list[Config]:
    # Counted as 8 operands: an address for every value takes registers.
    return elementwise(rows.element_size(), 8, 1, chosen, rows.shape[0], channels_last=True)


def _programs(count: int, chosen: int, config: Config) -> int:
    return cdiv(count, config["BLOCK_P"]) * cdiv(chosen, config["BLOCK_C"])


def _walked(rows: Tensor) -> tuple[Tensor, int, int | None]:
    """Return a tensor (N, C) and its strides, with None for a column stride of 1, so that it is known when
    the kernel is compiled."""
    return rows, rows.stride(0), None if rows.stride(1) == 1 else rows.stride(1)


# ------------------------------------------------------------------------------------------ compiled offline


def _cases(dtype: torch.dtype) -> list[Case]:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, values, outputs, shift = meta(8 * 784, 256), meta(8 * 784, 128), meta(8 * 784, 256), meta(128)
    index = meta(128, dtype=torch.int64)
    calls = {
        "select": lambda: select_rows(rows, index),
        "add": lambda: add_rows(rows, index, values, 1),
        "affine": lambda: affine_rows(rows, index, outputs, shift, 2.0, False),
        "affine inverse": lambda: affine_rows(rows, index, outputs, shift, 2.0, True),
    }
    return [Case(f"{name}, {dtype}".replace("torch.", ""), call, {}) for name, call in calls.items()]


COMPILE_CASES = [case for dtype in (torch.float32, torch.bfloat16) for case in _cases(dtype)]
