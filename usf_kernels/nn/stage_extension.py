"""Stages of a fused flow in the C++ extension, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels import _core
from usf_kernels.memory import in_huge_pages
from usf_kernels.nn.fused_blocks import AdditiveBlock, AffineBlock, ProjectedBlock
from usf_kernels.nn.fused_maps import Exchange, Maps, Product, Reorder, Result, Shift, Sizes
from usf_kernels.nn.weights import Weights
from usf_kernels.ops import native, products
from usf_kernels.ops.checks import compute_dtype


class StageExtension:
    """Stages for the extension, with their weights as they were when this was made.

    The extension knows couplings and residual blocks whose conditioners are linear layers and size-keeping
    convolutions of one- and two-dimensional maps, each with a ReLU or nothing after it. With bfloat16 rows
    and weights, only products are in bfloat16: the state between stages, sums and log-determinants are
    float32.

    Attributes:
        complete: whether the extension knows all stages, and their weights share one dtype.
        weights: the weights of the stages.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        self._stages = list(stages)
        self.weights = Weights(module for stage in stages for module in stage.modules())
        dtypes = {tensor.dtype for tensor in self.weights.tensors if tensor.is_floating_point()}
        self.complete = len(dtypes) <= 1 and all(
            isinstance(stage, Maps) or self.knows_layers_of(stage) for stage in stages
        )
        self._layers = [_layers(stage) if self.complete else [] for stage in stages]
        self._affine = any(isinstance(stage, AffineBlock) for stage in stages)
        # An estimate, per row.
        self._multiplications = sum(t.numel() for t in self.weights.tensors if t.ndim >= 2)
        self._runs: dict[bool, Any] = {}

    @staticmethod
    def takes(rows: Tensor) -> bool:
        """Whether the extension runs on rows like these."""
        return (
            products.MULTIPLIES
            and rows.device.type == "cpu"
            and (rows.dtype == torch.float32 or _in_pairs(rows))
            and not native.is_observed()
            and native.is_materialized(rows)
        )

    @staticmethod
    def knows_layers_of(stage: nn.Module) -> bool:
        """Whether the extension can run this block."""
        return (
            isinstance(stage, ProjectedBlock | AdditiveBlock | AffineBlock)
            and bool(layers := stage.conditioner.linear_layers())
            and all(isinstance(activation, nn.ReLU | None) for _, _, activation in layers)
            and not (isinstance(stage, AffineBlock) and stage.clamp > native.LARGEST_CLAMP)
            and not (isinstance(stage, ProjectedBlock) and stage.conditioner.shift is not None)
        )

    def run(self, rows: Tensor, sizes: Sizes, cond: Sequence[Tensor], *, inverse: bool, keep: bool) -> Result:
        """Run all stages or, for `inverse`, their inverses from the last to the first.

        Args:
            rows: (N, C), contiguous.
            sizes: (B, *spatial).
            cond: the result of each conditioner's `project` for the condition, if there is one.
            inverse: undo instead of apply.
            keep: do not overwrite `rows`: the result gets memory of its own.
        """
        if inverse not in self._runs:
            self._runs[inverse] = self._compiled(rows.shape[1], inverse)
        log_det = rows.new_zeros(len(rows), dtype=compute_dtype(rows)) if self._affine else None
        shares = [share.to(rows.dtype).contiguous() for share in (reversed(cond) if inverse else cond)]
        threads = products.threads_for(len(rows) * self._multiplications)
        state = in_huge_pages(torch.empty_like(rows)) if keep else rows
        # Convolutions imply one or two spatial dimensions.
        height, width = sizes[1:] if len(sizes) == 3 else (1, math.prod(sizes[1:]))
        arrays = [(share.data_ptr(), share.shape[0], share.shape[2]) for share in shares]
        run, bfloat16 = self._runs[inverse], rows.dtype == torch.bfloat16
        written = (rows.data_ptr(), state.data_ptr(), bfloat16)
        run.run(*written, sizes[0], height, width, arrays, native.address(log_det), threads)
        return state, log_det

    def _compiled(self, channels: int, inverse: bool) -> Any:
        run, factor = _core.StageRun(channels), -1.0 if inverse else 1.0
        steps = list(zip(self._stages, self._layers, strict=True))
        for stage, layers in reversed(steps) if inverse else steps:
            if isinstance(stage, Product | Exchange):
                undone = (stage.inverse_weight, stage.inverse_bias)
                layer = layer_of(*(undone if inverse else (stage.weight, stage.bias)))
                if isinstance(stage, Product):
                    run.product(layer)
                else:
                    run.exchange(layer, stage.index)
            elif isinstance(stage, Shift):
                run.shift((stage.bias * factor).float())
            elif isinstance(stage, Reorder):
                index, scale, bias = stage.undo() if inverse else (stage.index, stage.scale, stage.bias)
                run.reorder(index, scale.float(), bias.float())
            elif isinstance(stage, ProjectedBlock):
                run.residual(layers, layer_of(stage.weight.mT, None), factor)
            elif isinstance(stage, AdditiveBlock):
                run.additive(layers, *_seen_by(stage), stage.active, factor)
            else:
                run.affine(layers, *_seen_by(stage), stage.active, stage.shift.float(), stage.clamp, inverse)
        return run


def _layers(stage: nn.Module) -> list[Any]:
    """Layers of a stage's conditioner, for the extension."""
    if not hasattr(stage, "conditioner"):
        return []
    return [
        layer_of(linear.weight, linear.bias, relu=activation is not None, conditioned=conditioned)
        for linear, conditioned, activation in stage.conditioner.linear_layers()
    ]


def _seen_by(stage: AdditiveBlock | AffineBlock) -> tuple[Tensor, Tensor | None]:
    """Channels that a stage's conditioner sees, and the constant added to them, or None."""
    shift = stage.conditioner.shift
    return stage.passive, None if shift is None else shift.detach().float()


def layer_of(weight: Tensor, bias: Tensor | None, *, relu: bool = False, conditioned: bool = False) -> Any:
    """The extension's layer with this weight (outputs, inputs, *kernel), float32 or bfloat16 `_in_pairs`."""
    pairs, weight, kernel = _in_pairs(weight), weight.detach().float(), (1, 1, *weight.shape[2:])[-2:]
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().float()
    matrix = weight.movedim(1, -1).flatten(1).contiguous()
    return _core.Layer(matrix, bias, relu, conditioned, *kernel, pairs)


def _in_pairs(x: Tensor) -> bool:
    """Whether a tensor is bfloat16, and the extension multiplies such numbers, in pairs."""
    return products.MULTIPLIES_BFLOAT16 and x.dtype == torch.bfloat16
