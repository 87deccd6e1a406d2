"""The reversible backward pass: the gradients of the standard one, little memory, and no silent errors."""

import copy

import pytest
import torch
from helpers import conv_subnet, linear_subnet, randomise_, shapes
from hypothesis import given, settings
from torch import nn
from torch.utils.checkpoint import checkpoint

from usf_kernels.nn import (
    ActNorm,
    AdditiveCoupling,
    Conjugated,
    FlowSequence,
    FlowStep,
    LUConv1x1,
    Permutation,
)

pytestmark = pytest.mark.usefixtures("nan_memory")

COUPLINGS, LINEARS = ("additive", "affine"), ("lu", "permutation", "none")


class Shear(nn.Module):
    """A flow module that has no `pull_back`, with a condition and a log-determinant that is data."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, cond=None):
        shift = 0 if cond is None else cond.sum(1, keepdim=True).tanh()
        log_det = self.log_scale * x[0].numel()
        return x * self.log_scale.exp() + shift, log_det.expand(x.shape[0])

    def inverse(self, z, cond=None):
        shift = 0 if cond is None else cond.sum(1, keepdim=True).tanh()
        return (z - shift) * (-self.log_scale).exp(), -self.log_scale * z[0].numel()


class Pointwise(nn.Linear):
    """A conditioner for any number of positions; convolutions refuse none."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).tanh()


def sequence(channels, subnet=conv_subnet, cond_channels=0, memory="reversible"):
    """Steps of every kind, one of them twice and some nested."""
    options = {"subnet": subnet, "cond_channels": cond_channels, "zero_init": False}
    steps = [FlowStep(channels, coupling=c, linear=k, **options) for c in COUPLINGS for k in LINEARS]
    nested = FlowSequence([FlowStep(channels, act_norm=False, **options), Permutation(channels)])
    frozen = [ActNorm(channels, trainable=False), LUConv1x1(channels, diagonal="fixed", bias=False)]
    return FlowSequence([LUConv1x1(channels), *steps, nested, Shear(), steps[0], *frozen], memory=memory)


def backward(flow, x, cond=None):
    """Gradients of x, cond and the parameters, of a loss that weights everything differently."""
    inputs = [t for t in (x, cond) if t is not None and t.requires_grad]
    inputs += [p for p in flow.parameters() if p.requires_grad]
    z, log_det = flow(x, cond)
    weights = torch.linspace(0.5, 2, z.numel(), dtype=z.dtype).view_as(z)
    loss = (weights * z.square()).sum() - (log_det * torch.arange(1, x.shape[0] + 1)).sum()
    return loss.detach(), torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_same_gradients(flow, x, cond=None, tolerance=1e-10):
    standard = copy.deepcopy(flow)
    standard.memory = "standard"
    truth, expected = backward(standard, x, cond)
    loss, actual = backward(flow, x, cond)
    assert abs(loss - truth) <= 1e-12 * truth.abs()
    for value, reference in zip(actual, expected, strict=True):
        if reference is not None or value is not None:
            assert (value - reference).norm() <= tolerance * reference.norm() + 1e-14, value.shape


@pytest.mark.parametrize("cond_channels", [0, 2])
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4, 3)])
def test_gradients_are_the_standard_ones(shape, cond_channels):
    flow = sequence(5, conv_subnet if len(shape) == 4 else linear_subnet, cond_channels).double()
    x = (2 * torch.randn(shape, dtype=torch.float64) + 1).requires_grad_()
    cond = None
    if cond_channels:  # one for the whole batch
        cond = torch.randn(1, cond_channels, *shape[2:], dtype=torch.float64, requires_grad=True)
    flow(x, cond)  # initialises the ActNorms
    randomise_(flow)
    assert_same_gradients(flow, x, cond)
    for name, parameter in flow.named_parameters():  # frozen ones, on the way to others
        parameter.requires_grad_("subnet" not in name and "0" in name)
    assert_same_gradients(flow, x.detach(), None if cond is None else cond.detach())
    flow.eval().requires_grad_(False)
    assert_same_gradients(flow, x, cond)
    if cond_channels:
        assert_same_gradients(flow, x.detach(), cond)


