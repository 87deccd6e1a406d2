"""What is timed is what it says: every provider of a small case passes its check, and checks can fail."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import usf_kernels as usf
from bench import (
    accelerate,
    blocks,
    flows,
    machine,
    models,
    nfa,
    operations,
    table,
    training,
    tree,
)
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
    assert len(limits) == 3 * len(machine.dtypes(CPU))  # two kinds of convolutions and a product, in each
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


def test_what_peers_keep_is_made_before_they_are_timed(monkeypatch):
    peers = [case.providers(CPU) for case in (*operations._coupling(2, 6, 5), *operations._lu(2, 6, 5))]
    peers = [peer for _, peer, _ in peers]
    monkeypatch.setattr(torch, "eye", None)
    for peer in peers:
        peer.call()


def test_scores(monkeypatch):
    monkeypatch.setattr(operations, "SHAPES", ((2, 6, 5),))
    monkeypatch.setattr(operations, "SCALES", ((6, 5), (4, 3)))
    cases = [case for case in operations._scores() if "cpu" in case.devices]
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
    ending = table.REVERSIBLE if part == models.TRAINING else table.FUSED
    assert {p.name for p in providers if p.role == OURS} == names | {name + ending for name in names}
    assert {p.direction for p in providers} == {models.TRAINING if part == models.TRAINING else "forward"}
    assert [p.name for p in providers if p.role == LIMIT] == ([] if part else ["backbone alone"])
    assert all(p.capture != p.name.endswith(table.REVERSIBLE) for p in providers)


def test_a_wrong_model_is_noticed():
    spec = models.Spec("CFlow", "small", side=16, given=((6,), (2,)))
    provider = next(models._providers(spec, "flow part", 1, CPU))
    (z,) = provider.call()
    assert provider.check([z]) is None
    assert "relative error" in provider.check([1.01 * z])


def test_models_of_one_kind_are_one_operation():
    parts = (", from image to map", ", flow part", ", training step")
    names = {case.name for case in models.SUBJECT.cases}
    assert len(names) == len(models.SUBJECT.cases) == 2 * (3 * 6 + 1) + 1
    found = {table.operation({"subject": "models", "case": name}) for name in names}
    assert found == {model + part for model in models.model_peers.PEERS for part in parts}
    parts = (", flow part, accelerated", ", whole model, accelerated")
    names = {case.name for case in accelerate.SUBJECT.cases}
    assert len(names) == len(accelerate.SUBJECT.cases) == 2 * 2 * 6
    found = {table.operation({"subject": "accelerate", "case": name}) for name in names}
    assert found == {model + part for model in models.model_peers.PEERS for part in parts}


@pytest.fixture
def with_anomalib(monkeypatch):
    """Undoes `_without_anomalib`."""
    pytest.importorskip("anomalib")
    monkeypatch.setattr(models, "find_spec", find_spec)


@pytest.mark.parametrize("run", [models._map, models._latents, models._step])
@pytest.mark.parametrize("model", ["FastFlow", "UFlow", "CFlow"])
def test_peers_that_are_captured_make_nothing_on_the_cpu(with_anomalib, model, run):
    """A copy from there would break the capture; here the device is one that computes nothing."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(func for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device == CPU)
            return out

    spec = models.Spec(model, "resnet18", (1, 2, 3) if model != "CFlow" else (2, 3, 4), side=64)
    inputs = spec.features(1) if run is models._latents else [spec.images(1)]
    for make in models.peers_of(spec).values():
        peer = make().to("meta").train(run is models._step)
        call = partial(run, peer, [x.to("meta") for x in inputs])
        with Watch():
            models._all_on(torch.device("meta"), call)
    assert made == []


@pytest.mark.parametrize("part", ["whole model", models.FLOW])
@pytest.mark.parametrize("model", ["FastFlow", "UFlow", "CFlow"])
def test_accelerated_models(with_anomalib, model, part):
    spec = models.Spec(model, "resnet18", (1, 2, 3) if model != "CFlow" else (2, 3, 4), side=64)
    providers = {p.name: p for p in accelerate._providers(spec, part, 2, CPU)}
    assert wrong(providers.values()) == {}
    exact = (
        part != models.FLOW and model != "FastFlow"
    )  # what is kept and what is corrected differ there only
    names = (accelerate.REPLACED, accelerate.ACCELERATED, *([accelerate.EXACT] if exact else []))
    assert {name: p.role for name, p in providers.items()} == {
        accelerate.ORIGINAL: PEER,
        **dict.fromkeys(names, OURS),
    }
    sizes = [providers[name].checkpoint for name in (accelerate.ORIGINAL, accelerate.REPLACED)]
    assert 0.4 * sizes[0] < sizes[1] < 0.75 * sizes[0] if part == models.FLOW else sizes == [0, 0]
    maps, *rest = providers[accelerate.ACCELERATED].call()
    assert "relative error" in providers[accelerate.ACCELERATED].check([1.01 * maps, *rest])


