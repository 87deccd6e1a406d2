"""Base class of all flows on the features of a frozen backbone: likelihood and initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from usf_kernels.models.backbones import Backbone
from usf_kernels.models.checks import check_trainable
from usf_kernels.models.mahalanobis import moments
from usf_kernels.models.scored import ScoredModel
from usf_kernels.nn import ActNorm, FlowStep, LUConv1x1
from usf_kernels.nn.modes import in_mode, unchanged_on_error
from usf_kernels.ops.checks import check_between, check_choice, check_clamp, check_int, check_positive


class FeatureFlow(ScoredModel):
    """A density model of feature pyramids; the latents' norms are the anomaly scores.

    A subclass transforms features (`_transform`) with one FlowSequence per scale, `flows`; otherwise it also
    overrides which maps come first (`_entries`) and how flows get their inference form (`_fuse_flows`). All
    that it trains must count in the log-determinant, so that the likelihood is bounded.

    Args:
        backbone: from `create_backbone`.
        options: the other arguments of the subclass, as plain JSON values; `noise` must be among them.

    Raises:
        TypeError, ValueError: for a bad argument.
    """

    def __init__(self, backbone: Backbone, *, options: Mapping[str, Any]) -> None:
        super().__init__(backbone, options=options)
        check_between("noise", options["noise"], 0, math.inf, "[)")

    def _entries(self) -> Sequence[LUConv1x1 | ActNorm]:
        """The map before each scale's flow, from `entry_map`: the first step of each of `flows`."""
        return [flow[0] for flow in self.flows]

    def _transform(self, features: Sequence[Tensor], noise: float) -> tuple[list[Tensor], Tensor]:
        """Return latents and log-determinant; noise of this standard deviation is added after whitening."""
        raise NotImplementedError

    def _training_transform(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return latents and log-determinant for the loss of a training step: with noise."""
        return self._transform(features, self.options["noise"])

    def _fuse_flows(self, dtype: torch.dtype | None) -> None:
        self.flows = nn.ModuleList(flow.fuse(dtype) for flow in self.flows)

    def latents(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Map features to latents, one map per scale, and the log-determinant summed over scales."""
        entered, border_log_det = self._enter(features)
        latents, log_det = self._transform(entered, 0.0)
        return latents, log_det + border_log_det

    def loss(self, batch: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the negative log-likelihood per dimension, without its constant: 0-d.

        `(0.5 * sum z^2 - log|det|) / D`, summed over the scales' dimensions D, averaged over the batch.

        Args:
            batch: images (B, 3, H, W), or their features.
        """
        check_trainable(self, "loss")
        features = self.features(batch) if isinstance(batch, Tensor) else batch
        entered, border_log_det = self._enter(features)
        if self.training:
            latents, log_det = self._training_transform(entered)
        else:
            latents, log_det = self._transform(entered, 0.0)
        energy = sum(0.5 * z.square().flatten(1).sum(1) for z in latents)
        of_flow = ((energy - log_det) / sum(z[0].numel() for z in latents)).mean()
        # Averaged separately: latents may cover only a share of the positions, or extended maps.
        return of_flow - border_log_det / sum(maps[0].numel() for maps in features)

    @torch.no_grad()
    def initialize(self, features: Tensor | Sequence[Tensor], *, shrinkage: float = 0.01) -> Self:
        """Set the maps before the flows from features (N, C_l, H_l, W_l) of normal images.

        First, channels get the mean and spread near the border of a map that they have inside (`BorderNorm`).
        Then an LU map whitens them: while the couplings are the identity, the flow scores as the Mahalanobis
        distance does. Every ActNorm, where there are any, scales its input to unit variance.

        Args:
            features: features of normal training images, or these images (N, 3, H, W).
            shrinkage: ridge on the covariance, in units of the mean variance.

        Returns:
            self, in the mode in which it was, to be calibrated anew.

        Raises:
            TypeError: on the inference form.
            ValueError: for features with other channels, of no image, or whose statistics are not finite. The
                model is unchanged then.
        """
        check_trainable(self, "initialize")
        features = self._features_of(features)
        self._check_some(features)
        norms = [module for module in self.modules() if isinstance(module, ActNorm)]
        with unchanged_on_error(self.borders, *self._entries(), *norms):
            for border, maps in zip(self.borders, features, strict=True):
                border.fit(maps)
            entered, _ = self._enter(features)
            for entry, maps in zip(self._entries(), entered, strict=True):
                if isinstance(entry, LUConv1x1):
                    entry.whiten_(*moments(maps), eps=shrinkage)
            for norm in norms:
                norm.forget_()
            if norms:
                with in_mode(self, training=True):  # only there do they take statistics from a batch
                    self._transform(entered, 0.0)
            _check_finite(*self.borders, *self._entries(), *norms)
        self.forget_calibration()
        return self

    def scored_latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return latents cropped to the features' sizes; a subclass may have extended its maps."""
        latents, _ = self.latents(features)
        sizes = [maps.shape[2:] for maps in features]
        return [z[..., :height, :width] for z, (height, width) in zip(latents, sizes, strict=True)]


def _check_finite(*modules: nn.Module) -> None:
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise ValueError("features: expected ones with finite means and variances, found others among them")


def check_linear(linear: str) -> None:
    """Raise unless `linear` names a linear map of these models."""
    check_choice("linear", linear, ("lu", "permutation"))


def check_kernels(kernels: Sequence[int]) -> list[int]:
    """Return the sizes of kernels; raise unless there is one at least and all are odd."""
    if isinstance(kernels, str) or not isinstance(kernels, Sequence):
        raise TypeError(f"kernels: expected a sequence of sizes, found {type(kernels).__name__}")
    sizes = [check_int("kernels", size, 1) for size in kernels]
    if not sizes or any(size % 2 == 0 for size in sizes):
        raise ValueError(f"kernels: expected odd sizes, at least one, found {kernels!r}")
    return sizes


def glow_steps(
    channels: int,
    *,
    coupling: str,
    linear: str,
    steps: int,
    hidden_ratio: float,
    kernels: Sequence[int],
    clamp: float,
    cond_channels: int = 0,
) -> list[FlowStep]:
    """Steps with convolutional conditioners, whose kernels (checked already) repeat: what these models are
    made of.

    Raises:
        ValueError: for a bad argument.
    """
    check_int("steps", steps, 0)
    check_choice("coupling", coupling, ("additive", "affine"))
    check_linear(linear)
    check_positive("hidden_ratio", hidden_ratio)
    clamp = check_clamp(clamp)
    return [
        FlowStep(
            channels,
            subnet=convolutional_subnet(kernels[i % len(kernels)], hidden_ratio),
            coupling=coupling,
            linear=linear,
            clamp=clamp,
            act_norm=linear == "permutation",  # an LU map has scales and a bias of its own
            cond_channels=cond_channels,
        )
        for i in range(steps)
    ]


def entry_map(channels: int, linear: str) -> LUConv1x1 | ActNorm:
    """Make the map before a flow: LU, which can whiten, or ActNorm, which only scales and shifts."""
    return LUConv1x1(channels) if linear == "lu" else ActNorm(channels)


def add_noise(z: Tensor, noise: float) -> Tensor:
    """Add Gaussian noise of this standard deviation."""
    return z + noise * torch.randn_like(z) if noise > 0 else z


def convolutional_subnet(kernel: int, hidden_ratio: float) -> Callable[[int, int], nn.Module]:
    """Return a maker of conditioners (convolution, ReLU, convolution) with `hidden_ratio` hidden channels per
    input channel."""

    def make(c_in: int, c_out: int) -> nn.Module:
        hidden = max(1, round(hidden_ratio * c_in))
        return nn.Sequential(
            nn.Conv2d(c_in, hidden, kernel, padding=kernel // 2),
            nn.ReLU(),
            nn.Conv2d(hidden, c_out, kernel, padding=kernel // 2),
        )

    return make
