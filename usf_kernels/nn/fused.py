"""The inference form of a flow: what `fuse()` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from usf_kernels.kernels.plain import full_precision
from usf_kernels.nn.capture import CapturedCall
from usf_kernels.nn.coupling import check_condition
from usf_kernels.nn.fused_blocks import add_log_dets
from usf_kernels.nn.fused_maps import Reorder, squared_norm
from usf_kernels.nn.maps import to_maps
from usf_kernels.nn.stage_run import StageRun, blocks_of
from usf_kernels.nn.weights import Weights
from usf_kernels.ops import native
from usf_kernels.ops.checks import check_features, compute_dtype, count_positions
from usf_kernels.ops.rows import rows_of

Condition = Tensor | Sequence[Tensor] | None


class FusedFlow(nn.Module):
    """A flow for inference: the same results up to rounding, in fewer passes over memory.

    `fuse()` of a flow module returns one. `forward(x, cond=None) -> (z, log_det)` and `inverse(z, cond=None)
    -> (x, log_det)` do the same as the flow's; x is (B, C, *spatial) in any memory format and floating dtype,
    and results are in channels-last memory and in the dtype of the fused weights. `squared_norm(x, cond=None)
    -> (B, *spatial)` returns the score without z. All of them also take what `project` returns for a cond in
    its place. No gradients are recorded.

    Raises:
        TypeError, ValueError: an x or cond of the wrong shape or dtype.
    """

    _weights: Weights | None = None

    def __init__(
        self, stages: Sequence[nn.Module], *, channels: int, cond_channels: int, log_det: float
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.channels, self.cond_channels = channels, cond_channels
        # Log-det of the linear maps; a Python float keeps its digits whatever the dtype.
        self.log_det_per_position = log_det
        self.register_buffer("_like", torch.zeros((), device="cpu"), persistent=False)
        self._ranks = {
            rank for stage in stages for block in blocks_of(stage) for rank in block.conditioner.ranks()
        }
        self.register_load_state_dict_post_hook(_take_dtype)
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and results."""
        return self._like.dtype

    def train(self, mode: bool = True) -> FusedFlow:
        """Stay in evaluation mode, whatever this is part of: it is for inference only."""
        return super().train(False)

    def fuse(self, dtype: torch.dtype | None = None) -> FusedFlow:
        """Return self, which is an inference form already.

        Raises:
            TypeError: a dtype other than its own.
        """
        if dtype not in (None, self.dtype):
            raise TypeError(f"dtype: expected None or {self.dtype}, which it has, found {dtype}")
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
        """Apply: (z, log_det)."""
        check_features("x", x, self.channels)
        return self._transform(x, cond, inverse=False)

    @torch.no_grad()
    def inverse(self, z: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, log_det)."""
        check_features("z", z, self.channels)
        return self._transform(z, cond, inverse=True)

    def squared_norm(self, x: Tensor, cond: Condition = None) -> Tensor:
        """Squared norm of z over channels, (B, *spatial), accumulated in float32 at least."""
        return self.squared_norm_and_log_det(x, cond)[0]

    @torch.no_grad()
    def squared_norm_and_log_det(self, x: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
        """`squared_norm`, and what each position contributes to the log-determinant; both (B, *spatial)."""
        check_features("x", x, self.channels)
        last = self.stages[-1] if len(self.stages) else None
        if isinstance(last, Reorder):
            rows, row_log_det = self._run(x, cond, self.stages[:-1], inverse=False)
            norm = last.squared_norm(rows)
        else:
            rows, row_log_det = self._run(x, cond, self.stages, inverse=False)
            norm = squared_norm(rows)
        log_det = torch.full_like(norm, self.log_det_per_position)
        if row_log_det is not None:
            log_det += row_log_det
        sizes = (x.shape[0], *x.shape[2:])
        return norm.view(sizes), log_det.view(sizes)

    @property
    def weights(self) -> Weights:
        """The weights as they are: the same object as long as they do not change."""
        if self._weights is None or self._weights.outdated:
            self._weights = Weights(self.modules())
        return self._weights

    def capture(self, x: Tensor, cond: Tensor | None = None) -> CapturedCall:
        """Record `forward` as a CUDA graph for inputs of these shapes and dtypes.

        Raises:
            ValueError: inputs that are not on one CUDA device; see `CapturedCall`.
        """
        inputs = (x,) if cond is None else (x, cond)
        return CapturedCall(self.forward, *inputs)

    @torch.no_grad()
    def project(self, cond: Tensor) -> tuple[Tensor, ...]:
        """Compute what blocks need of a condition (B or 1, cond_channels, *spatial); pass it in its place.

        Returns:
            One tensor per block, (B or 1, positions, D).
        """
        blocks = [block for stage in self.stages for block in blocks_of(stage)]
        # Linear maps alone ignore the condition.
        check_features("cond", cond, self.cond_channels if blocks else None)
        cond = cond.to(self.dtype)
        with full_precision(cond):
            return tuple(block.conditioner.project(cond) for block in blocks)

    def _transform(self, x: Tensor, cond: Condition, *, inverse: bool) -> tuple[Tensor, Tensor]:
        rows, row_log_det = self._run(x, cond, self.stages, inverse=inverse)
        constant = self.log_det_per_position * count_positions(x)
        log_det = torch.full(
            (), -constant if inverse else constant, dtype=compute_dtype(rows), device=x.device
        )
        if row_log_det is not None:
            log_det = log_det + row_log_det.view(x.shape[0], count_positions(x)).sum(1)
        return to_maps(rows, (x.shape[0], *x.shape[2:])), log_det

    def _run(
        self, x: Tensor, cond: Condition, stages: Sequence[nn.Module], *, inverse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the stages, given first to last, or their inverses: (rows, log-det of each row or None)."""
        self._check_rank(x)
        with full_precision(x):  # autocast must not change the dtype of the fused weights
            return self._run_stages(x, cond, stages, inverse=inverse)

    def take_positions(self) -> FusedFlow:
        """Let conditioners of nn.Linear, which take vectors, take each position of maps as a vector."""
        self._ranks.discard(0)
        return self

    def _run_stages(
        self, x: Tensor, cond: Condition, stages: Sequence[nn.Module], *, inverse: bool
    ) -> tuple[Tensor, Tensor | None]:
        steps = list(zip(stages, self._shares(x, cond), strict=False))  # `stages` may leave out the last
        steps = steps[::-1] if inverse else steps
        sizes = (x.shape[0], *x.shape[2:])
        # x belongs to the caller: what works in place gets a copy. A run copies x by stretches, in the cache.
        first = steps[0][0] if steps else None
        runs = isinstance(first, StageRun)
        rows, total = rows_of(x, self.dtype, copy=not runs and (first is None or first.in_place)), None
        for stage, share in steps:
            keep = {"keep": True} if runs and stage is first and _shares_memory(rows, x) else {}
            rows, log_det = stage(rows, sizes, share, inverse=inverse, **keep)
            total = add_log_dets(total, log_det)
        return rows, total

    def _check_rank(self, x: Tensor) -> None:
        if self._ranks and x.ndim - 2 not in self._ranks:
            raise ValueError(
                f"x: expected {' or '.join(map(str, sorted(self._ranks)))} spatial dimensions, as the "
                f"conditioners' layers have, found shape {tuple(x.shape)}"
            )

    def _shares(self, x: Tensor, cond: Condition) -> Iterator[Tensor | Sequence[Tensor] | None]:
        """Yield what each stage needs of the condition."""
        if isinstance(cond, Tensor) and not any(blocks_of(stage) for stage in self.stages):
            cond = ()  # linear maps alone ignore it
        elif cond is None or isinstance(cond, Tensor):
            check_condition(x, cond, self.cond_channels)
            cond = () if cond is None else self.project(cond)
        else:
            self._check_projected(x, cond)
        rest = iter(cond)
        for stage in self.stages:
            share = list(islice(rest, len(blocks_of(stage))))
            yield share if isinstance(stage, StageRun) else next(iter(share), None)

    def _check_projected(self, x: Tensor, cond: Sequence[Tensor]) -> None:
        blocks = [block.conditioner for stage in self.stages for block in blocks_of(stage)]
        widths = [block.projected or self.cond_channels for block in blocks] if self.cond_channels else []
        batches, positions = (1, x.shape[0]), count_positions(x)
        if len(cond) != len(widths) or not all(
            isinstance(c, Tensor)
            and c.device == x.device
            and c.shape in [(batch, positions, width) for batch in batches]
            for c, width in zip(cond, widths, strict=True)
        ):
            found = [
                f"{tuple(c.shape)} on {c.device}" if isinstance(c, Tensor) else type(c).__name__ for c in cond
            ]
            raise ValueError(
                f"cond: expected what `project` returns, (1 or {x.shape[0]}, {positions}, D) for each D of "
                f"{widths}, on {x.device}, found [{', '.join(found)}]"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_weights": None}  # a snapshot of these tensors, not of a copy's

    def get_extra_state(self) -> Tensor:
        """Entry of the state_dict besides buffers: the log-determinant of the linear maps, 0-d float64."""
        return torch.tensor(self.log_det_per_position, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Set the log-determinant of the linear maps from a state_dict."""
        self.log_det_per_position = state.item()

    def extra_repr(self) -> str:
        """Channels and dtype, for print."""
        return f"{self.channels}, {self.dtype}"


def _take_dtype(flow: FusedFlow, _: object) -> None:
    """Adopt the dtype of loaded weights, which `load_state_dict(assign=True)` may have changed."""
    weights = (t for t in flow.stages.state_dict().values() if t.is_floating_point())
    flow._like = flow._like.to(next(weights, flow._like))


def _shares_memory(rows: Tensor, x: Tensor) -> bool:
    """Whether rows are views of x; true if that is unknown, as in traced graphs."""
    if native.is_observed():
        return True
    return rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
