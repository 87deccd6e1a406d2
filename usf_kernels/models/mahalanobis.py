"""The baseline: full-covariance Mahalanobis distance of features, one Gaussian per scale for all positions.

PaDiM (T. Defard et al., arXiv:2011.08785) without its positions, which textures do not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels.models.backbones import Backbone
from usf_kernels.models.scoring import Prediction, fit_null, predict
from usf_kernels.nn import LUConv1x1
from usf_kernels.ops import squared_norm
from usf_kernels.segmentation import Null


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of features (N, C, H, W) over images and positions, float64."""
    rows = features.transpose(0, 1).flatten(1).double()
    return rows.mean(1), torch.cov(rows)


class Mahalanobis(nn.Module):
    """Mahalanobis distance on the features of a frozen backbone, scored as the flows are.

    The latents are whitened features, so that their squared norm is the squared distance.

    Args:
        backbone: from `create_backbone`.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.whitening = nn.ModuleList(LUConv1x1(channels) for channels in backbone.channels)
        self.requires_grad_(False)
        self.null: Null | None = None

    def fit(self, features: Sequence[Tensor], *, shrinkage: float = 0.01) -> Mahalanobis:
        """Estimate mean and covariance from features (N, C_l, H_l, W_l) of normal images.

        Args:
            features: of the training images.
            shrinkage: ridge on the covariance, in units of the mean variance.

        Returns:
            self.
        """
        for linear, maps in zip(self.whitening, features, strict=True):
            linear.whiten_(*moments(maps), eps=shrinkage)
        return self

    def calibrate(self, features: Sequence[Tensor], *, false_alarms: float = 0.1) -> Null:
        """Fit the null model of the automatic threshold; as in `FastFlow.calibrate`."""
        norms = [squared_norm(z) for z in self.latents(features)]
        self.null = fit_null(norms, false_alarms=false_alarms)
        return self.null

    def latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Whitened features, of the same shapes."""
        return [linear(maps)[0] for linear, maps in zip(self.whitening, features, strict=True)]

    def predict(self, batch: Tensor, features: Sequence[Tensor] | None = None, **options: Any) -> Prediction:
        """Score and segment images (B, 3, H, W) in [0, 1]; arguments are those of `FastFlow.predict`."""
        features = self.backbone(batch) if features is None else features
        return predict(self.latents(features), tuple(batch.shape[-2:]), null=self.null, **options)
