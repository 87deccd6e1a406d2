"""Base class of the base distributions (shape, centre, checks), and helpers to make mixtures and draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily

from usf_kernels.models.checks import check_samples
from usf_kernels.ops.checks import check_flag, compute_dtype


class BaseDistribution(nn.Module):
    """A distribution of latents of one shape.

    Args:
        shape: shape of one sample, (C, *spatial).
        loc: centre, a number or (nested) numbers that broadcast to the shape.
        trainable: store parameters as nn.Parameters rather than buffers. Both are in the state_dict.

    `log_prob(z)` takes (B, *shape) in any floating dtype and returns (B,) in float32 at least, in nats.
    `sample(n)` draws (n, *shape) from torch's global generator.

    Raises:
        TypeError, ValueError: for a bad argument, or a z that is not floating or has another shape.
    """

    def __init__(
        self, shape: Sequence[int], *, loc: float | Sequence[Any] = 0.0, trainable: bool = False
    ) -> None:
        super().__init__()
        check_flag("trainable", trainable)
        self.shape, self.trainable = tuple(shape), bool(trainable)
        self.dimensions = math.prod(self.shape)
        values = torch.as_tensor(loc, dtype=torch.get_default_dtype())
        try:
            values = values.expand(self.shape)
        except RuntimeError as error:
            raise ValueError(
                f"loc: expected numbers that broadcast to {self.shape}, found shape {tuple(values.shape)}"
            ) from error
        if not values.is_meta and not values.isfinite().all():
            wrong = values[~values.isfinite()][0].item()
            raise ValueError(f"loc: expected finite numbers, found {wrong}")
        self._register("loc", values.clone())

    def _register(self, name: str, value: Tensor) -> None:
        if self.trainable:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _checked(self, z: Tensor) -> Tensor:
        check_samples("z", z, self.shape)
        return z.to(compute_dtype(z, self.loc))

    def forward(self, z: Tensor) -> Tensor:
        """Same as `log_prob`."""
        return self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of every sample, (B,)."""
        raise NotImplementedError

    def sample(self, n: int) -> Tensor:
        """Draw n samples, (n, *shape)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The shape, for print."""
        return f"{self.shape}, trainable={self.trainable}"


def wide(parameter: Tensor) -> Tensor:
    """Return a parameter in the dtype to compute with, float32 at least: log densities are sums of large
    terms, and gamma functions have no half precision."""
    return parameter.to(compute_dtype(parameter))


def draw(distribution: Distribution, n: int) -> Tensor:
    """Draw n samples. Some torch distributions cannot draw none, so at least one is drawn and dropped."""
    return distribution.sample((max(n, 1),))[:n]


def mixture(logits: Tensor, components: Distribution) -> Distribution:
    weights = Categorical(logits=logits, validate_args=False)
    return MixtureSameFamily(weights, components, validate_args=False)
