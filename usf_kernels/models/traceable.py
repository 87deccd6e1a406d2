"""Forms of torch's distributions whose log densities pass `torch.export` and have an ONNX form."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma, StudentT
from torch.distributions.utils import broadcast_all

SHIFT = 8


def log_gamma(x: Tensor) -> Tensor:
    """Return `log Gamma(x)` of positive x. ONNX has no operation for it: exported graphs have Stirling's
    series at x + 8 (Abramowitz and Stegun, 6.1.41), minus the logarithm of x (x + 1) ... (x + 7)."""
    if not torch.compiler.is_exporting():
        return torch.lgamma(x)
    far, product = x + SHIFT, x
    for i in range(1, SHIFT):
        product = product * (x + i)
    inverse = 1 / far
    square = inverse * inverse
    rest = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    return (far - 0.5) * far.log() - far + 0.5 * math.log(2 * math.pi) + rest - product.log()


class TraceableGamma(Gamma):
    """`torch.distributions.Gamma` of positive values."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        shape, rate = self.concentration, self.rate
        return shape * rate.log() + (shape - 1) * value.log() - rate * value - log_gamma(shape)


def _log_gamma_ratio(x: Tensor) -> Tensor:
    """Return `log(gamma(x + 1/2) / gamma(x))`, by its series for large x, where the difference cancels."""
    inverse = 1 / x
    series = 0.5 * x.log() - inverse / 8 + inverse**3 / 192 - inverse**5 / 640
    return torch.where(x > 30, series, log_gamma(x + 0.5) - log_gamma(x))


class TraceableStudentT(StudentT):
    """`torch.distributions.StudentT` without the look at values that torch's takes when it is made."""

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor, validate_args: bool = False) -> None:
        self.df, self.loc, self.scale = broadcast_all(df, loc, scale)
        # The chi-square as a gamma: torch's Chi2 would copy its second parameter from the host.
        half = torch.full_like(self.df, 0.5)
        self._chi2 = Gamma(0.5 * self.df, half, validate_args=False)
        Distribution.__init__(self, self.df.size(), validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        y, half = (value - self.loc) / self.scale, 0.5 * self.df
        normaliser = 0.5 * (math.pi * self.df).log() - _log_gamma_ratio(half)
        return -(half + 0.5) * torch.log1p(y.square() / self.df) - normaliser - self.scale.log()
