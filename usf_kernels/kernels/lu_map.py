"""An LU map from its parameters in two launches, and its gradients in one, where torch takes some forty.

Products have full float32 precision whatever torch's TF32 setting, as in `lu_conv`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.launch import Case, cdiv, launch
from usf_kernels.kernels.layout import contiguous
from usf_kernels.kernels.products import power_of_2
from usf_kernels.kernels.replay import replayed

FACTORS = ["C", "l_i", "l_k", "u_k", "u_j"]
ROWS = 32  # summed in one step of a column's sum


@triton.jit
def vector(values, at, C, DEFAULT: tl.constexpr):
    """Values of a vector (C,) at these places, with DEFAULT outside, or everywhere if it is None."""
    if values is None:
        return tl.full(at.shape, DEFAULT, tl.float32)
    else:
        return tl.load(values + at, mask=at < C, other=DEFAULT)


@triton.jit
def lower_factor(lower, l_i, l_k, i, k, C):
    """Elements (i, k) of L."""
    below = tl.load(lower + i * l_i + k * l_k, mask=(k < i) & (i < C), other=0.0)
    return tl.where(i == k, 1.0, below)


@triton.jit
def upper_factor(upper, u_k, u_j, k, j, diagonal, C):
    """Elements (k, j) of U, given its `diagonal` at the k or at the j."""
    above = tl.load(upper + k * u_k + j * u_j, mask=(k < j) & (j < C), other=0.0)
    return tl.where(k == j, diagonal, above)


@triton.jit(do_not_specialize=FACTORS)
def lu_map_kernel(
    lower, l_i, l_k, upper, u_k, u_j,  # (C, C) each
    signs, log_diagonal, log_scale, offset,  # (C,) each; all but the first may be None
    matrix,  # (C, C) out, contiguous
    moved,  # (tiles of columns, C) out: each tile's part of L U @ offset; or None
    C,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(C, BLOCK)
    i0 = tl.program_id(0) // tiles * BLOCK
    j0 = tl.program_id(0) % tiles * BLOCK
    i = (i0 + tl.arange(0, BLOCK))[:, None]
    j = (j0 + tl.arange(0, BLOCK))[None, :]
    diagonal = vector(signs, j, C, 0.0) * tl.exp(vector(log_diagonal, j, C, 0.0))
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, tl.minimum(tl.minimum(i0, j0) + BLOCK, C), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = lower_factor(lower, l_i, l_k, i, k[None, :], C)
        b = upper_factor(upper, u_k, u_j, k[:, None], j, diagonal, C)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if moved is not None:
        shift = tl.sum(acc * vector(offset, j, C, 0.0), axis=1)
        row = i0 + tl.arange(0, BLOCK)
        tl.store(moved + tl.program_id(0) % tiles * C + row, shift, mask=row < C)
    acc *= tl.exp(vector(log_scale, j, C, 0.0))
    tl.store(matrix + i * C + j, acc, mask=(i < C) & (j < C))


@triton.jit(do_not_specialize=["C", "tiles"])
def lu_map_sums_kernel(
    moved,  # (tiles, C), or None
    bias, log_diagonal, log_scale,  # (C,) each, or None
    shift,  # (C,) out, or None
    log_det,  # one, out
    C, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the tiles' parts of the shift, and in the first program the log-determinant."""
    if moved is not None:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        acc = vector(bias, i, C, 0.0)
        for t in range(0, tiles):
            acc += tl.load(moved + t * C + i, mask=i < C, other=0.0)
        tl.store(shift + i, acc, mask=i < C)
    if tl.program_id(0) == 0:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, C, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += vector(log_diagonal, i, C, 0.0) + vector(log_scale, i, C, 0.0)
        tl.store(log_det, tl.sum(total, axis=0))


@triton.jit
def of_product(grad, g_i, g_j, grad_shift, log_scale, offset, i, j, C):
    """Elements (i, j) of the gradient of L U, made of that of the scaled matrix and that of the shift."""
    g = tl.load(grad + i * g_i + j * g_j, mask=(i < C) & (j < C), other=0.0)
    if log_scale is not None:
        g *= tl.exp(vector(log_scale, j, C, 0.0))
        g += vector(grad_shift, i, C, 0.0) * vector(offset, j, C, 0.0)
    return g


