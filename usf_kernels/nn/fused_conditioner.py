"""Conditioners as `fuse()` runs them: on rows (N, C), with the maps around them folded into their layers."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from usf_kernels.nn.conditioner_layers import CONVOLUTIONS, flat, is_linear, keeps_size, linear
from usf_kernels.nn.conditioner_sizes import PointwiseOnMaps, is_elementwise, joined
from usf_kernels.nn.folding import WIDE, LinearMap
from usf_kernels.nn.maps import convolved_rows, to_maps


class _OnMaps(nn.Module):
    """Layers that look at neighbours, or that `fuse()` does not know: they take maps (B, C, *spatial)."""

    pointwise = False

    def __init__(self, layers: nn.Module, *, concatenates: bool = False) -> None:
        super().__init__()
        self.layers, self.concatenates = layers, concatenates

    def forward(self, rows: Tensor, sizes: tuple[int, ...], projected: Tensor | None) -> Tensor:
        maps = to_maps(rows, sizes)
        if self.concatenates:
            projected = projected.expand(sizes[0], -1, -1)
            maps = torch.cat([maps, to_maps(projected.flatten(0, 1), sizes)], dim=1)
        return convolved_rows(self.layers, maps)


class _Conditioned(nn.Module):
    """A linear layer of [x, cond] split in two: cond's part is computed once per condition, not per image."""

    def __init__(self, layer: nn.Module, condition: nn.Module) -> None:
        super().__init__()
        self.layer, self.condition = layer, condition
        self.pointwise = isinstance(layer, nn.Linear)

    def forward(self, rows: Tensor, sizes: tuple[int, ...], projected: Tensor) -> Tensor:
        rows = self.layer(rows) if self.pointwise else convolved_rows(self.layer, to_maps(rows, sizes))
        return rows.view(sizes[0], *projected.shape[1:]).add_(projected).view(rows.shape)


