"""Positional encodings, as maps and in the form that fused flows take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from usf_kernels.models.kept import Kept
from usf_kernels.nn.capture import is_capturing
from usf_kernels.nn.fused import FusedFlow
from usf_kernels.ops.checks import check_int
from usf_kernels.ops.native import is_observed, memory_format


def check_encoding_channels(channels: int) -> None:
    """Raise unless a positional encoding can have this number of channels."""
    check_int("encoding_channels", channels, 4)
    if channels % 4:
        raise ValueError(f"encoding_channels: expected a multiple of 4, found {channels}")


def positional_encoding(
    channels: int,
    height: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Encode each position of a map as sines and cosines of its column and row.

    With D = channels / 2, channels 2i and 2i + 1 are sin and cos of `column / 10000^(2i / D)`, and channels
    from D on are the same for the row. It is the 2D form of A. Vaswani et al., "Attention Is All You Need"
    (arXiv:1706.03762), section 3.5, on which CFlow conditions (arXiv:2107.12571).

    Args:
        channels: a multiple of 4.
        height, width: size of the map.
        dtype: dtype of the result; it is computed in float32 at least.
        device: device of the result.

    Returns:
        (channels, height, width), in [-1, 1].

    Raises:
        TypeError, ValueError: for another number of channels.
    """
    check_encoding_channels(channels)
    half, wide = channels // 2, torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, half, 2, dtype=wide, device=device) / half
    frequencies = torch.exp(-math.log(1e4) * exponents)

    def waves(length: int) -> Tensor:
        angles = torch.arange(length, dtype=wide, device=device) * frequencies[:, None]
        return torch.stack([angles.sin(), angles.cos()], dim=1).flatten(0, 1).to(dtype)

    columns = waves(width)[:, None, :].expand(half, height, width)
    rows = waves(height)[:, :, None].expand(half, height, width)
    return torch.cat([columns, rows])


class Encodings:
    """The positional encodings of one scale, as maps or projected for its fused flow.

    Both are cached for a few sizes of map; projections until a weight of the flow changes or moves.

    Args:
        channels: channels of the encoding.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._maps: Kept[Tensor] = Kept()
        self._projected: Kept[tuple[Tensor, ...]] = Kept()

    def of(self, maps: Tensor) -> Tensor:
        """Return (1, channels, H, W) for maps (B, C, H, W), in their memory format. Not to be written to."""
        key = tuple(maps.shape[2:]), maps.dtype, maps.device, memory_format(maps)
        return self._maps.get(key, (), lambda: self._encode(*key))

    def _encode(
        self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, format_: torch.memory_format
    ) -> Tensor:
        encoding = positional_encoding(self.channels, *size, dtype=dtype, device=device)[None]
        return encoding.contiguous(memory_format=format_)

    def projected(self, flow: FusedFlow, maps: Tensor) -> tuple[Tensor, ...] | None:
        """Return `flow.project` of the encoding; None if the flow takes no condition (has no couplings)."""
        if flow.cond_channels == 0:
            return None
        key = tuple(maps.shape[2:]), maps.device
        if is_observed() or is_capturing():
            return self._project(flow, *key)
        return self._projected.get(key, flow.weights, lambda: self._project(flow, *key))

    def _project(self, flow: FusedFlow, size: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
        return flow.project(positional_encoding(self.channels, *size, dtype=flow.dtype, device=device)[None])
