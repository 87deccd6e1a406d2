"""Conditioners of the density flows: dense for vectors, gated and normalised convolutions for maps.

The layers of a conditioner are not part of a coupling's log-determinant, so trainable normalisation is
harmless here, unlike on the way to the latents.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usf_kernels.nn.coupling import Subnet

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, *spatial), at every position alone. arXiv:1607.06450."""

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        rows = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
        return rows.movedim(-1, 1)


class GatedResidual(nn.Module):
    """`x + v * sigmoid(g)`, with v and g from two convolutions of x (kernels of `kernel` and 1), as in the
    gated residual networks of Flow++ (arXiv:1902.00275, section 3.3)."""

    def __init__(self, channels: int, kernel: int, dims: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dims]
        self.layers = nn.Sequential(
            nn.SiLU(),
            convolution(channels, channels, kernel, padding=kernel // 2),
            nn.SiLU(),
            convolution(channels, 2 * channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        value, gate = self.layers(x).chunk(2, dim=1)
        return x + value * torch.sigmoid(gate)


def convolutional_conditioner(hidden: int, layers: int, kernel: int, dims: int) -> Subnet:
    """Return a function that makes conditioners for maps of `dims` spatial dimensions: a convolution to
    `hidden` channels, `layers` gated residual blocks with a `ChannelNorm` each, and an output convolution."""

    def make(c_in: int, c_out: int) -> nn.Module:
        convolution = CONVOLUTIONS[dims]
        blocks = []
        for _ in range(layers):
            blocks += [GatedResidual(hidden, kernel, dims), ChannelNorm(hidden)]
        return nn.Sequential(
            convolution(c_in, hidden, kernel, padding=kernel // 2),
            *blocks,
            nn.SiLU(),
            convolution(hidden, c_out, kernel, padding=kernel // 2),
        )

    return make


def dense_conditioner(hidden: int, layers: int) -> Subnet:
    """Return a function that makes conditioners for vectors: `layers` hidden layers of width `hidden`."""

    def make(c_in: int, c_out: int) -> nn.Module:
        widths = [c_in, *[hidden] * layers]
        stack: list[nn.Module] = []
        for first, second in pairwise(widths):
            stack += [nn.Linear(first, second), nn.SiLU()]
        return nn.Sequential(*stack, nn.Linear(widths[-1], c_out))

    return make