@triton.jit(do_not_specialize=[*FACTORS, "g_i", "g_j"])
def lu_map_gradients_kernel(
    lower, l_i, l_k, upper, u_k, u_j,  # (C, C) each
    signs, log_diagonal, log_scale, offset,  # (C,) each; all but the first may be None
    matrix,  # (C, C), contiguous
    grad, g_i, g_j, grad_shift, grad_log_det,  # (C, C), (C,) or None, one: of the results
    grad_lower, grad_upper,  # (C, C) out, contiguous
    grad_log_diagonal, grad_log_scale, grad_offset,  # (C,) out, or None
    C,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`tiles`^2 programs multiply for L, as many for U, and the remaining ones sum over rows."""
    tiles = tl.cdiv(C, BLOCK)
    part = tl.program_id(0) // (tiles * tiles)
    i0 = tl.program_id(0) // tiles % tiles * BLOCK
    j0 = tl.program_id(0) % tiles * BLOCK
    i = (i0 + tl.arange(0, BLOCK))[:, None]
    j = (j0 + tl.arange(0, BLOCK))[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    if part == 0:  # P U^T, below the diagonal
        diagonal = vector(signs, j, C, 0.0) * tl.exp(vector(log_diagonal, j, C, 0.0))
        for start in range(j0, tl.where(i0 >= j0, C, 0), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = of_product(grad, g_i, g_j, grad_shift, log_scale, offset, i, k[None, :], C)
            b = upper_factor(upper, u_k, u_j, j, k[:, None], diagonal, C)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        tl.store(grad_lower + i * C + j, tl.where(j < i, acc, 0.0), mask=(i < C) & (j < C))
    elif part == 1:  # L^T P, from the diagonal on
        for start in range(i0, tl.where(i0 <= j0, C, 0), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = lower_factor(lower, l_i, l_k, k[None, :], i, C)
            b = of_product(grad, g_i, g_j, grad_shift, log_scale, offset, k[:, None], j, C)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        tl.store(grad_upper + i * C + j, tl.where(i < j, acc, 0.0), mask=(i < C) & (j < C))
        if grad_log_diagonal is not None:
            slope = vector(signs, j, C, 0.0) * tl.exp(vector(log_diagonal, j, C, 0.0))
            slope = acc * slope + tl.load(grad_log_det)
            tl.store(grad_log_diagonal + j + 0 * i, slope, mask=(i == j) & (j < C))
    elif grad_log_scale is not None:
        column = (tl.program_id(0) - 2 * tiles * tiles) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.zeros((BLOCK,), tl.float32)
        moved = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, C, ROWS):
            row = (start + tl.arange(0, ROWS))[:, None]
            inside = (row < C) & (column < C)[None, :]
            a = tl.load(matrix + row * C + column[None, :], mask=inside, other=0.0)
            g = tl.load(grad + row * g_i + column[None, :] * g_j, mask=inside, other=0.0)
            scaled += tl.sum(a * g, axis=0)
            moved += tl.sum(a * vector(grad_shift, row, C, 0.0), axis=0)
        scaled += tl.load(grad_log_det)
        moved *= tl.exp(-vector(log_scale, column, C, 0.0))  # the matrix includes the scale
        tl.store(grad_log_scale + column, scaled, mask=column < C)
        tl.store(grad_offset + column, moved, mask=column < C)


@replayed
def lu_map(
    lower: Tensor,
    upper: Tensor,
    signs: Tensor,
    log_diagonal: Tensor | None,
    bias: Tensor | None,
    log_scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch: see `usf_kernels.ops.lu_map.lu_map`; float32. Without log_scale, the bias has shape (0,)."""
    channels, device = len(lower), lower.device
    signs, log_diagonal, bias, log_scale, offset = contiguous(signs, log_diagonal, bias, log_scale, offset)
    block = power_of_2(channels, 16, 32)
    tiles = cdiv(channels, block)
    matrix, log_det = lower.new_empty((channels, channels)), lower.new_empty(())
    shift = lower.new_empty(0 if log_scale is None else channels)
    moved = None if log_scale is None else lower.new_empty((tiles, channels))
    launch(
        lu_map_kernel, tiles * tiles, lower, *lower.stride(), upper, *upper.stride(), signs, log_diagonal,
        log_scale, offset, matrix, moved, channels, BLOCK=block, BLOCK_K=16, num_warps=4, num_stages=2,
        device=device,
    )  # fmt: skip
    launch(
        lu_map_sums_kernel, 1 if moved is None else tiles, moved, bias, log_diagonal, log_scale,
        None if moved is None else shift, log_det, channels, tiles, BLOCK=block, num_warps=1, device=device,
    )  # fmt: skip
    return matrix, shift, log_det


@replayed
def lu_map_gradients(
    lower: Tensor,
    upper: Tensor,
    signs: Tensor,
    log_diagonal: Tensor | None,
    log_scale: Tensor | None,
    offset: Tensor | None,
    matrix: Tensor,
    grad: Tensor,
    grad_shift: Tensor | None,
    grad_log_det: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch: gradients of lower, upper, log_diagonal, log_scale and offset, given those of the results of
    `lu_map`. Those of None have shape (0,). `grad_shift` is read only with a log_scale."""
    channels, device = len(lower), lower.device
    signs, log_diagonal, log_scale, offset = contiguous(signs, log_diagonal, log_scale, offset)
    grad_shift = None if log_scale is None else grad_shift.contiguous()
    block = power_of_2(channels, 16, 32)
    tiles = cdiv(channels, block)
    given = lower, upper, log_diagonal, log_scale, offset
    found = [lower.new_empty(0 if value is None else value.shape) for value in given]
    written = [None if value is None else out for value, out in zip(given, found, strict=True)]
    programs = 2 * tiles * tiles + (0 if log_scale is None else tiles)
    launch(
        lu_map_gradients_kernel, programs, lower, *lower.stride(), upper, *upper.stride(), signs,
        log_diagonal, log_scale, offset, matrix, grad, *grad.stride(), grad_shift, grad_log_det, *written,
        channels, BLOCK=block, BLOCK_K=16, ROWS=ROWS, num_warps=8, num_stages=2, device=device,
    )  # fmt: skip
    return tuple(found)


def _cases() -> list[Case]:
    def given() -> list[Tensor]:
        sizes = (256, 256), (256, 256), *[(256,)] * 5
        return [torch.empty(size, device="meta") for size in sizes]

    def forward(act_norm: bool) -> None:
        lower, upper, signs, *rest = given()
        lu_map(lower, upper, signs, *(rest if act_norm else (rest[0], None, None, None)))

    def backward(act_norm: bool) -> None:
        lower, upper, signs, log_diagonal, shift, log_scale, offset = given()
        exit_values = (log_scale, offset) if act_norm else (None, None)
        of_results = lower, lower, shift, torch.empty((), device="meta")
        lu_map_gradients(lower, upper, signs, log_diagonal, *exit_values, *of_results)

    return [
        Case(f"{name}{' with an ActNorm' if act_norm else ''}", functools.partial(run, act_norm), {})
        for name, run in (("map", forward), ("gradients", backward))
        for act_norm in (False, True)
    ]


COMPILE_CASES = _cases()