class _Shift(nn.Module):
    """Adds a constant to every channel, in place."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, rows: Tensor) -> Tensor:
        return rows.add_(self.bias)


TOLD_SIZES = (_OnMaps, _Conditioned)  # layers whose `forward` takes sizes and a condition, too


class FusedConditioner(nn.Module):
    """`leave(subnet(enter(rows)))` on rows, with as much of both maps folded into its layers as fits there.

    Args:
        subnet: the conditioner. Convolutions, nn.Linear and activations inside nn.Sequential are understood;
            anything else in it runs as it is, on maps.
        enter: the map before it. `forward` may overwrite its rows.
        leave: the map after it.
        cond_channels: channels of the condition, which comes last among the subnet's inputs; 0 for none.
        give_last: make the last layer a matrix and a bias, which the caller takes out with `take_last`.

    Attributes:
        of_vectors: whether it takes vectors only: its nn.Linear would not act on the channels of maps.
        pointwise: whether every row is treated alone, so that rows may come a few at a time.
        conditioned: whether it takes a condition, as `project` returns it.
        projected: width D of what `project` returns; None if that is the condition's own channels.
    """

    def __init__(
        self,
        subnet: nn.Module,
        enter: LinearMap,
        leave: LinearMap,
        *,
        cond_channels: int = 0,
        give_last: bool = False,
    ) -> None:
        super().__init__()
        subnet = _with_plain_weights(copy_of(subnet).to("cpu", WIDE).eval())
        own = set(subnet.modules())  # an nn.Linear not in here was a 1x1 convolution
        convolves = any(isinstance(module, CONVOLUTIONS) for module in own)
        layers = list(flat(subnet))
        # One inside a module that `fuse()` does not know may well act on the channels of maps.
        self.of_vectors = not convolves and any(type(layer) is nn.Linear and layer in own for layer in layers)
        if convolves:  # an nn.Linear of its own acts on the last dimension of maps
            layers = [nn.Sequential(v) if type(v) is nn.Linear and v in own else v for v in layers]
        layers = joined(layers)
        condition, size = None, len(layers)
        if cond_channels > 0 and layers and is_linear(layers[0]):
            layers[0], condition = _split_condition(layers[0], cond_channels)
        elif cond_channels > 0:
            layers = [_OnMaps(layers[0] if layers else nn.Identity(), concatenates=True), *layers[1:]]
        alone = give_last and size == 1  # a layer has to remain when the last one is taken
        layers = [_matrix_layer(enter), *layers] if alone else _prepend(enter, layers)
        self.projected: int | None = None
        if condition is None:
            layers = _append(layers, leave, as_matrix=give_last)
        else:
            first = len(layers) - size
            # A map folded into the first layer would have to be folded into the condition's, too.
            layers = _append([*layers, nn.Identity()] if size == 1 else layers, leave, as_matrix=give_last)
            self.projected = len(layers[first].weight)
            layers[first] = _Conditioned(layers[first], condition)
        self._last = layers.pop() if give_last else None
        self.layers = nn.ModuleList(_grouped(layers))
        self.pointwise = all(layer.pointwise for layer in self.layers if isinstance(layer, TOLD_SIZES))
        self.conditioned = cond_channels > 0
        self.requires_grad_(False)
        for parameter in self.parameters():  # channels-last convolutions would reorder these at each call
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def linear_layers(self) -> list[tuple[nn.Module, bool, nn.Module | None]] | None:
        """List (layer, whether a condition is added to it, the activation after it) for each linear layer
        and size-keeping convolution; None if there are other layers besides these and `shift`."""
        found: list[tuple[nn.Module, bool, nn.Module | None]] = []
        for layer in list(self._simple_layers())[0 if self.shift is None else 1 :]:
            conditioned = isinstance(layer, _Conditioned)
            linear = layer.layer if conditioned else layer
            if is_linear(linear) and (type(linear) is nn.Linear or keeps_size(linear)):
                found.append((linear, conditioned, None))
            elif is_elementwise(linear) and found and found[-1][2] is None:
                found[-1] = (*found[-1][:2], linear)
            else:
                return None
        return found

    def ranks(self) -> Iterator[int]:
        """Yield the number of spatial dimensions that each convolution takes; 0 if `of_vectors`."""
        if self.of_vectors:
            yield 0
        for layer in self._simple_layers():
            layer = layer.layer if isinstance(layer, _Conditioned) else layer
            if isinstance(layer, CONVOLUTIONS):
                yield len(layer.kernel_size)

    def first_of_two(self) -> tuple[nn.Linear, bool] | None:
        """(layer, whether a condition is added to it) if this is one nn.Linear and a ReLU, else None."""
        found = self.linear_layers() if self.shift is None else None
        if found is None or len(found) != 1:
            return None
        layer, conditioned, activation = found[0]
        fits = isinstance(layer, nn.Linear) and type(activation) is nn.ReLU
        return (layer, conditioned) if fits else None

    @property
    def shift(self) -> Tensor | None:
        """Constant added to the rows before the layers, or None."""
        first = self.layers[0] if len(self.layers) else None
        return first.bias if isinstance(first, _Shift) else None

    def _simple_layers(self) -> Iterator[nn.Module]:
        for layer in self.layers:
            if isinstance(layer, _OnMaps) and type(layer.layers) is nn.Sequential and not layer.concatenates:
                yield from layer.layers
            else:
                yield layer

    def take_last(self) -> LinearMap:
        """Take out the last layer as a float64 map, which the caller must apply after `forward`."""
        last, self._last = self._last, None
        return LinearMap(last.weight.detach(), last.bias.detach())

    def project(self, cond: Tensor) -> Tensor:
        """Compute what `forward` needs of a condition (B or 1, channels, *spatial): (B or 1, positions, D).

        If the first layer is linear, that is the condition's share of its output.
        """
        first = next((layer for layer in self.layers if isinstance(layer, _Conditioned)), None)
        maps = cond if first is None else first.condition(cond)
        return (maps if maps.ndim > 2 else maps[..., None]).flatten(2).mT.contiguous()

    def forward(self, rows: Tensor, sizes: tuple[int, ...], projected: Tensor | None = None) -> Tensor:
        """Map rows (N, C_in) to (N, C_out); `sizes` are (B, *spatial), with product N; `projected` is the
        result of `project` for the condition."""
        for layer in self.layers:
            rows = layer(rows, sizes, projected) if isinstance(layer, TOLD_SIZES) else layer(rows)
        return rows


def _matrix_layer(linear_map: LinearMap) -> nn.Linear:
    return linear(linear_map.matrix, linear_map.bias)


def _prepend(enter: LinearMap, layers: list[nn.Module]) -> list[nn.Module]:
    """Add `enter` in front, folded into the first layer where that costs nothing."""
    if enter.is_identity:
        return layers
    if not layers or not is_linear(layers[0]):
        return [_matrix_layer(enter), *layers]
    first, rest = layers[0], layers[1:]
    if isinstance(first, nn.Linear) and _pays(first.weight, enter.matrix):
        bias = first.weight @ enter.bias
        bias = bias if first.bias is None else bias + first.bias
        return [linear(enter.right_multiply(first.weight.detach()), bias), *rest]
    part = enter.matrix.shape[0] < enter.matrix.shape[1]  # rows are the state: it must not be shifted
    if isinstance(first, nn.Linear) or enter.selection is None or (part and enter.bias.any()):
        return [_matrix_layer(enter), *layers]
    # A convolution pads the map's outputs with zeros, so the map's bias has to stay before it.
    weight = torch.einsum("oj...,ji->oi...", first.weight, enter.matrix)
    layers = [_with(first, weight, first.bias), *rest]
    if not enter.bias.any():
        return layers
    return [_Shift(torch.linalg.solve(enter.matrix, enter.bias)), *layers]


def _append(layers: list[nn.Module], leave: LinearMap, *, as_matrix: bool) -> list[nn.Module]:
    """Append `leave`, folded into the last layer where that is free; as nn.Linear if `as_matrix`."""
    last = layers[-1] if layers and is_linear(layers[-1]) else None
    bias = leave.bias if last is None or last.bias is None else leave.matrix @ last.bias + leave.bias
    if isinstance(last, nn.Linear) and _pays(leave.matrix, last.weight):
        return [*layers[:-1], linear(leave.left_multiply(last.weight.detach()), bias)]
    convolves = last is not None and not isinstance(last, nn.Linear)
    if convolves and len(leave.matrix) <= len(last.weight) and not as_matrix:
        weight = torch.einsum("jo,oi...->ji...", leave.matrix, last.weight)
        return [*layers[:-1], _with(last, weight, bias)]
    if leave.is_identity and not as_matrix:
        return layers
    return [*layers, _matrix_layer(leave)]


def _pays(second: Tensor, first: Tensor) -> bool:
    """Whether applying the product of two matrices takes no more multiplications than applying both."""
    return len(second) * first.shape[1] <= second.numel() + first.numel()


def _split_condition(first: nn.Module, cond_channels: int) -> tuple[nn.Module, nn.Module]:
    """Split the first layer: one without the condition's columns, and one of these, on maps, without bias."""
    own = first.weight.shape[1] - cond_channels
    weight, of_condition = first.weight.split([own, cond_channels], dim=1)
    condition = _with(first, of_condition, None)
    condition = PointwiseOnMaps(condition) if isinstance(first, nn.Linear) else condition
    return _with(first, weight, first.bias), condition


