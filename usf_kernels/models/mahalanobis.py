"""The baseline: full-covariance Mahalanobis distance of features, one Gaussian per scale for all positions.

It is PaDiM (T. Defard et al., arXiv:2011.08785) without a Gaussian per position, since textures look alike
everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from usf_kernels.models.backbones import Backbone
from usf_kernels.models.checks import check_trainable
from usf_kernels.models.scored import ScoredModel
from usf_kernels.nn import LUConv1x1
from usf_kernels.nn.modes import unchanged_on_error
from usf_kernels.ops.checks import to_double


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (C,) and covariance (C, C) of features (N, C, H, W) over images and positions, float64."""
    rows = to_double(features.transpose(0, 1).flatten(1))
    return rows.mean(1), torch.cov(rows).view(len(rows), len(rows))  # cov of one channel is 0-d


class Mahalanobis(ScoredModel):
    """Mahalanobis distance on the features of a frozen backbone, calibrated and scored as the flows are.

    The latents are whitened features, so that their squared norm is the squared distance.

    Args:
        backbone: from `create_backbone`.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, options={})
        self.whitening = nn.ModuleList(LUConv1x1(channels) for channels in backbone.channels)
        self.requires_grad_(False)

    @torch.no_grad()
    def fit(self, features: Tensor | Sequence[Tensor], *, shrinkage: float = 0.01) -> Self:
        """Estimate mean and covariance from features (N, C_l, H_l, W_l) of normal images.

        First, channels get the mean and spread near the border of a map that they have inside (`BorderNorm`).

        Args:
            features: features of the training images, or these images (N, 3, H, W).
            shrinkage: ridge on the covariance, in units of the mean variance.

        Returns:
            self, to be calibrated anew.

        Raises:
            TypeError: on the inference form.
            ValueError: for features with other channels, or whose statistics are not finite. The model is
                unchanged then.
        """
        check_trainable(self, "fit")
        features = self._features_of(features)
        self._check(features)
        with unchanged_on_error(self.borders, self.whitening):
            for linear, border, maps in zip(self.whitening, self.borders, features, strict=True):
                linear.whiten_(*moments(border.fit(maps)(maps)[0]), eps=shrinkage)
        self.forget_calibration()
        return self

    def latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return whitened features, of the same shapes."""
        entered, _ = self._enter(features)
        return [linear(maps)[0] for linear, maps in zip(self.whitening, entered, strict=True)]

    def scored_latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return all latents."""
        return self.latents(features)

    def _fuse_flows(self, dtype: torch.dtype | None) -> None:
        self.whitening = nn.ModuleList(linear.fuse(dtype) for linear in self.whitening)
