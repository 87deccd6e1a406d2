"""How an inference form is put together: which maps become one, which couplings become residual blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import nn

from usf_kernels.nn.conjugation import AffineCheckerboard
from usf_kernels.nn.coupling import AdditiveCoupling, AffineCoupling
from usf_kernels.nn.folding import Coupling, LinearMap, alternate, parts
from usf_kernels.nn.fused import FusedFlow
from usf_kernels.nn.fused_blocks import (
    AdditiveBlock,
    AffineBlock,
    AffineCheckerboardBlock,
    CheckerboardBlock,
    Product,
    ProjectedBlock,
    Reorder,
    Shift,
)
from usf_kernels.nn.stage_run import StageRun, blocks_of, joins
from usf_kernels.nn.usf_block import CheckerboardCoupling
from usf_kernels.ops.checks import FLOAT_DTYPES

WORST_CONDITION = 1e4  # of a map that residual blocks undo; beyond it, rounding would show


@torch.inference_mode(False)  # what inference mode makes has no versions, by which changes are seen
@torch.no_grad()
def fuse_flow(flow: nn.Module, dtype: torch.dtype | None = None) -> FusedFlow:
    """The inference form of a flow module of this package: see `FusedFlow`.

    All linear maps between two conditioners (LU, ActNorm, permutations) become one matrix, or one index where
    they only reorder and scale. Additive couplings between matrices become residual blocks, as long as this
    takes fewer multiplications: then only one product is left of all the maps.

    Args:
        flow: left as it is; later changes to it do not reach the fused one.
        dtype: of the weights and the computation, None for the flow's own.

    Raises:
        TypeError: a dtype that is not floating, a module that is not one of `usf_kernels.nn`.
        ValueError: a flow without any map or coupling.
    """
    tensors = (*flow.parameters(), *flow.buffers())
    if dtype is None:
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, found {dtype}")
    return fuse_parts(list(parts(flow)), dtype, next((t.device for t in tensors), None))


@torch.inference_mode(False)  # what inference mode makes has no versions, by which changes are seen
@torch.no_grad()
def fuse_parts(
    flow: Sequence[LinearMap | Coupling], dtype: torch.dtype, device: torch.device | None
) -> FusedFlow:
    """The same for a flow that is given as its maps and couplings, first to last."""
    maps, couplings = alternate(flow)
    stages = _moving(maps, couplings)
    residual = _residual(maps, couplings)
    if residual is not None and _multiplications(residual) <= _multiplications(stages):
        stages = residual
    return FusedFlow(
        _runs(stages),
        channels=len(maps[0].bias),
        cond_channels=max((c.cond_channels for c in couplings), default=0),
        log_det=sum(m.log_det for m in maps),
    ).to(device, dtype)


def _moving(maps: list[LinearMap], couplings: list[Coupling]) -> list[nn.Module]:
    """Stages whose state is every coupling's input, up to order and scale; each matrix is a product."""
    stages: list[nn.Module] = []
    behind = LinearMap.identity(len(maps[0].bias))  # from the state to the place in the flow that is reached
    for linear_map, coupling in zip(maps, [*couplings, None], strict=True):
        behind = linear_map.after(behind)
        if behind.selection is None:
            stages.append(Product(behind))
            behind = LinearMap.identity(len(behind.bias))
        if isinstance(coupling, CheckerboardCoupling):
            stages.append(CheckerboardBlock(coupling, behind, behind.inverse()))
        elif isinstance(coupling, AffineCheckerboard):
            if not behind.is_identity:
                stages.append(Reorder(behind))
                behind = LinearMap.identity(len(behind.bias))
            stages.append(AffineCheckerboardBlock(coupling))
        elif coupling is not None:
            kind = AdditiveBlock if isinstance(coupling, AdditiveCoupling) else AffineBlock
            stages.append(kind(coupling, behind))
    return stages if behind.is_identity else [*stages, Reorder(behind)]


def _residual(maps: list[LinearMap], couplings: list[Coupling]) -> list[nn.Module] | None:
    """Stages whose state is where the maps alone would take the input: one product, then residual blocks.

    None where a coupling is affine, where there is no matrix to save, or where a map is too ill-conditioned
    to be undone.
    """
    additive = not any(isinstance(coupling, AffineCoupling | AffineCheckerboard) for coupling in couplings)
    if not additive or all(linear_map.selection is not None for linear_map in maps):
        return None
    blocks: list[nn.Module] = []
    after = maps[-1]  # from the input of a coupling to the end
    offset = torch.zeros_like(after.bias)  # from the state to what it stands for, behind a block
    for linear_map, coupling in zip(reversed(maps[:-1]), reversed(couplings), strict=True):
        before = after.inverse()
        # Frobenius norms over C: the condition number, but for an average direction.
        if before.matrix.norm() * after.matrix.norm() / len(offset) > WORST_CONDITION:
            return None
        # The conditioner sees the same with the offset in front of the block, which differs along R only.
        shifted = LinearMap(before.matrix, before.bias + before.matrix @ offset)
        if isinstance(coupling, CheckerboardCoupling):
            blocks.append(CheckerboardBlock(coupling, shifted, after))
        elif before.selection is not None:
            blocks.append(AdditiveBlock(coupling, shifted))
        else:
            blocks.append(ProjectedBlock(coupling, shifted, after))
            offset = offset - blocks[-1].offset
        after = after.after(linear_map)
    entry = LinearMap(after.matrix, after.bias - offset)
    # Conjugated blocks undo their maps: what is left of them is the identity, up to rounding.
    is_shift = LinearMap(entry.matrix, torch.zeros_like(offset)).error_of_identity < 1e-12 * len(offset)
    return [Shift(entry.bias) if is_shift else Product(entry), *reversed(blocks)]


def _multiplications(stages: list[nn.Module]) -> int:
    """Per position."""
    tensors = (t for stage in stages for t in (*stage.parameters(), *stage.buffers()) if t.ndim > 1)
    inverses = sum(stage.weight.numel() for stage in stages if isinstance(stage, Product))
    return sum(t.numel() for t in tensors) - inverses


def _runs(stages: list[nn.Module]) -> list[nn.Module]:
    """The stages, with a StageRun in place of neighbours that can be one, where a block is among them."""
    grouped: list[nn.Module] = []
    for joined, neighbours in groupby(stages, joins):
        group = list(neighbours)
        if joined and any(blocks_of(stage) for stage in group):
            grouped.append(StageRun(group))
        else:
            grouped.extend(group)
    return grouped
