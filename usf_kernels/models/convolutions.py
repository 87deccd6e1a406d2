"""Convolutions of frozen networks in the C++ extension, where it is faster than PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels.nn.conditioner_layers import keeps_size
from usf_kernels.nn.stage_extension import layer_of
from usf_kernels.ops import native
from usf_kernels.ops.convolution import in_tiles


class TiledConv2d(nn.Conv2d):
    """`nn.Conv2d` of 3 x 3 kernels that keep the size, by Winograd's minimal filtering F(2 x 2, 3 x 3): 16
    multiplications for four outputs instead of 36 (arXiv:1509.09308), with rounding errors of the same size.

    In float32 on the CPU, without gradients, and in channels-last memory; anything else is PyTorch's. Made by
    `tile_convolutions_`.
    """

    _layer: tuple[Any, Any] | None = None  # the parameters' versions, and the extension's copy of them

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is such a convolution, and worth it."""
        return type(module) is nn.Conv2d and keeps_size(module) and in_tiles(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W)."""
        if not self._runs_in_tiles(x):
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        y = x.new_empty((batch, height, width, self.out_channels))
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        self._tiled().run(rows, y.view(-1, self.out_channels), height, width, torch.get_num_threads())
        return y.permute(0, 3, 1, 2)

    def _runs_in_tiles(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return False
        fits = x.ndim == 4 and x.shape[1] == self.in_channels and native.fits(x, self.weight, self.bias)
        return fits and not torch.is_autocast_enabled("cpu")

    def _tiled(self) -> Any:
        parameters = [t for t in (self.weight, self.bias) if t is not None]
        # Inference tensors have no versions: nobody writes to them.
        versions = [(t.data_ptr(), None if t.is_inference() else t._version) for t in parameters]
        if self._layer is None or self._layer[0] != versions:
            self._layer = versions, layer_of(self.weight, self.bias)
        return self._layer[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_layer"}


def tile_convolutions_(network: nn.Module) -> bool:
    """Make a `TiledConv2d`, in place, of every convolution of a network that it takes; whether there was one.

    Parameters, hooks and the state_dict stay what they are. `untile_convolutions_` undoes it.
    """
    found = [module for module in network.modules() if TiledConv2d.takes(module)]
    for module in found:
        module.__class__ = TiledConv2d
    return bool(found)


def untile_convolutions_(network: nn.Module) -> None:
    """Make them `nn.Conv2d` again."""
    for module in network.modules():
        if type(module) is TiledConv2d:
            module.__class__ = nn.Conv2d
            module.__dict__.pop("_layer", None)
