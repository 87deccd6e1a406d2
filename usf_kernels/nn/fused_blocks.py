"""The stages of a fused flow that have a conditioner: see `fused_maps`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usf_kernels.nn.conjugation import AffineCheckerboard
from usf_kernels.nn.folding import Coupling, LinearMap
from usf_kernels.nn.fused_conditioner import FusedConditioner
from usf_kernels.nn.fused_maps import Result, Sizes
from usf_kernels.nn.maps import to_maps
from usf_kernels.nn.usf_block import CheckerboardCoupling, checkerboard
from usf_kernels.ops.block import residual_mlp
from usf_kernels.ops.checks import compute_dtype
from usf_kernels.ops.row_kernels import multiplies_in_kernels
from usf_kernels.ops.rows import add_, affine_, select


class ProjectedBlock(nn.Module):
    """An additive coupling after any linear map, as the residual block `rows + R f(Q rows)`.

    If the conditioner begins or ends with a pointwise layer, Q or R is part of that. The inverse is the same
    with a minus, since Q R = 0.

    Args:
        coupling: the coupling whose subnet is f.
        before: the map from the state to the coupling's input; Q is its rows that feed the subnet.
        after: the inverse of `before`; R is its columns for the active half.

    Attributes:
        offset: (C,) float64, a constant that belongs to the residual, but that `forward` does not add.
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
    """A `CheckerboardCoupling` after any linear map: `rows + (1 - m) * R f(m * (Q rows + b))`.

    The mask m treats the channels of a position alike, so it may come after R. Arguments and offset are
    those of `ProjectedBlock`, except that the offset is zero.
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
        self.conditioner.pointwise = False  # the result for a row depends on its position
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
        self.conditioner.pointwise = False  # the result for a row depends on its position
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


@dataclass(frozen=True)
class Halves:
    """The halves of a coupling as channels of the state; float64, on the CPU.

    Attributes:
        passive: channels that the conditioner sees, ascending.
        enter: map from these to the conditioner's input.
        active: channels that are changed, ascending.
        leave: (active, active), from a shift of the coupling's active half to one of the state's channels.
        shift: (active,): in the units of the state, the coupling sees y + shift.
    """

    passive: Tensor
    enter: LinearMap
    active: Tensor
    leave: Tensor
    shift: Tensor

    @classmethod
    def of_selection(cls, before: LinearMap, split: int) -> Halves:
        """Halves of a coupling after a map that only reorders, scales and shifts."""
        index, scale = before.selection
        passive, order = index[:split].sort()
        enter = LinearMap(torch.diag(scale[:split])[:, order], before.bias[:split])
        active, order = index[split:].sort()
        inverse_scale = 1 / scale[split:]
        shift = (before.bias[split:] * inverse_scale)[order]
        return cls(passive, enter, active, torch.diag(inverse_scale)[order], shift)


class _IndexedBlock(nn.Module):
    """A coupling whose halves are channels of the state. The conditioner's layers contain the rest of the
    maps."""

    in_place = True

    def __init__(self, coupling: Coupling, halves: Halves) -> None:
        super().__init__()
        leave = self._leave(halves.leave, halves.shift)
        self.conditioner = FusedConditioner(
            coupling.subnet, halves.enter, leave, cond_channels=coupling.cond_channels
        )
        self.register_buffer("passive", halves.passive)
        self.register_buffer("active", halves.active)
        self.register_buffer("shift", halves.shift)

    def _leave(self, leave: Tensor, shift: Tensor) -> LinearMap:
        """Map from the conditioner's outputs to those of `_update`; `leave` orders and scales the shifts."""
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
    """`y[active] = (y[active] + shift) * exp(s) + t`, with s and t from f(y[passive]); t includes -shift."""

    def __init__(self, coupling: Coupling, halves: Halves) -> None:
        super().__init__(coupling, halves)
        self.clamp = coupling.clamp

    def _leave(self, leave: Tensor, shift: Tensor) -> LinearMap:
        order = (leave != 0).to(leave.dtype)
        return LinearMap(0.1 * torch.block_diag(order, leave), torch.cat([torch.zeros_like(shift), -shift]))

    def _update(self, rows: Tensor, outputs: Tensor, inverse: bool) -> Tensor:
        return affine_(rows, self.active, outputs, self.shift, self.clamp, inverse)


def add_log_dets(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Add two optional log-determinants, treating None as zero."""
    if total is None or more is None:
        return more if total is None else total
    return total + more
