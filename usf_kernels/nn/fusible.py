"""What every flow module has: its inference form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from usf_kernels.nn.fused import FusedFlow


class Fusible:
    """Mixin of the flow modules."""

    def fuse(self, dtype: torch.dtype | None = None) -> FusedFlow:
        """The inference form: the same results up to rounding, in fewer passes over memory.

        All linear maps between two conditioners become one matrix, or one index where they only reorder and
        scale; see `usf_kernels.nn.fusing.fuse_flow`. The module itself stays as it is, and what happens to it
        later does not reach its inference form.

        Args:
            dtype: of weights and results, for example torch.bfloat16; None for the module's own.

        Returns:
            A module with `forward(x, cond=None)`, `inverse(z, cond=None)` and `squared_norm(x, cond=None)`.

        Raises:
            TypeError: a dtype that is not floating; a module in here that is not one of this package's.
            ValueError: an empty sequence.
        """
        from usf_kernels.nn.fusing import fuse_flow  # it imports all the flow modules

        return fuse_flow(self, dtype)
