"""Base class of models that score features of a frozen backbone: calibration, scores, checkpoints."""

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
from usf_kernels.models.checks import check_not_fused_to
from usf_kernels.models.scoring import Prediction, predict
from usf_kernels.nn.capture import CapturedCall
from usf_kernels.nn.modes import in_mode, makes_weights
from usf_kernels.null import Null
from usf_kernels.ops import squared_norm
from usf_kernels.ops.checks import check_int

UNCALIBRATED = (
    "predict: the model is not calibrated, so its masks keep no promise on false alarms; scores and maps do "
    "not need it. `calibrate` it with features of held-out normal images"
)


class ScoredModel(nn.Module):
    """A model that maps features of a frozen backbone to latents, whose norms are the anomaly scores.

    A subclass defines which latents are scored (`scored_latents`), and how everything after the borders gets
    its inference form (`_fuse_flows`).

    Args:
        backbone: from `create_backbone`.
        options: the other arguments of the subclass, as plain JSON values.

    Attributes:
        latent_channels: channels of each latent map; the backbone's unless a subclass sets others.
        fused: whether this is an inference form.

    Raises:
        TypeError: for a backbone that is not a `Backbone`.
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

    def scored_latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the latents to score, with the spatial sizes of `features`."""
        raise NotImplementedError

    def _fuse_flows(self, dtype: torch.dtype | None) -> None:
        """Replace the maps after the borders by their inference form, in place."""
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of `from_config`, as plain JSON values."""
        return {"backbone": self.backbone.config, **self.options}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the untrained model described by `config`; raise as `create_backbone` and the class do."""
        options = dict(config)
        return cls(create_backbone(**options.pop("backbone")), **options)

    @property
    def null(self) -> Null | None:
        """The null model that `calibrate` fitted, None before."""
        if self.null_parameters.isnan().any():
            return None
        return Null.from_list(self.null_parameters.tolist(), tail=TAIL, tests=TESTS)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the null model with the rest, but do not cast it: a threshold needs its digits. It stays where
        it is if the device has no float64, as Apple's."""
        null = self._buffers.pop("null_parameters")
        try:
            super()._apply(fn, recurse)
            try:
                moved = fn(null)
            except TypeError:
                moved = null
            if moved.dtype != torch.float64:  # cast, too
                moved = null if moved.device.type == "mps" else null.to(moved.device)
            elif null.is_meta and not moved.is_meta:
                moved = moved.fill_(torch.nan)
            null = moved
        finally:
            self._buffers["null_parameters"] = null
        return self

    @makes_weights
    def fuse(self, dtype: torch.dtype | None = None) -> Self:
        """Return the inference form: the same model, faster and without a loss.

        Args:
            dtype: dtype of weights, features and latents, for example torch.bfloat16; None keeps theirs.
                Images keep their dtype, and squared norms are summed in float32.

        Returns:
            A copy in evaluation mode, null model included; this model stays as it is.

        Raises:
            TypeError: for a dtype where this is an inference form already, which keeps its own.
        """
        check_not_fused_to(self, dtype)
        fused = deepcopy(self).eval().requires_grad_(False)
        if not fused.fused:
            fused._fuse_flows(dtype)
            fused.backbone = fused.backbone.fuse(dtype)
            fused.fused = True
        return fused

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the backbone's maps of images (B, 3, H, W) in [0, 1]."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Any:
        """Map images to what `latents` returns for their features."""
        return self.latents(self.features(images))

    @torch.no_grad()
    def calibrate(
        self, features: Tensor | Sequence[Tensor], *, false_alarms: float = 0.1, batch_size: int = 32
    ) -> Null:
        """Fit the null model of the automatic threshold, and keep it in the state_dict.

        Args:
            features: features of held-out normal images, or these images (N, 3, H, W).
            false_alarms: regions that such an image may show on average; see `usf_kernels.calibrate`.
            batch_size: images at a time.

        Returns:
            The fitted `Null`, which is `model.null` from now on.

        Raises:
            TypeError, ValueError: as `squared_norms` and `usf_kernels.calibrate`.
        """
        return self.calibrate_to(
            self.squared_norms(features, batch_size=batch_size), false_alarms=false_alarms
        )

    def calibrate_to(self, norms: Sequence[Tensor], *, false_alarms: float = 0.1) -> Null:
        """Do what `calibrate` does, given the `squared_norms` of the images: of several processes, say."""
        null = calibrate(norms, false_alarms=false_alarms)
        self.null_parameters.copy_(torch.tensor(null.to_list(), dtype=torch.float64))
        return null

    @torch.no_grad()
    def squared_norms(self, data: Tensor | Sequence[Tensor], *, batch_size: int = 32) -> list[Tensor]:
        """Return the squared norms of the latents at every position, (N, H_l, W_l) per scale.

        Args:
            data: features, or images (N, 3, H, W).
            batch_size: images at a time.

        Raises:
            ValueError: no images, or maps that do not fit the model.
        """
        check_int("batch_size", batch_size, 1)
        features = self._features_of(data, batch_size)
        self._check_some(features)
        parts = []
        for start in range(0, len(features[0]), batch_size):
            latents = self._latents_to_score([maps[start : start + batch_size] for maps in features])
            parts.append([squared_norm(z) for z in latents])
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    @torch.no_grad()
    def forget_calibration(self) -> None:
        """Forget the null model: it is of latents that have changed. `initialize` and `fit` call this."""
        self.null_parameters.fill_(torch.nan)

    @torch.no_grad()
    def mean_square(self, features: Tensor | Sequence[Tensor], *, batch_size: int = 32) -> list[float]:
        """Return the mean of z^2 per scale: near 1 on held-out normal images if the flow generalises. Takes
        features or images, and raises, as `squared_norms` does."""
        norms = self.squared_norms(features, batch_size=batch_size)
        return [u.mean().item() / channels for u, channels in zip(norms, self.latent_channels, strict=True)]

    @torch.no_grad()
    def predict(self, batch: Tensor, features: Sequence[Tensor] | None = None, **options: Any) -> Prediction:
        """Score and segment images; each result depends on its own image and the fitted model only.

        Args:
            batch: images (B, 3, H, W) in [0, 1].
            features: features of the images, if they have been computed already.
            options: log_epsilon, tail, tests, upsample: see `scoring.predict`.

        Warns:
            UserWarning: before `calibrate`.
        """
        latents = self._latents_to_score(self.features(batch) if features is None else features)
        return self._found_in(latents, batch, options)

    @torch.no_grad()
    def capture(self, images: Tensor) -> Callable[..., Prediction]:
        """Return `predict` for batches of one shape, with a CUDA graph from the images to the latents.

        On a few small images a fused model spends its time on launches, which a graph saves; regions are
        found on the CPU as always. Weights may change in place, but not move.

        Args:
            images: an example of a batch, on the model's CUDA device.

        Returns:
            A function of a batch and of the options of `predict`.

        Raises:
            ValueError: for images on another device; in later calls, for another shape or dtype.
        """
        graph = CapturedCall(lambda batch: tuple(self._latents_to_score(self.features(batch))), images)

        @torch.no_grad()
        def predict_captured(batch: Tensor, **options: Any) -> Prediction:
            return self._found_in(list(graph(batch)), batch, options)

        return predict_captured

    def _found_in(self, latents: list[Tensor], batch: Tensor, options: Mapping[str, Any]) -> Prediction:
        null = self.null
        if null is None:
            warnings.warn(UNCALIBRATED, stacklevel=4)  # the caller of `predict`: no_grad is in between
        return predict(latents, tuple(batch.shape[-2:]), null=null, **options)

    def extra_repr(self) -> str:
        """The options, for print."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _features_of(self, data: Tensor | Sequence[Tensor], batch_size: int = 32) -> Sequence[Tensor]:
        """Return features as they are, and compute those of images, so many at a time."""
        if not isinstance(data, Tensor):
            return data
        parts = [self.features(images) for images in data.split(batch_size)]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]

    def _latents_to_score(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return `scored_latents` in evaluation mode, whichever mode the model is in."""
        with in_mode(self, training=False):
            return self.scored_latents(features)

    def _enter(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return features corrected near the border (`BorderNorm`), and the log-determinant of that."""
        self._check(features)
        entered = [border(maps) for border, maps in zip(self.borders, features, strict=True)]
        return [maps for maps, _ in entered], sum(log_det for _, log_det in entered)

    def _leave(self, entered: Sequence[Tensor]) -> list[Tensor]:
        """Return the features that `_enter` maps to `entered`."""
        return [border.inverse(maps) for border, maps in zip(self.borders, entered, strict=True)]

    def _check_some(self, features: Sequence[Tensor]) -> None:
        self._check(features)
        if len(features[0]) == 0:
            raise ValueError("features: expected those of at least one image, found none")

    def _check(self, features: Sequence[Tensor], name: str = "features") -> None:
        found = [maps.shape[1] if maps.ndim == 4 else tuple(maps.shape) for maps in features]
        if found != list(self.backbone.channels):
            raise ValueError(
                f"{name}: expected maps with {list(self.backbone.channels)} channels, found {found}"
            )
        if any(maps.shape[0] != features[0].shape[0] for maps in features):
            counts = [len(maps) for maps in features]
            raise ValueError(f"{name}: expected maps of as many images at every scale, found {counts}")
