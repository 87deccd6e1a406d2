"""Fused blocks that treat every position alone: a stretch of positions passes all of them together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from usf_kernels.nn.fused_blocks import Result, Sizes, add_log_dets

CHUNK_BYTES = 4 << 20  # of rows that pass pointwise blocks together: a share of the last-level cache


class PointwiseRun(nn.Module):
    """Blocks that treat every row alone, one after the other: on a stretch of rows at a time, so that the
    state passes through memory once and not once per block."""

    in_place = True

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, rows: Tensor, sizes: Sizes, cond: Sequence[Tensor], *, inverse: bool) -> Result:
        """Apply, or undo."""
        # Graphs get no loop over a length that they must not depend on; bfloat16 products prefer many rows.
        whole = torch.compiler.is_compiling() or rows.is_cuda or rows.element_size() < 4
        parts = 1 if whole else math.ceil(rows.numel() * rows.element_size() / CHUNK_BYTES)
        if parts <= 1:
            return rows, self._run(rows, sizes, cond, inverse)
        stretches = _stretches(rows, sizes, cond, math.ceil(len(rows) / parts))
        log_dets = [self._run(*stretch, inverse) for stretch in stretches]
        return rows, None if log_dets[0] is None else torch.cat(log_dets)

    def _run(self, rows: Tensor, sizes: Sizes, cond: Sequence[Tensor], inverse: bool) -> Tensor | None:
        total = None
        steps = list(zip_longest(self.blocks, cond))
        for block, its_cond in reversed(steps) if inverse else steps:
            _, log_det = block(rows, sizes, its_cond, inverse=inverse)
            total = add_log_dets(total, log_det)
        return total


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
