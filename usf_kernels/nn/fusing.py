"""How an inference form is built: which maps become one, and which couplings become residual blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import nn

from usf_kernels.nn.conjugation import AffineCheckerboard
from usf_kernels.nn.coupling import AdditiveCoupling, AffineCoupling
from usf_kernels.nn.folding import ON_CPU, Coupling, LinearMap, alternate, parts
from usf_kernels.nn.fused import FusedFlow
from usf_kernels.nn.fused_blocks import (
    AdditiveBlock,
    AffineBlock,
    AffineCheckerboardBlock,
    CheckerboardBlock,
    Halves,
    ProjectedBlock,
)
from usf_kernels.nn.fused_maps import Exchange, Product, Reorder, Shift
from usf_kernels.nn.modes import makes_weights
from usf_kernels.nn.stage_run import StageRun, blocks_of, joins
from usf_kernels.nn.usf_block import CheckerboardCoupling
from usf_kernels.ops.checks import check_dtype

WORST_CONDITION = 1e4  # largest for maps that blocks undo: rounding would show beyond it


@makes_weights
def fuse_flow(flow: nn.Module, dtype: torch.dtype | None = None) -> FusedFlow:
    """The inference form of a flow module of this package: see `FusedFlow`.

    All linear maps between two conditioners (LU, ActNorm, permutations) become one matrix, or one index if
    they only reorder and scale. Where that takes fewer multiplications, additive couplings between matrices
    become residual blocks, which leave only one product of all the maps; or, in full precision on the CPU,
    only the half that the next conditioner sees is computed, and the other half of the state stays as it is.

    Args:
        flow: not changed; later changes to it do not reach the inference form.
        dtype: dtype of the weights and the computation; None for the flow's own.

    Raises:
        TypeError: a dtype that is not floating, a module that is not one of `usf_kernels.nn`.
        ValueError: a flow without any map or coupling.
    """
    tensors = (*flow.parameters(), *flow.buffers())
    if dtype is None:
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    check_dtype(dtype)
    return fuse_parts(list(parts(flow)), dtype, next((t.device for t in tensors), None))


@makes_weights
def fuse_parts(
    flow: Sequence[LinearMap | Coupling], dtype: torch.dtype, device: torch.device | None
) -> FusedFlow:
    """`fuse_flow` for a flow that is given as its maps and couplings, first to last."""
    maps, couplings = alternate(flow)
    forms = [_residual(maps, couplings), _moving(maps, couplings)]
    # Exchanges take more kernels on GPUs. In half precision, every map that the state passes through costs
    # digits; residual blocks only add to the state.
    if (device is None or device.type == "cpu") and dtype in (torch.float32, torch.float64):
        forms.append(_exchanging(maps, couplings))
    stages = min((form for form in forms if form is not None), key=_multiplications)
    return FusedFlow(
        _runs(stages),
        channels=len(maps[0].bias),
        cond_channels=max((c.cond_channels for c in couplings), default=0),
        log_det=sum(m.log_det for m in maps),
    ).to(device, dtype)


def _moving(maps: list[LinearMap], couplings: list[Coupling]) -> list[nn.Module]:
    """Stages whose state is every coupling's input, up to order and scale. Each matrix takes a product."""
    stages: list[nn.Module] = []
    from_state = LinearMap.identity(len(maps[0].bias))  # from the state to this point of the flow
    for linear_map, coupling in zip(maps, [*couplings, None], strict=True):
        from_state = linear_map.after(from_state)
        if from_state.selection is None:
            stages.append(Product(from_state))
            from_state = LinearMap.identity(len(from_state.bias))
        if isinstance(coupling, CheckerboardCoupling):
            stages.append(CheckerboardBlock(coupling, from_state, from_state.inverse()))
        elif isinstance(coupling, AffineCheckerboard):
            if not from_state.is_identity:
                stages.append(Reorder(from_state))
                from_state = LinearMap.identity(len(from_state.bias))
            stages.append(AffineCheckerboardBlock(coupling))
        elif coupling is not None:
            kind = AdditiveBlock if isinstance(coupling, AdditiveCoupling) else AffineBlock
            stages.append(kind(coupling, Halves.of_selection(from_state, coupling.split)))
    return stages if from_state.is_identity else [*stages, Reorder(from_state)]


