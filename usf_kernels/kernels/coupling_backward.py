"""The backward pass of a coupling with a split, in one pass that recomputes what was not saved."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from usf_kernels.kernels.arithmetic import tanh
from usf_kernels.kernels.configs import Config, pick
from usf_kernels.kernels.coupling import Tiles, coupling_case_inputs, coupling_cases
from usf_kernels.kernels.launch import Case, aligned, bound, cdiv, launch, narrow, runtime, tile, walk
from usf_kernels.kernels.layout import contiguous, empty_output
from usf_kernels.kernels.replay import replayed


@triton.jit(do_not_specialize=[*runtime("x", "t", "g", "gt", "gx"), "split", "clamp"])
def coupling_backward_kernel(
    x, x_b, x_c, x_p,  # (b, C, P), what the coupling was given
    t, t_b, t_c, t_p,  # the coupling's parameters
    g, g_b, g_c, g_p,  # (b, C, P), gradient of its result
    gt, gt_b, gt_c, gt_p,  # gradient of its parameters, out
    gx, gx_b, gx_c, gx_p,  # (b, C, P) out
    grad_log_det,  # (b,) or, per position, (P,)
    index, scale, bias,  # (C,) each, or None
    grad_scale, grad_bias,  # (runs of tiles in all images, C) out, sums over a run; or None
    C, P, split, clamp,
    AFFINE: tl.constexpr, INVERSE: tl.constexpr, PER_POSITION: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Each program walks RUN tiles of positions, so that fewer sums are written and added up afterwards."""
    C = bound(C, gx_c, UNIT)
    P = bound(P, gx_p, UNIT)
    split = bound(split, gx_c, UNIT)
    b, outer, first = tile(C, P, BLOCK_C, BLOCK_P, WIDE, RUN)
    inner = outer
    if index is not None:
        inner = tl.load(index + outer, mask=outer < C, other=0).to(outer.dtype)
    x_c_at = outer if INVERSE else inner  # the gradient of the result is on the other side than x
    g_c_at = inner if INVERSE else outer
    x_row = x + b * aligned(x_b, UNIT) + walk(x_c_at, x_c, UNIT)
    g_row = g + b * aligned(g_b, UNIT) + walk(g_c_at, g_c, UNIT)
    t_row = t + b * aligned(t_b, UNIT) + walk(inner - split, t_c, UNIT)
    gt_row = gt + b * aligned(gt_b, UNIT) + walk(inner - split, gt_c, UNIT)
    gx_row = gx + b * aligned(gx_b, UNIT) + walk(x_c_at, gx_c, UNIT)
    if scale is not None:
        gain = tl.load(scale + inner, mask=outer < C, other=1.0).to(tl.float32)
        offset = tl.load(bias + inner, mask=outer < C, other=0.0).to(tl.float32)
        scale_sum = tl.zeros((BLOCK_C, 1), tl.float32)
        bias_sum = tl.zeros((BLOCK_C, 1), tl.float32)
    for step in range(RUN):
        p = first + step * BLOCK_P
        inside = (outer < C) & (p < P)
        active = inside & (inner >= split)
        value = tl.load(x_row + walk(p, x_p, UNIT), mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(g_row + walk(p, g_p, UNIT), mask=inside, other=0.0).to(tl.float32)
        t_at = t_row + walk(p, t_p, UNIT)
        gt_at = gt_row + walk(p, gt_p, UNIT)
        grad_result = grad
        if scale is not None:
            if INVERSE:
                value = (value - offset) / gain
            else:
                grad = grad * gain
        coupled = value
        if AFFINE:
            raw = tl.load(t_at, mask=active, other=0.0).to(tl.float32)
            shift = 0.1 * tl.load(
                t_at + walk((C - split).to(outer.dtype), t_c, UNIT), mask=active, other=0.0
            ).to(tl.float32)
            bounded = tanh(0.1 * raw)
            slope = 0.1 * clamp * (1 - bounded * bounded)
            if PER_POSITION:
                of_log_det = tl.load(grad_log_det + p, mask=p < P, other=0.0).to(tl.float32)
            else:
                of_log_det = tl.load(grad_log_det + b).to(tl.float32)
            if INVERSE:
                factor = tl.exp(-clamp * bounded)
                grad_shift = -0.1 * grad * factor
                grad_raw = -slope * (grad * (value - shift) * factor + of_log_det)
            else:
                factor = tl.exp(clamp * bounded)
                coupled = value * factor + shift
                grad_shift = 0.1 * grad
                grad_raw = slope * (grad * value * factor + of_log_det)
            grad = grad * factor
            tl.store(gt_at, narrow(grad_raw, gt), mask=active)
            tl.store(
                gt_at + walk((C - split).to(outer.dtype), gt_c, UNIT), narrow(grad_shift, gt), mask=active
            )
        else:
            shift = tl.load(t_at, mask=active, other=0.0).to(tl.float32)
            coupled = value if INVERSE else value + shift
            tl.store(gt_at, narrow(-grad if INVERSE else grad, gt), mask=active)
        if INVERSE and scale is not None:
            grad = grad / gain
        tl.store(gx_row + walk(p, gx_p, UNIT), narrow(grad, gx), mask=inside)
        if scale is not None:
            # Forward: y = scale * v + bias. Inverse: v = (y - bias) / scale, where v is `value`.
            of_scale = -grad * value if INVERSE else grad_result * coupled
            of_bias = -grad if INVERSE else grad_result
            scale_sum += tl.sum(of_scale, 1, keep_dims=True)
            bias_sum += tl.sum(of_bias, 1, keep_dims=True)
    if scale is not None:
        runs = tl.cdiv(P, BLOCK_P * RUN)
        row = (b * runs + tl.program_id(0) % runs) * C + inner
        tl.store(grad_scale + row, scale_sum, mask=outer < C)
        tl.store(grad_bias + row, bias_sum, mask=outer < C)


# --------------------------------------------------------------------------------------------- launchers

PROGRAMS = 1024  # enough to keep any device busy
LONGEST_RUN = 32


def largest_run(tiles: int) -> int:
    """Largest number of tiles per program, a power of 2, that leaves enough programs."""
    run = 1
    while run < LONGEST_RUN and tiles >= 2 * run * PROGRAMS:
        run *= 2
    return run


@replayed
def coupling_step_backward(
    grad: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    params: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    split: int,
    clamp: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, params, scale and bias of `coupling_step`; the last two are empty without a scale."""
    affine, scaled = clamp is not None, scale is not None
    grad_log_det, index, scale, bias = contiguous(grad_log_det, index, scale, bias)
    grad_x, grad_params = empty_output(x, x.dtype), empty_output(params, params.dtype)
    tiles = Tiles([x, params, grad, grad_params, grad_x], split, affine, index is not None or scaled)
    view = tiles.view

    def run(config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tiles_c, tiles_p = tiles.counts(config)
        tile_count = view.batch * tiles_c * tiles_p
        tiles_per_run = largest_run(tile_count) if scaled else 1
        runs = cdiv(tiles_p, tiles_per_run)
        shape = view.batch * runs, tiles.channels
        sums = [x.new_empty(shape, dtype=torch.float32) if scaled else None for _ in "sb"]
        launch(
            coupling_backward_kernel, view.batch * tiles_c * runs, *view.arguments(), grad_log_det,
            index, scale, bias, *sums, tiles.channels, view.positions, tiles.split, clamp or 0.0,
            AFFINE=affine, INVERSE=inverse, PER_POSITION=tiles.per_position, UNIT=tiles.unit,
            WIDE=view.is_wide(), RUN=tiles_per_run, device=x.device, **config,
        )  # fmt: skip
        if not scaled:
            return grad_x, grad_params, x.new_empty(0), x.new_empty(0)
        grad_scale, grad_bias = sums[0].sum(0), sums[1].sum(0)
        return grad_x, grad_params, grad_scale.to(scale.dtype), grad_bias.to(bias.dtype)

    key = tiles.key(affine, index is None, scaled)
    return pick("coupling_backward", key, tiles.candidates(4, index is not None), run, x.device)


# ------------------------------------------------------------------------------------------ compiled offline


def _cases(dtype: torch.dtype, channels_last: bool) -> list[Case]:
    x, no_exit, full_exit = coupling_case_inputs(dtype, channels_last)
    log_det = torch.empty(8, device="meta")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def backward(
        params: Tensor, exits: tuple, clamp: float | None, x: Tensor = x, log_det: Tensor = log_det
    ) -> Callable:
        return lambda: coupling_step_backward(x, log_det, x, params, *exits, 128, clamp, False)

    many = x.repeat(8, 1, 4, 4).to(memory_format=memory_format)  # enough for a program to walk many tiles
    calls = {
        "affine backward": backward(x, no_exit, 2.0),
        "affine step backward": backward(x, full_exit, 2.0),
        "affine step backward, runs": backward(many, full_exit, 2.0, many, log_det.repeat(8)),
        "additive step backward": backward(x[:, 128:], full_exit, None),
    }
    return coupling_cases(calls, "coupling_backward_kernel", dtype, channels_last)


COMPILE_CASES = [
    case
    for dtype in (torch.float32, torch.bfloat16)
    for channels_last in (False, True)
    for case in _cases(dtype, channels_last)
]
