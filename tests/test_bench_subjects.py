"""What is timed is what it says: every provider of a small case passes its check, and checks can fail."""

from dataclasses import replace

import pytest
import torch

from bench import blocks, flows, models, operations, table, training
from bench.flows import FORMS, Shape
from bench.measure import CPU
from bench.memory import saved_bytes
from bench.subject import LIMIT, OURS, PEER

SMALL = Shape(6, 5, 3, 2, depth=2)


@pytest.fixture(autouse=True)
def _without_anomalib(monkeypatch):
    """It takes ten seconds to import; FrEIA's block stands in for it here."""
    found = flows.find_spec
    for module in (flows, models):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == "anomalib" else found(name))


def wrong(providers):
    return {p.name: p.check(p.call()) for p in providers if p.check and p.check(p.call())}


def test_blocks():
    providers = blocks._providers(SMALL, CPU)
    assert wrong(providers) == {}
    assert {p.role for p in providers} >= {OURS, LIMIT}
    assert {p.name for p in providers if p.role == OURS} >= set(FORMS)
    limits = {(p.name, p.dtype) for p in providers if p.role == LIMIT}
    assert len(limits) == 3 * 2  # two kinds of convolutions and a product, in two precisions
    assert all(p.gigaflops > 0 and p.gigabytes > 0 for p in providers)


def test_training():
    pytest.importorskip("FrEIA")
    providers = training._providers(SMALL, tuple(FORMS), tuple(training.MODES), CPU)
    assert wrong(providers) == {}
    assert {p.name for p in providers if p.role == OURS} == {f + m for f in FORMS for m in training.MODES}
    assert [p.name for p in providers if p.role == PEER] == ["FrEIA 0.2"]


def test_a_wrong_gradient_is_noticed():
    (right,) = training._ours(SMALL, ("additive, LU",), ("",), SMALL.input(CPU))
    x, shape = SMALL.input(CPU), replace(SMALL, batch=1)
    flow = flows.our_flow("additive, LU", SMALL).train()
    with torch.no_grad():
        flow[1].coupling.subnet[0].weight.mul_(1.5)
    first = flow[0].coupling.subnet[0].weight
    assert right.check(None) is None
    assert "relative error" in training._right("additive, LU", shape, flow, first, x, None)


def test_reversal_saves_memory():
    shape = replace(SMALL, depth=8)
    standard, reversible = training._ours(shape, ("additive, LU",), tuple(training.MODES), shape.input(CPU))
    saved = [saved_bytes(p.saves, ignore=p.live) for p in (standard, reversible)]
    assert saved[1] < saved[0] / 5


@pytest.mark.parametrize("make", [operations._coupling, operations._lu, operations._residual])
def test_operations(make):
    for case in make(2, 6, 5):
        ours, eager, compiled = case.providers(CPU)
        assert wrong([ours, eager]) == {}
        assert (ours.role, eager.role, compiled.compiles) == (OURS, PEER, True)


def test_scores(monkeypatch):
    monkeypatch.setattr(operations, "SHAPES", ((2, 6, 5),))
    monkeypatch.setattr(operations, "SCALES", ((6, 5), (4, 3)))
    cases = list(operations._scores())
    assert len(cases) == 2 + 2 * 2
    for case in cases:
        ours, eager, _ = case.providers(CPU)
        assert wrong([ours, eager]) == {}


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (models.Spec("CFlow", "resnet10t", (0, 1), side=32), ""),
        (models.Spec("FastFlow", "resnet10t", (0, 1), side=32), models.TRAINING),
        (models.Spec("CFlow", "small", side=16, given=((6, 8), (2, 4))), "flow part"),
        (models.Spec("UFlow", "small", side=16, given=((8, 12), (2, 4))), "flow part"),
    ],
)
def test_models(spec, part):
    pytest.importorskip("timm")
    providers = list(models._providers(spec, part, 2, CPU))
    assert wrong(providers) == {}
    names = {f"{coupling}, {linear.replace('lu', 'LU')}" for coupling, linear in models.FORMS}
    fused = set() if part == models.TRAINING else {name + table.FUSED for name in names}
    assert {p.name for p in providers if p.role == OURS} == names | fused
    assert {p.direction for p in providers} == {models.TRAINING if part == models.TRAINING else "forward"}
    assert [p.name for p in providers if p.role == LIMIT] == ([] if part else ["backbone alone"])


def test_a_wrong_model_is_noticed():
    spec = models.Spec("CFlow", "small", side=16, given=((6,), (2,)))
    provider = next(models._providers(spec, "flow part", 1, CPU))
    (z,) = provider.call()
    assert provider.check([z]) is None
    assert "relative error" in provider.check([1.01 * z])


def test_cases_of_models_are_operations_of_their_own():
    names = {case.name for case in models.SUBJECT.cases}
    assert len(names) == len(models.SUBJECT.cases) == 2 * (3 * 5 + 1)
    row = {"subject": "models", "provider": "additive, LU, fused", "dtype": "float32"}
    found = {table.operation(row | {"case": name}) for name in names}
    parts = ("", ", flow part", ", training step")
    expected = {
        f"{model}{part}: additive, LU, float32" for model in ("FastFlow", "UFlow", "CFlow") for part in parts
    }
    assert found == expected
