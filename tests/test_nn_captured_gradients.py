"""Gradients by graphs; see test_gpu for CUDA's own."""

from types import SimpleNamespace

import pytest
import torch
from helpers import conv_subnet, randomise_
from torch import nn

import usf_kernels as usf
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


def test_a_pass_that_fails_while_recording_leaves_the_memory_as_it_was(graphs):
    model = Likelihood()
    gradients = CapturedGradients(
        model, lambda batch: model.loss(batch) * (1.0 if len(graphs) == 0 else None)
    )
    gradients(*batches(1))
    with pytest.raises(TypeError):
        gradients(*batches(1))
    assert model.flow.memory == "auto"


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
