"""What an inference form refuses, and what it leaves as it was."""

import copy

import pytest
import torch
from helpers import conv_subnet, randomise_
from test_nn_fused import assert_same, flow_of, pointwise, single, step, wide
from torch import nn

from usf_kernels.nn import (
    AdditiveCoupling,
    AffineCoupling,
    Conjugated,
    FlowSequence,
    FlowStep,
    LUConv1x1,
    USFBlock,
)
from usf_kernels.ops.products import MULTIPLIES_BFLOAT16


def pooling(c_in, c_out):
    """Keeps the size of maps of an even size alone."""
    return nn.Sequential(
        nn.Conv2d(c_in, 16, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(16, c_out, 3, padding=1),
    )


class Residual(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 3, padding=1), act

    def forward(self, x):
        return self.conv(self.act(x)) + x


def sharing(c_in, c_out):
    """One activation in several places, one of which still needs its input."""
    act = nn.SiLU()
    layers = nn.Conv2d(c_in, 8, 3, padding=1), act, Residual(act), Residual(act)
    return nn.Sequential(*layers, nn.Conv2d(8, c_out, 3, padding=1))


@pytest.mark.parametrize("coupling", ["additive", "affine"])
@pytest.mark.parametrize("linear", ["lu", "permutation"])
def test_a_conditioner_that_changes_the_size_is_named(coupling, linear):
    flow = flow_of([step(6, pooling, coupling=coupling, linear=linear) for _ in range(3)])
    assert_same(flow.double(), torch.randn(2, 6, 8, 4, dtype=torch.float64))
    for form in (flow.float(), flow.fuse()):
        with pytest.raises(ValueError, match="output of subnet: expected"):
            form(torch.randn(2, 6, 7, 4))


def test_other_numbers_of_dimensions_are_named():
    fused = flow_of([step(6) for _ in range(2)]).fuse()
    for shape in ((2, 6), (2, 6, 9), (2, 6, 3, 3, 3)):
        with pytest.raises(ValueError, match="x: expected 2 spatial dimensions"):
            fused(torch.randn(shape))
        with pytest.raises(ValueError, match="x: expected 2 spatial dimensions"):
            fused.squared_norm(torch.randn(shape))
    flow_of([step(6, wide, linear="permutation")]).fuse()(torch.randn(2, 6))  # which sees one position


@pytest.mark.parametrize("layers", [("conv", "linear"), ("linear", "conv"), ("conv", "linear", "wide")])
def test_nn_linear_among_convolutions_is_of_columns(layers):
    def make(c_in, c_out):
        sizes = [c_in, *[5] * (len(layers) - 1), c_out]
        kinds = {
            "conv": lambda i: nn.Conv2d(sizes[i], sizes[i + 1], 1),
            "wide": lambda i: nn.Conv2d(5 if layers[i - 1] == "linear" else sizes[i], c_out, 3, padding=1),
            "linear": lambda i: nn.Linear(4, 4),
        }
        if layers[0] == "linear":
            sizes[1] = c_in
        if layers[-1] == "linear":
            sizes[-2] = c_out
        return nn.Sequential(*(kinds[kind](i) for i, kind in enumerate(layers)))

    flow = flow_of([step(6, make) for _ in range(2)])
    assert_same(flow.double(), torch.randn(2, 6, 3, 4, dtype=torch.float64))


def test_conditioners_of_nn_linear_are_for_vectors():
    flow = flow_of([step(6, nn.Linear) for _ in range(2)])
    assert_same(flow.double(), torch.randn(5, 6, dtype=torch.float64))
    with pytest.raises(
        ValueError, match="x: expected 0 spatial dimensions, as the conditioners' layers have"
    ):
        flow.fuse()(torch.randn(2, 6, 3, 3))


def test_nothing_is_drawn():
    flow = flow_of([step(6) for _ in range(2)])
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    flow.fuse()
    assert torch.equal(torch.rand(4), expected)


def test_an_activation_in_several_places():
    flow = flow_of([AdditiveCoupling(6, subnet=sharing, zero_init=False)])
    assert_same(flow.double(), torch.randn(2, 6, 8, 8, dtype=torch.float64))
    assert not flow[0].subnet[1].inplace


@pytest.mark.parametrize("subnet", [pointwise, wide])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_another_flow_are_taken(subnet, dtype):
    steps = [step(6, subnet, linear="permutation") for _ in range(3)]
    flow, x = flow_of(steps), torch.randn(4, 6, 5, 5, dtype=dtype)
    plain = FlowSequence([step(6, subnet, linear="permutation") for _ in range(3)]).eval()  # scales nothing
    fused, other = flow.fuse(dtype), plain.fuse(dtype)
    other.load_state_dict(fused.state_dict())
    for found, expected in zip((*other(x), *other.inverse(x)), (*fused(x), *fused.inverse(x)), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(other.squared_norm(x), fused.squared_norm(x))


def test_weights_of_another_dtype_are_taken():
    flow = flow_of([step(6, pointwise) for _ in range(2)]).double()
    fused, x = flow.fuse(torch.float32), torch.randn(2, 6, 3, 3, dtype=torch.float64)
    fused.load_state_dict(flow.fuse().state_dict(), assign=True)
    assert fused.dtype == torch.float64
    assert torch.equal(fused(x)[0], flow.fuse()(x)[0])


@pytest.mark.parametrize("subnet", [pointwise, conv_subnet, wide])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_autocast_leaves_it_alone(subnet, coupling):
    fused = flow_of([step(6, subnet, coupling=coupling, cond_channels=2) for _ in range(2)]).fuse()
    x, cond = torch.randn(2, 6, 4, 4), torch.randn(1, 2, 4, 4)
    expected = *fused(x, cond), fused.squared_norm(x, cond)
    with torch.autocast("cpu", torch.bfloat16):
        found = *fused(x, cond), fused.squared_norm(x, cond)
    for ours, truth in zip(found, expected, strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.skipif(not MULTIPLIES_BFLOAT16, reason="this processor does not multiply in bfloat16")
def test_layers_of_several_dtypes_are_pytorchs():
    fused = flow_of([AdditiveCoupling(32, subnet=conv_subnet, zero_init=False)]).fuse(torch.bfloat16)
    convolutions = [module for module in fused.modules() if isinstance(module, nn.Conv2d)]
    convolutions[-1].float()
    with pytest.raises(RuntimeError, match="type"):
        fused(torch.randn(1, 32, 6, 6))


def test_a_shift_in_front_of_a_part_of_the_channels():
    """A whitening of channels of which some depend on no other."""
    covariance = torch.eye(6, dtype=torch.float64)
    covariance[3:, 3:] = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 3.0]])
    covariance[0, 0] = 2
    maps = [LUConv1x1(6).whiten_(torch.arange(1.0, 7.0, dtype=torch.float64), covariance) for _ in range(2)]
    couplings = [AdditiveCoupling(6, subnet=single, zero_init=False) for _ in range(2)]
    flow = FlowSequence([couplings[0], maps[0], couplings[1], maps[1]]).eval().double()
    assert_same(flow, torch.randn(2, 6, 5, 5, dtype=torch.float64))


