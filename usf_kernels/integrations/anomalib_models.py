"""Faster classes for anomalib's models, from model to loss, here Fastflow's and Uflow's; see `accelerate`.

Instances keep their parameters, buffers, hooks and place; only their class changes, and so their `forward`.
Graphs traced for a compiler or for export have the blocks' own operations and no masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.models.image.cflow.lightning_model import Cflow
from anomalib.models.image.cflow.torch_model import CflowModel
from anomalib.models.image.fastflow.anomaly_map import AnomalyMapGenerator as FastflowMapGenerator
from anomalib.models.image.fastflow.torch_model import FastflowModel
from anomalib.models.image.uflow.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.uflow.feature_extraction import LayerNormFeatureExtractor
from anomalib.models.image.uflow.loss import UFlowLoss
from anomalib.models.image.uflow.torch_model import UflowModel
from FrEIA.framework import GraphINN
from torch import Tensor, nn
from torch.nn import functional as F

from usf_kernels.calibration import TAIL, TESTS
from usf_kernels.integrations.anomalib_accelerated import Accelerated, is_recorded, prediction
from usf_kernels.integrations.anomalib_cflow import FastCflow, FastCflowModel
from usf_kernels.integrations.anomalib_graph import FastGraphINN
from usf_kernels.integrations.sequence import is_fused
from usf_kernels.ops import anomaly_map, squared_norm
from usf_kernels.segmentation import Null, segment


class FastFastflowModel(Accelerated, FastflowModel):
    """`anomalib.models.image.fastflow.torch_model.FastflowModel` for images of any size that the backbone
    takes."""

    network = "feature_extractor"

    def forward(self, input_tensor: Tensor) -> tuple[list[Tensor], list[Tensor]] | InferenceBatch:
        """Same as the original; the map has the size of the images."""
        own_maps = self.maps_itself(FastflowMapGenerator)
        if self.training or is_recorded() or not own_maps or not hasattr(self, "norms"):
            return super().forward(input_tensor)
        features = self._get_cnn_features(input_tensor)
        latents = [_latent(flow, maps) for flow, maps in zip(self.fast_flow_blocks, features, strict=True)]
        return prediction(_negative_likelihoods(latents, tuple(input_tensor.shape[-2:])))

    def _get_cnn_features(self, input_tensor: Tensor) -> list[Tensor]:
        features = self.feature_extractor.eval()(input_tensor)
        return [_layer_norm(norm, maps) for norm, maps in zip(self.norms, features, strict=True)]


class FastLayerNormFeatureExtractor(Accelerated, LayerNormFeatureExtractor):
    """The U-Flow feature extractor for images of any size.

    U-Flow needs maps with exactly twice the height and width of the next coarser one. For images whose sides
    are not multiples of the largest stride, maps are resized bilinearly to that.
    """

    def normalize_features(self, features: Iterable[Tensor]) -> list[Tensor]:
        """Normalise as the original does, after resizing where necessary."""
        features = list(features)
        height, width = features[-1].shape[-2:]
        normalized = []
        for norm, maps, stride in zip(self.feature_normalizations, features, self.scale_factors, strict=True):
            times = self.scale_factors[-1] // stride
            normalized.append(_layer_norm(norm, _resized(maps, (times * height, times * width))))
        return normalized


class FastUflowModel(Accelerated, UflowModel):
    """`anomalib.models.image.uflow.torch_model.UflowModel` with the automatic segmentation of the paper.

    Attributes:
        null: null model of the squared norms of normal images, from `usf_kernels.calibrate` on the norms of
            `model.latents(...)` of held-out ones; None for the chi-square of white latents. It is not in the
            state_dict.
    """

    network = "feature_extractor"
    correction = "predicts the mask of the component tree"
    null: Null | None = None

    def end_fast(self) -> None:
        super().end_fast()
        self.__dict__.pop("null", None)

    def latents(self, images: Tensor) -> list[Tensor]:
        """Return the latents of a batch of images, (B, C_l, H_l, W_l) per scale."""
        return list(self.encode(self.feature_extractor(images))[0])

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor] | InferenceBatch:
        """Same as the original, but with the component tree's mask unless `exact`, of the images' size."""
        if self.training or is_recorded():
            return super().forward(image)
        latents, size = self.latents(image), tuple(image.shape[-2:])
        mask = None if self.exact else _segment(latents, size, self.null)
        own_maps = self.maps_itself(AnomalyMapGenerator, FastAnomalyMapGenerator)
        return prediction(
            anomaly_map(latents, size) if own_maps else self.anomaly_map_generator(latents), mask
        )


class FastAnomalyMapGenerator(Accelerated, AnomalyMapGenerator):
    """`anomalib.models.image.uflow.anomaly_map.AnomalyMapGenerator` whose mask marks what is anomalous."""

    correction = "its mask marks what is anomalous"

    def compute_anomaly_mask(self, z: Sequence[Tensor], *args: Any, **options: Any) -> Tensor:
        """Return the component tree's mask, (B, 1, H, W) bool.

        The original returns the complement of a test of blocks, and takes options for that test. With `exact`
        it is called instead.
        """
        if self.exact:
            return super().compute_anomaly_mask(z, *args, **options)
        if args or options:
            raise TypeError("compute_anomaly_mask: options of the test of blocks need accelerate(exact=True)")
        return _segment(z, tuple(self.input_size), None)


class FastUFlowLoss(Accelerated, UFlowLoss):
    """The mean over the batch of the negative log-likelihood, up to its constant.

    The original sums one term over the batch, so that the variance of the latents settles at 1 / batch size.
    """

    correction = "means over the batch of both terms"

    def forward(self, hidden_variables: Sequence[Tensor], jacobians: Tensor) -> Tensor:
        """Return the loss, 0-d, of latents (B, C_l, H_l, W_l) and log-determinants (B,)."""
        if self.exact:
            return super().forward(hidden_variables, jacobians)
        energy = sum(0.5 * z.square().flatten(1).sum(1) for z in hidden_variables)
        return (energy - jacobians).mean()


def _latent(flow: nn.Module, maps: Tensor) -> Tensor:
    """Return a flow's latents of maps, in whatever memory format they come."""
    if torch.is_grad_enabled() or not is_fused(flow):
        return flow(maps)[0]
    return flow.inference_form(maps.dtype)(maps)[0]


