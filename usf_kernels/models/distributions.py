"""Base distributions of density flows, with parameters that may be trained along with the flow.

Radial distributions on the L1, L2 and Linf norms with a learned distribution of the norm: the uniformly
scaling flows of arXiv:2510.09452.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    Normal,
    StudentT,
)

from usf_kernels.ops.checks import check_choice, check_float, check_int, compute_dtype


class BaseDistribution(nn.Module):
    """A distribution of latents of one shape.

    Args:
        shape: of one sample, (C, *spatial).
        loc: its centre, a number or (nested) numbers that broadcast to the shape.
        trainable: make the parameters nn.Parameters; buffers otherwise. Both are in the state_dict.

    `log_prob(z)` takes (B, *shape) in any floating dtype and returns (B,) in float32 at least, in nats.
    `sample(n)` draws (n, *shape) from torch's global generator.

    Raises:
        TypeError, ValueError: a bad argument; z that is not floating or of another shape.
    """

    def __init__(
        self, shape: Sequence[int], *, loc: float | Sequence[Any] = 0.0, trainable: bool = False
    ) -> None:
        super().__init__()
        self.shape, self.trainable = tuple(shape), trainable
        self.dimensions = math.prod(self.shape)
        values = torch.as_tensor(loc, dtype=torch.get_default_dtype())
        try:
            values = values.expand(self.shape)
        except RuntimeError as error:
            raise ValueError(
                f"loc: expected numbers that broadcast to {self.shape}, found shape {tuple(values.shape)}"
            ) from error
        self._register("loc", values.clone())

    def _register(self, name: str, value: Tensor) -> None:
        if self.trainable:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _checked(self, z: Tensor) -> Tensor:
        check_float("z", z)
        if z.ndim == 0 or tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"z: expected shape (B, {str(self.shape)[1:]}, found {tuple(z.shape)}")
        return z.to(compute_dtype(z, self.loc))

    def forward(self, z: Tensor) -> Tensor:
        """`log_prob`."""
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


class _FromTorch(BaseDistribution):
    """One of torch.distributions; its parameters are read anew at every call."""

    def distribution(self) -> Distribution:
        """The distribution as it is now: of one sample, without a batch shape."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of every sample, (B,)."""
        z = self._checked(z)
        return z.new_zeros(0) if len(z) == 0 else self.distribution().log_prob(z)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Draw n samples, (n, *shape)."""
        check_int("n", n, 0)
        return _draw(self.distribution(), n)


class NormalBase(_FromTorch):
    """Independent normals.

    Args:
        shape, loc, trainable: see `BaseDistribution`.
        scale: of every dimension, positive.
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
        _check_positive("scale", scale)
        self._register("log_scale", torch.full(self.shape, math.log(scale)))

    def distribution(self) -> Distribution:
        """The distribution as it is now."""
        return self._independent(self.loc, self.log_scale.exp())

    def _independent(self, *parameters: Tensor) -> Distribution:
        return Independent(
            self.family(*parameters, validate_args=False), len(self.shape), validate_args=False
        )


class LaplaceBase(NormalBase):
    """Independent Laplace distributions; arguments as for `NormalBase`. Radial on the L1 norm."""

    family = Laplace


class StudentTBase(NormalBase):
    """Independent Student t distributions; `df` are the degrees of freedom, trained where `trainable`."""

    family = StudentT

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
        _check_positive("df", df)
        self._register("log_df", torch.full(self.shape, math.log(df)))

    def distribution(self) -> Distribution:
        """The distribution as it is now."""
        return self._independent(self.log_df.exp(), self.loc, self.log_scale.exp())