def test_modules_that_do_something_else_are_refused():
    class Doubled(FlowStep):
        def forward(self, x, cond=None):
            return super().forward(2 * x, cond)

    class Named(FlowStep):
        name = "the same as a step"

    flow = FlowSequence([step(6), randomise_(Doubled(6, subnet=conv_subnet))])
    with pytest.raises(TypeError, match="with its own forward and inverse, found Doubled"):
        flow.fuse()
    assert_same(flow_of([Named(6, subnet=conv_subnet)]).double(), torch.randn(1, 6, 4, 4).double())
    mixed = FlowSequence([AdditiveCoupling(6, subnet=conv_subnet), LUConv1x1(6)])
    with pytest.raises(TypeError, match="linear of a Conjugated, found a AdditiveCoupling in it"):
        Conjugated(mixed, AffineCoupling(6, subnet=conv_subnet)).fuse()


def test_the_flow_itself_stays_as_it_is():
    flow = flow_of([step(6, sharing) for _ in range(2)])
    before, x = copy.deepcopy(flow), torch.randn(2, 6, 5, 5)
    flow.fuse()(x)
    assert torch.equal(flow(x)[0], before(x)[0])


class ChannelMLP(nn.Module):
    """As in ConvNeXt: nn.Linear over the channels of maps."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.first, self.last = nn.Linear(c_in, 8), nn.Linear(8, c_out)

    def forward(self, x):
        return self.last(torch.relu(self.first(x.movedim(1, -1)))).movedim(-1, 1)


def test_linear_layers_inside_of_modules_may_take_maps():
    flow = flow_of([step(6, ChannelMLP) for _ in range(2)]).double()
    assert_same(flow, torch.randn(2, 6, 5, 4, dtype=torch.float64))


def test_a_map_to_the_first_channels_is_no_identity():
    block = USFBlock(3, subnet=pointwise, zero_init=False)
    other = LUConv1x1(3)
    with torch.no_grad():
        other.lower[-1, 0] = 0.5
    block.linear.load_state_dict(other.state_dict())
    assert_same(FlowSequence([block]).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("subnet", [conv_subnet, pointwise, wide])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
@pytest.mark.parametrize("value", [99, -3, 10**11])
def test_damaged_indices_are_refused(coupling, subnet, value):
    """They would be written to in the extension."""
    fused = flow_of([step(6, subnet, coupling=coupling, linear="permutation") for _ in range(2)]).fuse()
    state = {
        name: torch.full_like(v, value) if v.dtype == torch.int64 else v
        for name, v in fused.state_dict().items()
    }
    fused.load_state_dict(state)
    with pytest.raises((ValueError, RuntimeError, IndexError), match=r"index"):
        fused(torch.randn(2, 6, 5, 5))


def test_views_that_are_negated_when_read():
    fused, x = flow_of([step(6) for _ in range(2)]).fuse(), torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(fused(torch._neg_view(-x)), fused(x))
    zero = torch._efficientzerotensor((2, 6, 5, 5))
    torch.testing.assert_close(fused(zero), fused(torch.zeros(2, 6, 5, 5)))


def test_linear_maps_alone_ignore_a_condition():
    flow, x, cond = FlowSequence([LUConv1x1(4)]).eval(), torch.randn(2, 4, 3, 3), torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(flow.fuse()(x, cond), flow(x, cond))


def test_an_inference_form_is_its_own():
    fused = flow_of([step(6)]).fuse()
    assert fused.fuse() is fused.fuse(torch.float32) is fused
    with pytest.raises(
        TypeError, match=r"dtype: expected None or torch.float32, which it has, found torch.b"
    ):
        fused.fuse(torch.bfloat16)
