"""`fuse`, which every flow module has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from usf_kernels.nn.fused import FusedFlow


class Fusible:
    """Mixin that gives flow modules `fuse`."""

    def fuse(self, dtype: torch.dtype | None = None) -> FusedFlow:
        """Return the inference form: the same results up to rounding, in fewer passes over memory.

        All linear maps between two conditioners become one matrix, or one index if they only reorder and
        scale; see `usf_kernels.nn.fusing.fuse_flow`. The module itself is not changed, and later changes to
        it do not reach its inference form.

        Args:
            dtype: dtype of weights and results, for example torch.bfloat16; None for the module's own.

        Returns:
            A module with `forward(x, cond=None)`, `inverse(z, cond=None)` and `squared_norm(x, cond=None)`.

        Raises:
            TypeError: a dtype that is not floating; a module inside that is not one of this package's.
            ValueError: an empty sequence.
        """
        from usf_kernels.nn.fusing import fuse_flow  # here, since it imports all flow modules

        return fuse_flow(self, dtype)