def test_a_wrong_mask_is_noticed():
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    assert accelerate._right(lambda: [mask], [mask.repeat(2, 1, 1, 1)]) is None
    assert accelerate._right(lambda: [mask], [~mask]) == "1 of a mask"


def test_a_checkpoint_counts_shared_tensors_in_full(tmp_path):
    layer = nn.Linear(100, 100, bias=False)
    layer.register_buffer("transposed", layer.weight.detach().mT)
    bytes_ = accelerate.checkpoint_bytes(layer)
    assert 2 * 4 * 100**2 < bytes_ < 2 * 4 * 100**2 + 4000
    copied = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    torch.save(copied, tmp_path / "file.pt")
    assert abs((tmp_path / "file.pt").stat().st_size - bytes_) < 200


@pytest.mark.parametrize("name", ["white 28^2", "smooth 28^2", "smooth_8bit 28^2"])
def test_the_tree_passes_its_own_check(name):
    ours, *peers = tree.SUBJECT.case(name).providers(CPU)
    assert ours.name == "usf_kernels"
    assert wrong([ours, *peers]) == {}
    assert all(provider.check for provider in peers)


def test_a_wrong_tree_is_noticed():
    """One link goes to the root."""
    pytest.importorskip("skimage")
    peers = {p.name: p for p in tree.SUBJECT.case("white 28^2").providers(CPU)}
    parent, order = peers["scikit-image"].call()
    parent.ravel()[order[-1]] = order[0]
    assert peers["scikit-image"].check((parent, order)).startswith("components (784, ")


@pytest.mark.parametrize("batch", [1, 2])
def test_threads_give_the_same_tree(batch):
    providers = tree._threads(tree.white, 28, batch, CPU)
    assert [p.name for p in providers] == ["usf_kernels x2", "usf_kernels x1"]
    assert wrong(providers) == {}
    found = providers[0].call()
    (found if batch == 1 else found[1]).parent[5] = 0
    assert providers[0].check(found) == "parent differs from that of one thread"


def test_regions():
    for case in nfa.SUBJECT.cases[:3]:
        providers = list(case.providers(CPU))
        assert wrong(providers) == {}
        assert providers[0].check([[]]) == "image 0: the square of scale 0 is not found"
        regions = providers[0].call()[0]
        assert "false detections" in providers[0].check([regions * 3])
        if len(providers) == 3:
            (scale, pixels, value), *more = providers[2].call()[0]
            assert "usf_kernels [(" in providers[2].check([[(scale, pixels[1:], value), *more]])


def test_plain_python_finds_what_ours_does():
    pytest.importorskip("skimage")
    pytest.importorskip("mpmath")
    from bench.plain_nfa import detections

    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 8, side, side, generator=generator).square().sum(1) for side in (14, 7)]
    maps[0][0, 2:5, 3:9] += 60
    maps[0][0, 9:12, 3:6] += 150
    maps[1][0, 3:5, 4] += 300
    ours = usf.regions(maps, channels=[8, 8], tail="chernoff")[0]
    theirs = detections([u[0].numpy() for u in maps], [8, 8])
    assert len(ours) >= 2
    found = sorted((r.scale, r.area, r.log_nfa) for r in ours)
    expected = sorted((scale, len(pixels), value) for scale, pixels, value in theirs)
    for ours_, theirs_ in zip(found, expected, strict=True):
        assert ours_ == pytest.approx(theirs_, rel=1e-5)


def test_the_number_of_tests_is_computed_once(monkeypatch):
    """As in ours."""
    pytest.importorskip("skimage")
    mpmath = pytest.importorskip("mpmath")
    from bench.plain_nfa import detections

    found = [detections([np.ones((3, 4))], [8])]
    monkeypatch.setattr(mpmath, "log10", None)
    assert [detections([np.ones((3, 4))], [8])] == found
