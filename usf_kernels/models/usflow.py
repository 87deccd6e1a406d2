"""USFlow, a uniformly scaling density model of vectors, images and volumes, and its affine counterpart.

F. Abu Zaid et al., "On Uniformly Scaling Flows: A Density-Aligned Approach to Deep One-Class
Classification", arXiv:2510.09452.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn

from usf_kernels.models.checks import check_not_fused_to, check_sample_shape, check_samples, check_trainable
from usf_kernels.models.conditioners import convolutional_conditioner, dense_conditioner
from usf_kernels.models.distributions import create_base
from usf_kernels.models.mahalanobis import moments
from usf_kernels.nn import (
    AdditiveCoupling,
    AffineCheckerboard,
    AffineCoupling,
    Conjugated,
    FlowSequence,
    Householder,
    LUConv1x1,
    Permutation,
    USFBlock,
)
from usf_kernels.nn.coupling import Subnet
from usf_kernels.nn.modes import makes_weights
from usf_kernels.nn.usf_block import CheckerboardCoupling
from usf_kernels.ops.checks import check_between, check_choice, check_clamp, check_int, check_positive


class DensityFlow(nn.Module):
    """`A_{n+1} . B_n ... B_1`: conjugated blocks `B = A^-1 . C . A`, a linear map, and a base distribution.

    `USFlow` has additive couplings C, `NonUSFlow` affine ones; all else is the same. A block starts as the
    identity, and A_{n+1}, an `LUConv1x1` for any choice of `linear`, holds all scales: after `initialize` the
    untrained flow whitens its data.

    Args:
        shape: shape of one sample: (D,) or D for vectors, (C, H, W) for images, (C, D, H, W) for volumes.
        blocks: number of blocks, n.
        mask: "half", "channel" (every other one) or "checkerboard" (every other position; the colours
            alternate from block to block): see `usf_kernels.nn.USFBlock`.
        linear: kind of the maps A inside blocks: "lu", "householder" or "permutation".
        base: a name or a mapping, see `create_base`.
        hidden: width of a conditioner.
        layers: hidden layers of a dense conditioner (for vectors), gated blocks of a convolutional one.
        kernel: size of the kernels, odd.
        reflections: number of reflections of every Householder map.
        clamp: bound on the log scales of affine couplings.
        prior_scale: s of the log-normal prior on every LU map: independently ln|u_ii| ~ N(0, s0^2), with
            s0 = s / (C * H * W). None for no prior.
        prior_weight: weight of the log prior in `loss`, against the mean log-likelihood: 1 / N makes training
            on N samples a maximum a posteriori estimate, and 1 is what the authors' code does.
        memory: what training keeps for the backward pass, see `usf_kernels.nn.FlowSequence`.

    `model(x) -> (z, log_det)` takes (B, *shape) of any floating dtype, and computes in that of its weights;
    log_det is 0-d for a USFlow and (B,) for a NonUSFlow.

    Raises:
        TypeError, ValueError: for a bad argument, or an x that is not floating or has another shape.
    """

    coupling: str

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        blocks: int = 8,
        mask: str = "half",
        linear: str = "lu",
        base: str | Mapping[str, Any] = "normal",
        hidden: int = 64,
        layers: int = 2,
        kernel: int = 3,
        reflections: int = 4,
        clamp: float = 2.0,
        prior_scale: float | None = None,
        prior_weight: float = 1.0,
        memory: str = "auto",
    ) -> None:
        super().__init__()
        self.shape = check_sample_shape(shape)
        dims = len(self.shape) - 1
        blocks, hidden = check_int("blocks", blocks, 0), check_int("hidden", hidden, 1)
        check_choice("mask", mask, ("half", "channel", "checkerboard"))
        check_choice("linear", linear, ("lu", "householder", "permutation"))
        layers, kernel = check_int("layers", layers, 0), check_int("kernel", kernel, 1)
        reflections, clamp = check_int("reflections", reflections, 1), check_clamp(clamp)
        if dims and layers and hidden == 1:
            raise ValueError("hidden: expected at least 2, found 1, which layer norm would make constant")
        if kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd size, found {kernel}")
        if mask == "checkerboard" and dims == 0:
            raise ValueError(f"mask: a checkerboard needs spatial dimensions, found shape {self.shape}")
        if mask != "checkerboard" and blocks and self.shape[0] == 1:
            hint = "" if dims == 0 else "; mask='checkerboard' takes one"
            raise ValueError(
                f"shape: expected at least 2 channels for mask={mask!r}, found {self.shape}{hint}"
            )
        check_between("prior_weight", prior_weight, 0, math.inf, "[)")
        if prior_scale is not None:
            check_positive("prior_scale", prior_scale)
        if isinstance(base, Mapping):  # as plain values, to be stored
            base = {name: v.tolist() if hasattr(v, "tolist") else v for name, v in base.items()}
        self.options = {
            "shape": list(self.shape),
            "blocks": blocks,
            "mask": mask,
            "linear": linear,
            "base": base,
            "hidden": hidden,
            "layers": layers,
            "kernel": kernel,
            "reflections": reflections,
            "clamp": clamp,
            "prior_scale": None if prior_scale is None else float(prior_scale),
            "prior_weight": float(prior_weight),
            "memory": memory,
        }
        if dims == 0:
            subnet = dense_conditioner(hidden, layers)
        else:
            subnet = convolutional_conditioner(hidden, layers, kernel, dims)
        steps = [self._block(subnet, odd=bool(i % 2)) for i in range(blocks)]
        last = LUConv1x1(self.shape[0], prior_scale=prior_scale)
        self.flow: nn.Module = FlowSequence([*steps, last], memory=memory)
        self.base = create_base(base, self.shape)
        self.fused = False

    def _block(self, subnet: Subnet, *, odd: bool) -> nn.Module:
        options, channels = self.options, self.shape[0]
        mask, linear, prior_scale = options["mask"], options["linear"], options["prior_scale"]
        board = mask == "checkerboard"
        if self.coupling == "additive" and linear == "lu":
            return USFBlock(channels, subnet=subnet, mask=mask, odd=odd and board, prior_scale=prior_scale)
        if self.coupling == "additive":
            settings, kinds = {}, (AdditiveCoupling, CheckerboardCoupling)
        else:
            settings, kinds = {"clamp": options["clamp"]}, (AffineCoupling, AffineCheckerboard)
        if board:
            settings["odd"] = odd
        coupling = kinds[board](channels, subnet=subnet, **settings)
        if linear == "lu":
            matrix: nn.Module = LUConv1x1(channels, init="orthogonal", prior_scale=prior_scale)
        elif linear == "householder":
            matrix = Householder(channels, reflections=options["reflections"])
        else:
            matrix = Permutation(channels)
        if mask == "channel":
            matrix = FlowSequence([matrix, _every_other_first(channels)], memory="standard")
        return Conjugated(matrix, coupling)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of `from_config`, as plain JSON values."""
        return dict(self.options)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the untrained model described by `config`; raise as the class does."""
        return cls(**config)

    @property
    def dimensions(self) -> int:
        """Number of values in one sample."""
        return math.prod(self.shape)

    def no_weight_decay(self) -> list[str]:
        """Return the names of the base's parameters, for which zero is no better a value than others."""
        return [f"base.{name}" for name, _ in self.base.named_parameters()]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map samples to latents of the same shape, and the log-determinant."""
        check_samples("x", x, self.shape)
        return self.flow(self._in_own_dtype(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latents to samples, and the log-determinant of this direction."""
        check_samples("z", z, self.shape)
        return self.flow.inverse(self._in_own_dtype(z))

    def _in_own_dtype(self, x: Tensor) -> Tensor:
        """Cast x to the flow's dtype, the only one that conditioners take; an inference form takes any."""
        return x if self.fused else x.to(next(self.flow.parameters()).dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of every sample in nats, (B,)."""
        z, log_det = self(x)
        return self.base.log_prob(z) + log_det

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Draw n samples, (n, *shape), from torch's global generator."""
        return self.inverse(self.base.sample(n))[0]

    def log_prior(self) -> Tensor:
        """Log density of the prior on the diagonals of all LU maps, in nats: 0-d; 0 without a prior.

        Raises:
            TypeError: on the inference form, whose maps are folded.
        """
        check_trainable(self, "log_prior")
        return self.flow.log_prior(math.prod(self.shape[1:]))

    def loss(self, batch: Tensor) -> Tensor:
        """`-(mean log p(x) + prior_weight * log_prior) / D`, in nats per dimension: 0-d.

        Args:
            batch: (B, *shape).

        Raises:
            TypeError: on the inference form.
        """
        check_trainable(self, "loss")
        total = self.log_prob(batch).mean()
        if self.options["prior_scale"] is not None:
            total = total + self.options["prior_weight"] * self.log_prior()
        return -total / self.dimensions

    @torch.no_grad()
    def initialize(self, samples: Tensor, *, shrinkage: float = 0.01) -> Self:
        """Set the last map so that the latents of these samples have mean 0 and unit covariance per position.

        Args:
            samples: training data (N, *shape); N times the number of positions should be well above C.
            shrinkage: ridge on the covariance, in units of the mean variance.

        Returns:
            self.

        Raises:
            TypeError, ValueError: samples of the wrong dtype or shape, or too few for a covariance.
        """
        check_trainable(self, "initialize")
        check_samples("samples", samples, self.shape)
        if len(samples) * math.prod(self.shape[1:]) < 2:
            raise ValueError(
                f"samples: expected at least two positions to fit to, found shape {tuple(samples.shape)}"
            )
        h, _ = self.flow[:-1](self._in_own_dtype(samples))
        self.flow[-1].whiten_(*moments(h), eps=shrinkage)
        return self

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return anomaly scores, (B,): each sample's negative log-likelihood in nats."""
        return -self.log_prob(x)

    @makes_weights
    def fuse(self, dtype: torch.dtype | None = None) -> Self:
        """Return a copy for inference, with the flow in its inference form, see `usf_kernels.nn.fused`.

        Args:
            dtype: dtype of the flow's weights and the latents, for example torch.bfloat16; None keeps it.

        Returns:
            A copy in evaluation mode, without a loss and a prior; this model stays as it is.

        Raises:
            TypeError: for a dtype where this is an inference form already, which keeps its own.
        """
        check_not_fused_to(self, dtype)
        fused = deepcopy(self).eval().requires_grad_(False)
        if not fused.fused:
            fused.flow, fused.fused = fused.flow.fuse(dtype), True
        return fused

    def extra_repr(self) -> str:
        """The options, for print."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class USFlow(DensityFlow):
    """A `DensityFlow` with additive couplings. It is uniformly scaling: the log-determinant depends on no
    data. With a base whose density falls with a norm, that norm of the latents ranks as the likelihood.

    Args: see `DensityFlow`.
    """

    coupling = "additive"


class NonUSFlow(DensityFlow):
    """A `DensityFlow` with affine couplings, the counterpart that is not uniformly scaling.

    Args: see `DensityFlow`.
    """

    coupling = "affine"


def _every_other_first(channels: int) -> Permutation:
    """Return the permutation that puts the even channels first, then the odd ones."""
    order = torch.arange(channels)
    return Permutation.of(torch.cat([order[::2], order[1::2]]))