def _with(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Copy a linear layer, with this weight and bias: the layer itself may be used elsewhere too."""
    layer = deepcopy(layer)
    layer.weight = nn.Parameter(weight.detach())
    layer.bias = None if bias is None else nn.Parameter(bias.detach())
    if not isinstance(layer, nn.Linear):
        layer.out_channels, layer.in_channels = weight.shape[:2]
    return layer


def copy_of(module: nn.Module) -> nn.Module:
    """Deep copy of a module that may hold results of autograd, as torch.nn.utils.weight_norm leaves them.
    PyTorch refuses to copy these, so they are detached; calling the module computes them again."""
    results = (value for child in module.modules() for value in vars(child).values())
    memo = {id(v): v.detach() for v in results if isinstance(v, Tensor) and not v.is_leaf}
    return deepcopy(module, memo)


def _with_plain_weights(module: nn.Module) -> nn.Module:
    """Replace torch.nn.utils.weight_norm and spectral_norm by the weights that they would compute, in place:
    the weights left by the last call may belong to other values of the parameters."""
    for part in module.modules():
        for hook in list(part._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(part, hook.name)
            elif isinstance(hook, SpectralNorm):
                nn.utils.remove_spectral_norm(part, hook.name)
    return module


def _grouped(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """Yield the layers, with neighbours that need maps, and activations among them, wrapped as one."""
    on_maps: list[nn.Module] = []
    for layer in layers:
        on_rows = is_linear(layer) and isinstance(layer, nn.Linear)
        on_rows = on_rows or isinstance(layer, (_Shift, *TOLD_SIZES))
        if not on_rows and (on_maps or not is_elementwise(layer)):
            on_maps.append(layer)
            continue
        if on_maps:
            yield _OnMaps(nn.Sequential(*on_maps))
            on_maps = []
        yield layer
    if on_maps:
        yield _OnMaps(nn.Sequential(*on_maps))
