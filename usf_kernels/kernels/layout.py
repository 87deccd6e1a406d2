"""How a kernel sees (B, C, *spatial) tensors: as (batch, channel, position) with three strides. No Triton."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Strides(NamedTuple):
    """Elements between neighbours along each axis; 0 for axes of length 1, which are never walked."""

    batch: int
    channel: int
    position: int


def empty_output(x: Tensor, dtype: torch.dtype, channels: int | None = None) -> Tensor:
    """Empty tensor of the shape of x (or with another number of channels): channels-last if the channels of x
    are next to each other, contiguous otherwise. Fakes and launchers share this function."""
    channels = x.shape[1] if channels is None else channels
    if x.ndim > 2 and x.stride(1) == 1:
        return x.new_empty((x.shape[0], *x.shape[2:], channels), dtype=dtype).movedim(-1, 1)
    return x.new_empty((x.shape[0], channels, *x.shape[2:]), dtype=dtype)


def contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """Return vectors with a stride of 1, as kernels need; the gradient of a sum, say, has a stride of 0."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def flat_strides(x: Tensor) -> Strides | None:
    """Strides of x with its spatial dimensions flattened; None if no single stride walks these."""
    return _flat(x.shape, x.stride())


def _flat(sizes: torch.Size, strides: tuple[int, ...]) -> Strides | None:
    position = expected = None
    for size, stride in zip(reversed(sizes[2:]), reversed(strides[2:]), strict=True):
        if size == 1:
            continue
        if position is None:
            position = stride
        elif stride != expected:
            # An empty tensor is not walked at all.
            return Strides(0, 0, 0) if 0 in sizes else None
        expected = stride * size
    return Strides(strides[0] if sizes[0] > 1 else 0, strides[1] if sizes[1] > 1 else 0, position or 0)


class View:
    """Tensors of the same batch and positions, as a kernel walks them.

    A tensor whose spatial dimensions have no common stride (a crop, every other row) is copied into the
    memory format of the last tensor, the output; slices of channels or the batch and expanded batches are not
    copied.

    Args:
        tensors: the operands, the output last.
        group: merge runs of this many channels into one if all tensors are contiguous within an image. An odd
            number of positions, such as 7 x 7, would otherwise leave no row aligned.
        merge_batch: treat the batch as one image of batch * positions positions if all tensors allow it
            (vectors, channels-last): small images then fill large tiles.

    Attributes:
        batch, positions: sizes after merging.
        group: the factor by which channel counts are to be divided.
        tensors, strides: those of each operand.
        walk: everything but the tensors; made once for equal shapes and strides, and shared.
    """

    __slots__ = ("batch", "group", "positions", "strides", "tensors", "walk")

    def __init__(self, tensors: Sequence[Tensor], *, group: int = 1, merge_batch: bool = True) -> None:
        walk = Walk.over(tuple([(t.shape, t.stride()) for t in tensors]), group, merge_batch)
        if walk is None:
            output = tensors[-1]
            tensors = [
                empty_output(output, t.dtype, t.shape[1]).copy_(t) if flat_strides(t) is None else t
                for t in tensors
            ]
            walk = Walk.over(tuple([(t.shape, t.stride()) for t in tensors]), group, merge_batch)
        self.tensors, self.walk = tensors, walk
        self.batch, self.positions, self.group = walk.batch, walk.positions, walk.group
        self.strides = walk.strides

    def arguments(self) -> list[Any]:
        """List each operand and its strides, with None for a channel or position stride of 1, so that
        contiguity is known when the kernel is compiled."""
        arguments = []
        for tensor, steps in zip(self.tensors, self.walk.steps, strict=True):
            arguments += (tensor, *steps)
        return arguments

    def unit(self, *channels: int, first: int = 0, last: int | None = None) -> int:
        """Largest of 8, 4, 2 and 1 that divides all strides other than 1, and all lengths along contiguous
        axes: kernels need it to load 16 bytes at a time. `channels` are all channel counts and offsets. Only
        operands from `first` up to, but not including, `last` count."""
        return self.walk.unit(channels, first, last)

    def is_wide(self) -> bool:
        """Whether offsets within an image overflow 32 bits."""
        return self.walk.wide


class Walk:
    """The part of a `View` that depends only on the shapes and strides of its operands."""

    def __init__(
        self, sizes: Sequence[torch.Size], strides: Sequence[Strides], group: int, merge_batch: bool
    ) -> None:
        self.batch, self.positions, self.group = sizes[-1][0], math.prod(sizes[-1][2:]), 1
        self.strides = strides
        if merge_batch:
            self._merge_batch()
        if group > 1:
            self._merge_channels(sizes, group)
        self.steps = [
            (s.batch, None if s.channel == 1 else s.channel, None if s.position == 1 else s.position)
            for s in self.strides
        ]
        self.wide = any(
            (size[1] - 1) * s.channel + (self.positions - 1) * s.position >= 2**31
            for size, s in zip(sizes, self.strides, strict=True)
        )
        self._units: dict[tuple[Any, ...], int] = {}

    @staticmethod
    @functools.lru_cache(4096)  # looking at the strides takes longer than a kernel on a small map
    def over(
        forms: tuple[tuple[torch.Size, tuple[int, ...]], ...], group: int, merge_batch: bool
    ) -> Walk | None:
        """Walk over operands of these shapes and strides; None if one of them cannot be walked."""
        strides = [_flat(*form) for form in forms]
        return None if None in strides else Walk([size for size, _ in forms], strides, group, merge_batch)

    def _merge_batch(self) -> None:
        if self.positions == 1:
            self.strides = [Strides(0, s.channel, s.batch) for s in self.strides]
        elif all(s.batch == self.positions * s.position for s in self.strides):
            self.strides = [Strides(0, s.channel, s.position) for s in self.strides]
        else:
            return
        self.batch, self.positions = 1, self.batch * self.positions

    def _merge_channels(self, sizes: Sequence[torch.Size], group: int) -> None:
        if all(
            s.position == 1 and (size[1] == 1 or s.channel == self.positions)
            for size, s in zip(sizes, self.strides, strict=True)
        ):
            self.strides = [Strides(s.batch, s.channel * group, 1) for s in self.strides]
            self.group, self.positions = group, self.positions * group

    def unit(self, channels: tuple[int, ...], first: int, last: int | None) -> int:
        """See `View.unit`."""
        key = channels, first, last
        if key not in self._units:
            unit = 8
            for batch, channel, position in self.strides[first:last]:
                along_channels = channels if channel == 1 else (channel,)
                unit = math.gcd(unit, batch, *along_channels, self.positions if position == 1 else position)
            self._units[key] = unit
        return self._units[key]
