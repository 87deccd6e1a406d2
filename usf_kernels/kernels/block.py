"""A conjugated block with a 1x1 conditioner: a residual network of two layers at every position."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.cases import product_cases
from usf_kernels.kernels.configs import MANY_POSITIONS, Config, pick
from usf_kernels.kernels.finish import finish
from usf_kernels.kernels.launch import (
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
from usf_kernels.kernels.plain import full_precision
from usf_kernels.kernels.products import (
    activate,
    dot,
    linear,
    matrix_arguments,
    place,
    power_of_2,
)
from usf_kernels.kernels.replay import replayed
from usf_kernels.kernels.vendor import has_many_positions, vendor_channels, vendor_linear

UNSPECIALIZED = [*runtime(*"xay"), "v_n", "v_k", "w_n", "w_k", "N"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def residual_mlp_kernel(
    x, x_b, x_c, x_p,  # (b, C, P) in
    bias_map, a_b, a_c, a_p,  # (b, N, P), added before the activation, or None
    y, y_b, y_c, y_p,  # (b, C, P) out
    first, v_n, v_k,  # (N, C)
    last, w_n, w_k,  # (C, N)
    first_bias, last_bias,  # (N,) and (C,), or None
    C, N, P,
    ACTIVATION: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, FIRST_UNIT: tl.constexpr, LAST_UNIT: tl.constexpr, WIDE: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute, activate and consume BLOCK_N hidden units at a time, without writing them to memory."""
    b, p, c = place(C, P, WIDE, BLOCK_P, BLOCK_C)
    inside = (p < bound(P, y_p, UNIT))[:, None] & (c < bound(C, y_c, UNIT))[None, :]
    x_at = x + b * aligned(x_b, UNIT) + walk(p, x_p, UNIT)[:, None] + walk(c, x_c, UNIT)[None, :]
    value = tl.load(x_at, mask=inside, other=0.0).to(first.dtype.element_ty)
    first_at = first + walk(c, v_k, FIRST_UNIT)[:, None]
    first_inside = (c < bound(C, v_k, FIRST_UNIT))[:, None]
    last_at = last + walk(c, w_n, LAST_UNIT)[None, :]
    last_inside = (c < bound(C, w_n, LAST_UNIT))[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        weight = tl.load(
            first_at + walk(n, v_n, FIRST_UNIT)[None, :],
            mask=first_inside & (n < bound(N, v_n, FIRST_UNIT))[None, :],
            other=0.0,
        )
        hidden = dot(value, weight, tl.zeros((BLOCK_P, BLOCK_N), tl.float32), PRECISION)
        if first_bias is not None:
            hidden += tl.load(first_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if bias_map is not None:
            n_at = n.to(tl.int64) if WIDE else n
            at = (
                bias_map
                + b * aligned(a_b, UNIT)
                + walk(p, a_p, UNIT)[:, None]
                + walk(n_at, a_c, UNIT)[None, :]
            )
            mask = (p < bound(P, a_p, UNIT))[:, None] & (n < bound(N, a_c, UNIT))[None, :]
            hidden += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        hidden = activate(hidden, ACTIVATION)
        if RAGGED:  # units past the last are NaN if x is infinite
            hidden = tl.where((n < N)[None, :], hidden, 0.0)
        weight = tl.load(
            last_at + walk(n, w_k, LAST_UNIT)[:, None],
            mask=last_inside & (n < bound(N, w_k, LAST_UNIT))[:, None],
            other=0.0,
        )
        acc = dot(narrow(hidden, last), weight, acc, PRECISION)
    if last_bias is not None:
        acc += tl.load(last_bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    # x is read again, from the cache: keeping it would take half of the registers throughout.
    acc = tl.load(x_at, mask=inside, other=0.0).to(tl.float32) + SIGN * acc
    y_at = y + b * aligned(y_b, UNIT) + walk(p, y_p, UNIT)[:, None] + walk(c, y_c, UNIT)[None, :]
    tl.store(y_at, narrow(acc, y), mask=inside)


@replayed
def residual_mlp(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    last: Tensor,
    last_bias: Tensor | None,
    bias_map: Tensor | None,
    activation: str,
    inverse: bool,
) -> Tensor:
    """Launch: see `usf_kernels.ops.residual_mlp`. `first` and `last` share a dtype, that of the products."""
    if bias_map is not None:
        bias_map = bias_map.expand(x.shape[0], *bias_map.shape[1:])
    first_bias, last_bias = contiguous(first_bias, last_bias)
    hidden, channels = first.shape
    if channels >= vendor_channels(x, first, alone=False):
        return two_products(x, first, first_bias, last, last_bias, bias_map, activation, inverse)
    if channels > fused_channels(first.dtype, many=has_many_positions(x)):
        h = linear(x, first, first_bias, bias_map, activation=activation)
        return linear(h, last, last_bias, residual=x, sign=-1 if inverse else 1)
    y = empty_output(x, torch.promote_types(x.dtype, first.dtype))
    view = View([x, y] if bias_map is None else [x, bias_map, y])
    operands = view.arguments()
    if bias_map is None:
        operands[4:4] = [None] * 4
    first_at, first_unit = matrix_arguments(first)
    last_at, last_unit = matrix_arguments(last)
    unit = view.unit(channels, hidden)

    def run(config: Config) -> Tensor:
        programs = view.batch * cdiv(view.positions, config["BLOCK_P"])
        launch(
            residual_mlp_kernel, programs, *operands, *first_at, *last_at, first_bias, last_bias,
            channels, hidden, view.positions, ACTIVATION=activation, SIGN=-1 if inverse else 1,
            PRECISION=product_precision(), UNIT=unit, FIRST_UNIT=first_unit, LAST_UNIT=last_unit,
            WIDE=view.is_wide(), RAGGED=hidden % config["BLOCK_N"] != 0, device=x.device, **config,
        )  # fmt: skip
        return y

    candidates = tiles(first, view)
    return pick("residual_mlp", (x.dtype, first.dtype), candidates, run, x.device)


def two_products(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    last: Tensor,
    last_bias: Tensor | None,
    bias_map: Tensor | None,
    activation: str,
    inverse: bool,
) -> Tensor:
    """`residual_mlp` with the products of the vendor's library."""
    hidden, sign, relu = vendor_linear(x, first, None), -1 if inverse else 1, activation == "relu"
    if relu or first_bias is not None or bias_map is not None:
        finish(hidden, first_bias, bias_map, relu, 1, hidden)
    if not (x.dtype == hidden.dtype == last.dtype and x.ndim > 2):
        update = vendor_linear(hidden, last, last_bias)
        y = empty_output(x, torch.promote_types(x.dtype, update.dtype))
        return torch.add(x, update, alpha=sign, out=y)
    # The product is added to y, which holds x and the bias already.
    y = finish(x, last_bias, None, False, sign, empty_output(x, x.dtype))
    with full_precision(x):
        if y.stride(1) == 1:
            rows, hidden = (v.movedim(1, -1).flatten(0, -2) for v in (y, hidden))
            rows.addmm_(hidden, last.mT, alpha=sign)
        else:
            y.flatten(2).baddbmm_(last.expand(len(x), *last.shape), hidden.flatten(2), alpha=sign)
    return y


def fused_channels(dtype: torch.dtype, *, many: bool = False) -> int:
    """Largest C that the fused kernel takes: its tiles stay in registers and shared memory. For `many`
    positions the limit is lower, since two products with larger tiles are faster."""
    if dtype == torch.float32 and product_precision() == "ieee":
        return 64
    return 128 if many else 256


def tiles(first: Tensor, view: View) -> list[Config]:
    """Candidate tiles (positions, hidden units, warps, stages) by number of channels, as large as possible
    without spilling registers."""
    hidden, channels = first.shape
    block_c, many = power_of_2(channels, 16, 256), view.batch * view.positions >= MANY_POSITIONS
    hopper = capability(first.device) == 90  # measured there; other devices run out of registers
    if first.dtype != torch.float32 and block_c <= 128:
        shapes = ((64, 64, 4, 2) if hopper and not many else (64, 32, 4, 2), (64, 32, 8, 2))
    elif first.dtype != torch.float32:
        other = (64, 32, 8, 2) if warp_size() == 32 else (32, 32, 4, 2)  # wide: fewer registers per thread
        shapes = ((32, 32, 4, 3) if hopper else other, (16, 32, 4, 2))
    elif product_precision() == "tf32" and block_c <= 128:
        shapes = ((64, 16, 4, 3) if hopper else (32, 32, 4, 2), (16, 32, 4, 2))
    elif product_precision() == "tf32":
        shapes = ((32, 16, 4, 3) if hopper else (16, 16, 4, 2),)
    else:
        shapes = ((64, 16, 4, 2), (64, 32, 8, 2))
    return [
        {
            "BLOCK_P": power_of_2(view.positions, 16, block_p), "BLOCK_C": block_c,
            "BLOCK_N": power_of_2(hidden, 16, block_n), "num_warps": warps, "num_stages": stages,
        }
        for block_p, block_n, warps, stages in shapes
    ]  # fmt: skip


def _cases(channels: int, channels_last: bool, batch: int, side: int) -> Iterator[Case]:
    def call(new: Callable[..., Tensor]) -> None:
        layers = new(2 * channels, channels), new(2 * channels), new(channels, 2 * channels), new(channels)
        bias_map = new(1, 2 * channels, side, side)
        residual_mlp(new(batch, channels, side, side), *layers, bias_map, "relu", False)

    name = f"{channels} channels" + (", many positions" if batch * side**2 >= MANY_POSITIONS else "")
    return product_cases(name, "residual_mlp_kernel", call, channels_last)


COMPILE_CASES = [
    case
    for channels, channels_last in ((64, False), (64, True), (128, True), (256, False), (256, True))
    for batch, side in ((8, 28), (64, 64))
    if channels <= 128 or batch == 8
    for case in _cases(channels, channels_last, batch, side)
]
