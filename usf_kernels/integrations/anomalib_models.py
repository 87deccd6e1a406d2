"""Faster classes for anomalib's Fastflow, Cflow and Uflow, from torch model to loss; see `accelerate`.

Instances keep their parameters, buffers, hooks and place; only their class changes, and so their `forward`.
Graphs traced for a compiler or for export have the blocks' own operations and no masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.models.image.cflow.lightning_model import Cflow
from anomalib.models.image.cflow.torch_model import CflowModel
from anomalib.models.image.cflow.utils import positional_encoding_2d
from anomalib.models.image.fastflow.torch_model import FastflowModel
from anomalib.models.image.uflow.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.uflow.feature_extraction import LayerNormFeatureExtractor
from anomalib.models.image.uflow.loss import UFlowLoss
from anomalib.models.image.uflow.torch_model import UflowModel
from FrEIA.framework import GraphINN
from torch import Tensor, nn
from torch.nn import functional as F

from usf_kernels.calibration import TAIL, TESTS
from usf_kernels.integrations.anomalib_graph import FastGraphINN
from usf_kernels.integrations.faster import Faster
from usf_kernels.models.native_layers import use_extension_, use_pytorch_
from usf_kernels.nn.fused import FusedFlow
from usf_kernels.nn.maps import to_rows
from usf_kernels.ops import anomaly_map, squared_norm
from usf_kernels.ops.native import is_observed
from usf_kernels.segmentation import Null, segment

LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)


class Accelerated(Faster):
    """Mixin for classes of anomalib, to stand before them in a class's bases.

    Attributes:
        exact: keep the original's values where `accelerate` would correct them.
        one_step: train Cflow with one optimiser step per batch of images.
        network: attribute name of the frozen network in front of the flows; empty for none.
    """

    exact = False
    one_step = False
    network = ""

    def begin_fast(self, *, exact: bool, one_step: bool) -> None:
        """Set the options and run the frozen network in the extension. Undone by `end_fast`."""
        self.exact, self.one_step = exact, one_step
        if self.network and use_extension_(network := getattr(self, self.network)):
            network.to(memory_format=torch.channels_last)

    def end_fast(self) -> None:
        """Undo `begin_fast`."""
        for name in ("exact", "one_step"):
            self.__dict__.pop(name, None)
        if self.network:
            use_pytorch_(getattr(self, self.network).to(memory_format=torch.contiguous_format))


class FastFastflowModel(Accelerated, FastflowModel):
    """`anomalib.models.image.fastflow.torch_model.FastflowModel` for images of any size that the backbone
    takes."""

    network = "feature_extractor"

    def forward(self, input_tensor: Tensor) -> tuple[list[Tensor], list[Tensor]] | InferenceBatch:
        """Same as the original; the map has the size of the images."""
        if self.training or torch.compiler.is_compiling() or not hasattr(self, "norms"):
            return super().forward(input_tensor)
        features = self._get_cnn_features(input_tensor)
        latents = [flow(maps)[0] for flow, maps in zip(self.fast_flow_blocks, features, strict=True)]
        return _prediction(_negative_likelihoods(latents, tuple(input_tensor.shape[-2:])))

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
        if self.training or torch.compiler.is_compiling():
            return super().forward(image)
        latents, size = self.latents(image), tuple(image.shape[-2:])
        mask = None if self.exact else _segment(latents, size, self.null)
        return _prediction(anomaly_map(latents, size), mask)


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


class FastCflowModel(Accelerated, CflowModel):
    """`anomalib.models.image.cflow.torch_model.CflowModel` on all positions at once.

    The contribution of positions to the conditioners is computed once per size of the maps. Unless `exact`,
    the score of an image depends on itself only: the mean over scales of `sigmoid(-log p)`, where log p is
    the log-likelihood per dimension, whose log-sigmoid training maximises. The original divides by the
    largest likelihood of the batch.
    """

    network = "encoder"
    correction = "scores from 0 to 1, each of one image alone"

    def begin_fast(self, **options: bool) -> None:
        super().begin_fast(**options)
        self._projections: dict[str, tuple[FusedFlow, torch.Size, tuple[Tensor, ...]]] = {}

    def end_fast(self) -> None:
        super().end_fast()
        del self._projections

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the projections, which are computed again when needed."""
        return {**super().__getstate__(), "_projections": {}}

    def forward(self, images: Tensor) -> InferenceBatch:
        """Same as the original: maps (B, H, W) of the size of the images."""
        with torch.no_grad():
            likelihoods = list(self.log_likelihoods(images))
            size = tuple(images.shape[-2:])
            if self.exact:
                return _prediction(
                    self.anomaly_map_generator(
                        distribution=[scale.flatten() for scale in likelihoods],
                        height=[scale.shape[1] for scale in likelihoods],
                        width=[scale.shape[2] for scale in likelihoods],
                        image_size=size,
                    )
                )
            maps = [
                F.interpolate(torch.sigmoid(-scale)[:, None], size, mode="bilinear", align_corners=True)
                for scale in likelihoods
            ]
            return _prediction((sum(maps) / len(maps)).squeeze(1))

    def log_likelihoods(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the log-likelihood per dimension of each scale's positions, (B, H_l, W_l)."""
        features = self.encoder.eval()(images)
        for layer, decoder in zip(self.pool_layers, self.decoders, strict=True):
            maps = features[layer]
            if is_observed() or not getattr(decoder, "folds", False):
                likelihood = _likelihood(decoder, maps, self.condition_vector)
            else:
                likelihood = self._fused_likelihood(layer, decoder, maps)
            yield likelihood.view(maps.shape[0], *maps.shape[2:])  # `len` would be a constant in exports

    def _fused_likelihood(self, layer: str, decoder: nn.Module, maps: Tensor) -> Tensor:
        flow = decoder.inference_form(maps.dtype).take_positions()
        norm, log_det = flow.squared_norm_and_log_det(maps, self._projection(layer, flow, maps))
        return (log_det - 0.5 * norm) / maps.shape[1] - LOG_ROOT_TWO_PI

    def _projection(self, layer: str, flow: FusedFlow, maps: Tensor) -> tuple[Tensor, ...]:
        """Return the flow's projection of the encoding for maps of this size."""
        size, known = maps.shape[2:], self._projections.get(layer)
        if known is None or known[0] is not flow or known[1] != size:
            known = (flow, size, flow.project(_encoding(self.condition_vector, maps)))
            self._projections[layer] = known
        return known[2]


class FastCflow(Accelerated, Cflow):
    """`anomalib.models.Cflow`, whose training may take all positions of a batch in one optimiser step."""

    @property
    def name(self) -> str:
        """The original's name: anomalib keeps results in a folder of this name."""
        return Cflow.__name__

    @property
    def outdated(self) -> bool:
        """Whether the post-processor was fitted to the original's scores, which are on another scale."""
        smallest = getattr(self.post_processor, "image_min", None)
        return not self.exact and smallest is not None and not smallest.isnan()

    def training_step(self, batch: Any, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Same as the original; with `one_step`, one optimiser step for all positions and scales."""
        if not self.one_step:
            return super().training_step(batch, *args, **options)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        features = self.model.encoder(batch.image)
        losses = []
        for layer, decoder in zip(self.model.pool_layers, self.model.decoders, strict=True):
            maps = features[layer].detach()
            losses.append(-F.logsigmoid(_likelihood(decoder, maps, self.model.condition_vector)))
        self.manual_backward(sum(loss.mean() for loss in losses))
        optimizer.step()
        total = sum(loss.detach().sum() for loss in losses)
        self.log("train_loss", total.item(), on_epoch=True, prog_bar=True, logger=True)
        return {"loss": total}


def _prediction(maps: Tensor, mask: Tensor | None = None) -> InferenceBatch:
    return InferenceBatch(pred_score=maps.amax(dim=(-2, -1)), anomaly_map=maps, pred_mask=mask)


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


def _likelihood(decoder: nn.Module, maps: Tensor, encoding_channels: int) -> Tensor:
    """Return every position's log-likelihood per dimension, (B * H * W,), by the decoder's own blocks."""
    encoding = _encoding(encoding_channels, maps).expand(maps.shape[0], -1, -1, -1)
    z, log_det = decoder(to_rows(maps), [to_rows(encoding)])
    return (log_det - 0.5 * z.square().sum(1)) / z.shape[1] - LOG_ROOT_TWO_PI


def _encoding(channels: int, maps: Tensor) -> Tensor:
    """Return the condition of every position of the maps, (1, channels, H, W)."""
    return positional_encoding_2d(channels, *maps.shape[2:])[None].to(maps)


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
