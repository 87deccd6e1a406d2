"""Convolutional conditioners as one operation: values and gradients against float64, and who gets it."""

from copy import deepcopy

import pytest
import torch
from helpers import assert_within_budget, layouts, max_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from usf_kernels.nn import AdditiveCoupling, conditioner_layers
from usf_kernels.nn.conditioner_layers import evaluate
from usf_kernels.ops.convolution import Layer, convolutions
from usf_kernels.ops.products import MULTIPLIES

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.skipif(not MULTIPLIES, reason="the extension has no convolutions here"),
]

# Kernels, channels, and where ReLUs are; each with a convolution at least that runs in tiles.
CHAINS = {
    "two": (((3, 3), (3, 3)), (20, 37, 33), (True, False)),
    "one": (((3, 3),), (16, 16), (False,)),
    "relu at the end": (((3, 3), (3, 3)), (24, 16, 18), (False, True)),
    "with others": (((1, 1), (3, 3), (5, 1), (3, 3)), (7, 20, 30, 16, 8), (True, True, True, False)),
}


def draw(name="two", bias=True):
    kernels, channels, relus = CHAINS[name]
    modules = []
    for kernel, c_in, c_out, relu in zip(kernels, channels, channels[1:], relus, strict=False):
        padding = tuple(size // 2 for size in kernel)
        modules += [nn.Conv2d(c_in, c_out, kernel, padding=padding, bias=bias), *[nn.ReLU()] * relu]
    return nn.Sequential(*modules)


def in_extension(network, x):
    """The result, of which it is known that the extension made it."""
    y = evaluate(network, x)
    assert in_one(y)
    return y


def in_one(y):
    return type(y.grad_fn).__name__ == "_ConvolutionsBackward"


def everything(run, network, x, grad):
    """The result, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    y = run(network, x)
    return [y, *torch.autograd.grad(y, [x, *network.parameters()], grad)]


def check(network, x):
    def in_torch(network, x):
        return network(x)

    grad = torch.randn_like(network(x))
    ours = everything(in_extension, network, x, grad)
    eager = everything(in_torch, network, x, grad)
    truth = everything(in_torch, deepcopy(network).double(), x.double(), grad.double())
    for value, plain, expected in zip(ours, eager, truth, strict=True):
        assert_within_budget(value, plain, expected, factor=4)
    return ours[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_matches_float64_in_any_memory(name, bias):
    network = draw(name, bias)
    x = torch.randn(2, CHAINS[name][1][0], 9, 7)
    for layout, view in [("contiguous", x), *layouts(x)]:
        y = check(network, view)
        rows = layout in ("channels last", "channels-last slice")
        kept = torch.channels_last if rows else torch.contiguous_format
        assert y.is_contiguous(memory_format=kept)
    check(network.to(memory_format=torch.channels_last), x)


@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.integers(16, 40), st.integers(16, 40))
def test_any_shape(batch, height, width, inputs, outputs):
    network = nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1))
    check(network, torch.randn(batch, inputs, height, width))


@pytest.mark.parametrize("shape", [(2, 20, 3, 0), (2, 20, 0, 3), (2, 20, 0, 0), (0, 20, 3, 3)])
def test_maps_without_positions(shape):
    network = nn.Sequential(nn.Conv2d(20, 16, 3, padding=1), nn.ReLU())
    x = torch.randn(shape, requires_grad=True)
    y = convolutions(x, [Layer(network[0].weight, network[0].bias, relu=True)])
    assert y.shape == (shape[0], 16, *shape[2:])
    y.sum().backward()
    assert x.grad.shape == shape
    assert not network[0].weight.grad.any()
    assert not network[0].bias.grad.any()


@pytest.mark.parametrize("bias", [True, False])
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 20), st.integers(2, 40), st.integers(1, 40))
def test_pointwise_layers_on_maps(bias, batch, height, width, inputs, outputs):
    layers = nn.Conv2d(inputs, 9, 1, bias=bias), nn.ReLU(), nn.Conv2d(9, outputs, 1, bias=bias), nn.ReLU()
    wide = torch.randn(batch, inputs + 2, height, width)
    if inputs > 1 and height * width > 1:
        assert check(nn.Sequential(*layers), wide[:, 1:-1]).is_contiguous()


@pytest.mark.parametrize("bias", [True, False])
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 20), st.integers(1, 40), st.integers(1, 40))
def test_pointwise_layers_on_rows(bias, batch, height, width, inputs, outputs):
    layers = nn.Conv2d(inputs, 9, 1, bias=bias), nn.ReLU(), nn.Conv2d(9, outputs, 1, bias=bias), nn.ReLU()
    x = torch.randn(batch, inputs, height, width).contiguous(memory_format=torch.channels_last)
    assert check(nn.Sequential(*layers), x).is_contiguous(memory_format=torch.channels_last)


def test_pointwise_layers_in_other_memory_are_pytorchs():
    network = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 8, 5, 6)
    assert in_one(evaluate(network, x))
    for layout, view in layouts(x):
        assert in_one(evaluate(network, view)) == (layout not in ("strided", "reversed"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("second", [1, 3])
@given(
    st.integers(0, 3), st.integers(1, 6), st.integers(1, 9), st.sampled_from(["maps", "rows", "part of rows"])
)
def test_what_all_samples_share(bias, second, batch, height, width, layout):
    """Passes the first layer once, in any memory; in front of a second layer that is pointwise or not."""
    network = nn.Sequential(
        nn.Conv2d(20 + 5, 17, 1, bias=bias), nn.ReLU(), nn.Conv2d(17, 24, second, padding=second // 2)
    )
    cond = torch.randn(1, 5, height, width)
    x = torch.randn(batch, 40 if layout == "part of rows" else 20, height, width)
    x = x if layout == "maps" else x.contiguous(memory_format=torch.channels_last)[:, :20]

    def whole(network, x, cond):
        return network(torch.cat([x, cond.expand(len(x), -1, -1, -1)], 1))

    def everything(run, dtype, sign=lambda value: value):
        inputs = [sign(v.detach().to(dtype)).requires_grad_() for v in (x, cond)]
        wide = deepcopy(network).to(dtype)
        for parameter in wide.parameters():
            parameter.data = sign(parameter.data)
        y = run(wide, *inputs)
        grad_y = sign(2 * run(deepcopy(network).to(dtype), x.to(dtype), cond.to(dtype)).detach())
        return [y, *torch.autograd.grad(y, [*inputs, *wide.parameters()], grad_y)]

    assert in_one(evaluate(network, x, cond)) or x.numel() < 2
    ours, eager, truth = (
        everything(*given)
        for given in ((evaluate, torch.float32), (whole, torch.float32), (whole, torch.double))
    )
    sums = everything(whole, torch.double, torch.abs)  # of absolute values: the signs make them cancel
    for value, plain, expected, summed in zip(ours, eager, truth, sums, strict=True):
        scale = summed.max().item() if summed.numel() else 0.0
        assert_within_budget(value, plain, expected, factor=4, scale=scale)


@pytest.mark.parametrize("layout", ["maps", "rows", "part of rows"])
def test_the_share_lies_as_the_input(layout, monkeypatch):
    """What would be transposed at every call is as large as the layer's output."""
    network = nn.Sequential(nn.Conv2d(20 + 5, 17, 1), nn.ReLU(), nn.Conv2d(17, 24, 1))
    x = torch.randn(2, 40 if layout == "part of rows" else 20, 5, 6)
    x = x if layout == "maps" else x.contiguous(memory_format=torch.channels_last)[:, :20]
    shares = []

    def watched(x, layers, share):
        shares.append(share)
        return convolutions(x, layers, share)

    monkeypatch.setattr(conditioner_layers, "convolutions", watched)
    evaluate(network, x, torch.randn(1, 5, 5, 6))
    assert [share.stride(1) for share in shares] == [30 if layout == "maps" else 1]


@pytest.mark.parametrize("kernel", [1, 3])
def test_biases_of_any_strides(kernel):
    """Nothing may be read from a copy that is gone."""
    x, weight = torch.randn(2, 16, 5, 6), torch.randn(32, 16, kernel, kernel)
    for bias in (torch.randn(64)[::2], torch.randn(1).expand(32)):
        for _ in range(3):
            found = convolutions(x, [Layer(weight, bias, relu=False)])
            expected = nn.functional.conv2d(x, weight, bias, padding=kernel // 2)
            assert max_error(found, expected) < 1e-4


def test_another_default_device():
    network, x = draw(), torch.randn(1, 20, 4, 5)
    with torch.device("meta"):
        found = evaluate(network, x)
    assert max_error(found, network(x)) < 1e-5


def test_large_maps_on_any_number_of_threads():
    network, threads = nn.Sequential(nn.Conv2d(48, 32, 3, padding="same")), torch.get_num_threads()
    x = torch.randn(2, 48, 40, 36)
    grad = torch.randn(2, 32, 40, 36)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            check(network, x)
            first, again = (everything(in_extension, network, x, grad) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_only_wanted_gradients_are_computed():
    network = draw()
    network[0].weight.requires_grad_(False)
    network[2].bias.requires_grad_(False)
    evaluate(network, torch.randn(1, 20, 6, 6)).sum().backward()
    assert [p.grad is None for p in network.parameters()] == [True, False, False, True]
    network.requires_grad_(False)
    x = torch.randn(1, 20, 6, 6, requires_grad=True)
    in_extension(network, x).sum().backward()
    assert x.grad.isfinite().all()


def test_second_derivatives():
    network, x = draw(), torch.randn(1, 20, 4, 5)

    def penalty(network, x, run):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(run(network, x).square().sum(), x, create_graph=True)
        first = torch.autograd.grad(grad.square().sum(), list(network.parameters()), materialize_grads=True)
        (weight,) = torch.autograd.grad(run(network, x).square().sum(), network[0].weight, create_graph=True)
        return *first, *torch.autograd.grad(weight.square().sum(), x)

    ours = penalty(network, x, in_extension)
    truth = penalty(deepcopy(network).double(), x.double(), lambda network, x: network(x))
    for value, expected in zip(ours, truth, strict=True):
        assert max_error(value, expected) <= 1e-5 * max(1.0, expected.abs().max().item())


def test_what_is_left_to_pytorch():
    network, x = draw(), torch.randn(1, 20, 6, 6, requires_grad=True)
    assert in_one(evaluate(network, x))
    assert not in_one(evaluate(deepcopy(network).double(), x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(network, x).dtype == torch.bfloat16
    few = nn.Sequential(nn.Conv2d(20, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 40, 1))
    assert not in_one(evaluate(few, x))
    for other in (
        nn.Sequential(*network, nn.GELU()),
        nn.Sequential(nn.Conv2d(20, 20, 3, padding=1, padding_mode="reflect")),
        nn.Sequential(nn.Conv2d(20, 20, 3, stride=2, padding=1)),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(20, 20, 3, padding=1))),
        nn.Conv2d(20, 20, 3, padding=1),
    ):
        assert torch.equal(evaluate(other, x), other(x))
    with pytest.raises(RuntimeError, match="channels"):
        evaluate(network, x[:, :19])


@pytest.mark.parametrize(
    "hook",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
@pytest.mark.parametrize("place", [None, 0, 1, 2])
def test_hooks_are_called(hook, place):
    network, called = draw(), []
    module = network if place is None else network[place]
    getattr(module, hook)(lambda *_: called.append(1))
    evaluate(network, torch.randn(1, 20, 6, 6, requires_grad=True)).sum().backward()
    assert called


def test_transforms_and_compilers_see_the_layers():
    network, x = draw(), torch.randn(2, 20, 6, 6)
    jacobian = torch.func.jvp(lambda x: evaluate(network, x), (x,), (x,))[1]
    assert max_error(jacobian, torch.func.jvp(network, (x,), (x,))[1]) < 1e-5
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: evaluate(network, x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), network(x))


def test_couplings_run_it_and_results_may_be_overwritten():
    coupling = AdditiveCoupling(40, subnet=lambda c_in, c_out: draw_between(c_in, c_out), zero_init=False)
    x = torch.randn(2, 40, 6, 6)
    y, _ = coupling(x)
    names, seen = [], [y.grad_fn]
    while seen:
        node = seen.pop()
        names.append(type(node).__name__)
        seen += [parent for parent, _ in node.next_functions if parent is not None]
    assert "_ConvolutionsBackward" in names
    y = evaluate(coupling.subnet, x[:, :20]).mul_(2)
    y.sum().backward()
    assert coupling.subnet[0].weight.grad.isfinite().all()


def draw_between(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, c_out, 3, padding=1))


def test_no_layers_of_other_widths():
    layer = Layer(torch.randn(16, 20, 3, 3), None, relu=False)
    assert convolutions(torch.randn(1, 20, 3, 3), [layer]).shape == (1, 16, 3, 3)
    mismatched = nn.Sequential(nn.Conv2d(20, 16, 3, padding=1), nn.Conv2d(20, 16, 3, padding=1))
    with pytest.raises(RuntimeError, match="channels"):
        evaluate(mismatched, torch.randn(1, 20, 3, 3))


@pytest.mark.parametrize("name", ["two", "with others"])
def test_saved_tensors_may_come_back_in_another_memory_format(name):
    """As `save_on_cpu` returns them."""
    network = draw(name)
    x = torch.randn(2, CHAINS[name][1][0], 9, 7).to(memory_format=torch.channels_last).requires_grad_()
    leaves = [x, *network.parameters()]
    expected = torch.autograd.grad(in_extension(network, x).square().sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        y = in_extension(network, x)
    for found, value in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True):
        assert torch.equal(found, value)
