"""Conversion of maps to rows and back, and convolutions of maps, for inference forms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from usf_kernels.nn.conditioner_layers import CONVOLUTIONS, hooked
from usf_kernels.ops.checks import check_shape


def to_maps(rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """View rows (N, C) as maps (B, C, *spatial) in channels-last memory; `sizes` are (B, *spatial)."""
    return rows.view(*sizes, rows.shape[1]).movedim(-1, 1)


def to_rows(maps: Tensor) -> Tensor:
    """Reshape maps (B, C, *spatial) to rows (N, C), without a copy if they are channels-last."""
    return maps.movedim(1, -1).reshape(-1, maps.shape[1])


def convolved_rows(layers: nn.Module, maps: Tensor) -> Tensor:
    """Apply layers to maps in channels-last memory; return the result as rows.

    Raises:
        ValueError: a result of another size than the maps.
    """
    result = convolve(layers, maps)
    if not torch.compiler.is_compiling():  # a graph for any size must not compare sizes
        expected = (maps.shape[0], result.shape[1], *maps.shape[2:])
        check_shape("output of subnet", result, expected, "(B, c_out, *spatial)")
    return to_rows(result)


def convolve(layers: nn.Module, maps: Tensor) -> Tensor:
    """Apply layers to maps in channels-last memory.

    In float32 without rounding to TF32, cuDNN's convolutions are two to three times as fast if maps and
    weights are contiguous: the maps are then copied.
    """
    if (
        torch.compiler.is_compiling()  # the compiler chooses memory formats itself
        or not (maps.is_cuda and maps.dtype == torch.float32)
        or torch.backends.cudnn.conv.fp32_precision == "tf32"
    ):
        return layers(maps)
    maps = maps.contiguous()
    for layer in layers if type(layers) is nn.Sequential else (layers,):
        if type(layer) in CONVOLUTIONS and not hooked(layer):
            maps = layer._conv_forward(maps, layer.weight.contiguous(), layer.bias)
        else:
            maps = layer(maps)
    return maps
