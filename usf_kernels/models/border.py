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
from usf_kernels.ops.native import is_observed

RINGS = 2  # width in positions of the border that is told from the inside
SIDE = 2 * RINGS + 1  # rows (or columns) told apart: RINGS near either end, and all others as one
LARGEST_RATIO = 10.0  # between two spreads


class BorderNorm(nn.Module):
    """Give every channel near the border the mean and the spread that it has inside.

    `y = x * scale_r + shift_p`, and y = x inside: an affine map per channel that depends on the position and
    not on the input. There is one scale per ring r = 0, 1 from the border, but one shift per place p: the
    four sides and the corners see more of the padding, or none where a stride skips it. (A spread for each
    of these places was measured too: such flows rank pixels less well, and raise more false alarms.) The map
    is set by `fit`, not trained; before that it is the identity.

    Args:
        channels: number of channels, C.

    Attributes:
        log_scale: (RINGS, C) buffer.
        shift: (SIDE * SIDE, C) buffer, one row per place, in the order of `place_of`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.zeros(RINGS, channels))
        self.register_buffer("shift", torch.zeros(SIDE * SIDE, channels))
        self._kept: Kept[_Maps] = Kept()

    @torch.no_grad()
    def fit(self, features: Tensor) -> BorderNorm:
        """Take means and spreads from features (N, C, H, W) of normal images; returns self.

        Maps without positions inside make it the identity.
        """
        ring, place = (of(*features.shape[2:], device=features.device) for of in (ring_of, place_of))
        if not (ring == RINGS).any():
            self.log_scale.zero_(), self.shift.zero_()
            return self
        rings = (features[:, :, ring == r].double() for r in range(RINGS + 1))
        spreads = torch.stack([values.std((0, 2), correction=0) for values in rings])
        places = (features[:, :, place == p].double() for p in range(SIDE * SIDE))
        means = torch.stack([values.mean((0, 2)) for values in places])
        scale = (spreads[-1] / spreads[:-1]).nan_to_num(1.0, 1.0).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
        self.log_scale.copy_(scale.log())
        scales = torch.cat([scale, torch.ones_like(scale[:1])])[ring_of(SIDE, SIDE).flatten()]
        self.shift.copy_(means[SIDE * SIDE // 2] - scales * means)
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
        ring, place = (of(*x.shape[2:], device=x.device) for of in (ring_of, place_of))
        scales = torch.cat([self.log_scale.exp(), self.log_scale.new_ones(1, self.log_scale.shape[1])])
        maps = (
            table.to(x.dtype)[index].permute(2, 0, 1)[None]
            for table, index in ((scales, ring), (self.shift, place))
        )
        log_det = sum((ring == r).sum() * self.log_scale[r].sum() for r in range(RINGS))
        return _Maps(*(m.contiguous() if x.is_contiguous() else m for m in maps), log_det)


class _Maps(NamedTuple):
    """Scale and shift, (1, C, H, W) in the features' memory format, None for the identity; 0-d log_det."""

    scale: Tensor | None
    shift: Tensor | None
    log_det: Tensor


def place_of(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return (height, width) indices of each position's place: SIDE * SIDE by rows, the middle is inside."""
    y, x = (_from_ends(size, device) for size in (height, width))
    return y[:, None] * SIDE + x


def _from_ends(size: int, device: torch.device | None) -> Tensor:
    """Return (size,): 0, 1, ... at the first positions, SIDE - 1, ... at the last ones, RINGS between."""
    ahead = torch.arange(size, device=device)
    behind = size - 1 - ahead
    return torch.where(ahead <= behind, ahead.clamp(max=RINGS), SIDE - 1 - behind.clamp(max=RINGS))


def ring_of(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return (height, width): the number of positions between each one and the border, at most RINGS."""
    y, x = (torch.arange(size, device=device) for size in (height, width))
    y, x = torch.minimum(y, height - 1 - y), torch.minimum(x, width - 1 - x)
    return torch.minimum(y[:, None], x).clamp(max=RINGS)
