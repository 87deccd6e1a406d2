"""What every model that scores features of a frozen backbone shares: calibration, scores, checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn

from usf_kernels.calibration import TAIL, TESTS, calibrate
from usf_kernels.models.backbones import Backbone, create_backbone
from usf_kernels.models.border import BorderNorm
from usf_kernels.models.scoring import Prediction, predict
from usf_kernels.nn.capture import CapturedCall
from usf_kernels.nn.modes import in_mode
from usf_kernels.null import Null
from usf_kernels.ops import squared_norm
from usf_kernels.ops.checks import check_int, check_not_fused_to

UNCALIBRATED = (
    "predict: the model is not calibrated, so its masks keep no promise on false alarms; scores and maps do "
    "not need it. `calibrate` it with features of held-out normal images"
)


class ScoredModel(nn.Module):
    """Features of a frozen backbone to latents, whose norms are the anomaly scores.

    A subclass says which latents are scored (`_scored_latents`) and how the rest of it gets its inference
    form (`_fuse_flows`).

    Args:
        backbone: from `create_backbone`.
        options: the other arguments of the subclass, as plain JSON values.

    Attributes:
        latent_channels: of each latent map; the backbone's, where a subclass does not say otherwise.
        fused: whether this is an inference form.

    Raises:
        TypeError: for another backbone.
    """

    def __init__(self, backbone: Backbone, *, options: Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(f"backbone: expected one from create_backbone, found {type(backbone).__name__}")
        self.backbone = backbone
        self.latent_channels = tuple(backbone.channels)
        self.options = dict(options)
        self.fused = False
        self.borders = nn.ModuleList(BorderNorm(channels) for channels in backbone.channels)
        # One (scale, dof) per scale; NaN until `calibrate`. A buffer, so that checkpoints hold it.
        self.register_buffer(
            "null_parameters", torch.full((len(self.latent_channels), 2), torch.nan, dtype=torch.float64)
        )

    def _scored_latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Of the sizes of the features."""
        raise NotImplementedError

    def _fuse_flows(self, dtype: torch.dtype | None) -> None:
        """Replace what is behind the borders by its inference form, in place."""
        raise NotImplementedError

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
        return Null.from_list(self.null_parameters.tolist(), tail=TAIL, tests=TESTS)

    def fuse(self, dtype: torch.dtype | None = None) -> Self:
        """The same model for inference, faster and without a loss: backbone and flows in inference form.

        Args:
            dtype: of the weights, the features and the latents, for example torch.bfloat16; None for their
                own. Images stay what they are, and squared norms are sums in float32.

        Returns:
            A copy in evaluation mode, null model included; this model stays as it is.

        Raises:
            TypeError: a dtype for an inference form, which keeps its own.
        """
        check_not_fused_to(self, dtype)
        fused = deepcopy(self).eval().requires_grad_(False)
        if not fused.fused:
            fused._fuse_flows(dtype)
            fused.backbone = fused.backbone.fuse(dtype)
            fused.fused = True
        return fused

    def features(self, images: Tensor) -> list[Tensor]:
        """What is modelled: the backbone's maps of images (B, 3, H, W) in [0, 1]."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Any:
        """Images to what `latents` returns of their features."""
        return self.latents(self.features(images))

    @torch.no_grad()
    def calibrate(
        self, features: Tensor | Sequence[Tensor], *, false_alarms: float = 0.1, batch_size: int = 32
    ) -> Null:
        """Fit the null model of the automatic threshold, and keep it in the state_dict.

        Args:
            features: of held-out normal images, or these images (N, 3, H, W).
            false_alarms: regions that each of them may show on average; see `usf_kernels.calibrate`.
            batch_size: images at a time.

        Returns:
            The fitted `Null`, from now on `model.null`.
        """
        null = calibrate(self._squared_norms(features, batch_size), false_alarms=false_alarms)
        self.null_parameters.copy_(torch.tensor(null.to_list(), dtype=torch.float64))
        return null

    @torch.no_grad()
    def mean_square(self, features: Tensor | Sequence[Tensor], *, batch_size: int = 32) -> list[float]:
        """Mean of z^2 per scale: near 1 on held-out normal images if the flow generalises; arguments as of
        `calibrate`."""
        norms = self._squared_norms(features, batch_size)
        return [u.mean().item() / channels for u, channels in zip(norms, self.latent_channels, strict=True)]

    @torch.no_grad()
    def predict(self, batch: Tensor, features: Sequence[Tensor] | None = None, **options: Any) -> Prediction:
        """Score and segment images; each result depends on its own image and the fitted model only.

        Args:
            batch: images (B, 3, H, W) in [0, 1].
            features: theirs, where they have been computed already.
            options: log_epsilon, tail, tests, upsample: see `scoring.predict`.

        Warns:
            UserWarning: before `calibrate`.
        """
        latents = self._latents_to_score(self.features(batch) if features is None else features)
        return self._found_in(latents, batch, options)

    @torch.no_grad()
    def capture(self, images: Tensor) -> Callable[..., Prediction]:
        """`predict` for batches of one shape, with a CUDA graph from the images to the latents.

        A fused model on a few small images waits for its launches, which a graph does not; regions are found
        on the CPU as always. Weights may change where they are, but not move.

        Args:
            images: an example of a batch, on the model's CUDA device.

        Returns:
            A function of a batch and of the options of `predict`.

        Raises:
            ValueError: images on another device; when called, of another shape or dtype.
        """
        graph = CapturedCall(lambda batch: tuple(self._latents_to_score(self.features(batch))), images)

        @torch.no_grad()
        def predict_captured(batch: Tensor, **options: Any) -> Prediction:
            return self._found_in(list(graph(batch)), batch, options)

        return predict_captured

    def _found_in(self, latents: list[Tensor], batch: Tensor, options: Mapping[str, Any]) -> Prediction:
        null = self.null
        if null is None:
            warnings.warn(UNCALIBRATED, stacklevel=4)  # who called `predict`: no_grad is in between
        return predict(latents, tuple(batch.shape[-2:]), null=null, **options)

    def extra_repr(self) -> str:
        """The options, for print."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _features_of(self, data: Tensor | Sequence[Tensor], batch_size: int = 32) -> Sequence[Tensor]:
        """Features, where images are given those of so many at a time."""
        if not isinstance(data, Tensor):
            return data
        parts = [self.features(images) for images in data.split(batch_size)]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]

    def _squared_norms(self, data: Tensor | Sequence[Tensor], batch_size: int) -> list[Tensor]:
        check_int("batch_size", batch_size, 1)
        features = self._features_of(data, batch_size)
        self._check(features)
        if len(features[0]) == 0:
            raise ValueError("features: expected those of at least one image, found none")
        parts = []
        for start in range(0, len(features[0]), batch_size):
            latents = self._latents_to_score([maps[start : start + batch_size] for maps in features])
            parts.append([squared_norm(z) for z in latents])
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def _latents_to_score(self, features: Sequence[Tensor]) -> list[Tensor]:
        """`_scored_latents` in evaluation mode, whichever the model is in."""
        with in_mode(self, training=False):
            return self._scored_latents(features)

    def _enter(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """What is behind the borders sees this of features; and the log-determinant."""
        self._check(features)
        entered = [border(maps) for border, maps in zip(self.borders, features, strict=True)]
        return [maps for maps, _ in entered], sum(log_det for _, log_det in entered)

    def _leave(self, entered: Sequence[Tensor]) -> list[Tensor]:
        """The features of which `_enter` makes this."""
        return [border.inverse(maps) for border, maps in zip(self.borders, entered, strict=True)]

    def _check(self, features: Sequence[Tensor], name: str = "features") -> None:
        found = [maps.shape[1] if maps.ndim == 4 else tuple(maps.shape) for maps in features]
        if found != list(self.backbone.channels):
            raise ValueError(
                f"{name}: expected maps with {list(self.backbone.channels)} channels, found {found}"
            )
        if any(maps.shape[0] != features[0].shape[0] for maps in features):
            counts = [len(maps) for maps in features]
            raise ValueError(f"{name}: expected maps of as many images at every scale, found {counts}")
