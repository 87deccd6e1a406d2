"""What all flows on the features of a frozen backbone share: likelihood, calibration, scores, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from usf_kernels.models.backbones import Backbone, create_backbone
from usf_kernels.models.mahalanobis import moments
from usf_kernels.models.scoring import Prediction, fit_null, predict
from usf_kernels.nn import ActNorm, FlowStep, LUConv1x1
from usf_kernels.ops import squared_norm
from usf_kernels.segmentation import Null

if TYPE_CHECKING:
    from typing_extensions import Self


class FeatureFlow(nn.Module):
    """A density model of feature pyramids; the latents' norms are the anomaly scores.

    A subclass transforms features (`_transform`) with one FlowSequence per scale, `flows`, or says which its
    first maps are (`_entries`) and how its flows get their inference form (`_fuse_flows`). Whatever it trains
    is counted in the log-determinant, so that the likelihood is bounded.

    Args:
        backbone: from `create_backbone`.
        options: the other arguments of the subclass, as plain JSON values; `noise` must be among them.

    Attributes:
        latent_channels: of each latent map; the backbone's, where a subclass does not say otherwise.

    Raises:
        TypeError, ValueError: for a bad argument.
    """

    def __init__(self, backbone: Backbone, *, options: Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(f"backbone: expected one from create_backbone, found {type(backbone).__name__}")
        if not options["noise"] >= 0:
            raise ValueError(f"noise: expected 0 or more, found {options['noise']!r}")
        self.backbone = backbone
        self.latent_channels = tuple(backbone.channels)
        self.options = dict(options)
        self.fused = False
        # One (scale, dof) per scale; NaN until `calibrate`. A buffer, so that checkpoints hold it.
        self.register_buffer(
            "null_parameters", torch.full((len(self.latent_channels), 2), torch.nan, dtype=torch.float64)
        )

    def _entries(self) -> Sequence[LUConv1x1 | ActNorm]:
        """The map in front of each scale's flow, from `entry_map`: the first step of each of `flows`."""
        return [flow[0] for flow in self.flows]

    def _transform(self, features: Sequence[Tensor], noise: float) -> tuple[list[Tensor], Tensor]:
        """Latents and log-determinant; noise of this standard deviation is put on whitened features."""
        raise NotImplementedError

    def _training_transform(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """What the loss of a training step sees: with noise."""
        return self._transform(features, self.options["noise"])

    def _fuse_flows(self, dtype: torch.dtype | None) -> None:
        """Replace the flows by their inference forms, in place."""
        self.flows = nn.ModuleList(flow.fuse(dtype) for flow in self.flows)

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` needs: plain JSON values."""
        return {"backbone": self.backbone.config, **self.options}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The model that a `config` describes, untrained; raises as `create_backbone` and the class do."""
        options = dict(config)
        return cls(create_backbone(**options.pop("backbone")), **options)

    @property
    def null(self) -> Null | None:
        """What `calibrate` found, None before."""
        if self.null_parameters.isnan().any():
            return None
        return Null.from_list(self.null_parameters.tolist())

    def fuse(self, dtype: torch.dtype | None = None) -> Self:
        """The same model for inference, faster and without a loss: backbone and flows in inference form.

        Args:
            dtype: of the weights, the features and the latents, for example torch.bfloat16; None for their
                own. Images stay what they are, and squared norms are sums in float32.

        Returns:
            A copy in evaluation mode, null model included; this model stays as it is.
        """
        fused = deepcopy(self).eval().requires_grad_(False)
        if not fused.fused:
            fused._fuse_flows(dtype)
            fused.backbone = fused.backbone.fuse(dtype)
            fused.fused = True
        return fused

    def features(self, images: Tensor) -> list[Tensor]:
        """What the flows model: the backbone's maps of images (B, 3, H, W) in [0, 1]."""
        return self.backbone(images)

    def latents(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Features to latents, one map per scale, and the log-determinant summed over scales."""
        self._check(features)
        return self._transform(features, 0.0)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images to latents and log-determinant."""
        return self.latents(self.features(images))

    def loss(self, batch: Tensor | Sequence[Tensor]) -> Tensor:
        """Negative log-likelihood per dimension, without its constant: 0-d.

        `(0.5 * sum z^2 - log|det|) / D`, summed over the scales' dimensions D, averaged over the batch.

        Args:
            batch: images (B, 3, H, W), or their features.
        """
        features = self.features(batch) if isinstance(batch, Tensor) else batch
        self._check(features)
        if self.fused:
            raise TypeError("loss: expected a model to train, found its inference form (`fuse`)")
        if self.training:
            latents, log_det = self._training_transform(features)
        else:
            latents, log_det = self._transform(features, 0.0)
        energy = sum(0.5 * z.square().flatten(1).sum(1) for z in latents)
        return ((energy - log_det) / sum(z[0].numel() for z in latents)).mean()

    @torch.no_grad()
    def initialize(self, features: Sequence[Tensor], *, shrinkage: float = 0.01) -> Self:
        """Set the maps in front of the flows from features (N, C_l, H_l, W_l) of normal images.

        An LU map whitens them: while the couplings are the identity, the flow scores as the Mahalanobis
        distance does. Where there are ActNorms, every one scales what reaches it to unit variance.

        Args:
            features: of normal training images.
            shrinkage: ridge on the covariance, in units of the mean variance.

        Returns:
            self, in the mode in which it was.
        """
        self._check(features)
        for entry, maps in zip(self._entries(), features, strict=True):
            if isinstance(entry, LUConv1x1):
                entry.whiten_(*moments(maps), eps=shrinkage)
        if any(isinstance(module, ActNorm) for module in self.modules()):
            training = self.training
            self.train()
            self._transform(features, 0.0)  # an ActNorm takes its statistics from its first batch in training
            self.train(training)
        return self

    @torch.no_grad()
    def calibrate(
        self, features: Sequence[Tensor], *, false_alarms: float = 0.1, batch_size: int = 32
    ) -> Null:
        """Fit the null model of the automatic threshold, and keep it in the state_dict.

        Args:
            features: of held-out normal images.
            false_alarms: regions that each of them may show on average; see `scoring.fit_null`.
            batch_size: images at a time.

        Returns:
            The fitted `Null`, from now on `model.null`.
        """
        null = fit_null(self._squared_norms(features, batch_size), false_alarms=false_alarms)
        self.null_parameters.copy_(torch.tensor(null.to_list(), dtype=torch.float64))
        return null

    @torch.no_grad()
    def mean_square(self, features: Sequence[Tensor], *, batch_size: int = 32) -> list[float]:
        """Mean of z^2 per scale: near 1 on held-out normal images if the flow generalises."""
        norms = self._squared_norms(features, batch_size)
        return [u.mean().item() / channels for u, channels in zip(norms, self.latent_channels, strict=True)]

    @torch.no_grad()
    def predict(self, batch: Tensor, features: Sequence[Tensor] | None = None, **options: Any) -> Prediction:
        """Score and segment images; each result depends on its own image and the fitted model only.

        Args:
            batch: images (B, 3, H, W) in [0, 1].
            features: theirs, where they have been computed already.
            options: log_epsilon, tail, tests, upsample: see `scoring.predict`.
        """
        training = self.training
        self.eval()
        try:
            latents = self._scored_latents(self.features(batch) if features is None else features)
        finally:
            self.train(training)
        return predict(latents, tuple(batch.shape[-2:]), null=self.null, **options)

    def _squared_norms(self, features: Sequence[Tensor], batch_size: int) -> list[Tensor]:
        training = self.training
        self.eval()
        parts = []
        for start in range(0, len(features[0]), batch_size):
            latents = self._scored_latents([maps[start : start + batch_size] for maps in features])
            parts.append([squared_norm(z) for z in latents])
        self.train(training)
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def _scored_latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The latents where there are features; a subclass may have extended its maps beyond them."""
        latents, _ = self.latents(features)
        sizes = [maps.shape[2:] for maps in features]
        return [z[..., :height, :width] for z, (height, width) in zip(latents, sizes, strict=True)]

    def _check(self, features: Sequence[Tensor], name: str = "features") -> None:
        found = [maps.shape[1] if maps.ndim == 4 else tuple(maps.shape) for maps in features]
        if found != list(self.backbone.channels):
            raise ValueError(
                f"{name}: expected maps with {list(self.backbone.channels)} channels, found {found}"
            )


def check_linear(linear: str) -> None:
    """Raise unless it names a linear map of these models."""
    if linear not in ("lu", "permutation"):
        raise ValueError(f"linear: expected 'lu' or 'permutation', found {linear!r}")


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
    """Steps with convolutional conditioners, whose kernels repeat: what these models are made of.

    Raises:
        ValueError: for a bad argument.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected a whole number, 0 or more, found {steps!r}")
    check_linear(linear)
    if not hidden_ratio > 0:
        raise ValueError(f"hidden_ratio: expected a positive number, found {hidden_ratio!r}")
    if not kernels or any(size < 1 or size % 2 == 0 for size in kernels):
        raise ValueError(f"kernels: expected odd sizes, at least one, found {kernels!r}")
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
    """What stands in front of a flow: a map that can whiten, or one that can only scale and shift."""
    return LUConv1x1(channels) if linear == "lu" else ActNorm(channels)


def add_noise(z: Tensor, noise: float) -> Tensor:
    """With Gaussian noise of this standard deviation."""
    return z + noise * torch.randn_like(z) if noise > 0 else z


def convolutional_subnet(kernel: int, hidden_ratio: float) -> Callable[[int, int], nn.Module]:
    """Convolution, ReLU, convolution: a conditioner with `hidden_ratio` hidden channels per input channel."""

    def make(c_in: int, c_out: int) -> nn.Module:
        hidden = max(1, round(hidden_ratio * c_in))
        return nn.Sequential(
            nn.Conv2d(c_in, hidden, kernel, padding=kernel // 2),
            nn.ReLU(),
            nn.Conv2d(hidden, c_out, kernel, padding=kernel // 2),
        )

    return make
