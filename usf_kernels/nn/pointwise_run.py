"""Stages that treat every position alone: a stretch of positions passes all of them together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels.nn.fused_blocks import Result, Sizes, add_log_dets
from usf_kernels.nn.pointwise_extension import PointwiseExtension

CHUNK_BYTES = 4 << 20  # of rows that pass together in torch operations: a share of the last-level cache


class PointwiseRun(nn.Module):
    """Blocks that treat every row alone, and the linear maps between them, one after the other: on a stretch
    of rows at a time, so that the state passes through memory once and not once per stage. In the extension
    where it can run them, else in torch operations."""

    in_place = True

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self._extension: PointwiseExtension | None = None

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
        """Apply, or undo; `keep` for leaving the rows as they are."""
        if PointwiseExtension.takes(rows):
            if self._extension is None or self._extension.outdated:
                self._extension = PointwiseExtension(self.stages)
            if self._extension.complete:
                return self._extension.run(rows, sizes, cond, inverse=inverse, keep=keep)
        rows = rows.clone() if keep else rows
        # Graphs get no loop over a length that they must not depend on; bfloat16 products prefer many rows.
        whole = torch.compiler.is_compiling() or rows.is_cuda or rows.element_size() < 4
        parts = 1 if whole else math.ceil(rows.numel() * rows.element_size() / CHUNK_BYTES)
        if parts <= 1:
            return self._run(rows, sizes, cond, inverse)
        log_dets = []
        for part, its_sizes, its_cond in _stretches(rows, sizes, cond, math.ceil(len(rows) / parts)):
            out, log_det = self._run(part, its_sizes, its_cond, inverse)
            if out is not part:
                part.copy_(out)
            log_dets.append(log_det)
        return rows, None if log_dets[0] is None else torch.cat(log_dets)

    def _run(self, rows: Tensor, sizes: Sizes, cond: Sequence[Tensor], inverse: bool) -> Result:
        total, shares = None, iter(cond)
        steps = [
            (stage, next(shares, None) if hasattr(stage, "conditioner") else None) for stage in self.stages
        ]
        for stage, share in reversed(steps) if inverse else steps:
            rows, log_det = stage(rows, sizes, share, inverse=inverse)
            total = add_log_dets(total, log_det)
        return rows, total

    def _apply(self, *arguments: Any, **options: Any) -> PointwiseRun:
        self._extension = None  # to(), cuda() and their like give the stages other tensors
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_extension": None}  # made again from the weights


def _stretches(
    rows: Tensor, sizes: Sizes, cond: Sequence[Tensor], length: int
) -> Iterator[tuple[Tensor, Sizes, Sequence[Tensor]]]:
    """(rows, their sizes, their conditions), at most `length` rows each: whole images where those fit, so
    that each condition is read once."""
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
