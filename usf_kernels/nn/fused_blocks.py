"""The stages of a fused flow.

The state is rows (N, C), N = B * positions. A stage is called with (rows, sizes, cond, inverse=...), where
`sizes` are (B, *spatial), and returns the new rows with their log-dets (N,), None where those are constant.
`cond` is what its conditioner's `project` made of the condition: of a run of blocks, one for each.
Those with `in_place` write to the rows that they are given.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usf_kernels.nn.conjugation import AffineCheckerboard
from usf_kernels.nn.folding import Coupling, LinearMap
from usf_kernels.nn.fused_conditioner import FusedConditioner
from usf_kernels.nn.maps import to_maps
from usf_kernels.nn.rows import add_, affine_, select
from usf_kernels.nn.usf_block import CheckerboardCoupling, checkerboard
from usf_kernels.ops.block import residual_mlp
from usf_kernels.ops.checks import compute_dtype
from usf_kernels.ops.rows import multiplies_in_kernels

Result = tuple[Tensor, Tensor | None]
Sizes = tuple[int, ...]


class Product(nn.Module):
    """All channels times a matrix, plus a bias."""

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
        """Of every row of the result, (N,), without reordering it."""
        if not self.scales:
            return squared_norm(rows)
        order = self.inverse_index
        return squared_norm(rows * self.scale[order] + self.bias[order])


def _look_at_scales(reorder: Reorder, _: object) -> None:
    """Whether anything has to be scaled or shifted."""
    reorder.scales = bool((reorder.scale != 1).any() or reorder.bias.any())


class ProjectedBlock(nn.Module):
    """An additive coupling behind any linear map, as the residual block `rows + R f(Q rows)`.

    Where the conditioner begins or ends with a pointwise layer, Q or R is inside it. The inverse is the same
    with a minus, since Q R = 0.

    Args:
        coupling: whose subnet is f.
        before: the map from the state to the coupling's input; Q is its rows that feed the subnet.
        after: its inverse; R is its columns for the other half.

    Attributes:
        offset: (C,) float64, a constant that `forward` leaves out of what it adds to the state.
    """

    in_place = True

    def __init__(self, coupling: Coupling, before: LinearMap, after: LinearMap) -> None:
        super().__init__()
        leave = after.matrix[:, coupling.split :]
        self.conditioner = FusedConditioner(
            coupling.subnet,
            before.rows(torch.arange(coupling.split, device="cpu")),
            LinearMap(leave, leave.new_zeros(len(leave))),
            cond_channels=coupling.cond_channels,
            give_last=True,
        )
        last = self.conditioner.take_last()
        self.offset = last.bias
        self.register_buffer("weight", last.matrix.mT)
        self._first = self.conditioner.first_of_two()

    def forward(self, rows: Tensor, sizes: Sizes, cond: Tensor | None, *, inverse: bool) -> Result:
        """Apply, or undo."""
        if self._first is not None and multiplies_in_kernels(rows):
            layer, conditioned = self._first
            maps = rows.view(sizes[0], math.prod(sizes[1:]), rows.shape[1]).mT
            cond = cond.mT if conditioned else None
            maps = residual_mlp(
                maps, layer.weight, layer.bias, self.weight.mT, None, bias_map=cond, inverse=inverse
            )
            return maps.mT.reshape(rows.shape), None
        return rows.addmm_(self.conditioner(rows, sizes, cond), self.weight, alpha=-1 if inverse else 1), None


class CheckerboardBlock(nn.Module):
    """A `CheckerboardCoupling` behind any linear map: `rows + (1 - m) * R f(m * (Q rows + b))`.

    The mask m treats the channels of a position alike, so it may come behind R. Arguments and offset as in
    `ProjectedBlock`, but nothing is left out.
    """

    in_place = True

    def __init__(self, coupling: CheckerboardCoupling, before: LinearMap, after: LinearMap) -> None:
        super().__init__()
        leave = LinearMap(after.matrix, torch.zeros_like(after.bias))
        self.conditioner = FusedConditioner(
            coupling.subnet,
            LinearMap.identity(coupling.channels),
            leave,
            cond_channels=coupling.cond_channels,
        )
        self.conditioner.pointwise = False  # what happens to a row depends on where it is
        self.offset, self.odd = leave.bias, coupling.odd
        self.register_buffer("weight", before.matrix)
        self.register_buffer("bias", before.bias)

    def forward(self, rows: Tensor, sizes: Sizes, cond: Tensor | None, *, inverse: bool) -> Result:
        """Apply, or undo."""
        mask = checkerboard(to_maps(rows, sizes), odd=self.odd).view(-1, 1)
        by_image = (sizes[0], mask.shape[0], rows.shape[1])
        passive = F.linear(rows, self.weight, self.bias).view(by_image).mul_(mask)
        update = self.conditioner(passive.view(rows.shape), sizes, cond).view(by_image).mul_(~mask)
        return rows.add_(update.view(rows.shape), alpha=-1 if inverse else 1), None


class AffineCheckerboardBlock(nn.Module):
    """An `AffineCheckerboard` on the state itself: `exp(s) * rows + t`, both masked."""

    in_place = True

    def __init__(self, coupling: AffineCheckerboard) -> None:
        super().__init__()
        identity = LinearMap.identity(2 * coupling.channels)
        leave = LinearMap(0.1 * identity.matrix, identity.bias)
        self.conditioner = FusedConditioner(
            coupling.subnet,
            LinearMap.identity(coupling.channels),
            leave,
            cond_channels=coupling.cond_channels,
        )
        self.conditioner.pointwise = False  # what happens to a row depends on where it is
        self.odd, self.clamp = coupling.odd, coupling.clamp

    def forward(self, rows: Tensor, sizes: Sizes, cond: Tensor | None, *, inverse: bool) -> Result:
        """Apply, or undo."""
        mask = checkerboard(to_maps(rows, sizes), odd=self.odd).view(-1, 1)
        by_image = (sizes[0], mask.shape[0], rows.shape[1])
        passive = (rows.view(by_image) * mask).view(rows.shape)
        outputs = self.conditioner(passive, sizes, cond).view(*by_image[:2], 2 * rows.shape[1]) * ~mask
        scale, shift = outputs.view(rows.shape[0], 2 * rows.shape[1]).chunk(2, dim=1)
        log_scale = self.clamp * torch.tanh(scale.to(compute_dtype(scale)))
        log_det = log_scale.sum(1)
        if inverse:
            return rows.sub_(shift).mul_((-log_scale).exp().to(rows.dtype)), -log_det
        return rows.mul_(log_scale.exp().to(rows.dtype)).add_(shift), log_det


class _IndexedBlock(nn.Module):
    """A coupling behind a map that only reorders, scales and shifts: halves of the state are indices.

    Both index sets are in ascending order. The order that the conditioner expects, and the scales, are inside
    its layers.
    """

    in_place = True

    def __init__(self, coupling: Coupling, before: LinearMap) -> None:
        super().__init__()
        index, scale = before.selection
        split = coupling.split
        passive, order = index[:split].sort()
        enter = torch.diag(scale[:split])[:, order]
        active, order = index[split:].sort()
        inverse_scale = 1 / scale[split:]
        leave = torch.diag(inverse_scale)[order]
        # In the units of the state, what the coupling sees of a channel is y + shift.
        shift = (before.bias[split:] * inverse_scale)[order]
        self.conditioner = FusedConditioner(
            coupling.subnet,
            LinearMap(enter, before.bias[:split]),
            self._leave(leave, shift),
            cond_channels=coupling.cond_channels,
        )
        self.register_buffer("passive", passive)
        self.register_buffer("active", active)
        self.register_buffer("shift", shift)

    def _leave(self, leave: Tensor, shift: Tensor) -> LinearMap:
        """From the conditioner's outputs to what `_update` takes; `leave` orders and scales the shifts."""
        raise NotImplementedError

    def _update(self, rows: Tensor, outputs: Tensor, inverse: bool) -> Tensor | None:
        raise NotImplementedError

    def forward(self, rows: Tensor, sizes: Sizes, cond: Tensor | None, *, inverse: bool) -> Result:
        """Apply, or undo."""
        outputs = self.conditioner(select(rows, self.passive), sizes, cond)
        return rows, self._update(rows, outputs, inverse)


