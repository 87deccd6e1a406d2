"""Deep SVDD, deep one-class classification: a network that draws normal samples to one point.

L. Ruff et al., "Deep One-Class Classification", ICML 2018 (PMLR 80), equations 3 and 4.

The link to uniformly scaling flows (arXiv:2510.09452): let f be a flow whose log|det| is the same for all x,
with the base distribution N(c, I/2) in D dimensions. Its negative log-likelihood is

    -log p(x) = |f(x) - c|^2 + (D/2) log(pi) - log|det|

so that maximum likelihood minimises `one_class_loss(f(x), c) - log|det|` plus a constant: Deep SVDD with one
more term. That term forbids the collapse which Deep SVDD has to be kept from by other means (a fixed centre,
no biases, unbounded activations): a map to a point has log|det| = -infinity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from usf_kernels.models.checks import check_not_fused_to, check_sample_shape, check_samples, check_trainable
from usf_kernels.models.conditioners import CONVOLUTIONS
from usf_kernels.nn.capture import is_capturing
from usf_kernels.nn.modes import makes_weights
from usf_kernels.ops.checks import (
    check_between,
    check_choice,
    check_dtype,
    check_int,
    compute_dtype,
    to_double,
)

SMALLEST_CENTRE = 0.1  # per coordinate: a bias-free network reaches zero by setting weights to zero
MOMENTUM = 0.1  # weight of a batch's squared radius in the running one


def squared_distance(z: Tensor, centre: Tensor) -> Tensor:
    """Return `|z - centre|^2` of every sample, (B,), in float32 at least."""
    return (z - centre).to(compute_dtype(z, centre)).square().flatten(1).sum(1)


def one_class_loss(z: Tensor, centre: Tensor) -> Tensor:
    """Mean squared distance of latents (B, ...) from the centre: 0-d. Equation 4, without weight decay."""
    return squared_distance(z, centre).mean()


def soft_boundary_loss(z: Tensor, centre: Tensor, squared_radius: Tensor, nu: float) -> Tensor:
    """`R^2 + mean(max(0, |z - centre|^2 - R^2)) / nu`: 0-d. Equation 3, without weight decay."""
    outside = (squared_distance(z, centre) - squared_radius).clamp_min(0)
    return squared_radius + outside.mean() / nu


class Collapse(NamedTuple):
    """Whether a network maps everything to (nearly) the same point.

    Attributes:
        collapsed: whether `relative_spread` is below the threshold.
        spread: root mean square distance of the latents from their mean.
        relative_spread: spread relative to that at the time when the centre was set.
        effective_dimensions: (sum l)^2 / sum l^2 over the eigenvalues l of the latents' covariance, between 1
            and the number of eigenvalues; 0 where there is no variance at all.
        distance: mean distance of the latents from the centre.
    """

    collapsed: bool
    spread: float
    relative_spread: float
    effective_dimensions: float
    distance: float


class DeepSVDD(nn.Module):
    """Deep SVDD with a dense network for vectors, or a convolutional one for images and volumes.

    The centre is the mean latent of the first training batch, away from zero in every coordinate, and never
    moves. In soft-boundary form, the squared radius of a training batch is the (1 - nu)-quantile of its
    squared distances, which minimises that batch's loss over the radius exactly; a running mean of it is kept
    for `predict`. Weight decay, part of the paper's objective, is left to the optimiser.

    Args:
        shape: shape of one sample: (D,) or D, (C, H, W), (C, D, H, W).
        objective: "one_class" or "soft_boundary".
        nu: share of the training samples allowed outside a soft boundary, in (0, 1).
        latent: dimensions of the latents.
        hidden: width of a dense network, or of the first convolution (doubled by each next one).
        layers: hidden layers; of a convolutional network, each halves the resolution.
        bias: False as in the paper, whose propositions 2 and 3 show how biases allow collapse.

    `model(x) -> z` takes (B, *shape) and returns (B, latent).

    Raises:
        TypeError, ValueError: for a bad argument, or an x that is not floating or has another shape.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        objective: str = "one_class",
        nu: float = 0.1,
        latent: int = 32,
        hidden: int = 64,
        layers: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.shape = check_sample_shape(shape)
        check_choice("objective", objective, ("one_class", "soft_boundary"))
        check_between("nu", nu, 0, 1)
        latent, hidden = check_int("latent", latent, 1), check_int("hidden", hidden, 1)
        layers = check_int("layers", layers, 0)
        self.options = {
            "shape": list(self.shape),
            "objective": objective,
            "nu": float(nu),
            "latent": latent,
            "hidden": hidden,
            "layers": layers,
            "bias": bias,
        }
        network = _dense if len(self.shape) == 1 else _convolutional
        self.network = network(self.shape, latent, hidden, layers, bias)
        self.fused = False
        self.register_buffer("centre", torch.full((latent,), torch.nan))
        self.register_buffer("initial_spread", torch.tensor(torch.nan))
        self.register_buffer("squared_radius", torch.tensor(torch.nan))

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of `from_config`, as plain JSON values."""
        return dict(self.options)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the untrained model described by `config`; raise as the class does."""
        return cls(**config)

    def forward(self, x: Tensor) -> Tensor:
        """Map samples (B, *shape) to latents (B, latent)."""
        check_samples("x", x, self.shape)
        return self.network(x.to(next(self.network.parameters()).dtype))

    @torch.no_grad()
    def initialize(self, samples: Tensor) -> Self:
        """Set the centre, and the radius of a soft boundary, from these samples (N, *shape), at least one.
        The first batch of `loss` does so too.

        Returns:
            self.

        Raises:
            TypeError: on the inference form.
            ValueError: no samples, or latents whose mean is not finite.
        """
        check_trainable(self, "initialize")
        z = self(samples)
        if len(z) == 0:
            raise ValueError("samples: expected at least one, found none")
        mean = z.mean(0)
        if not mean.isfinite().all():
            raise ValueError("samples: expected finite latents of all, found a mean that is not finite")
        away = torch.where(mean < 0, -SMALLEST_CENTRE, SMALLEST_CENTRE).to(mean.dtype)
        self.centre.copy_(torch.where(mean.abs() < SMALLEST_CENTRE, away, mean))
        self.initial_spread.copy_(_spread(z))
        if self.options["objective"] == "soft_boundary":
            self.squared_radius.copy_(self._radius_of(z))
        return self

    def loss(self, batch: Tensor) -> Tensor:
        """Return the objective on a batch (B, *shape), 0-d. In training mode the first batch sets the centre.

        Raises:
            TypeError: on the inference form.
            ValueError: for an empty batch.
            RuntimeError: in evaluation mode, before there is a centre.
        """
        check_trainable(self, "loss")
        if len(batch) == 0:
            raise ValueError("batch: expected at least one sample, found none")
        if self.training and not self._ready():
            self.initialize(batch)
        self._require_centre()
        z = self(batch)
        if self.options["objective"] == "one_class":
            return one_class_loss(z, self.centre)
        squared_radius = self._update_radius(z) if self.training else self.squared_radius
        return soft_boundary_loss(z, self.centre, squared_radius, self.options["nu"])

    @torch.no_grad()
    def _update_radius(self, z: Tensor) -> Tensor:
        now = self._radius_of(z)
        before = torch.where(self.squared_radius.isnan(), now, self.squared_radius)
        self.squared_radius.copy_(torch.lerp(before, now, MOMENTUM))
        return now

    def _radius_of(self, z: Tensor) -> Tensor:
        """Return the squared radius that minimises the batch's loss; the largest one of several."""
        distance = squared_distance(z, self.centre)
        within = math.floor((1 - self.options["nu"]) * len(distance) + 1e-9)  # + 1e-9: rounding
        return distance.kthvalue(min(within + 1, len(distance))).values.to(self.squared_radius.dtype)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return anomaly scores, (B,): squared distances from the centre. For a soft boundary, the squared
        radius is subtracted, so that samples outside are positive.

        Raises:
            RuntimeError: before there is a centre.
        """
        self._require_centre()
        distance = squared_distance(self(x), self.centre)
        return distance if self.options["objective"] == "one_class" else distance - self.squared_radius

    @torch.no_grad()
    def collapse(self, samples: Tensor, *, threshold: float = 0.01) -> Collapse:
        """Measure how far the latents of samples (N, *shape) have collapsed.

        Args:
            samples: normal samples, at least two.
            threshold: share of the initial spread below which the network counts as collapsed.

        Raises:
            ValueError: for fewer than two samples.
            RuntimeError: before there is a centre.
        """
        self._require_centre()
        if len(samples) < 2:
            raise ValueError(f"samples: expected at least two, found {len(samples)}")
        z, centre = to_double(self(samples)), to_double(self.centre)
        eigenvalues = torch.linalg.eigvalsh(torch.cov(z.T).view(z.shape[1], z.shape[1])).clamp_min(0)
        total = eigenvalues.sum().item()
        relative = (_spread(z) / to_double(self.initial_spread)).item()
        return Collapse(
            collapsed=not relative >= threshold,  # NaN, without any spread at the start, is collapse too
            spread=_spread(z).item(),
            relative_spread=relative,
            effective_dimensions=total**2 / eigenvalues.square().sum().item() if total > 0 else 0.0,
            distance=squared_distance(z, centre).sqrt().mean().item(),
        )

    @makes_weights
    def fuse(self, dtype: torch.dtype | None = None) -> Self:
        """Return a copy for inference, in evaluation mode and without gradients. A `dtype` is that of the
        copy's network; centre and radius keep theirs. This model stays as it is.

        Raises:
            TypeError: for a dtype that is not floating, or any on an inference form, which keeps its own.
        """
        check_dtype(dtype)
        check_not_fused_to(self, dtype)
        fused = deepcopy(self).eval().requires_grad_(False)
        fused.network.to(dtype=dtype)
        fused.fused = True
        return fused

    def _ready(self) -> bool:
        """Whether the centre is set. A CUDA graph cannot check that, but its warm-up calls have."""
        return is_capturing() or not bool(self.centre.isnan().any())

    def _require_centre(self) -> None:
        if not self._ready():
            raise RuntimeError("centre: not set yet; call `initialize`, or `loss` in training mode")


def _spread(z: Tensor) -> Tensor:
    return (z - z.mean(0)).square().sum(1).mean().sqrt()


def _dense(shape: tuple[int, ...], latent: int, hidden: int, layers: int, bias: bool) -> nn.Module:
    stack: list[nn.Module] = []
    width = shape[0]
    for _ in range(layers):
        stack += [nn.Linear(width, hidden, bias=bias), nn.LeakyReLU(0.1)]
        width = hidden
    return nn.Sequential(*stack, nn.Linear(width, latent, bias=bias))


def _convolutional(shape: tuple[int, ...], latent: int, hidden: int, layers: int, bias: bool) -> nn.Module:
    convolution = CONVOLUTIONS[len(shape) - 1]
    channels, sizes, stack = shape[0], shape[1:], []
    for i in range(layers):
        stack += [
            convolution(channels, hidden * 2**i, 3, stride=2, padding=1, bias=bias),
            nn.LeakyReLU(0.1),
        ]
        channels, sizes = hidden * 2**i, tuple((size + 1) // 2 for size in sizes)
    return nn.Sequential(*stack, nn.Flatten(), nn.Linear(channels * math.prod(sizes), latent, bias=bias))
