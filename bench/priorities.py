"""Order of measurements on a GPU if time is limited: at least one case of every kind in the first minutes."""

from __future__ import annotations

from collections.abc import Iterator

from bench.flows import Shape
from bench.models import FLOW, TRAINING
from bench.operations import LARGE

_BATCH, _CHANNELS, _SIDE = LARGE
SIZE = f"{_CHANNELS} @ {_SIDE}^2, batch {_BATCH}"
# Kernels bound by memory, and products with the operations around them, beyond the last-level cache.
OPERATIONS = (
    ("coupling", f"additive coupling, {SIZE}"),
    ("lu_conv", f"LU 1x1 convolution, {SIZE}, forward"),
    ("coupling", f"affine step with permutation, {SIZE}"),
    ("score", f"squared norm of a linear map, {SIZE}"),
    ("residual", f"residual MLP, {SIZE}"),
    ("score", f"squared norm, {SIZE}"),
    ("coupling", f"affine coupling, {SIZE}"),
    ("coupling", f"masked additive coupling, {SIZE}"),
    ("coupling", f"additive step with permutation, {SIZE}"),
)


def _blocks(subject: str, channels: int, side: int, kernel: int, batch: int) -> tuple[str, str]:
    return subject, Shape(channels, side, kernel, batch, depth=8).title


def _model(name: str, batch: int, part: str = "") -> tuple[str, str]:
    return "models", f"{name} resnet18 256^2, batch {batch}" + (f", {part}" if part else "")


def _order() -> Iterator[tuple[str, str]]:
    yield "machine", "limits"
    yield from OPERATIONS
    # One image through eight blocks, a training step of them, a model, eight blocks beside compiled ones.
    yield _blocks("blocks", 64, 64, 1, 1)
    yield _blocks("training_step", 64, 64, 1, 8)
    yield _model("FastFlow", 8, FLOW)
    yield _blocks("blocks", 64, 64, 1, 8)
    yield _model("FastFlow", 1, TRAINING)
    yield _model("FastFlow", 1)
    # The same for other shapes and models.
    yield _blocks("blocks", 64, 64, 3, 1)
    yield _model("UFlow", 8, FLOW)
    yield _model("CFlow", 1, FLOW)
    yield _blocks("blocks", 256, 16, 1, 1)
    yield _blocks("training_step", 64, 64, 3, 8)
    yield _model("UFlow", 1)
    yield _model("CFlow", 1)
    yield _model("UFlow", 1, TRAINING)
    yield _model("CFlow", 1, TRAINING)
    yield _blocks("blocks", 64, 64, 3, 8)
    yield "lu_conv", f"LU 1x1 convolution, {SIZE}, inverse"
    for batch, part in ((1, FLOW), (8, ""), (8, TRAINING)):
        for name in ("FastFlow", "UFlow", "CFlow"):
            if (name, batch, part) != ("CFlow", 1, FLOW):
                yield _model(name, batch, part)
    yield "score", "anomaly map, likelihood, FastFlow's three scales to 256^2, batch 64"


ORDER: dict[tuple[str, str], int] = {case: place for place, case in enumerate(_order())}
