"""Layers of frozen networks that run faster than PyTorch's: in the C++ extension, or in the cache."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels.memory import in_huge_pages
from usf_kernels.nn.conditioner_layers import hooked, keeps_size
from usf_kernels.nn.stage_extension import layer_of
from usf_kernels.nn.weights import Weights
from usf_kernels.ops import native
from usf_kernels.ops.convolution import in_tiles
from usf_kernels.ops.products import MULTIPLIES, MULTIPLIES_BFLOAT16, WORTH_THREADS, has_amx

NARROWEST_LINEAR = 32  # inputs and outputs: the extension multiplies this many at a time
WORDS = 32  # bfloat16 layers whose widths are multiples of this need no float32 copies
NARROWEST_PAIRS = 128  # channels of a bfloat16 convolution: at 64, transforming tiles costs what it saves


class _Native:
    """A layer that runs in the extension on the CPU without gradients, in float32, or in bfloat16 on a
    processor that multiplies it but has no AMX (which PyTorch uses well); otherwise PyTorch runs it. The
    extension has a copy of the parameters, renewed when they have changed; writes through `.data` go
    unnoticed. Made by `use_extension_`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _layer: tuple[Weights, Any] | None = None  # the parameters as they were, and the extension's copy

    def _fits(self, x: Tensor) -> bool:
        given = [t for t in (x, self.weight, self.bias) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            return False
        if not native.accepts(*given, dtype=x.dtype) or torch.is_autocast_enabled("cpu"):
            return False
        if x.dtype != torch.float32 and not (x.dtype == torch.bfloat16 and self._fits_pairs()):
            return False
        return not any(t.is_inference() for t in given[1:])  # changes of these go unnoticed

    def _fits_pairs(self) -> bool:
        return MULTIPLIES_BFLOAT16 and not has_amx()

    def _run(self, rows: Tensor, height: int, width: int) -> Tensor:
        """Map contiguous rows (N, inputs) to (N, outputs) of the same dtype."""
        if self._layer is None or self._layer[0].outdated:
            self._layer = Weights([self]), layer_of(self.weight, self.bias)
        layer, threads = self._layer[1], torch.get_num_threads()
        if rows.dtype == torch.bfloat16 and all(size % WORDS == 0 for size in self.weight.shape):  # not 3 x 3
            y = in_huge_pages(rows.new_empty(len(rows), len(self.weight)))
            layer.run_bfloat16(rows.data_ptr(), len(rows), y.data_ptr(), threads)
            return y
        y = in_huge_pages(rows.new_empty(len(rows), len(self.weight), dtype=torch.float32))
        layer.run(rows.float(), y, height, width, threads)
        return y.to(rows.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_layer"}


class TiledConv2d(_Native, nn.Conv2d):
    """A size-preserving 3 x 3 `nn.Conv2d` by Winograd's minimal filtering (arXiv:1509.09308). The result is
    in channels-last memory.

    F(2 x 2, 3 x 3) takes 16 multiplications for four outputs instead of 36, with rounding errors of the size
    of PyTorch's. In float32, with at least 32 channels and maps of some 9 x 9 at least, F(4 x 4, 3 x 3) takes
    36 for sixteen outputs instead of 144, with errors three to four times as large in root mean square.
    An input that is not finite may give NaN in all outputs of its tiles."""

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is such a convolution, and faster in the extension."""
        return type(module) is nn.Conv2d and keeps_size(module) and in_tiles(module.weight)

    def _fits_pairs(self) -> bool:
        return min(self.weight.shape[:2]) >= NARROWEST_PAIRS and super()._fits_pairs()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W)."""
        if x.ndim != 4 or x.shape[1] != self.weight.shape[1] or not self._fits(x):
            return super().forward(x)
        batch, channels, height, width = x.shape
        rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, channels)
        y = self._run(rows, height, width)
        return y.view(batch, height, width, len(self.weight)).permute(0, 3, 1, 2)


class PackedLinear(_Native, nn.Linear):
    """An `nn.Linear` for many rows, with weights stored in the order in which they are read."""

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is such a layer, and wide enough to gain from the extension."""
        narrow = type(module) is not nn.Linear or min(module.weight.shape) < NARROWEST_LINEAR
        return MULTIPLIES and not narrow and not hooked(module)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        outputs, inputs = self.weight.shape
        few = x.numel() * outputs < WORTH_THREADS
        if few or x.shape[-1] != inputs or not self._fits(x):
            return super().forward(x)
        rows = x.reshape(-1, inputs).contiguous()
        return self._run(rows, 1, len(rows)).view(*x.shape[:-1], outputs)


def _kinds() -> list[type[nn.Module]]:
    if "timm.models.cait" not in sys.modules:  # timm is an extra, and takes long to import
        return [TiledConv2d, PackedLinear]
    from usf_kernels.models.talking_heads import CachedTalkingHeads

    return [TiledConv2d, PackedLinear, CachedTalkingHeads]


def use_extension_(network: nn.Module) -> bool:
    """Turn every suitable layer of a network into a `TiledConv2d`, `PackedLinear` or `CachedTalkingHeads`, in
    place. Return whether there were such convolutions, which want channels-last memory.

    Parameters, hooks and the state_dict stay the same. `use_pytorch_` undoes it.
    """
    found = {kind: [m for m in network.modules() if kind.takes(m)] for kind in _kinds()}
    for kind, modules in found.items():
        for module in modules:
            module.__class__ = kind
    return bool(found[TiledConv2d])


def use_pytorch_(network: nn.Module) -> None:
    """Undo `use_extension_`: turn the layers into PyTorch's, or timm's, again."""
    kinds = _kinds()
    for module in network.modules():
        if type(module) in kinds:
            module.__class__ = type(module).__bases__[-1]
            module.__dict__.pop("_layer", None)
