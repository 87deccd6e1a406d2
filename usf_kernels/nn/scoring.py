"""Scores from latents, as modules without parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from usf_kernels.ops import anomaly_map, squared_norm
from usf_kernels.ops.checks import check_choice, check_size


class SquaredNorm(nn.Module):
    """Squared norms (B, *spatial) of latents (B, C, *spatial): see `usf_kernels.ops.squared_norm`."""

    def forward(self, z: Tensor) -> Tensor:
        """Sum of squares over channels."""
        return squared_norm(z)


class AnomalyMap(nn.Module):
    """Anomaly map in [0, 1] of latents at one or several scales: see `usf_kernels.ops.anomaly_map`.

    Args:
        size: (H, W) of the map, or one int for a square; None if every call passes it.
        interpolate: "likelihood" or "latent".
    """

    def __init__(self, size: int | tuple[int, int] | None = None, *, interpolate: str = "likelihood") -> None:
        super().__init__()
        check_choice("interpolate", interpolate, ("likelihood", "latent"))
        self.size = None if size is None else check_size(size)
        self.interpolate = interpolate

    def forward(
        self, latents: Tensor | Sequence[Tensor], size: int | tuple[int, int] | None = None
    ) -> Tensor:
        """Return (B, 1, H, W); `size` overrides the one given at construction."""
        size = self.size if size is None else size
        return anomaly_map(latents, size, interpolate=self.interpolate)

    def extra_repr(self) -> str:
        """The options, for print."""
        return f"size={self.size}, interpolate={self.interpolate!r}"
