"""Runs of neighbouring stages of a fused flow: in the extension, or for a stretch of positions at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels.nn.fused_blocks import add_log_dets
from usf_kernels.nn.fused_maps import Maps, Result, Sizes
from usf_kernels.nn.stage_extension import StageExtension
from usf_kernels.ops import native

CHUNK_BYTES = 4 << 20  # size of a stretch of rows: a part of the last-level cache
Step = tuple[nn.Module, Tensor | None]  # a stage, and its projected condition


class StageRun(nn.Module):
    """Stages that run one after the other.

    On the CPU, the extension runs them if it knows all of their layers, in float32, and in bfloat16 if it
    multiplies such numbers: products and everything else stay in the cache. Otherwise, stages that treat
    every row alone get a stretch of rows at a time, so that the state passes through memory once and not once
    per stage.
    """

    in_place = True

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self._extension: StageExtension | None = None

    @property
    def blocks(self) -> list[nn.Module]:
        """The stages that have a conditioner."""
        return [stage for stage in self.stages if hasattr(stage, "conditioner")]

    def forward(
        self,
        rows: Tensor,
        sizes: Sizes,
        cond: Sequence[Tensor],
        *,
        inverse: bool,
        keep: bool = False,
    ) -> Result:
        """Apply, or undo; with `keep`, do not overwrite the rows."""
        if StageExtension.takes(rows):
            if self._extension is None or self._extension.weights.outdated:
                self._extension = StageExtension(self.stages)
            if self._extension.complete:
                return self._extension.run(rows, sizes, cond, inverse=inverse, keep=keep)
        shares = iter(cond)
        steps = [
            (stage, next(shares, None) if hasattr(stage, "conditioner") else None) for stage in self.stages
        ]
        steps = steps[::-1] if inverse else steps
        # No stretches while tracing, since a graph must not depend on the number of rows, nor for
        # bfloat16, whose products prefer many rows.
        whole = native.is_observed() or rows.is_cuda or rows.element_size() < 4
        if keep and (steps[0][0].in_place or not whole):  # stretches are written back
            rows = rows.clone(memory_format=torch.contiguous_format)
        if whole:
            return _one_by_one(steps, rows, sizes, inverse)
        total = None
        for pointwise, group in groupby(steps, _is_pointwise):
            together = _in_stretches if pointwise else _one_by_one
            rows, log_det = together(list(group), rows, sizes, inverse)
            total = add_log_dets(total, log_det)
        return rows, total

    def _apply(self, *arguments: Any, **options: Any) -> StageRun:
        self._extension = None  # to(), cuda() and the like replace the stages' tensors
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_extension": None}  # made again from the weights


def blocks_of(stage: nn.Module) -> Sequence[nn.Module]:
    """Stages with a conditioner: those of a run, or a single stage itself if it has one."""
    if isinstance(stage, StageRun):
        return stage.blocks
    return [stage] if hasattr(stage, "conditioner") else []


def joins(stage: nn.Module) -> bool:
    """Whether a stage may be part of a run: the extension knows it, or it treats every row alone."""
    if isinstance(stage, Maps):
        return True
    if not hasattr(stage, "conditioner"):
        return False
    return stage.conditioner.pointwise or StageExtension.knows_layers_of(stage)


def _is_pointwise(step: Step) -> bool:
    stage, _ = step
    return not hasattr(stage, "conditioner") or stage.conditioner.pointwise


def _one_by_one(steps: Sequence[Step], rows: Tensor, sizes: Sizes, inverse: bool) -> Result:
    total = None
    for stage, share in steps:
        rows, log_det = stage(rows, sizes, share, inverse=inverse)
        total = add_log_dets(total, log_det)
    return rows, total


def _in_stretches(steps: Sequence[Step], rows: Tensor, sizes: Sizes, inverse: bool) -> Result:
    parts = math.ceil(rows.numel() * rows.element_size() / CHUNK_BYTES)
    if parts <= 1:  # no rows at all, or few
        return _one_by_one(steps, rows, sizes, inverse)
    cond = [share for _, share in steps if share is not None]
    log_dets = []
    for part, its_sizes, its_cond in _stretches(rows, sizes, cond, math.ceil(len(rows) / parts)):
        shares = iter(its_cond)
        its_steps = [(stage, None if share is None else next(shares)) for stage, share in steps]
        out, log_det = _one_by_one(its_steps, part, its_sizes, inverse)
        if out is not part:
            part.copy_(out)
        log_dets.append(log_det)
    return rows, None if log_dets[0] is None else torch.cat(log_dets)


def _stretches(
    rows: Tensor, sizes: Sizes, cond: Sequence[Tensor], length: int
) -> Iterator[tuple[Tensor, Sizes, Sequence[Tensor]]]:
    """Yield (rows, their sizes, their conditions) for stretches of at most `length` rows: whole images if
    those fit, so that each condition is read once."""
    if not cond:
        yield from ((part, (len(part),), cond) for part in rows.split(length))
        return
    positions = math.prod(sizes[1:])
    at_once = max(1, length // positions)
    for first in range(0, sizes[0], at_once):
        images = rows[first * positions : (first + at_once) * positions]
        theirs = [c if len(c) == 1 else c[first : first + at_once] for c in cond]
        if positions <= length:
            yield images, (len(images) // positions, positions), theirs
            continue
        for start in range(0, positions, length):
            part = images[start : start + length]
            yield part, (1, len(part)), [c[:, start : start + length] for c in theirs]
