"""Gradients by graphs; see test_gpu for CUDA's own."""

import contextlib
import gc
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import conv_subnet, randomise_
from torch import nn

import usf_kernels as usf
from usf_kernels.models.border import BorderNorm
from usf_kernels.nn import CapturedGradients, FlowSequence, FlowStep


class Likelihood(nn.Module):
    """A flow with a loss; in float64, whose operations all go through PyTorch's dispatcher."""

    def __init__(self, coupling="additive", linear="lu", steps=5, **options):
        super().__init__()
        self.flow = FlowSequence(
            [
                FlowStep(6, subnet=conv_subnet, coupling=coupling, linear=linear, zero_init=False)
                for _ in range(steps)
            ],
            **options,
        )
        randomise_(self).double()

    def loss(self, batch):
        latents, log_dets = zip(*(self.flow(x) for x in batch["maps"]), strict=True)
        energy = sum(0.5 * z.square().sum() for z in latents)
        return (energy - sum(log_det.sum() for log_det in log_dets)) / 100


def batches(count):
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, 6, 5, 4), (2, 6, 3, 3))
    return [
        {"maps": [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]}
        for _ in range(count)
    ]


def gradients_of(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("linear", ["lu", "permutation"])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_training_by_a_graph_is_training(graphs, coupling, linear):
    torch.manual_seed(0)
    captured = Likelihood(coupling, linear)
    plain = Likelihood(coupling, linear, memory="standard")
    plain.load_state_dict(captured.state_dict())
    gradients = CapturedGradients(captured)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (captured, plain)]
    for batch in batches(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected = plain.loss(batch)
        expected.backward()
        torch.testing.assert_close(gradients(batch), expected.detach(), rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients_of(captured), gradients_of(plain), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    assert len(graphs) == 1
    assert captured.flow.memory == "auto"


@pytest.mark.parametrize("model_class", [usf.models.FastFlow, usf.models.UFlow, usf.models.CFlow])
def test_models_train_by_graphs(graphs, model_class):
    network = nn.Identity()  # never called: there are features
    network.feature_info = SimpleNamespace(channels=lambda: (4, 6), reduction=lambda: (1, 2))
    backbone = usf.models.Backbone(network, {"name": "none"}, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = model_class(backbone).double()
    maps = [torch.randn(12, 4, 8, 8, dtype=torch.float64), torch.randn(12, 6, 4, 4, dtype=torch.float64)]
    model.initialize(maps).train()
    gradients = CapturedGradients(model)
    for start in range(0, 12, 3):
        batch = [part[start : start + 3] for part in maps]
        torch.manual_seed(start)
        assert gradients(batch).isfinite()
        found = gradients_of(model)
        model.zero_grad()
        torch.manual_seed(start)
        model.loss(batch).backward()
        for ours, theirs in zip(found, gradients_of(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert len(graphs) == 1


def test_recording_leaves_no_trace(graphs):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

        def loss(self, x):
            return (self.norm(x) * torch.rand(3) * self.frozen).square().sum()

    torch.manual_seed(0)
    plain, captured = Normed(), Normed()
    gradients = CapturedGradients(captured)
    for seed in range(4):
        x = torch.randn(8, 3) + 1
        torch.manual_seed(seed)
        expected = plain.loss(x)
        torch.manual_seed(seed)
        assert gradients(x).item() == pytest.approx(expected.item())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], value)
    assert captured.frozen.grad is None


def test_a_pass_that_fails_while_recording_leaves_no_trace(graphs):
    model = Likelihood()
    model.register_buffer("calls", torch.zeros(()))

    def loss(batch):
        model.calls += 1
        return model.loss(batch) * (1.0 if len(graphs) == 0 else None)

    gradients = CapturedGradients(model, loss)
    gradients(*batches(1))
    with pytest.raises(TypeError):
        gradients(*batches(1))
    assert model.flow.memory == "auto"
    assert model.calls == 1
    assert gradients_of(model) == [None] * len(list(model.parameters()))


def test_nothing_outlives_the_graph(graphs):
    model = Likelihood()
    gradients = CapturedGradients(model)
    for batch in batches(2):
        gradients(batch)
    graph = weakref.ref(gradients._graph)
    gc.disable()
    try:
        del gradients
        assert graph() is None
    finally:
        gc.enable()


def test_what_is_kept_is_not_read_by_a_graph(graphs, monkeypatch):
    """Outside of a mode, where tables are kept that a graph would know the addresses of."""
    norm = BorderNorm(3).fit(torch.randn(5, 3, 7, 6) * torch.linspace(1, 2, 7)[:, None])
    x = torch.randn(2, 3, 7, 6)
    made, _ = norm(x)
    assert norm._maps(x).scale is norm._maps(x).scale
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "any", None)  # it would be read back
    assert norm._maps(x).scale is not norm._maps(x).scale
    torch.testing.assert_close(norm(x)[0], made)


def test_the_same_structure_in_every_call(graphs):
    weight = nn.Linear(1, 1)
    gradients = CapturedGradients(weight, lambda batch: batch["a"] - 2 * batch["b"] + 0 * weight.weight.sum())
    batch = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    for _ in range(3):
        assert gradients(batch) == -3
    with pytest.raises(ValueError, match="batch: expected the captured TreeSpec"):
        gradients(dict(reversed(batch.items())))
    with pytest.raises(ValueError, match="batch: expected the captured TreeSpec"):
        gradients([batch["a"], batch["b"]])


@pytest.mark.parametrize("around", [False, True])
def test_casts_of_an_autocast_are_recorded(graphs, around):
    layer = nn.Linear(4, 3)
    narrow = partial(torch.autocast, "cpu", torch.bfloat16)

    def loss(x):
        with contextlib.nullcontext() if around else narrow():
            return layer(x).float().square().sum()

    gradients = CapturedGradients(layer, loss)
    for seed in range(5):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        with narrow() if around else contextlib.nullcontext():
            found = gradients(x)
        with narrow():
            expected = layer(x).float().square().sum()
        torch.testing.assert_close(found, expected.detach(), rtol=0.01, atol=0.01)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(2)


@pytest.mark.parametrize("objective", ["one_class", "soft_boundary"])
def test_deep_svdd_trains_by_graphs(graphs, monkeypatch, objective):
    model = usf.models.DeepSVDD(6, objective=objective).double()
    monkeypatch.setattr("usf_kernels.models.deep_svdd.is_capturing", lambda: len(graphs) > 0)
    gradients = CapturedGradients(model.train())
    for seed in range(4):
        x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = gradients(x)
        torch.testing.assert_close(found, model.loss(x).detach())


def test_conjugated_blocks_and_students_t_train_by_graphs(graphs, monkeypatch):
    model = usf.models.USFlow((2, 4, 4), mask="checkerboard", base="student_t", memory="standard").double()
    monkeypatch.setattr("usf_kernels.nn.usf_block.is_capturing", lambda: len(graphs) > 0)
    gradients = CapturedGradients(model.train())
    for seed in range(4):
        x = torch.randn(5, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = gradients(x)
        torch.testing.assert_close(found, model.loss(x).detach())


def test_other_shapes_are_refused(graphs):
    model = Likelihood()
    gradients = CapturedGradients(model)
    for batch in batches(2):
        gradients(batch)
    with pytest.raises(
        ValueError, match=r"expected the captured \(2, 6, 5, 4\) torch.float64, found \(1, 6,"
    ):
        gradients({"maps": [x[:1] for x in batch["maps"]]})


def test_what_cannot_be_captured_is_refused():
    with pytest.raises(ValueError, match=r"module: expected tensors on one CUDA device, found \['cpu'\]"):
        CapturedGradients(Likelihood())


def test_reversible_sequences_are_refused(graphs):
    with pytest.raises(ValueError, match="expected sequences with memory='auto' or 'standard', found 'rev"):
        CapturedGradients(Likelihood(memory="reversible"))
