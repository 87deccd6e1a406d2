"""Faster classes for anomalib's Cflow, the Lightning module and its torch model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.models.image.cflow.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.cflow.lightning_model import Cflow
from anomalib.models.image.cflow.torch_model import CflowModel
from anomalib.models.image.cflow.utils import positional_encoding_2d
from torch import Tensor, nn
from torch.nn import functional as F

from usf_kernels.integrations.anomalib_accelerated import Accelerated, prediction
from usf_kernels.integrations.sequence import is_fused
from usf_kernels.nn.fused import FusedFlow
from usf_kernels.nn.maps import to_rows

LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)


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
        training = self.decoders.training
        if training:  # the original leaves them so
            self.decoders.eval()
        with torch.no_grad():
            likelihoods = list(self.log_likelihoods(images))
            if training:
                self.decoders.train()
            size = tuple(images.shape[-2:])
            if self.exact or type(self.anomaly_map_generator) is not AnomalyMapGenerator:
                return prediction(
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
            return prediction((sum(maps) / len(maps)).squeeze(1))

    def log_likelihoods(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the log-likelihood per dimension of each scale's positions, (B, H_l, W_l)."""
        features = self.encoder.eval()(images)
        for layer, decoder in zip(self.pool_layers, self.decoders, strict=True):
            maps = features[layer]
            if is_fused(decoder):
                likelihood = self._fused_likelihood(layer, decoder, maps)
            else:
                likelihood = _likelihood(decoder, maps, self.condition_vector)
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


def _likelihood(decoder: nn.Module, maps: Tensor, encoding_channels: int) -> Tensor:
    """Return every position's log-likelihood per dimension, (B * H * W,), by the decoder's own blocks."""
    encoding = _encoding(encoding_channels, maps).expand(maps.shape[0], -1, -1, -1)
    z, log_det = decoder(to_rows(maps), [to_rows(encoding)])
    return (log_det - 0.5 * z.square().sum(1)) / z.shape[1] - LOG_ROOT_TWO_PI


def _encoding(channels: int, maps: Tensor) -> Tensor:
    """Return the condition of every position of the maps, (1, channels, H, W)."""
    return positional_encoding_2d(channels, *maps.shape[2:])[None].to(maps)
