"""How a kernel sees (B, C, *spatial) tensors: as (batch, channel, position) with three strides. No Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Strides(NamedTuple):
    """Elements between neighbours along each axis; 0 along one of length 1, which nobody walks."""

    batch: int
    channel: int
    position: int


def empty_output(x: Tensor, dtype: torch.dtype, channels: int | None = None) -> Tensor:
    """Fresh memory for a result of the shape of x (or with another number of channels): channels-last where x
    has its channels next to each other, contiguous otherwise. Fakes and launchers share it."""
    channels = x.shape[1] if channels is None else channels
    if x.ndim > 2 and x.stride(1) == 1:
        return x.new_empty((x.shape[0], *x.shape[2:], channels), dtype=dtype).movedim(-1, 1)
    return x.new_empty((x.shape[0], channels, *x.shape[2:]), dtype=dtype)


def flat_strides(x: Tensor) -> Strides | None:
    """Strides of x with its spatial dimensions flattened; None where one stride cannot walk them."""
    sizes, strides = x.shape, x.stride()
    position = expected = None
    for size, stride in zip(reversed(sizes[2:]), reversed(strides[2:]), strict=True):
        if size == 1:
            continue
        if position is None:
            position = stride
        elif stride != expected:
            # Of an empty tensor nothing is walked.
            return Strides(0, 0, 0) if x.numel() == 0 else None
        expected = stride * size
    return Strides(strides[0] if sizes[0] > 1 else 0, strides[1] if sizes[1] > 1 else 0, position or 0)


class View:
    """Tensors of the same batch and positions, as a kernel walks them.

    A tensor whose spatial dimensions have no common stride (a crop, every other row) is copied into the
    memory format of the last one, the output; slices of channels or the batch and expanded batches are not.

    Args:
        tensors: the operands, the output last.
        group: merge runs of this many channels into one where all tensors are contiguous within an image. An
            odd number of positions, 7 x 7 say, would otherwise leave no row aligned.
        merge_batch: take the batch as one image of batch * positions positions where all tensors allow it
            (vectors, channels-last): small images then fill large tiles.

    Attributes:
        batch, positions: after merging. group: the factor by which channel counts are to be divided.
        tensors, strides: of each operand.
    """

    def __init__(self, tensors: Sequence[Tensor], *, group: int = 1, merge_batch: bool = True) -> None:
        output = tensors[-1]
        self.batch, self.positions = output.shape[0], math.prod(output.shape[2:])
        self.tensors, self.strides = [], []
        for tensor in tensors:
            strides = flat_strides(tensor)
            if strides is None:
                tensor = empty_output(output, tensor.dtype, tensor.shape[1]).copy_(tensor)
                strides = flat_strides(tensor)
            self.tensors.append(tensor)
            self.strides.append(strides)
        if merge_batch:
            self._merge_batch()
        self.group = 1
        if group > 1:
            self._merge_channels(group)

    def _merge_batch(self) -> None:
        if self.positions == 1:
            self.strides = [Strides(0, s.channel, s.batch) for s in self.strides]
        elif all(s.batch == self.positions * s.position for s in self.strides):
            self.strides = [Strides(0, s.channel, s.position) for s in self.strides]
        else:
            return
        self.batch, self.positions = 1, self.batch * self.positions

    def _merge_channels(self, group: int) -> None:
        sizes = [tensor.shape[1] for tensor in self.tensors]
        if all(
            s.position == 1 and (size == 1 or s.channel == self.positions)
            for size, s in zip(sizes, self.strides, strict=True)
        ):
            self.strides = [Strides(s.batch, s.channel * group, 1) for s in self.strides]
            self.group, self.positions = group, self.positions * group

    def arguments(self) -> list[Any]:
        """For each operand itself and its strides; None for a channel or position stride of 1, so that
        contiguity is known when the kernel is compiled."""
        arguments = []
        for tensor, (batch, channel, position) in zip(self.tensors, self.strides, strict=True):
            arguments += (
                tensor,
                batch,
                None if channel == 1 else channel,
                None if position == 1 else position,
            )
        return arguments

    def unit(self, *channels: int, operands: slice = slice(None)) -> int:
        """Largest of 8, 4, 2 and 1 that divides every stride but the contiguous one, and the lengths along
        that (`channels`: all channel counts and offsets): what a kernel must know of its offsets to load 16
        bytes at a time. `operands` selects those to look at."""
        unit = 8
        for batch, channel, position in self.strides[operands]:
            along_channels = channels if channel == 1 else (channel,)
            unit = math.gcd(unit, batch, *along_channels, self.positions if position == 1 else position)
        return unit

    def is_wide(self) -> bool:
        """Whether offsets within an image overflow 32 bits."""
        return any(
            (t.shape[1] - 1) * s.channel + (self.positions - 1) * s.position >= 2**31
            for t, s in zip(self.tensors, self.strides, strict=True)
        )