@given(shapes(min_channels=2))
@settings(max_examples=15)
def test_any_shape(shape):
    channels = shape[1]
    steps = [FlowStep(channels, coupling=c, linear=k, subnet=Pointwise) for c in COUPLINGS for k in LINEARS]
    flow = randomise_(FlowSequence(steps, memory="reversible").double())
    assert_same_gradients(flow, torch.randn(shape, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_float32_gradients(coupling, linear, layout):
    """To 1e-5 of the standard ones, or as close as those are to the truth where terms cancel."""
    steps = [
        FlowStep(64, subnet=conv_subnet, coupling=coupling, linear=linear, zero_init=False) for _ in range(8)
    ]
    flow, x = FlowSequence(steps, memory="reversible"), torch.randn(2, 64, 8, 8).to(memory_format=layout)
    flow(x)
    standard = FlowSequence(copy.deepcopy(steps), memory="standard")
    double = copy.deepcopy(standard).double()
    _, actual = backward(flow, x)
    _, expected = backward(standard, x)
    _, truth = backward(double, x.double())
    for a, e, t in zip(actual, expected, truth, strict=True):
        assert (a - e).norm() <= max(1e-5 * e.norm(), 2 * (e - t).norm())


def test_a_conditioner_that_returns_its_input():
    steps = [FlowStep(4, subnet=lambda *_: nn.Identity(), linear=k, zero_init=False) for k in LINEARS]
    flow = FlowSequence(steps, memory="reversible").double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    flow(x)
    assert_same_gradients(flow, x)


def test_few_positions_lose_no_digits():
    """An LU map undone factor by factor would lose one or two more than its matrix."""
    steps = [LUConv1x1(256, init="orthogonal") for _ in range(8)]
    flow, x = FlowSequence(steps, memory="reversible"), torch.randn(1, 256, 3, 3)
    _, actual = backward(flow, x)
    _, truth = backward(FlowSequence(copy.deepcopy(steps), memory="standard").double(), x.double())
    for value, reference in zip(actual, truth, strict=True):
        assert (value - reference).norm() <= 1e-5 * reference.norm()


def saved_bytes(flow, x):
    """What the graph keeps of one forward pass, parameters aside."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in flow.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z, _ = flow(x)
    kept = getattr(z.grad_fn, "samples", [])
    return sum(storages.values()) + sum(t.nbytes for t in kept)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_memory_does_not_grow_with_depth(coupling):
    def make(depth, memory):
        steps = [FlowStep(16, subnet=conv_subnet, coupling=coupling) for _ in range(depth)]
        return FlowSequence(steps, memory=memory)

    x = torch.randn(4, 16, 16, 16)
    standard, few = saved_bytes(make(8, "standard"), x), saved_bytes(make(8, "reversible"), x)
    assert few < standard / 5
    assert saved_bytes(make(64, "auto"), x) < 1.5 * few
    assert few < 1.1 * x.nbytes


def test_backward_twice_through_one_graph():
    flow = FlowSequence([FlowStep(4, subnet=conv_subnet, zero_init=False) for _ in range(4)])
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    z, _ = flow(x)
    inputs = [x, *flow.parameters()]
    first, second = (torch.autograd.grad(z.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_when_it_is_used():
    x = torch.randn(2, 4, 5, 5)

    def uses(flow, x=x):
        return "Reversible" in type(flow(x)[0].grad_fn).__name__

    steps = [FlowStep(4, subnet=conv_subnet) for _ in range(4)]
    flow = FlowSequence(steps)
    assert uses(flow)
    assert uses(FlowSequence(steps[:1], memory="reversible"))
    assert uses(FlowSequence(steps, memory="reversible")[1:])
    assert not uses(flow[1:])
    assert not uses(flow, x[:1, :, :3, :1])  # fewer positions than channels
    assert not uses(FlowSequence(steps, memory="standard"))
    assert not uses(torch.compile(flow, backend="eager", fullgraph=True))
    frozen = copy.deepcopy(flow).requires_grad_(False)
    assert not uses(frozen)
    assert uses(frozen, x.clone().requires_grad_())
    with torch.no_grad():
        assert not flow(x)[0].requires_grad
    jacobian = torch.func.jacrev(lambda v: flow(v.view(1, 4, 1, 1))[0].flatten())(torch.randn(4))
    assert jacobian.shape == (4, 4)
    for clone in (copy.deepcopy(flow), flow[:]):
        assert repr(clone) == repr(flow)
        assert uses(clone)


def nearly_singular_at(step, depth=5, **options):
    flow = FlowSequence([FlowStep(4, subnet=conv_subnet, act_norm=False) for _ in range(depth)], **options)
    with torch.no_grad():
        flow[step].linear.log_diagonal[1] = -12.0
    return flow


def test_lost_precision_is_an_error():
    x = torch.randn(4, 4, 6, 6)
    z, _ = nearly_singular_at(3)(x)
    with pytest.raises(
        RuntimeError, match=r"the inverse of step 3 lost precision: .* off by .*in torch.float32"
    ):
        z.sum().backward()
    nearly_singular_at(3).double()(x.double())[0].sum().backward()  # has the digits for it
    nearly_singular_at(3, check_every=0)(x)[0].sum().backward()
    nearly_singular_at(3, memory="standard")(x)[0].sum().backward()
    flow = nearly_singular_at(2, check_every=3)
    flow._check.count = 1  # as after a first pass
    for parts in (flow, flow[:4]):  # a slice counts together with the whole
        parts(x)[0].sum().backward()
    z, _ = flow[1:](x)
    with pytest.raises(RuntimeError, match="the inverse of step 1 lost precision"):
        z.sum().backward()


def test_errors():
    x = torch.randn(2, 4, 5, 5)
    steps = [FlowStep(4, subnet=conv_subnet) for _ in range(4)]
    with pytest.raises(
        ValueError, match="memory: expected one of 'auto', 'reversible', 'standard', found 'low'"
    ):
        FlowSequence(steps, memory="low")
    with pytest.raises(ValueError, match="check_every: expected an int at least 0, found -1"):
        FlowSequence(steps, check_every=-1)
    assert FlowSequence(steps, check_every=3)[1:].check_every == 3
    flow = FlowSequence(steps)
    z, _ = flow(x)
    with pytest.raises(RuntimeError, match="gives first derivatives, one at a time, found create_graph"):
        torch.autograd.grad(z.square().sum(), flow[0].linear.lower, create_graph=True)
    z, _ = flow(x)
    with torch.no_grad():
        flow[0].linear.lower.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


class Wrapped(nn.Module):
    """A step that is a sequence, but not of this package's class."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, cond=None):
        return self.flow(x, cond)

    def inverse(self, z, cond=None):
        return self.flow.inverse(z, cond)


class FlowConditioner(nn.Module):
    """A conditioner that holds a sequence."""

    checkpointed = False

    def __init__(self, c_in, c_out):
        super().__init__()
        self.flow, self.last = (
            FlowSequence([FlowStep(c_in, subnet=conv_subnet)] * 4),
            conv_subnet(c_in, c_out),
        )

    def forward(self, x):
        if self.checkpointed:
            return self.last(checkpoint(lambda v: self.flow(v)[0], x, use_reentrant=False))
        return self.last(self.flow(x)[0])


class CheckpointedConditioner(FlowConditioner):
    checkpointed = True


def _conjugated(channels, memory):
    maps = [LUConv1x1(channels, init="orthogonal"), Permutation(channels)] * 2
    return Conjugated(FlowSequence(maps, memory=memory), AdditiveCoupling(channels, subnet=conv_subnet))


@pytest.mark.parametrize("memory", ["auto", "reversible"])
@pytest.mark.parametrize(
    "step",
    [
        _conjugated,
        lambda channels, memory: Wrapped(
            FlowSequence([FlowStep(channels, subnet=conv_subnet, zero_init=False)] * 4, memory=memory)
        ),
        lambda channels, memory: FlowStep(channels, subnet=FlowConditioner, zero_init=False),
        lambda channels, memory: FlowStep(channels, subnet=CheckpointedConditioner, zero_init=False),
    ],
)
def test_sequences_inside_of_steps(step, memory):
    """They are parts of the step: the backward pass replays it once, and records what is in it."""
    flow = FlowSequence([step(4, memory) for _ in range(4)], memory=memory).double()
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    found = backward(flow, x)
    for part in flow.modules():
        if isinstance(part, FlowSequence):
            part.memory = "standard"
    expected = backward(flow, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
