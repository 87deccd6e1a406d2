"""anomalib's models with random weights, split into the parts that are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usf_kernels.calibration import TAIL, TESTS
from usf_kernels.segmentation import segment

ROWS = 64  # rows per call and optimiser step of anomalib's CFlow, its default


class Peer(nn.Module):
    """One of anomalib's models: `forward` takes images to the anomaly map.

    Args:
        model: anomalib's torch model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).anomaly_map

    @property
    def flow(self) -> nn.Module:
        """The trained part of the model, without normalisation."""
        raise NotImplementedError

    def latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the latents of given features, from the flows alone."""
        raise NotImplementedError

    def flow_part(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return what the model computes from given features; works after `usf_kernels.accelerate` too."""
        return self.latents(features)

    def corrected(self, images: Tensor) -> list[Tensor]:
        """Return the corrected results of `usf_kernels.accelerate`, from formulas and the original blocks."""
        return [self(images)]

    def step(self, images: Tensor) -> None:
        """Run forward and backward, in training mode."""
        raise NotImplementedError


class Fastflow(Peer):
    """FastFlow."""

    @property
    def flow(self) -> nn.Module:
        return self.model.fast_flow_blocks

    def latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [flow(x)[0] for flow, x in zip(self.model.fast_flow_blocks, features, strict=True)]

    def step(self, images: Tensor) -> None:
        # FastflowLoss without its initial zero, a copy from the CPU that CUDA graphs do not allow.
        pairs = zip(*self.model(images), strict=True)
        sum(torch.mean(0.5 * torch.sum(z**2, dim=(1, 2, 3)) - log_det) for z, log_det in pairs).backward()


class Uflow(Peer):
    """U-Flow."""

    @property
    def flow(self) -> nn.Module:
        return self.model.flow

    def latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        return list(self.model.flow(features, rev=False)[0])

    def corrected(self, images: Tensor) -> list[Tensor]:
        """Return the map and the automatic segmentation."""
        latents = self.latents(self.model.feature_extractor(images))
        size = tuple(images.shape[-2:])
        return [self(images), segment(latents, size, tail=TAIL, tests=TESTS, upsample="nearest")]

    def step(self, images: Tensor) -> None:
        from anomalib.models.image.uflow.loss import UFlowLoss

        UFlowLoss()(*self.model(images)).backward()


class Cflow(Peer):
    """CFlow, by default 64 rows at a time."""

    @property
    def flow(self) -> nn.Module:
        return self.model.decoders

    def latents(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [
            torch.cat([decoder(rows, [cond])[0] for rows, cond in zip(*parts, strict=True)])
            .view(len(maps), *maps.shape[2:], -1)
            .movedim(-1, 1)
            for decoder, maps, parts in self._parts(features)
        ]

    def flow_part(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return log-likelihoods per dimension, (B, H, W) per scale."""
        if hasattr(self.model, "log_likelihoods"):  # accelerated
            given = _Given(dict(zip(self.model.pool_layers, features, strict=True)))
            with patch.object(self.model, "encoder", given):
                return list(self.model.log_likelihoods(features[0]))
        from anomalib.models.image.cflow.utils import get_logp

        found = []
        for decoder, maps, parts in self._parts(features):
            channels = maps.shape[1]
            rows = [get_logp(channels, *decoder(rows, [cond])) for rows, cond in zip(*parts, strict=True)]
            found.append(torch.cat(rows).view(len(maps), *maps.shape[2:]) / channels)
        return found

    def corrected(self, images: Tensor) -> list[Tensor]:
        """Return the mean over the scales of sigmoid(-log p), p per dimension, for each image by itself."""
        self.model.decoders.eval()  # `forward` leaves them in training mode
        scales = self.flow_part(list(self.model.encoder(images).values()))
        maps = [
            F.interpolate(
                torch.sigmoid(-scale)[:, None], images.shape[-2:], mode="bilinear", align_corners=True
            )
            for scale in scales
        ]
        return [torch.cat(maps, 1).mean(1)]

    def step(self, images: Tensor) -> None:
        from anomalib.models.image.cflow.utils import get_logp

        with torch.no_grad():
            features = list(self.model.encoder(images).values())
        for decoder, maps, parts in self._parts(features):
            channels = maps.shape[1]
            for rows, cond in zip(*parts, strict=True):
                z, log_det = decoder(rows, [cond])
                (-F.logsigmoid(get_logp(channels, z, log_det) / channels)).mean().backward()

    def _parts(self, features: Sequence[Tensor]) -> list[tuple[nn.Module, Tensor, list[Sequence[Tensor]]]]:
        from anomalib.models.image.cflow.utils import positional_encoding_2d

        found = []
        for decoder, maps in zip(self.model.decoders, features, strict=True):
            cond = positional_encoding_2d(self.model.condition_vector, *maps.shape[2:]).to(maps)
            both = (maps, cond.expand(len(maps), *cond.shape))
            rows = [x.movedim(1, -1).flatten(0, 2).split(self.model.fiber_batch_size) for x in both]
            found.append((decoder, maps, rows))
        return found


class _Given(nn.Module):
    """A replacement for an encoder that returns given features."""

    def __init__(self, features: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = features

    def forward(self, _: Tensor) -> dict[str, Tensor]:
        return self.features


def fastflow(backbone: str, side: int) -> Peer:
    """Make FastFlow on a backbone of anomalib's list."""
    from anomalib.models.image.fastflow.torch_model import FastflowModel

    return Fastflow(FastflowModel((side, side), backbone, pre_trained=False))


def uflow(backbone: str, side: int) -> Peer:
    """Make U-Flow; for "MS-CaiT" only its flow, which must be given features, for "ms_cait" all of it."""
    import timm
    from anomalib.models.image.uflow import torch_model

    if backbone == "MS-CaiT":
        scales = SimpleNamespace(channels=[768, 384], scale_factors=[16, 32], scales=range(2))
        with patch.object(torch_model, "get_feature_extractor", lambda *_: scales):
            return Uflow(torch_model.UflowModel((side, side)))
    create = timm.create_model

    def without_weights(*arguments: object, **options: object) -> nn.Module:
        return create(*arguments, **{**options, "pretrained": False})

    with patch.object(timm, "create_model", without_weights):  # it has no option against trained weights
        name = "mcait" if backbone == "ms_cait" else backbone
        return Uflow(torch_model.UflowModel((side, side), backbone=name))


def cflow(backbone: str, side: int, rows: int = ROWS) -> Peer:
    """Make CFlow at the paper's scales, for `rows` rows at a time."""
    from anomalib.models.image.cflow.torch_model import CflowModel

    layers = ("layer2", "layer3", "layer4")
    return Cflow(CflowModel(backbone, layers, pre_trained=False, fiber_batch_size=rows))


ALL_ROWS, AT_ONCE = 1 << 30, ", all rows at once"
PEERS: dict[str, dict[str, Callable[[str, int], Peer]]] = {  # by our class's name, then the peer's name
    "FastFlow": {"anomalib Fastflow": fastflow},
    "UFlow": {"anomalib Uflow": uflow},
    "CFlow": {
        "anomalib Cflow": cflow,
        f"anomalib Cflow{AT_ONCE}": lambda backbone, side: cflow(backbone, side, ALL_ROWS),
    },
}
