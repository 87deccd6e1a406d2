"""FastFlow, in its original affine form and as a uniformly scaling flow.

J. Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows",
arXiv:2111.07677; uniformly scaling flows for anomaly detection: arXiv:2510.09452.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels.models.backbones import Backbone, create_backbone
from usf_kernels.models.mahalanobis import moments
from usf_kernels.models.scoring import Prediction, fit_null, predict
from usf_kernels.nn import ActNorm, FlowSequence, FlowStep, LUConv1x1
from usf_kernels.ops import squared_norm
from usf_kernels.segmentation import Null


class FastFlow(nn.Module):
    """One flow per scale of a frozen feature pyramid; the latents' norm is the anomaly score.

    A flow is a whitening map and then `steps` Glow-like steps, whose conditioners (convolution, ReLU,
    convolution) alternate between 3 x 3 and 1 x 1 kernels. With the couplings starting as the identity, the
    flow that `initialize` leaves behind scores exactly as a Mahalanobis distance, and training improves on
    that. Everything trainable is counted in the log-determinant, so the likelihood is bounded.

    Args:
        backbone: from `create_backbone`.
        coupling: "additive" (uniformly scaling) or "affine" (the paper's).
        linear: "lu" or "permutation" (the paper's, with ActNorm).
        steps: per scale.
        hidden_ratio: hidden channels of a conditioner per input channel of it.
        kernels: sizes of the kernels, repeated over the steps: (3, 1) alternates as in the paper, (3,) is its
            form for large backbones.
        clamp: bound on the log scales of affine couplings.
        noise: standard deviation of the Gaussian noise put on whitened features in training mode. It keeps
            the flow from learning directions in which few training images happen not to vary.
        memory: what training keeps for the backward pass, see `usf_kernels.nn.FlowSequence`.

    `model(images) -> (latents, log_det)`: a list of (B, C_l, H_l, W_l), and the log-determinant summed over
    scales: 0-d for the uniformly scaling form, (B,) for the affine one.

    Raises:
        TypeError, ValueError: for a bad argument.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        coupling: str = "additive",
        linear: str = "lu",
        steps: int = 8,
        hidden_ratio: float = 1.0,
        kernels: Sequence[int] = (3, 1),
        clamp: float = 2.0,
        noise: float = 0.3,
        memory: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(f"backbone: expected one from create_backbone, found {type(backbone).__name__}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps: expected a whole number, 0 or more, found {steps!r}")
        if linear not in ("lu", "permutation"):
            raise ValueError(f"linear: expected 'lu' or 'permutation', found {linear!r}")
        if not hidden_ratio > 0:
            raise ValueError(f"hidden_ratio: expected a positive number, found {hidden_ratio!r}")
        if not kernels or any(size < 1 or size % 2 == 0 for size in kernels):
            raise ValueError(f"kernels: expected odd sizes, at least one, found {kernels!r}")
        if not noise >= 0:
            raise ValueError(f"noise: expected 0 or more, found {noise!r}")
        self.backbone = backbone
        self.options = {
            "coupling": coupling,
            "linear": linear,
            "steps": steps,
            "hidden_ratio": hidden_ratio,
            "kernels": list(kernels),
            "clamp": clamp,
            "noise": noise,
            "memory": memory,
        }
        self.flows = nn.ModuleList()
        for channels in backbone.channels:
            first = LUConv1x1(channels) if linear == "lu" else ActNorm(channels)
            rest = [
                FlowStep(
                    channels,
                    subnet=_subnet(kernels[i % len(kernels)], hidden_ratio),
                    coupling=coupling,
                    linear=linear,
                    clamp=clamp,
                    act_norm=linear == "permutation",  # an LU map has scales and a bias of its own
                )
                for i in range(steps)
            ]
            self.flows.append(FlowSequence([first, *rest], memory=memory))
        # One (scale, dof) per scale; NaN until `calibrate`. A buffer, so that checkpoints hold it.
        self.register_buffer(
            "null_parameters", torch.full((len(self.flows), 2), torch.nan, dtype=torch.float64)
        )

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` needs: plain JSON values."""
        return {"backbone": self.backbone.config, **self.options}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FastFlow:
        """The model that a `config` describes, untrained; raises as `create_backbone` and FastFlow do."""
        options = dict(config)
        return cls(create_backbone(**options.pop("backbone")), **options)

    @property
    def null(self) -> Null | None:
        """What `calibrate` found, None before."""
        if self.null_parameters.isnan().any():
            return None
        return Null.from_list(self.null_parameters.tolist())

    def fuse(self, dtype: torch.dtype | None = None) -> FastFlow:
        """The same model for inference, faster and without a loss: its flows in their inference form.

        Args:
            dtype: of the flows' weights and latents, for example torch.bfloat16; None for their own.

        Returns:
            A copy in evaluation mode, null model included; this model stays as it is.
        """
        fused = deepcopy(self).eval().requires_grad_(False)
        fused.flows = nn.ModuleList(flow.fuse(dtype) for flow in self.flows)
        fused.backbone.to(memory_format=torch.channels_last)
        return fused

    def features(self, images: Tensor) -> list[Tensor]:
        """What the flows model: the backbone's maps of images (B, 3, H, W) in [0, 1]."""
        return self.backbone(images)

    def latents(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Features to latents of the same shapes, and the log-determinant summed over scales."""
        self._check(features)
        pairs = [flow(maps) for flow, maps in zip(self.flows, features, strict=True)]
        return [z for z, _ in pairs], sum(log_det for _, log_det in pairs)

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
        if not all(isinstance(flow, FlowSequence) for flow in self.flows):
            raise TypeError("loss: expected a model to train, found its inference form (`fuse`)")
        total, dimensions = 0.0, 0
        for flow, maps in zip(self.flows, features, strict=True):
            z, log_det = flow[0](maps)
            if self.training and self.options["noise"] > 0:
                z = z + self.options["noise"] * torch.randn_like(z)
            z, rest = flow[1:](z)
            total = total + 0.5 * z.square().flatten(1).sum(1) - (log_det + rest)
            dimensions += maps[0].numel()
        return (total / dimensions).mean()

    @torch.no_grad()
    def initialize(self, features: Sequence[Tensor], *, shrinkage: float = 0.01) -> FastFlow:
        """Set the first map of every flow from features (N, C_l, H_l, W_l) of normal images.

        With linear="lu" it whitens them: an untrained flow then scores as the Mahalanobis distance does. With
        "permutation", every ActNorm scales what reaches it to unit variance.

        Args:
            features: of normal training images.
            shrinkage: ridge on the covariance, in units of the mean variance.

        Returns:
            self, in the mode in which it was.
        """
        self._check(features)
        for flow, maps in zip(self.flows, features, strict=True):
            if isinstance(flow[0], LUConv1x1):
                flow[0].whiten_(*moments(maps), eps=shrinkage)
            else:
                training = flow.training
                flow.train()(maps)  # ActNorm takes its statistics from the first batch it trains on
                flow.train(training)
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
        return [u.mean().item() / channels for u, channels in zip(norms, self.backbone.channels, strict=True)]

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
            latents, _ = self.latents(self.features(batch) if features is None else features)
        finally:
            self.train(training)
        return predict(latents, tuple(batch.shape[-2:]), null=self.null, **options)

    def _squared_norms(self, features: Sequence[Tensor], batch_size: int) -> list[Tensor]:
        training = self.training
        self.eval()
        parts = []
        for start in range(0, len(features[0]), batch_size):
            latents, _ = self.latents([maps[start : start + batch_size] for maps in features])
            parts.append([squared_norm(z) for z in latents])
        self.train(training)
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def _check(self, features: Sequence[Tensor]) -> None:
        found = [maps.shape[1] if maps.ndim == 4 else tuple(maps.shape) for maps in features]
        if found != list(self.backbone.channels):
            raise ValueError(
                f"features: expected maps with {list(self.backbone.channels)} channels, found {found}"
            )


def _subnet(kernel: int, hidden_ratio: float) -> Callable[[int, int], nn.Module]:
    def make(c_in: int, c_out: int) -> nn.Module:
        hidden = max(1, round(hidden_ratio * c_in))
        return nn.Sequential(
            nn.Conv2d(c_in, hidden, kernel, padding=kernel // 2),
            nn.ReLU(),
            nn.Conv2d(hidden, c_out, kernel, padding=kernel // 2),
        )

    return make
