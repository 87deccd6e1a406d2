"""Base distributions of density flows, with parameters that may be trained along with the flow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Laplace, Normal

from usf_kernels.models.base_distribution import BaseDistribution, draw, mixture, wide
from usf_kernels.models.radial import RadialBase
from usf_kernels.models.traceable import TraceableStudentT
from usf_kernels.ops.checks import check_choice, check_int, check_positive


class _FromTorch(BaseDistribution):
    """A base distribution made of one of torch.distributions, rebuilt from the parameters at every call."""

    def distribution(self) -> Distribution:
        """Return the distribution of one sample at the current parameters, without a batch shape."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of every sample, (B,)."""
        z = self._checked(z)
        return z.new_zeros(0) if z.shape[0] == 0 else self.distribution().log_prob(z)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Draw n samples, (n, *shape)."""
        check_int("n", n, 0)
        return draw(self.distribution(), n).to(self.loc.dtype)


class NormalBase(_FromTorch):
    """Independent normals.

    Args:
        shape, loc, trainable: see `BaseDistribution`.
        scale: initial scale of every dimension, positive.
    """

    family: type[Distribution] = Normal

    def __init__(
        self,
        shape: Sequence[int],
        *,
        loc: float | Sequence[Any] = 0.0,
        scale: float = 1.0,
        trainable: bool = False,
    ) -> None:
        super().__init__(shape, loc=loc, trainable=trainable)
        check_positive("scale", scale)
        self._register("log_scale", torch.full(self.shape, math.log(scale)))

    def distribution(self) -> Distribution:
        """Return the distribution at the current parameters."""
        return self._independent(wide(self.loc), wide(self.log_scale).exp())

    def _independent(self, *parameters: Tensor) -> Distribution:
        return Independent(
            self.family(*parameters, validate_args=False), len(self.shape), validate_args=False
        )


class LaplaceBase(NormalBase):
    """Independent Laplace distributions, radial in the L1 norm; arguments as for `NormalBase`."""

    family = Laplace


class StudentTBase(NormalBase):
    """Independent Student t distributions; `df` are the degrees of freedom, trained where `trainable`."""

    family = TraceableStudentT

    def __init__(
        self,
        shape: Sequence[int],
        *,
        df: float = 5.0,
        loc: float | Sequence[Any] = 0.0,
        scale: float = 1.0,
        trainable: bool = False,
    ) -> None:
        super().__init__(shape, loc=loc, scale=scale, trainable=trainable)
        check_positive("df", df)
        self._register("log_df", torch.full(self.shape, math.log(df)))

    def distribution(self) -> Distribution:
        """Return the distribution at the current parameters."""
        return self._independent(wide(self.log_df).exp(), wide(self.loc), wide(self.log_scale).exp())


class NormalMixtureBase(_FromTorch):
    """A mixture of normals with diagonal covariances.

    Args:
        shape, trainable: see `BaseDistribution`.
        components: number of normals, which start with equal weights and unit variances.
        spread: standard deviation of the initial means, drawn from torch's global generator.
    """

    def __init__(
        self, shape: Sequence[int], *, components: int = 4, spread: float = 1.0, trainable: bool = True
    ) -> None:
        super().__init__(shape, trainable=trainable)
        check_int("components", components, 1)
        check_positive("spread", spread)
        self._register("means", spread * torch.randn(components, *self.shape))
        self._register("log_scale", torch.zeros(components, *self.shape))
        self._register("logits", torch.zeros(components))

    def distribution(self) -> Distribution:
        """Return the distribution at the current parameters."""
        normals = Independent(self._normals(), len(self.shape), validate_args=False)
        return mixture(wide(self.logits), normals)

    def _normals(self) -> Normal:
        return Normal(wide(self.loc) + self.means, wide(self.log_scale).exp(), validate_args=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of every sample, (B,)."""
        parts = self._normals().log_prob(self._checked(z)[:, None]).flatten(2)
        # The weights are added before the sum: OpenVINO adds a vector to a sum along the wrong axis.
        weights = torch.log_softmax(wide(self.logits), 0) / max(self.dimensions, 1)
        return (parts + weights[:, None]).sum(2).logsumexp(1)


BASES: dict[str, type[BaseDistribution]] = {
    "normal": NormalBase,
    "laplace": LaplaceBase,
    "student_t": StudentTBase,
    "radial": RadialBase,
    "normal_mixture": NormalMixtureBase,
}


def create_base(spec: str | Mapping[str, Any], shape: Sequence[int]) -> BaseDistribution:
    """Make a base distribution from its description.

    Args:
        spec: "normal", "laplace", "student_t", "radial" or "normal_mixture", or a mapping with such a `name`
            and the options of that distribution.
        shape: shape of one sample.

    Raises:
        TypeError, ValueError: for an unknown name or option, or a bad value.
    """
    if not isinstance(spec, (str, Mapping)):
        raise TypeError(f"base: expected a name or a mapping, found {type(spec).__name__}")
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    check_choice("base", name, tuple(BASES))
    return BASES[name](shape, **options)
