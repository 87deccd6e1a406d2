"""The structure of a benchmark: a subject has cases, a case has an input and the providers timed on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Call = Callable[[], object]
Check = Callable[[object], str | None]

OURS, PEER, LIMIT = "ours", "peer", "limit"
# Largest relative root-mean-square error of a result: rounding in that precision, through a few layers.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.08}
LEAST = 0.01  # nats per dimension added to a log-determinant's scale: it may cancel, rounding errors do not


@dataclass(frozen=True)
class Provider:
    """An implementation that is timed.

    Attributes:
        name: its name in the rows.
        call: what is timed.
        role: "ours", "peer", or "limit" for the work that nobody can avoid.
        dtype: dtype in which it computes.
        direction: "forward", "inverse", "training step", ...; ratios compare equal directions.
        layout: memory format of its input, if that was chosen.
        check: takes what `call` returned; says what is wrong, or None.
        gigabytes: least traffic of the call.
        gigaflops: work of the call.
        compiles: whether its first call compiles for long; the quick run leaves it out then.
        saves: a forward pass whose tensors saved for backward are counted, or None.
        checkpoint: bytes of the file that a user of it saves, for the same column as those of `saves`.
        live: tensors that are not counted, because they exist anyway.
        peak: whether to measure its peak memory.
        capture: whether it can be captured as a CUDA graph.
        graphed: call to capture, if not `call`.
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
        name: its name in the rows.
        providers: makes the input on a device and returns the providers to time, without peers that are not
            installed.
        shape: values that curves are drawn over: some of channels, side, kernel, batch and depth.
        seconds: time to spend on it.
        quick: whether it belongs to the quick run.
        first: whether it comes first, compilers included, if time is limited.
        devices: kinds of device that it is for.
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
        """Number of positions in one call; 0 without a side."""
        return self.shape.get("batch", 1) * self.shape.get("side", 0) ** 2


@dataclass(frozen=True)
class Subject:
    """A topic to measure: name, description, cases, optional packages, and kinds of device."""

    name: str
    about: str
    cases: tuple[Case, ...]
    peers: Mapping[str, str] = field(default_factory=dict)  # module -> how to install it
    devices: tuple[str, ...] = ("cpu", "cuda")

    def case(self, name: str) -> Case:
        """Return the case of this name; raise KeyError if there is none."""
        for case in self.cases:
            if case.name == name:
                return case
        raise KeyError(f"{self.name} has no case {name!r}")


def close_to(truth: Callable[[], Tensor | tuple[Tensor, ...]], dtype: str, *, slack: float = 1.0) -> Check:
    """Make a check of the first samples of a result, a tensor or several, against float64.

    Args:
        truth: makes the true first samples; samples of a batch do not depend on each other. If it and the
            result have a log-determinant too, that is compared as well.
        dtype: dtype in which the result was computed, which determines the tolerance.
        slack: factor on the tolerance.
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
            if not log_det.numel():  # an additive step has none
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
    """Return the root-mean-square error, in units of the root mean square of what was expected."""
    scale = expected.square().mean().sqrt().item()
    error = (found - expected).square().mean().sqrt().item()
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)
