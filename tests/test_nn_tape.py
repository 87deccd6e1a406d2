"""Reversible passes against standard ones, where the replay of a conditioner could differ from its call."""

import copy
import threading

import pytest
import torch
from helpers import conv_subnet
from torch import nn

from usf_kernels.nn import FlowSequence, FlowStep, Permutation, USFBlock
from usf_kernels.nn.tape import swapped


def steps_of(subnet, count=4, channels=8, **options):
    return [FlowStep(channels, subnet=subnet, zero_init=False, **options) for _ in range(count)]


def gradients(flow, memory, x, between=lambda flow: None):
    flow = copy.deepcopy(flow)
    flow.memory = memory
    torch.manual_seed(0)
    x = x.detach().requires_grad_()
    z, log_det = flow(x)
    between(flow)
    (z.square().sum() - log_det.sum()).backward()
    return [x.grad, *(p.grad for p in flow.parameters())]


def assert_as_standard(flow, x, **options):
    for found, expected in zip(
        gradients(flow, "reversible", x, **options), gradients(flow, "standard", x, **options), strict=True
    ):
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-4


def with_dropout(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, 16, 1), nn.Dropout(0.3), nn.Conv2d(16, c_out, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_numbers_in_any_memory_format(dtype):
    """A permutation may hand on other memory than it was given."""
    x = torch.randn(3, 8, 6, 6, dtype=dtype).to(memory_format=torch.channels_last)
    plain = steps_of(with_dropout, count=1, linear="none")
    for steps in ([*plain, Permutation(8)], steps_of(with_dropout, linear="permutation")):
        assert_as_standard(FlowSequence(steps, check_every=1).to(dtype), x)


def test_evaluation_mode_after_the_forward_pass():
    flow = FlowSequence(steps_of(with_dropout), check_every=1)
    assert_as_standard(flow, torch.randn(3, 8, 6, 6), between=lambda flow: flow.eval())
    gradients(flow, "reversible", torch.randn(3, 8, 6, 6), between=lambda flow: flow.eval())


class Shifted(nn.Module):
    """Its last parameter's gradient is the output's as it is."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv, self.shift = nn.Conv2d(c_in, c_out, 1), nn.Parameter(torch.zeros(1, c_out, 6, 6))

    def forward(self, x):
        return self.conv(x) + self.shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_lies_in_memory_that_is_written_to(dtype):
    flow = FlowSequence(steps_of(Shifted, linear="none"), check_every=1).to(dtype)
    assert_as_standard(flow, torch.randn(1, 8, 6, 6, dtype=dtype))


class Running(nn.Module):
    """Replaces a buffer at every call, where others write into theirs."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 1)
        self.register_buffer("mean", torch.ones(()))

    def forward(self, x):
        self.mean = 0.5 * self.mean + x.detach().square().mean()
        return self.conv(x) * self.mean


def test_buffers_that_are_replaced():
    flow, x = FlowSequence(steps_of(Running), check_every=1), torch.randn(2, 8, 5, 5)
    assert_as_standard(flow, x)
    other = copy.deepcopy(flow)
    other.memory = "standard"
    for one in (flow, other):
        one(x)[0].sum().backward()
    for found, expected in zip(flow.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [FlowStep, USFBlock])
def test_conditioners_that_begin_in_place(kind):
    def subnet(c_in, c_out):
        return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(c_in, c_out, 1))

    assert_as_standard(FlowSequence([kind(8, subnet=subnet, zero_init=False)] * 4), torch.randn(2, 8, 5, 5))


class Doubled(FlowSequence):
    def forward(self, x, cond=None):
        z, log_det = super().forward(x, cond)
        return 2 * z, log_det + z[0].numel() * torch.tensor(2.0).log()

    def inverse(self, z, cond=None):
        x, log_det = super().inverse(z / 2, cond)
        return x, log_det - z[0].numel() * torch.tensor(2.0).log()


def test_subclasses_of_sequences_are_called():
    flow = FlowSequence([*steps_of(conv_subnet), Doubled(steps_of(conv_subnet, count=1))])
    x = torch.randn(2, 8, 5, 5)
    assert_as_standard(flow, x)
    torch.testing.assert_close(flow(x), copy.deepcopy(flow).requires_grad_(False)(x))


def test_hooks_on_steps_are_called():
    flow, called = FlowSequence(steps_of(conv_subnet), memory="reversible"), []
    flow[1].register_full_backward_hook(lambda *_: called.append("backward"))
    flow(torch.randn(2, 8, 5, 5, requires_grad=True))[0].sum().backward()
    assert called == ["backward"]


def test_two_threads_in_one_module():
    """What the other has put there must neither be used nor be taken for what stood there before."""
    place, inside, go_on = {"weight": None}, threading.Event(), threading.Event()

    def first():
        with swapped([(place, "weight", torch.ones(1))]):
            inside.set()
            go_on.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with pytest.raises(RuntimeError, match="two threads"), swapped([(place, "weight", torch.zeros(1))]):
        pass
    go_on.set()
    thread.join()
    assert place == {"weight": None}
    with swapped([(place, "weight", torch.zeros(1))]):
        assert place["weight"] == 0
