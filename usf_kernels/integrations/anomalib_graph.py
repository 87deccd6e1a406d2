"""FrEIA's `GraphINN`, of which U-Flow is built, with runs of blocks in their inference form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from FrEIA.framework import GraphINN
from torch import Tensor

from usf_kernels.integrations.faster import Faster, InferenceForm, runs_as_one
from usf_kernels.integrations.sequence import can_fold, like
from usf_kernels.nn.fused import FusedFlow
from usf_kernels.ops.native import is_observed


class FastGraphINN(Faster, GraphINN):
    """A `GraphINN` that runs each run of replaced blocks as one fused flow, in evaluation mode without grad.

    The fused flows are made at the first call and again whenever a parameter has changed since.
    """

    _fused: dict[str, InferenceForm] | None = None

    def begin_fast(self, **options: Any) -> None:
        """Add the attributes that the original does not have. Undone by `end_fast`."""
        self._fused = {}

    def end_fast(self) -> None:
        """Remove all that `begin_fast` added."""
        self.__dict__.pop("_fused", None)

    def train(self, mode: bool = True) -> FastGraphINN:
        """Same as the original; the next call also looks for writes through `.data`."""
        for form in (self._fused or {}).values():
            form.suspect()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the fused flows, which are made again when needed."""
        return {**super().__getstate__(), "_fused": {}}

    def forward(
        self,
        x_or_z: Tensor | Iterable[Tensor],
        c: Iterable[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
        intermediate_outputs: bool = False,
        x: Any = None,
    ) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """Same as the original."""
        recorded = self.training or torch.is_grad_enabled() or is_observed()
        conditioned = c is not None or bool(self.condition_nodes)
        if recorded or conditioned or rev or not jac or intermediate_outputs or x is not None:
            return super().forward(x_or_z, c, rev, jac, intermediate_outputs, x)
        inputs = (x_or_z,) if torch.is_tensor(x_or_z) else tuple(x_or_z)
        if len(inputs) != len(self.in_nodes):
            raise ValueError(f"x_or_z: expected {len(self.in_nodes)} tensors, found {len(inputs)}")
        values = {(node, 0): tensor for node, tensor in zip(self.in_nodes, inputs, strict=True)}
        log_det = inputs[0].new_zeros(len(inputs[0]))
        runs = self._runs()
        inside = {node for run in runs.values() for node in run[1:]}
        for node in self.node_list:
            if node.module is None or node in inside:
                continue
            found = tuple(values[source] for source in node.inputs)
            if node in runs:
                z, more = self._inference_form(runs[node], found[0].dtype)(found[0])
                values[runs[node][-1], 0] = like(z, found[0])
            else:
                outputs, more = node.module(found, rev=False, jac=True)
                values |= {(node, i): value for i, value in enumerate(outputs)}
            log_det = log_det + more
        results = tuple(values[node.inputs[0]] for node in self.out_nodes)
        return results if len(results) > 1 or self.force_tuple_output else results[0], log_det

    def _runs(self) -> dict[Any, list[Any]]:
        """Return the runs of consecutive replaced blocks, by the first node of each."""
        runs: dict[Any, list[Any]] = {}
        uses = Counter(source for node in self.node_list for source in node.inputs)
        heads: dict[Any, Any] = {}  # last node of a run so far -> its first node
        for node in self.node_list:
            if node.module is None or node.conditions:
                continue
            if not can_fold(node.module) or not runs_as_one(node.module):
                continue
            behind_one = uses[node.inputs[0]] == 1  # else another node needs the value between the two
            head = heads.pop(node.inputs[0][0], node) if behind_one else node
            runs.setdefault(head, []).append(node)
            heads[node] = head
        return runs

    def _inference_form(self, run: list[Any], dtype: torch.dtype) -> FusedFlow:
        blocks = [node.module for node in run]
        known = self._fused.get(run[0].name)
        if known is None or not known.is_of(blocks, dtype):
            known = self._fused[run[0].name] = InferenceForm(blocks, dtype)
        return known.flow
