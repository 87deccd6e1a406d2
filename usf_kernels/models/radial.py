"""Radial base distributions on the L1, L2 and Linf norms, with a learned distribution of the norm.

These are the base distributions of the uniformly scaling flows of arXiv:2510.09452.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Laplace, LogNormal, Normal

from usf_kernels.models.base_distribution import BaseDistribution, draw, mixture, wide
from usf_kernels.models.traceable import TraceableGamma
from usf_kernels.ops.checks import check_choice, check_int


class RadialBase(BaseDistribution):
    """Radial on an Lp norm: the direction is uniform, and the norm has a distribution of its own.

    With r = |z - loc|_p, D dimensions and V the volume of the unit ball, the density is
    `f(r) / (D V r^(D-1))`, since a ball of radius r has the volume V r^D. The distribution f is a mixture,
    of gamma or log-normal distributions of r^2 (p = 2) or r (otherwise). One gamma component starts as the
    standard normal (p = 2) or the standard Laplace distribution (p = 1).

    Args:
        shape, loc, trainable: see `BaseDistribution`.
        p: 1, 2 or math.inf.
        norm: "gamma" or "log_normal".
        components: number of components of the mixture.

    The norm of a latent ranks as the likelihood does only where the density falls with the norm; with a
    learned distribution of the norm, it need not.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        p: float = 2,
        norm: str = "gamma",
        components: int = 1,
        loc: float | Sequence[Any] = 0.0,
        trainable: bool = True,
    ) -> None:
        super().__init__(shape, loc=loc, trainable=trainable)
        if p not in (1, 2, math.inf):
            raise ValueError(f"p: expected 1, 2 or math.inf, found {p!r}")
        check_choice("norm", norm, ("gamma", "log_normal"))
        check_int("components", components, 1)
        self.p, self.norm_family, self.power = p, norm, 2 if p == 2 else 1
        shape_parameter = max(self.dimensions, 1) / self.power
        # In a cube of half-width sqrt(3), coordinates have unit variance.
        mean = math.sqrt(3) if p == math.inf else float(max(self.dimensions, 1))
        offsets = torch.linspace(-1, 1, components) if components > 1 else torch.zeros(1)
        self._register("log_mean", math.log(mean) + offsets / math.sqrt(shape_parameter))
        self._register("log_shape", torch.full((components,), math.log(shape_parameter)))
        self._register("logits", torch.zeros(components))

    def norm(self, z: Tensor) -> Tensor:
        """Return |z - loc|_p of every sample, (B,)."""
        z = self._checked(z)
        return torch.linalg.vector_norm((z - self.loc).flatten(1), self.p, dim=1)

    def norm_distribution(self) -> Distribution:
        """Return the distribution of the norm, squared if p = 2, at the current parameters."""
        shape, log_mean = wide(self.log_shape).exp(), wide(self.log_mean)
        if self.norm_family == "gamma":
            family = TraceableGamma(shape, shape * (-log_mean).exp(), validate_args=False)
        else:  # on a logarithmic scale about as wide as a gamma distribution of this shape
            family = LogNormal(log_mean, shape.rsqrt(), validate_args=False)
        return mixture(wide(self.logits), family)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of every sample, (B,)."""
        r = self.norm(z)
        info = torch.finfo(r.dtype)
        # So that its power is positive and finite too, and the density at infinity a number.
        r = r.clamp(info.tiny**0.45, info.max ** (0.98 / self.power))
        log_norm = self.norm_distribution().log_prob(r**self.power)
        return (
            log_norm
            + math.log(self.power / self.dimensions)
            - self._log_volume()
            + (self.power - self.dimensions) * r.log()
        )

    def _log_volume(self) -> float:
        """Log volume of the unit ball."""
        d = self.dimensions
        if self.p == 2:
            return d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
        return d * math.log(2) - (math.lgamma(d + 1) if self.p == 1 else 0.0)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Draw n samples, (n, *shape)."""
        check_int("n", n, 0)
        r = draw(self.norm_distribution(), n) ** (1 / self.power)
        # The density of each of these depends on the norm only, so their directions are uniform.
        loc = wide(self.loc)
        zero, one = torch.zeros_like(loc), torch.ones_like(loc)
        if self.p == math.inf:
            z = 2 * torch.rand((n, *self.shape), dtype=zero.dtype, device=zero.device) - 1
        else:
            z = (Normal if self.p == 2 else Laplace)(zero, one, validate_args=False).sample((n,))
        z = z.flatten(1)
        z = z * (r / torch.linalg.vector_norm(z, self.p, dim=1))[:, None]
        return (z.view(n, *self.shape) + loc).to(self.loc.dtype)

    def extra_repr(self) -> str:
        """The options, for print."""
        return f"{super().extra_repr()}, p={self.p}, norm={self.norm_family!r}"
