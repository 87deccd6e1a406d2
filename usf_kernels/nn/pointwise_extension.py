"""Runs of pointwise stages in the C++ extension, float32 on the CPU: products and all else in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels import _core
from usf_kernels.nn.fused_blocks import (
    AdditiveBlock,
    AffineBlock,
    Product,
    ProjectedBlock,
    Reorder,
    Result,
    Sizes,
)
from usf_kernels.nn.fused_conditioner import FusedConditioner
from usf_kernels.ops.checks import compute_dtype

AVAILABLE = hasattr(_core, "PointwiseRun")  # compilers without vector types build none
KNOWN = (Product, Reorder, ProjectedBlock, AdditiveBlock, AffineBlock)
WORTH_THREADS = 1 << 19  # multiplications; below, waking threads takes longer than they save


class PointwiseExtension:
    """The stages with their weights as the extension wants them, as they are when it is made.

    Args:
        stages: of a fused flow, each of which treats every row alone.

    Attributes:
        complete: whether it can run all of them: it knows linear layers with nothing or ReLU behind them.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        self._stages = list(stages)
        self._layers = [
            _layers(stage.conditioner) if hasattr(stage, "conditioner") else [] for stage in stages
        ]
        self.complete = None not in self._layers and all(isinstance(stage, KNOWN) for stage in stages)
        self._affine = any(isinstance(stage, AffineBlock) for stage in stages)
        tensors = [t for stage in stages for t in chain(stage.parameters(), stage.buffers())]
        self._multiplications = sum(t.numel() for t in tensors if t.ndim == 2)  # per row, about
        self._tensors = [t for t in tensors if not t.is_inference()]  # those have no versions
        self._versions = [t._version for t in self._tensors]
        self._runs: dict[bool, Any] = {}

    @staticmethod
    def takes(rows: Tensor) -> bool:
        """Whether it runs on rows like these."""
        return (
            AVAILABLE
            and rows.device.type == "cpu"
            and rows.dtype == torch.float32
            and not torch.compiler.is_compiling()
        )

    @property
    def outdated(self) -> bool:
        """Whether weights have been written to since it was made."""
        return self._versions != [t._version for t in self._tensors]

    def run(self, rows: Tensor, sizes: Sizes, cond: Sequence[Tensor], *, inverse: bool, keep: bool) -> Result:
        """All stages, or their inverses from the last to the first.

        Args:
            rows: (N, C), contiguous unless `keep`.
            sizes: (B, *spatial).
            cond: what each conditioner's `project` made of the condition, if there is one.
            inverse: the direction.
            keep: whether the result has memory of its own, so that `rows` stay as they are.
        """
        if inverse not in self._runs:
            self._runs[inverse] = self._compiled(rows.shape[1], inverse)
        log_det = rows.new_zeros(len(rows), dtype=compute_dtype(rows)) if self._affine else None
        shares = [share.contiguous() for share in (reversed(cond) if inverse else cond)]
        worth = len(rows) * self._multiplications >= WORTH_THREADS
        threads = torch.get_num_threads() if worth else 1
        rows = rows.contiguous()
        state = torch.empty_like(rows) if keep else rows
        self._runs[inverse].run(rows, state, math.prod(sizes[1:]), shares, log_det, threads)
        return state, log_det

    def _compiled(self, channels: int, inverse: bool) -> Any:
        run, factor = _core.PointwiseRun(channels), -1.0 if inverse else 1.0
        steps = list(zip(self._stages, self._layers, strict=True))
        for stage, layers in reversed(steps) if inverse else steps:
            if isinstance(stage, Product):
                undone = (stage.inverse_weight, stage.inverse_bias)
                run.product(_layer(*(undone if inverse else (stage.weight, stage.bias))))
            elif isinstance(stage, Reorder):
                run.reorder(*stage.undo() if inverse else (stage.index, stage.scale, stage.bias))
            elif isinstance(stage, ProjectedBlock):
                run.residual(layers, _layer(stage.weight.mT, None), factor)
            elif isinstance(stage, AdditiveBlock):
                run.additive(layers, stage.passive, stage.active, factor)
            else:
                run.affine(layers, stage.passive, stage.active, stage.shift, stage.clamp, inverse)
        return run


def _layers(conditioner: FusedConditioner) -> list[Any] | None:
    """Its layers for the extension; None where it has one that the extension does not know."""
    found = conditioner.linear_layers()
    if not found or any(not isinstance(activation, nn.ReLU | None) for _, _, activation in found):
        return None
    return [
        _layer(linear.weight, linear.bias, relu=activation is not None, conditioned=conditioned)
        for linear, conditioned, activation in found
    ]


def _layer(weight: Tensor, bias: Tensor | None, *, relu: bool = False, conditioned: bool = False) -> Any:
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return _core.PointwiseLayer(weight.detach().contiguous(), bias.detach(), relu, conditioned)