class NormalMixtureBase(_FromTorch):
    """A mixture of normals with diagonal covariances.

    Args:
        shape, trainable: see `BaseDistribution`.
        components: their number; they start with equal weights and unit variances.
        spread: standard deviation of the first means, which torch's global generator draws.
    """

    def __init__(
        self, shape: Sequence[int], *, components: int = 4, spread: float = 1.0, trainable: bool = True
    ) -> None:
        super().__init__(shape, trainable=trainable)
        check_int("components", components, 1)
        _check_positive("spread", spread)
        self._register("means", spread * torch.randn(components, *self.shape))
        self._register("log_scale", torch.zeros(components, *self.shape))
        self._register("logits", torch.zeros(components))

    def distribution(self) -> Distribution:
        """The distribution as it is now."""
        normals = Normal(self.loc + self.means, self.log_scale.exp(), validate_args=False)
        normals = Independent(normals, len(self.shape), validate_args=False)
        return _mixture(self.logits, normals)


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
        components: of the mixture.

    A latent norm ranks as the likelihood does only where the density falls with the norm, which a learned
    distribution of the norm is free not to do.
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
        """|z - loc|_p of every sample, (B,)."""
        z = self._checked(z)
        return torch.linalg.vector_norm((z - self.loc).flatten(1), self.p, dim=1)

    def norm_distribution(self) -> Distribution:
        """Of the norm to the power of 2 (p = 2) or 1, as it is now."""
        shape = self.log_shape.exp()
        if self.norm_family == "gamma":
            family = Gamma(shape, shape * (-self.log_mean).exp(), validate_args=False)
        else:  # about as wide, on the logarithmic scale, as a gamma distribution of this shape
            family = LogNormal(self.log_mean, shape.rsqrt(), validate_args=False)
        return _mixture(self.logits, family)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of every sample, (B,)."""
        r = self.norm(z)
        r = r.clamp_min(torch.finfo(r.dtype).tiny ** 0.45)  # the square of it is positive too
        log_norm = self.norm_distribution().log_prob(r**self.power)
        return (
            log_norm
            + math.log(self.power / self.dimensions)
            - self._log_volume()
            + (self.power - self.dimensions) * r.log()
        )

    def _log_volume(self) -> float:
        """Of the unit ball."""
        d = self.dimensions
        if self.p == 2:
            return d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
        return d * math.log(2) - (math.lgamma(d + 1) if self.p == 1 else 0.0)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Draw n samples, (n, *shape)."""
        check_int("n", n, 0)
        r = _draw(self.norm_distribution(), n) ** (1 / self.power)
        # The density of each of these depends on the norm only, so their directions are uniform.
        zero, one = torch.zeros_like(self.loc), torch.ones_like(self.loc)
        if self.p == math.inf:
            z = 2 * torch.rand((n, *self.shape), dtype=zero.dtype, device=zero.device) - 1
        else:
            z = (Normal if self.p == 2 else Laplace)(zero, one, validate_args=False).sample((n,))
        z = z.flatten(1)
        z = z * (r / torch.linalg.vector_norm(z, self.p, dim=1))[:, None]
        return z.view(n, *self.shape) + self.loc

    def extra_repr(self) -> str:
        """The options, for print."""
        return f"{super().extra_repr()}, p={self.p}, norm={self.norm_family!r}"


BASES: dict[str, type[BaseDistribution]] = {
    "normal": NormalBase,
    "laplace": LaplaceBase,
    "student_t": StudentTBase,
    "radial": RadialBase,
    "normal_mixture": NormalMixtureBase,
}


def create_base(spec: str | Mapping[str, Any], shape: Sequence[int]) -> BaseDistribution:
    """A base distribution from its description.

    Args:
        spec: "normal", "laplace", "student_t", "radial" or "normal_mixture", or a mapping with such a `name`
            and the options of that distribution.
        shape: of one sample.

    Raises:
        TypeError, ValueError: an unknown name or option, a bad value.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    check_choice("base", name, tuple(BASES))
    return BASES[name](shape, **options)


def _draw(distribution: Distribution, n: int) -> Tensor:
    """n samples; not all of torch.distributions can draw none."""
    return distribution.sample((max(n, 1),))[:n]


def _mixture(logits: Tensor, components: Distribution) -> Distribution:
    weights = Categorical(logits=logits, validate_args=False)
    return MixtureSameFamily(weights, components, validate_args=False)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, found {value!r}")