def _residual(maps: list[LinearMap], couplings: list[Coupling]) -> list[nn.Module] | None:
    """One product of all maps, then residual blocks: the state is in the coordinates of the flow's output.

    Returns None if a coupling is affine, if no matrix can be saved, or if a map is too ill-conditioned to be
    undone.
    """
    if not _can_save(maps, couplings):
        return None
    blocks: list[nn.Module] = []
    after = maps[-1]  # from the coupling to the end of the flow
    offset = torch.zeros_like(after.bias)  # still to be added to the state after a block
    for linear_map, coupling in zip(reversed(maps[:-1]), reversed(couplings), strict=True):
        before = after.inverse()
        if _condition(before, after) > WORST_CONDITION:
            return None
        # Offsets before and after the block differ along R only, which the conditioner does not see.
        shifted = LinearMap(before.matrix, before.bias + before.matrix @ offset)
        if isinstance(coupling, CheckerboardCoupling):
            blocks.append(CheckerboardBlock(coupling, shifted, after))
        elif before.selection is not None:
            blocks.append(AdditiveBlock(coupling, Halves.of_selection(shifted, coupling.split)))
        else:
            blocks.append(ProjectedBlock(coupling, shifted, after))
            offset = offset - blocks[-1].offset
        after = after.after(linear_map)
    entry = LinearMap(after.matrix, after.bias - offset)
    # Conjugated blocks undo their maps, so that only the identity is left, up to rounding.
    is_shift = LinearMap(entry.matrix, torch.zeros_like(offset)).error_of_identity < 1e-12 * len(offset)
    return [Shift(entry.bias) if is_shift else Product(entry), *reversed(blocks)]


def _exchanging(maps: list[LinearMap], couplings: list[Coupling]) -> list[nn.Module] | None:
    """Stages that exchange channels of the state for those that the next conditioner sees, or residual blocks
    where these cost no more; a product after the last one.

    The update of a coupling changes only the channels that stayed: the new ones depend on its passive half
    alone. So the map of the update has half the size too, and is folded into the conditioner's last layer.

    Returns None where `_residual` does.
    """
    mixed = any(isinstance(coupling, CheckerboardCoupling) for coupling in couplings)
    if mixed or not _can_save(maps, couplings):
        return None
    stages: list[nn.Module] = []
    from_state = LinearMap.identity(len(maps[0].bias))  # from the state to this point of the flow
    for linear_map, coupling in zip(maps, couplings, strict=False):
        from_state = linear_map.after(from_state)
        if from_state.selection is not None:
            stages.append(AdditiveBlock(coupling, Halves.of_selection(from_state, coupling.split)))
            continue
        to_state = from_state.inverse()
        if _condition(from_state, to_state) > WORST_CONDITION:
            return None
        residual = ProjectedBlock(coupling, from_state, to_state)
        exchange, block, left = _exchanged(coupling, from_state, to_state)
        if _multiplications([residual]) <= _multiplications([exchange, block]):
            stages.append(residual)
            from_state = LinearMap(from_state.matrix, from_state.bias + from_state.matrix @ residual.offset)
        else:
            stages += [exchange, block]
            from_state = left
    from_state = maps[-1].after(from_state)
    if from_state.selection is None:
        return [*stages, Product(from_state)]
    return stages if from_state.is_identity else [*stages, Reorder(from_state)]


def _exchanged(
    coupling: AdditiveCoupling, from_state: LinearMap, to_state: LinearMap
) -> tuple[Exchange, AdditiveBlock, LinearMap]:
    """Split a coupling, given the map from the state to its input and the inverse of that map.

    Returns:
        The exchange before the coupling, the coupling as a block, and the map from the state after these to
        the coupling's output.
    """
    channels, split = len(from_state.bias), coupling.split
    seen = from_state.rows(torch.arange(split, device="cpu"))
    # The channels to replace are those that the new half determines best: pivoting finds them.
    pivots = torch.linalg.lu(seen.matrix.mT)[0].argmax(0)
    goes, stays = pivots[:split].sort().values, pivots[split:].sort().values
    exchange = Exchange(goes, seen)
    halves = Halves(
        passive=goes,
        enter=LinearMap.identity(split),
        active=stays,
        leave=to_state.matrix[stays][:, split:],
        shift=torch.zeros(channels - split, **ON_CPU),
    )
    undone = Exchange.of_state(goes, LinearMap(exchange.inverse_weight, exchange.inverse_bias))
    return exchange, AdditiveBlock(coupling, halves), from_state.after(undone)


def _can_save(maps: list[LinearMap], couplings: list[Coupling]) -> bool:
    """Whether products can be saved: some map is a matrix, and all couplings are additive."""
    additive = not any(isinstance(coupling, AffineCoupling | AffineCheckerboard) for coupling in couplings)
    return additive and any(linear_map.selection is None for linear_map in maps)


def _condition(linear_map: LinearMap, inverse: LinearMap) -> float:
    """Condition number for an average direction: the product of Frobenius norms over C."""
    return (linear_map.matrix.norm() * inverse.matrix.norm()).item() / len(linear_map.bias)


def _multiplications(stages: list[nn.Module]) -> int:
    """Number of multiplications per position."""
    tensors = (t for stage in stages for t in (*stage.parameters(), *stage.buffers()) if t.ndim > 1)
    inverses = sum(stage.weight.numel() for stage in stages if isinstance(stage, Product | Exchange))
    return sum(t.numel() for t in tensors) - inverses


def _runs(stages: list[nn.Module]) -> list[nn.Module]:
    """Return the stages, with neighbours that can run together as a StageRun if they include a block."""
    grouped: list[nn.Module] = []
    for joined, neighbours in groupby(stages, joins):
        group = list(neighbours)
        if joined and any(blocks_of(stage) for stage in group):
            grouped.append(StageRun(group))
        else:
            grouped.extend(group)
    return grouped