def _negative_likelihoods(latents: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return anomalib's map of Fastflow: `usf_kernels.anomaly_map` less 1. Computed as that difference, it
    would be 0 wherever a likelihood is below the rounding error of 1, and defects would tie."""
    maps = [
        F.interpolate((squared_norm(z) / (-2 * z.shape[1])).exp()[:, None], size, mode="bilinear")
        for z in latents
    ]
    return -torch.stack(maps).mean(0)


def _segment(latents: Sequence[Tensor], size: tuple[int, int], null: Null | None) -> Tensor:
    return segment(list(latents), size, tail=TAIL, tests=TESTS, null=null, upsample="nearest")


def _layer_norm(norm: nn.LayerNorm, maps: Tensor) -> Tensor:
    """Apply `norm` to maps of any size; its weights are resized if it was made for another."""
    if tuple(maps.shape[1:]) == tuple(norm.normalized_shape):
        return norm(maps)
    weight, bias = (_resized(p[None], tuple(maps.shape[-2:]))[0] for p in (norm.weight, norm.bias))
    return F.layer_norm(maps, maps.shape[1:], weight, bias, norm.eps)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


MODELS: dict[type, type] = {
    AnomalyMapGenerator: FastAnomalyMapGenerator,
    Cflow: FastCflow,
    CflowModel: FastCflowModel,
    FastflowModel: FastFastflowModel,
    GraphINN: FastGraphINN,
    LayerNormFeatureExtractor: FastLayerNormFeatureExtractor,
    UFlowLoss: FastUFlowLoss,
    UflowModel: FastUflowModel,
}
