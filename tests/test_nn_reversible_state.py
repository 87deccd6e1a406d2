"""Reversible passes of steps with a state: the backward pass sees what the forward pass saw."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from usf_kernels.nn import (
    AdditiveCoupling,
    Conjugated,
    FlowSequence,
    FlowStep,
    Householder,
    LUConv1x1,
    Permutation,
    USFBlock,
)


def conditioner(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, 8, 1), nn.ReLU(), nn.Conv2d(8, c_out, 1))


def assert_close(found, expected):
    assert (found - expected).norm() < 1e-4 * expected.norm()


KINDS = {
    "lu": lambda: FlowStep(6, subnet=conditioner, zero_init=False),
    "permutation": lambda: FlowStep(6, subnet=conditioner, zero_init=False, linear="permutation"),
    "conjugated": lambda: USFBlock(6, subnet=conditioner),
}


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_a_functional_call(kind):
    first, second = (FlowSequence([KINDS[kind]() for _ in range(4)]).eval() for _ in range(2))
    x = torch.randn(2, 6, 5, 4, requires_grad=True)
    (expected,) = torch.autograd.grad((second(x)[0] ** 3).sum(), x)
    state = second.state_dict()
    before = {name: value.clone() for name, value in first.state_dict().items()}
    for _ in range(2):
        (found,) = torch.autograd.grad((functional_call(first, state, (x,))[0] ** 3).sum(), x)
        assert_close(found, expected)
    for name, value in first.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("linear", ["lu", "permutation"])
@pytest.mark.parametrize("rank", [2, 3])
def test_random_numbers_in_maps_that_are_a_part_of_others(rank, linear):
    convolution = nn.Conv2d if rank == 2 else nn.Conv3d

    def dropping(c_in, c_out):
        layers = convolution(c_in, 16, 3, padding=1), nn.ReLU(), nn.Dropout(), convolution(16, c_out, 1)
        return nn.Sequential(*layers)

    steps = [FlowStep(6, subnet=dropping, linear=linear, zero_init=False) for _ in range(4)]
    flow = FlowSequence(steps, check_every=1)
    last = torch.channels_last if rank == 2 else torch.channels_last_3d
    whole = torch.randn(2, 12, 5, 4, 3)[..., :, :, : None if rank == 3 else 1]
    whole = (whole if rank == 3 else whole[..., 0]).contiguous(memory_format=last)
    flow(whole[:, :6])  # sets the ActNorms
    gradients = []
    for flow.memory in ("standard", "reversible"):
        torch.manual_seed(1)
        x = whole[:, :6].detach().requires_grad_()
        gradients.append(torch.autograd.grad((flow(x)[0] ** 2).sum(), x)[0])
    assert_close(gradients[1], gradients[0])


class Normed(nn.Module):
    """Its statistics have no counter beside them."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.layer = nn.Conv2d(c_in, c_out, 1)
        self.register_buffer("mean", torch.zeros(c_out))
        self.register_buffer("variance", torch.ones(c_out))

    def forward(self, x):
        return nn.functional.batch_norm(self.layer(x), self.mean, self.variance, training=self.training)


def test_statistics_are_updated_once():
    flow = FlowSequence([FlowStep(4, subnet=Normed, zero_init=False)], memory="reversible")
    z, log_det = flow(torch.randn(8, 4, 3, 3) + 1)
    subnet = flow[0].coupling.subnet
    mean, variance = subnet.mean.clone(), subnet.variance.clone()
    assert mean.abs().max() > 0
    (z.sum() + log_det).backward()
    assert torch.equal(subnet.mean, mean)
    assert torch.equal(subnet.variance, variance)


def inplace(c_in, c_out):
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(c_in, 8, 1), nn.ReLU(), nn.Conv2d(8, c_out, 1))


RESULTS = {
    "lu": lambda: LUConv1x1(6, init="orthogonal"),
    "householder": lambda: Householder(6),
    "step": lambda: FlowStep(6, subnet=conditioner),
    "conjugated": lambda: USFBlock(6, subnet=inplace),
}


@pytest.mark.parametrize("size", [(5, 4), (1, 1), (30, 20)])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", RESULTS)
def test_results_may_be_written_to(kind, last, size):
    module, x = RESULTS[kind](), torch.randn(2, 6, *size)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    gradients = []
    for write in (False, True):
        z = module(x)[0]
        z = z.mul_(2.0) if write else 2.0 * z
        gradients.append(torch.autograd.grad((z**3).sum(), x)[0])
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("rank", [2, 3])
def test_random_numbers_of_several_conditioners_in_one_step(rank):
    """On the way back they are evaluated in another order."""
    convolution = nn.Conv2d if rank == 2 else nn.Conv3d

    def dropping(c_in, c_out):
        layers = convolution(c_in, 16, 1), nn.ReLU(), nn.Dropout(), convolution(16, c_out, 1)
        return nn.Sequential(*layers)

    def block():
        couplings = [AdditiveCoupling(8, subnet=dropping, zero_init=False) for _ in range(2)]
        return Conjugated(Householder(8), FlowSequence([couplings[0], Permutation(8), couplings[1]]))

    flow = FlowSequence([block() for _ in range(4)], check_every=1)
    x = torch.randn(2, 8, *[5, 4, 3][:rank], requires_grad=True)
    gradients = []
    for flow.memory in ("standard", "reversible"):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad((flow(x)[0] ** 2).sum(), [x, *flow.parameters()]))
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected)


def test_weights_that_are_cached_are_computed_anew_on_the_way_back():
    def normed(c_in, c_out):
        first = parametrizations.spectral_norm(nn.Conv2d(c_in, 8, 1)).eval()
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, c_out, 1))

    flow = FlowSequence(
        [FlowStep(6, subnet=normed, act_norm=False, zero_init=False) for _ in range(4)]
    ).eval()
    x, weights, gradients = torch.randn(2, 6, 5, 4), list(flow.parameters()), []
    first = flow[0].coupling.subnet[0]
    for flow.memory in ("standard", "reversible"):
        with parametrize.cached():
            loss = (flow(x)[0] ** 2).sum() + first.weight.square().sum()
            gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
        assert parametrize._cache_enabled == 0
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected)
