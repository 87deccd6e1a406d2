"""The stages of a fused flow that are linear maps.

The state is rows (N, C), N = B * positions. A stage is called with (rows, sizes, cond, inverse=...), where
`sizes` are (B, *spatial), and returns the new rows with their log-dets (N,), None if these are constant.
`cond` is the result of its conditioner's `project` for the condition; a run takes one for each block.
Stages with `in_place` write to the rows that they are given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usf_kernels.nn.folding import LinearMap
from usf_kernels.ops.checks import compute_dtype
from usf_kernels.ops.rows import select

Result = tuple[Tensor, Tensor | None]
Sizes = tuple[int, ...]


class Product(nn.Module):
    """A matrix applied to all channels, plus a bias."""

    in_place = False

    def __init__(self, linear_map: LinearMap) -> None:
        super().__init__()
        inverse = linear_map.inverse()
        self.register_buffer("weight", linear_map.matrix)
        self.register_buffer("bias", linear_map.bias)
        self.register_buffer("inverse_weight", inverse.matrix)
        self.register_buffer("inverse_bias", inverse.bias)

    def forward(self, rows: Tensor, sizes: Sizes, cond: Tensor | None, *, inverse: bool) -> Result:
        """Apply, or undo."""
        if inverse:
            return F.linear(rows, self.inverse_weight, self.inverse_bias), None
        return F.linear(rows, self.weight, self.bias), None


class Exchange(nn.Module):
    """Replace some channels by a linear map of all of them: `rows[:, index] = weight rows + bias`.

    Args:
        index: (n,), the channels that are replaced, ascending.
        linear_map: from all C channels to the n new ones. Together with the channels that stay, these must
            determine the old state.
    """

    in_place = True

    def __init__(self, index: Tensor, linear_map: LinearMap) -> None:
        super().__init__()
        inverse = self.of_state(index, linear_map).inverse().rows(index)
        self.register_buffer("index", index)
        self.register_buffer("weight", linear_map.matrix)
        self.register_buffer("bias", linear_map.bias)
        self.register_buffer("inverse_weight", inverse.matrix)
        self.register_buffer("inverse_bias", inverse.bias)

    @staticmethod
    def of_state(index: Tensor, linear_map: LinearMap) -> LinearMap:
        """The exchange as a map of all channels."""
        whole = LinearMap.identity(linear_map.matrix.shape[1])
        return LinearMap(
            whole.matrix.index_copy(0, index, linear_map.matrix),
            whole.bias.index_copy(0, index, linear_map.bias),
        )

    def forward(self, rows: Tensor, sizes: Sizes, cond: Tensor | None, *, inverse: bool) -> Result:
        """Apply, or undo."""
        weight, bias = (self.inverse_weight, self.inverse_bias) if inverse else (self.weight, self.bias)
        return rows.index_copy_(1, self.index, F.linear(rows, weight, bias)), None


class Shift(nn.Module):
    """A constant added to every channel."""

    in_place = False

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias)

    def forward(self, rows: Tensor, sizes: Sizes, cond: Tensor | None, *, inverse: bool) -> Result:
        """Apply, or undo."""
        return torch.add(rows, self.bias, alpha=-1 if inverse else 1), None


class Reorder(nn.Module):
    """Channels in another order, scaled and shifted: `scale * rows[:, index] + bias`."""

    in_place = False

    def __init__(self, linear_map: LinearMap) -> None:
        super().__init__()
        index, scale = linear_map.selection
        self.register_buffer("index", index)
        self.register_buffer("inverse_index", torch.argsort(index))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear_map.bias)
        _look_at_scales(self, None)
        self.register_load_state_dict_post_hook(_look_at_scales)

    def forward(self, rows: Tensor, sizes: Sizes, cond: Tensor | None, *, inverse: bool) -> Result:
        """Apply, or undo."""
        if inverse:
            rows = (rows - self.bias) / self.scale if self.scales else rows
            return select(rows, self.inverse_index), None
        rows = select(rows, self.index)
        return (rows.mul_(self.scale).add_(self.bias) if self.scales else rows), None

    def undo(self) -> tuple[Tensor, Tensor, Tensor]:
        """(index, scale, bias) of the inverse."""
        order = self.inverse_index
        return order, 1 / self.scale[order], -(self.bias / self.scale)[order]

    def squared_norm(self, rows: Tensor) -> Tensor:
        """Squared norm of every row of the result, (N,), without reordering channels."""
        if not self.scales:
            return squared_norm(rows)
        order = self.inverse_index
        return squared_norm(rows * self.scale[order] + self.bias[order])


def _look_at_scales(reorder: Reorder, _: object) -> None:
    """Set `scales`: whether anything has to be scaled or shifted."""
    reorder.scales = bool((reorder.scale != 1).any() or reorder.bias.any())


Maps = Product | Shift | Reorder | Exchange  # the maps that the extension knows


def squared_norm(rows: Tensor) -> Tensor:
    """Squared norm of each row: (N, C) to (N,), accumulated in float32 at least."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=compute_dtype(rows)).square_()
