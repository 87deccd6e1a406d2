"""FrEIA's `SequenceINN` of replaced blocks, in evaluation mode as one fused flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels.integrations.faster import Faster, InferenceForm, is_heard, runs_as_one
from usf_kernels.nn.fused import FusedFlow
from usf_kernels.ops.native import is_observed


def can_fold(module: nn.Module) -> bool:
    """Whether a module is a replaced block with `flow_parts`; a sequence in a sequence is not."""
    return hasattr(module, "flow_parts") and module.folds


def is_fused(module: nn.Module) -> bool:
    """Whether a sequence's inference form may be called in its place, which would not call its hooks."""
    return not is_observed() and not is_heard(module) and getattr(module, "folds", False)


def like(z: Tensor, x: Tensor) -> Tensor:
    """Return z, contiguous if x is: whoever made x may call `view` on what comes of it."""
    return z.contiguous() if x.is_contiguous() else z


class SequenceMixin(Faster):
    """Mixin for subclasses of FrEIA's `SequenceINN`, listed before it in the bases.

    In evaluation mode and with no gradients recorded, it runs in its inference form, which is made at the
    first call and again whenever a parameter has changed since.
    """

    _fused: InferenceForm | None = None

    def forward(
        self, x_or_z: Tensor, c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Same as the original."""
        alone = torch.is_tensor(x_or_z) and not self.force_tuple_output
        recorded = torch.is_grad_enabled() or is_observed()
        if recorded or not alone or not self.folds:
            return super().forward(x_or_z, c, rev, jac)
        cond = None if self.conditions[0] is None else c[self.conditions[0]]
        fused = self.inference_form(x_or_z.dtype)
        z, log_det = (fused.inverse if rev else fused)(x_or_z, cond)
        return like(z, x_or_z), log_det.expand(z.shape[0]).clone()  # callers may write to it

    @property
    def folds(self) -> bool:
        """Whether one inference form can replace the blocks: they fold, and all see the same condition or
        none."""
        same = len(set(self.conditions)) == 1 and all(map(can_fold, self.module_list))
        return same and runs_as_one(self.module_list)

    def inference_form(self, dtype: torch.dtype) -> FusedFlow:
        """Return the inference form of the current blocks, all of which must fold."""
        blocks = list(self.module_list)
        if self._fused is None or not self._fused.is_of(blocks, dtype):
            self._fused = InferenceForm(blocks, dtype)
        return self._fused.flow

    def train(self, mode: bool = True) -> SequenceMixin:
        """Same as the original; the next call also looks for writes through `.data`."""
        if self._fused is not None:
            self._fused.suspect()
        return super().train(mode)

    def end_fast(self) -> None:
        self.__dict__.pop("_fused", None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the inference form, which is made again when needed."""
        return {name: value for name, value in super().__getstate__().items() if name != "_fused"}