class AdditiveBlock(_IndexedBlock):
    """`y[active] += f(y[passive])`."""

    def _leave(self, leave: Tensor, shift: Tensor) -> LinearMap:
        return LinearMap(leave, torch.zeros_like(shift))

    def _update(self, rows: Tensor, outputs: Tensor, inverse: bool) -> None:
        add_(rows, self.active, outputs, -1 if inverse else 1)


class AffineBlock(_IndexedBlock):
    """`y[active] = (y[active] + shift) * exp(s) + t`, with s and t from f(y[passive]); t holds -shift too."""

    def __init__(self, coupling: Coupling, before: LinearMap) -> None:
        super().__init__(coupling, before)
        self.clamp = coupling.clamp

    def _leave(self, leave: Tensor, shift: Tensor) -> LinearMap:
        order = (leave != 0).to(leave.dtype)
        return LinearMap(0.1 * torch.block_diag(order, leave), torch.cat([torch.zeros_like(shift), -shift]))

    def _update(self, rows: Tensor, outputs: Tensor, inverse: bool) -> Tensor:
        return affine_(rows, self.active, outputs, self.shift, self.clamp, inverse)


def add_log_dets(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Their sum, where None is 0."""
    if total is None or more is None:
        return more if total is None else total
    return total + more


def squared_norm(rows: Tensor) -> Tensor:
    """(N, C) to (N,), accumulated in float32 at least."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=compute_dtype(rows)).square_()
