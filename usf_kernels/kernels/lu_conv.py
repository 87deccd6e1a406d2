"""The matrix of an LU-parameterised map and its inverse, formed from the triangles alone.

Products here have full float32 precision whatever torch's TF32 setting: a rounded inverse would not undo the
map. They cost C^3 operations, once per call, where applying the matrix costs C^2 for each position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.launch import Case, cdiv, launch, narrow
from usf_kernels.kernels.products import power_of_2
from usf_kernels.kernels.replay import replayed

DIAGONAL = 32  # rows of the diagonal blocks that are inverted by substitution
PRODUCT = ["C", "l_i", "l_k", "r_k", "r_j"]
INVERSE = ["C", "l_i", "l_k", "u_k", "u_j"]


@triton.jit(do_not_specialize=PRODUCT)
def triangular_product_kernel(
    left, l_i, l_k,  # (C, C)
    right, r_k, r_j,  # (C, C)
    out,  # (C, C), contiguous
    C,
    INVERSE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Unit lower times upper triangle; upper times lower for the inverse."""
    tiles = tl.cdiv(C, BLOCK)
    i0 = tl.program_id(0) // tiles * BLOCK
    j0 = tl.program_id(0) % tiles * BLOCK
    i = (i0 + tl.arange(0, BLOCK))[:, None]
    j = (j0 + tl.arange(0, BLOCK))[None, :]
    low = tl.maximum(i0, j0) if INVERSE else 0  # all other k meet a zero
    high = C if INVERSE else tl.minimum(tl.minimum(i0, j0) + BLOCK, C)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(low, high, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        kl = k[None, :]
        kr = k[:, None]
        left_read = (kl >= i) & (kl < C) if INVERSE else kl < i
        right_read = (kr >= j) & (kr < C) if INVERSE else kr <= j
        a = tl.load(left + i * l_i + kl * l_k, mask=left_read & (i < C), other=0.0).to(tl.float32)
        b = tl.load(right + kr * r_k + j * r_j, mask=right_read & (j < C), other=0.0).to(tl.float32)
        if not INVERSE:
            a = tl.where(kl == i, 1.0, a)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(out + i * C + j, narrow(acc, out), mask=(i < C) & (j < C))


@triton.jit
def triangle(lower, l_i, l_k, upper, u_k, u_j, of_upper, i, k, mask):
    """Elements (i, k) of L, or of U transposed: both are lower triangles, inverted side by side."""
    of_lower = tl.load(lower + i * l_i + k * l_k, mask=mask & (of_upper == 0), other=0.0).to(tl.float32)
    return of_lower + tl.load(upper + k * u_k + i * u_j, mask=mask & (of_upper == 1), other=0.0).to(
        tl.float32
    )


@triton.jit(do_not_specialize=INVERSE)
def invert_diagonal_kernel(
    lower, l_i, l_k,  # (C, C)
    upper, u_k, u_j,  # (C, C)
    inverse,  # (2, C, C), contiguous: of L and of U transposed; never read above the diagonal
    C,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Invert one block on the diagonal by forward substitution against the identity."""
    of_upper = tl.program_id(0) % 2
    first = tl.program_id(0) // 2 * BLOCK
    column = tl.arange(0, BLOCK)
    solved = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(0, tl.minimum(BLOCK, C - first)):
        row = triangle(
            lower, l_i, l_k, upper, u_k, u_j, of_upper, first + step, first + column, column <= step
        )
        pivot = tl.where(of_upper == 1, tl.sum(tl.where(column == step, row, 0.0), axis=0), 1.0)
        row = tl.where(column < step, row, 0.0)
        value = (column == step).to(tl.float32) - tl.sum(row[:, None] * solved, axis=0)
        solved = tl.where((column == step)[:, None], (value / pivot)[None, :], solved)
    i = first + column[:, None]
    at = inverse + of_upper * C * C + i * C + first + column[None, :]
    tl.store(at, solved, mask=(i < C) & (column[None, :] <= column[:, None]))


@triton.jit(do_not_specialize=[*INVERSE, "size"])
def join_kernel(
    lower, l_i, l_k,  # (C, C)
    upper, u_k, u_j,  # (C, C)
    inverse, products,  # (2, C, C), contiguous
    C, size,  # size of the diagonal blocks inverted so far, joined in pairs
    SECOND: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Join inverted blocks X1 and X2 of a triangle T: X21 = -X2 (T21 X1), with one product per launch."""
    of_upper = tl.program_id(0) % 2
    program = tl.program_id(0) // 2
    tiles = size // BLOCK
    left = program // (tiles * tiles) * 2 * size  # first row and column of X1
    below = left + size
    i0 = below + program // tiles % tiles * BLOCK
    j0 = left + program % tiles * BLOCK
    i = (i0 + tl.arange(0, BLOCK))[:, None]
    j = (j0 + tl.arange(0, BLOCK))[None, :]
    inverse += of_upper * C * C
    products += of_upper * C * C
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    # Columns of X1 reach from the diagonal to its last row, rows of X2 from its first column to the diagonal.
    for start in range(below if SECOND else j0, i0 + BLOCK if SECOND else below, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        kl = k[None, :]
        kr = k[:, None]
        if SECOND:
            a = tl.load(inverse + i * C + kl, mask=(i < C) & (kl <= i), other=0.0)
            b = tl.load(products + kr * C + j, mask=kr < C, other=0.0)
        else:
            a = triangle(lower, l_i, l_k, upper, u_k, u_j, of_upper, i, kl, i < C)
            b = tl.load(inverse + kr * C + j, mask=kr >= j, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if SECOND:
        tl.store(inverse + i * C + j, -acc, mask=i < C)
    else:
        tl.store(products + i * C + j, acc, mask=i < C)


@replayed
def lu_matrix(lower: Tensor, upper: Tensor, inverse: bool, dtype: torch.dtype) -> Tensor:
    """`L U`, or `U^-1 L^-1`, (C, C), computed in float32. L and U are read as `lu_conv1x1` reads them."""
    channels, device = lower.shape[0], lower.device
    out = lower.new_empty((channels, channels), dtype=dtype)
    if inverse:
        transposed = _inverses(lower, upper)
        operands = (transposed[1], 1, channels, transposed[0], channels, 1)
    else:
        operands = (lower, *lower.stride(), upper, *upper.stride())
    block = power_of_2(channels, 16, 32)
    launch(
        triangular_product_kernel, cdiv(channels, block) ** 2, *operands, out, channels,
        INVERSE=inverse, BLOCK=block, BLOCK_K=16, num_warps=4, num_stages=2, device=device,
    )  # fmt: skip
    return out


def _inverses(lower: Tensor, upper: Tensor) -> Tensor:
    """(2, C, C): the inverses of L and of U transposed in their lower triangles.

    Substitution inverts diagonal blocks, then two products each give blocks of twice the size: a dozen
    launches at C = 2048, where substitution alone would be a chain of C steps.
    """
    channels, device = lower.shape[0], lower.device
    operands = lower, *lower.stride(), upper, *upper.stride()
    inverse, products = (lower.new_empty((2, channels, channels), dtype=torch.float32) for _ in range(2))
    launch(
        invert_diagonal_kernel, 2 * cdiv(channels, DIAGONAL), *operands, inverse, channels,
        BLOCK=DIAGONAL, num_warps=1, device=device,
    )  # fmt: skip
    size = DIAGONAL
    while size < channels:
        pairs, block = cdiv(channels - size, 2 * size), min(size, 32)
        for second in (False, True):
            launch(
                join_kernel, 2 * pairs * (size // block) ** 2, *operands, inverse, products, channels, size,
                SECOND=second, BLOCK=block, BLOCK_K=16, num_warps=4, num_stages=2, device=device,
            )  # fmt: skip
        size *= 2
    return inverse


def _case(inverse: bool) -> Case:
    triangles = [torch.empty((256, 256), device="meta") for _ in range(2)]
    name = "inverse" if inverse else "matrix"
    return Case(name, lambda: lu_matrix(*triangles, inverse, torch.float32), {})


COMPILE_CASES = [_case(False), _case(True)]
