"""Layers of a conditioner that may change the size of maps: `fuse()` leaves these, and all between, as is."""

from __future__ import annotations

from torch import Tensor, nn

from usf_kernels.nn.conditioner_layers import CONVOLUTIONS, ELEMENTWISE, hooked


def joined(layers: list[nn.Module]) -> list[nn.Module]:
    """Return the layers, with all from the first to the last that may change the size of maps as one module.
    An nn.Linear among these applies to channels."""
    changing = [i for i, layer in enumerate(layers) if not _leaves_size(layer)]
    if len(changing) < 2:  # a single one cannot change it: the conditioner as a whole does not
        return layers
    first, end = changing[0], changing[-1] + 1
    among = [PointwiseOnMaps(layer) if type(layer) is nn.Linear else layer for layer in layers[first:end]]
    return [*layers[:first], nn.Sequential(*among), *layers[end:]]


def _leaves_size(layer: nn.Module) -> bool:
    """Whether a layer is known to return maps of the size of its input."""
    if type(layer) not in CONVOLUTIONS or hooked(layer):
        return is_elementwise(layer) or (type(layer) is nn.Linear and not hooked(layer))
    if isinstance(layer.padding, str):
        same = layer.padding == "same"
    else:
        reach = zip(layer.padding, layer.dilation, layer.kernel_size, strict=True)
        same = all(2 * padding == dilation * (size - 1) for padding, dilation, size in reach)
    return same and all(step == 1 for step in layer.stride)


def is_elementwise(layer: nn.Module) -> bool:
    """Whether a layer treats every number alone; a subclass or a layer with hooks need not."""
    return type(layer) in ELEMENTWISE and not hooked(layer)


class PointwiseOnMaps(nn.Module):
    """An nn.Linear applied to the channels of maps (B, C, *spatial)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, maps: Tensor) -> Tensor:
        return self.layer(maps.movedim(1, -1)).movedim(-1, 1)
