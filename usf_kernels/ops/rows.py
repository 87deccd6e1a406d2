"""Rows (N, C), and couplings on some of their channels: by kernels, the extension, or torch operations.

Torch's own index operations on channels-last memory cost as much as the products around them, and its affine
coupling takes many passes over memory. GPUs run Triton kernels, in compiled graphs too. CPUs run the
extension, except where a compiler, a tracer, a transform or a mode has to see the operations: then, and in
graphs for export, torch operations run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usf_kernels import _core
from usf_kernels.memory import in_huge_pages
from usf_kernels.ops.checks import compute_dtype
from usf_kernels.ops.native import LARGEST_CLAMP, is_materialized, is_observed, threads_over
from usf_kernels.ops.row_kernels import add_rows, affine_rows, runs_kernels, select_rows


def rows_of(x: Tensor, dtype: torch.dtype, *, copy: bool) -> Tensor:
    """Convert x (B, C, *spatial) to contiguous rows (B * positions, C) of `dtype`; always copy if `copy`."""
    channels = x.shape[1]
    scattered = x.is_contiguous() and not x.movedim(1, -1).is_contiguous()
    if scattered and _in_extension(x) and (x.dtype == dtype or dtype == torch.bfloat16):
        maps = x.detach().flatten(2)
        out = in_huge_pages(x.new_empty(x.shape[0] * maps.shape[2], channels, dtype=dtype))
        _core.interleave(_bits(maps), _bits(out), threads_over(out))
        return out
    rows = x.movedim(1, -1)
    if copy and _in_extension(x):
        return in_huge_pages(rows.new_empty(rows.shape, dtype=dtype)).copy_(rows).view(-1, channels)
    rows = rows.to(dtype, copy=copy, memory_format=torch.contiguous_format)
    return rows.reshape(-1, channels).contiguous()


def select(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[:, index]`."""
    if runs_kernels(rows):
        return select_rows(rows, index)
    if not _in_extension(rows):
        return torch.gather(rows, 1, index.expand(rows.shape[0], -1))
    out = in_huge_pages(rows.new_empty(rows.shape[0], len(index)))
    _core.select_rows(_bits(rows), index, _bits(out), threads_over(rows))
    return out


def add_(rows: Tensor, index: Tensor, values: Tensor, factor: int) -> None:
    """`rows[:, index] += factor * values`.

    Raises:
        ValueError: rows that are not contiguous, which the extension cannot write to.
    """
    if runs_kernels(rows):
        add_rows(rows, index, values, factor)
    elif not _in_extension(rows):
        rows.index_add_(1, index, values, alpha=factor)
    else:
        _core.add_rows(_bits(_contiguous(rows)), index, _bits(values), factor, threads_over(rows))


def affine_(
    rows: Tensor, index: Tensor, outputs: Tensor, shift: Tensor, clamp: float, inverse: bool
) -> Tensor:
    """Affine coupling of the columns `index` of `rows`: `y = (y + shift) * exp(s) + t`, or its inverse.

    `outputs` (N, 2 * len(index)) holds raw, then t; `s = clamp * tanh(raw)`. Returns the log-det of each row,
    (N,), float32 at least.

    Raises:
        ValueError: see `add_`.
    """
    if runs_kernels(rows):
        return affine_rows(rows, index, outputs, shift, clamp, inverse)
    if _in_extension(rows) and clamp <= LARGEST_CLAMP:
        log_det = rows.new_empty(rows.shape[0], dtype=torch.float32)
        written = _bits(_contiguous(rows))
        arguments = (written, index, _bits(outputs), shift.float(), clamp, inverse, log_det)
        _core.affine_rows(*arguments, threads_over(rows))
        return log_det
    raw, translation = outputs.chunk(2, dim=1)
    log_scale = raw.tanh().mul_(clamp)
    active = select(rows, index)
    if inverse:
        active = active.sub_(translation).mul_(log_scale.neg().exp()).sub_(shift)
    else:
        active = active.add_(shift).mul_(log_scale.exp()).add_(translation)
    rows.index_copy_(1, index, active)
    total = log_scale.sum(1, dtype=compute_dtype(rows))
    return -total if inverse else total


def _in_extension(rows: Tensor) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.dtype in (torch.float32, torch.bfloat16)
        and not is_observed()
        and is_materialized(rows)
    )


def _contiguous(rows: Tensor) -> Tensor:
    """Return rows to write to; raise unless contiguous, since results written to a copy would be lost."""
    if not rows.is_contiguous():
        raise ValueError(f"rows: expected contiguous rows to write to, found strides {rows.stride()}")
    return rows


def _bits(rows: Tensor) -> Tensor:
    """Contiguous rows, with bfloat16 as int16 of the same bits: NumPy's protocols have no bfloat16."""
    rows = rows.contiguous()
    return rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows
