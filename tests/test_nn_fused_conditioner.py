"""Conditioners with layers that are not what they seem, in an inference form: the same as in the flow."""

import pytest
import torch
from helpers import randomise_
from torch import nn

from usf_kernels.nn import FlowSequence, FlowStep


class Centred(nn.ReLU):
    """Not elementwise."""

    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


class Permuted(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


def hooked():
    activation = nn.ReLU()
    activation.register_forward_hook(lambda _, inputs, output: output - output.mean((2, 3), True))
    return activation


def assert_same(subnet, *, train=False, **options):
    cond = torch.randn(1, options["cond_channels"], 6, 8) if options else None
    for coupling, linear in (("additive", "lu"), ("additive", "permutation"), ("affine", "permutation")):
        steps = [
            FlowStep(8, subnet=subnet, coupling=coupling, linear=linear, zero_init=False, **options)
            for _ in range(2)
        ]
        flow, x = randomise_(FlowSequence(steps)), torch.randn(2, 8, 6, 8)
        if train:
            flow(x)[0].sum().backward()
        fused = flow.eval().fuse()
        with torch.no_grad():
            torch.testing.assert_close(fused(x, cond)[0], flow(x, cond)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", [Centred, hooked])
def test_activations_of_other_kinds(activation):
    assert_same(lambda i, o: nn.Sequential(nn.Conv2d(i, 6, 1), activation(), nn.Conv2d(6, o, 1)))


def test_a_convolution_in_two_places():
    def subnet(c_in, c_out):
        conv = nn.Conv2d(c_in, c_in, 3, padding=1)
        return nn.Sequential(conv, nn.ReLU(), conv, *([] if c_in == c_out else [nn.Conv2d(c_in, c_out, 1)]))

    assert_same(subnet)


@pytest.mark.parametrize("cond_channels", [0, 3])
@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(5, 5, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(5, 5, 1), nn.Upsample(scale_factor=2)],
        [nn.Conv2d(5, 5, 3, stride=2, padding=1), nn.Conv2d(5, 5, 1), nn.Upsample(scale_factor=2)],
        [nn.Conv2d(5, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 3, padding=2)],
        [Permuted(0, 2, 3, 1), nn.Linear(5, 5), Permuted(0, 3, 1, 2)],
    ],
    ids=["pooled", "strided", "unpadded", "permuted"],
)
def test_maps_of_another_size_inside(layers, cond_channels):
    options = {"cond_channels": cond_channels} if cond_channels else {}
    assert_same(lambda i, o: nn.Sequential(nn.Conv2d(i, 5, 1), *layers, nn.Conv2d(5, o, 1)), **options)


@pytest.mark.parametrize("cond_channels", [0, 3])
def test_maps_of_another_size_from_the_first_layer_on(cond_channels):
    options = {"cond_channels": cond_channels} if cond_channels else {}

    def subnet(c_in, c_out):
        first = nn.Conv2d(c_in, 5, 3, stride=2, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.ConvTranspose2d(5, c_out, 2, stride=2))

    assert_same(subnet, **options)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_are_computed_when_called():
    def subnet(c_in, c_out):
        first = torch.nn.utils.weight_norm(nn.Conv2d(c_in, 5, 3, padding=1))
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(5, c_out, 1))

    assert_same(subnet, train=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv2d])
def test_weights_that_are_computed_when_called_and_were_loaded_since(norm, layer):
    size = () if layer is nn.Linear else (1,)

    def subnet(c_in, c_out):
        return nn.Sequential(norm(layer(c_in, 5, *size)), nn.ReLU(), norm(layer(5, c_out, *size)))

    first, second = (FlowSequence([FlowStep(6, subnet=subnet) for _ in range(2)]).eval() for _ in range(2))
    x = torch.randn(3, 6) if layer is nn.Linear else torch.randn(3, 6, 4, 5)
    first = randomise_(first)
    expected = first(x)[0].detach()
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.fuse()(x)[0], expected, rtol=1e-4, atol=1e-4)


def test_hooks_of_linear_layers():
    def subnet(c_in, c_out):
        first = nn.Linear(c_in, 5)
        first.register_forward_hook(lambda _, inputs, output: 2 * output)
        return nn.Sequential(first, nn.ReLU(), nn.Linear(5, c_out))

    flow, x = (
        randomise_(FlowSequence([FlowStep(6, subnet=subnet) for _ in range(2)])).eval(),
        torch.randn(3, 6),
    )
    torch.testing.assert_close(flow.fuse()(x)[0], flow(x)[0].detach(), rtol=1e-4, atol=1e-4)


def test_a_layer_with_a_forward_of_its_own():
    def subnet(c_in, c_out):
        first = nn.Linear(c_in, 5)
        first.forward = lambda x: 2 * nn.Linear.forward(first, x)
        return nn.Sequential(first, nn.ReLU(), nn.Linear(5, c_out))

    flow, x = randomise_(FlowSequence([FlowStep(6, subnet=subnet)])).eval(), torch.randn(3, 6)
    torch.testing.assert_close(flow.fuse()(x)[0], flow(x)[0].detach(), rtol=1e-4, atol=1e-4)
