"""The shape of a benchmark: a subject has cases, a case has an input and those who are timed on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Call = Callable[[], object]
Check = Callable[[object], str | None]

OURS, PEER, LIMIT = "ours", "peer", "limit"
# Relative root-mean-square error that a result may have: rounding in that precision, through a few layers.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.08}
LEAST = 0.01  # nats per dimension, added to a log-determinant: it may cancel, its rounding errors do not


@dataclass(frozen=True)
class Provider:
    """Somebody who is timed.

    Attributes:
        name: how the rows call it.
        call: what is timed.
        role: "ours", "peer", or "limit" for the work that nobody can avoid.
        dtype: in which it computes.
        direction: "forward", "inverse", "training step", ...; ratios compare equal directions.
        layout: memory format of its input, where that was chosen.
        check: takes what `call` returned; says what is wrong, or None.
        gigabytes: that the call has to move at least.
        gigaflops: that the call has to compute.
        compiles: its first call compiles for long, and the quick run leaves it out.
        saves: a forward pass whose tensors saved for backward are counted, or None.
        checkpoint: bytes of the file that a user of it saves; in the rows' column of what is saved.
        live: tensors that are not counted, because they live anyway.
        peak: whether to measure its memory.
        capture: whether it can be captured as a CUDA graph.
        graphed: what is captured, where that is not `call`.
    """

    name: str
    call: Call
    role: str = OURS
    dtype: str = "float32"
    direction: str = "forward"
    layout: str = ""
    check: Check | None = None
    gigabytes: float = 0.0
    gigaflops: float = 0.0
    compiles: bool = False
    saves: Call | None = None
    checkpoint: int = 0
    live: tuple[Tensor, ...] = ()
    peak: bool = False
    capture: bool = True
    graphed: Call | None = None


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: how the rows call it.
        providers: makes the input on a device and returns whom to time. A peer that is not installed is
            missing from them.
        shape: what curves are drawn against, of channels, side, kernel, batch and depth.
        seconds: to spend on it.
        quick: whether it belongs to the quick run.
        first: whether it comes first, compilers included, where the time is limited.
        devices: kinds that it is for.
    """

    name: str
    providers: Callable[[torch.device], Iterable[Provider]]
    shape: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 2.0
    quick: bool = True
    first: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def pixels(self) -> int:
        """Positions in one call; 0 where that means nothing."""
        return self.shape.get("batch", 1) * self.shape.get("side", 0) ** 2


@dataclass(frozen=True)
class Subject:
    """What is measured, why, on which inputs, and on which kinds of device."""

    name: str
    about: str
    cases: tuple[Case, ...]
    peers: Mapping[str, str] = field(default_factory=dict)  # module to how to install it
    devices: tuple[str, ...] = ("cpu", "cuda")

    def case(self, name: str) -> Case:
        """The case of this name; KeyError if there is none."""
        for case in self.cases:
            if case.name == name:
                return case
        raise KeyError(f"{self.name} has no case {name!r}")


def close_to(truth: Callable[[], Tensor | tuple[Tensor, ...]], dtype: str, *, slack: float = 1.0) -> Check:
    """A check of the first samples of a result, a tensor or several, against float64.

    Args:
        truth: makes what the first samples should be; samples of a batch do not depend on each other. Where
            it and the result have a log-determinant too, that is compared.
        dtype: in which the result was computed: it says how far it may be off.
        slack: times so far.
    """

    def check(result: object) -> str | None:
        (expected, *log_dets), (found, *others) = _tensors(truth()), _tensors(result)
        found = found[: len(expected)].double().cpu()
        if found.shape != expected.shape:
            return f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        error = relative_error(found, expected)
        if not error <= slack * TOLERANCE[dtype]:
            return f"relative error {error:.2g}"
        for log_det, other in zip(log_dets, others, strict=False):
            if not log_det.numel():  # of an additive step
                continue
            other = other.double().cpu().flatten()[: log_det.numel()]
            size = log_det.abs() + LEAST * expected[0].numel()
            error = ((other - log_det).abs() / size).max().item()
            if not error <= slack * TOLERANCE[dtype]:
                return f"relative error {error:.2g} of a log-determinant"
        return None

    return check


def _tensors(result: object) -> Sequence[Tensor]:
    return result if isinstance(result, tuple) else result[:1] if isinstance(result, list) else (result,)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root-mean-square error, in units of the root mean square of what was expected."""
    scale = expected.square().mean().sqrt().item()
    error = (found - expected).square().mean().sqrt().item()
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)
