"""Correction of features near the border of a map for the padding of convolutions.

A convolution that pads with zeros sees less near the border, so its output there has another mean and spread
than inside. Affine couplings learn scales for that. A flow whose determinant does not depend on the input
has no such scales, and would find the border of every image unusual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from usf_kernels.models.kept import Kept
from usf_kernels.nn.capture import is_capturing
from usf_kernels.ops.checks import to_double
from usf_kernels.ops.native import is_observed

RINGS = 2  # width in positions of the border that is told from the inside
LARGEST_RATIO = 10.0  # between two spreads


class BorderNorm(nn.Module):
    """Give every channel near the border the mean and the spread that it has inside.

    `y = x * scale_r + shift_r` for positions r = 0, 1 from the border, and y = x inside: an affine map per
    channel that depends on the position and not on the input. The map is set by `fit`, not trained; before
    that it is the identity.

    Args:
        channels: number of channels, C.

    Attributes:
        log_scale, shift: (RINGS, C) buffers.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.zeros(RINGS, channels))
        self.register_buffer("shift", torch.zeros(RINGS, channels))
        self._kept: Kept[_Maps] = Kept()

    @torch.no_grad()
    def fit(self, features: Tensor) -> BorderNorm:
        """Take means and spreads from features (N, C, H, W) of normal images; returns self.

        Maps without positions inside make it the identity.
        """
        distance = ring_of(*features.shape[2:], device=features.device)
        rings = [to_double(features[:, :, distance == ring]) for ring in range(RINGS + 1)]
        if rings[-1].numel() == 0:
            self.log_scale.zero_(), self.shift.zero_()
            return self
        spreads = torch.stack([ring.std((0, 2), correction=0) for ring in rings])
        means = torch.stack([ring.mean((0, 2)) for ring in rings])
        scale = (spreads[-1] / spreads[:-1]).nan_to_num(1.0, 1.0).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
        self.log_scale.copy_(scale.log())
        self.shift.copy_(means[-1] - scale * means[:-1])
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Correct features (B, C, H, W); return them and the log-determinant, 0-d."""
        scale, shift, log_det = self._maps(x)
        return (x if scale is None else torch.addcmul(shift, x, scale)), log_det

    def inverse(self, y: Tensor) -> Tensor:
        """Return the features that `forward` maps to y."""
        scale, shift, _ = self._maps(y)
        return y if scale is None else (y - shift) / scale

    def _maps(self, x: Tensor) -> _Maps:
        key = (*x.shape[2:], x.dtype, x.device, x.is_contiguous())
        return self._kept.get(key, (self.log_scale, self.shift), lambda: self._made(x))

    def _made(self, x: Tensor) -> _Maps:
        # Values must not be read back while operations are observed or captured.
        unseen = not is_observed() and not is_capturing()
        if unseen and not (self.log_scale.any() or self.shift.any()):
            return _Maps(None, None, self.log_scale.new_zeros(()))
        ring = ring_of(*x.shape[2:], device=x.device)
        inside = self.shift.new_zeros(1, self.shift.shape[1])
        tables = torch.cat([self.log_scale.exp(), inside + 1]), torch.cat([self.shift, inside])
        maps = (table.to(x.dtype)[ring].permute(2, 0, 1)[None] for table in tables)
        log_det = sum((ring == r).sum() * self.log_scale[r].sum() for r in range(RINGS))
        return _Maps(*(m.contiguous() if x.is_contiguous() else m for m in maps), log_det)


class _Maps(NamedTuple):
    """Scale and shift, (1, C, H, W) in the features' memory format, None for the identity; 0-d log_det."""

    scale: Tensor | None
    shift: Tensor | None
    log_det: Tensor


def ring_of(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return (height, width): the number of positions between each one and the border, at most RINGS."""
    y, x = (torch.arange(size, device=device) for size in (height, width))
    y, x = torch.minimum(y, height - 1 - y), torch.minimum(x, width - 1 - x)
    return torch.minimum(y[:, None], x).clamp(max=RINGS)
