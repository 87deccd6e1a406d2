"""Layers in the extension: against float64, in any memory, and left to PyTorch where they have to be."""

import copy
import pickle

import pytest
import torch
from helpers import layouts, max_error
from torch import nn

from usf_kernels.models import FastFlow, create_backbone, native_layers
from usf_kernels.models.native_layers import (
    NARROWEST_PAIRS,
    PackedLinear,
    TiledConv2d,
    use_extension_,
    use_pytorch_,
)
from usf_kernels.nn.stage_extension import layer_of
from usf_kernels.ops.products import MULTIPLIES, MULTIPLIES_BFLOAT16, has_amx

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.skipif(not MULTIPLIES, reason="the extension has no products here"),
]


def draw(inputs=24, outputs=40, bias=True):
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
    tiled = copy.copy(conv)  # with the same parameters
    assert use_extension_(tiled)
    return conv, tiled


def rms(x):
    return x.square().mean().sqrt()


def runs_in_tiles(conv, x):
    """The result, of which it is known that the extension made it."""
    conv._layer = None
    y = conv(x)
    assert conv._layer is not None
    return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 24, 9, 7), (1, 24, 1, 1), (3, 24, 16, 32), (0, 24, 4, 4), (2, 24, 1, 9)]
)
@torch.no_grad()
def test_matches_float64(shape, bias):
    conv, tiled = draw(bias=bias)
    x = torch.randn(shape)
    truth = copy.deepcopy(conv).double()(x.double())
    for _, view in [("contiguous", x), *layouts(x)]:
        y = runs_in_tiles(tiled, view)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert max_error(y, truth) < 2e-6


@pytest.mark.parametrize("shape", [(2, 40, 9, 9), (1, 300, 12, 31), (3, 64, 22, 16)])
@torch.no_grad()
def test_large_tiles_are_nearly_as_accurate_as_sums_over_taps(shape):
    conv, tiled = draw(shape[1], 64)
    x = torch.randn(shape)
    truth = copy.deepcopy(conv).double()(x.double())
    y, plain = runs_in_tiles(tiled, x), conv(x)
    assert rms(y - truth) < 5 * rms(plain - truth)
    assert max_error(y, truth) < 12 * max_error(plain, truth)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    _, tiled = draw(64, 64)
    for side in (8, 20):  # small tiles, large ones
        x = torch.randn(9, 64, side, side)
        assert torch.equal(tiled(x)[4:5], tiled(x[4:5]))


@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits():
    _, tiled = draw(64, 64)
    x, threads = torch.randn(2, 64, 20, 22), torch.get_num_threads()
    try:
        results = [torch.set_num_threads(n) or tiled(x) for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], y) for y in results[1:])


def test_gradients_other_precisions_and_compilers_are_pytorchs():
    conv, tiled = draw()
    x = torch.randn(2, 24, 6, 6)
    y = tiled(x)
    assert tiled._layer is None
    y.sum().backward()
    assert tiled.weight.grad is not None
    tiled.requires_grad_(False)
    assert tiled(x.requires_grad_()).requires_grad
    with torch.no_grad():
        wide = copy.deepcopy(tiled).double()
        assert torch.equal(wide(x.double()), copy.deepcopy(conv).double()(x.double()))
        torch._dynamo.reset()
        compiled = torch.compile(tiled, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), conv(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert tiled(x).dtype == torch.bfloat16
        assert tiled._layer is None
        assert wide._layer is None
    with pytest.raises(RuntimeError, match="channels"):
        tiled(torch.randn(2, 23, 6, 6))


@pytest.mark.skipif(not MULTIPLIES_BFLOAT16, reason="needs a processor that multiplies bfloat16")
@torch.no_grad()
def test_bfloat16_is_the_extensions_where_pytorch_has_no_amx(monkeypatch):
    torch.manual_seed(0)
    conv = nn.Conv2d(NARROWEST_PAIRS, NARROWEST_PAIRS + 2, 3, padding=1).bfloat16()
    linear, in_words = nn.Linear(96, 70).bfloat16(), nn.Linear(96, 64).bfloat16()
    use_extension_(nn.Sequential(conv, linear, in_words))
    maps = torch.randn(2, NARROWEST_PAIRS, 7, 9).bfloat16()
    rows = torch.randn(150, 96).bfloat16()
    cases = [(conv, maps), (linear, rows), (in_words, rows), (in_words, rows.mT.contiguous().mT)]
    for layer, x in cases[1:] if has_amx() else cases:  # below, a convolution is refused
        layer._layer = None
        truth = copy.deepcopy(layer).double()(x.double())
        monkeypatch.setattr(native_layers, "has_amx", lambda: True)
        pytorchs = layer(x)
        assert layer._layer is None
        monkeypatch.setattr(native_layers, "has_amx", lambda: False)
        found = layer(x)
        assert layer._layer is not None
        assert found.dtype == torch.bfloat16
        assert found.shape == truth.shape
        # Going to Winograd's points sums numbers, and so their roundings.
        assert (found - truth).norm() < 3 * (pytorchs - truth).norm() < 0.01 * truth.norm()


@pytest.mark.skipif(not has_amx(), reason="needs a processor with AMX, for which tiles are not transformed")
def test_a_convolution_of_words_is_refused():
    conv = nn.Conv2d(NARROWEST_PAIRS, NARROWEST_PAIRS + 2, 3, padding=1).bfloat16()
    rows = torch.randn(7 * 9, NARROWEST_PAIRS)
    with pytest.raises(ValueError, match="convolution of words"):
        layer_of(conv.weight, conv.bias).run(rows, rows.new_empty(7 * 9, NARROWEST_PAIRS + 2), 7, 9, 1)


@torch.no_grad()
def test_narrow_convolutions_in_bfloat16_are_pytorchs():
    conv = nn.Conv2d(NARROWEST_PAIRS, 64, 3, padding=1).bfloat16()
    assert use_extension_(conv)
    conv(torch.randn(1, NARROWEST_PAIRS, 5, 5).bfloat16())
    assert conv._layer is None


@torch.no_grad()
def test_what_happens_to_the_weights_is_seen():
    conv, tiled = draw()
    x = torch.randn(1, 24, 6, 6)
    before = tiled(x)
    conv.weight.mul_(2)
    conv.bias.zero_()
    assert max_error(tiled(x), conv(x)) < 1e-5
    assert max_error(tiled(x), before) > 0.1
    for other in (copy.deepcopy(tiled), pickle.loads(pickle.dumps(tiled))):
        assert torch.equal(other(x), tiled(x))
    tiled.load_state_dict(draw()[0].state_dict())
    assert max_error(tiled(x), conv(x)) < 1e-5  # which shares its parameters


def test_what_is_replaced():
    network = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding="same", bias=False),
        nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3)),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1)),
    )
    before = network.state_dict()
    assert use_extension_(network)
    tiled = [name for name, module in network.named_modules() if isinstance(module, TiledConv2d)]
    assert tiled == ["0", "1"]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not use_extension_(network)
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        y = network[0](x)
    use_pytorch_(network)
    assert not any(isinstance(module, TiledConv2d) or hasattr(module, "_layer") for module in network)
    assert max_error(network[0](x), y) < 1e-5


def fused_matches_float64(backbone, images, kind, *, count, tolerance):
    """And its `count` layers of this kind have all run in the extension. The backbone is left in float64."""
    fused = backbone.fuse()
    layers = [module for module in fused.modules() if isinstance(module, kind)]
    assert len(layers) == count
    for ours, truth in zip(fused(images), backbone.double()(images.double()), strict=True):
        assert max_error(ours, truth) < tolerance * truth.abs().max()
    assert all(layer._layer is not None for layer in layers)


def test_fused_backbones_have_them():
    torch.manual_seed(0)
    backbone = create_backbone("resnet18", out_indices=(1, 2), weights=None)
    for parameter in backbone.parameters():  # its last norms start as zeros, which would hide convolutions
        parameter.data.add_(0.1 * torch.rand_like(parameter))
    images = torch.rand(2, 3, 70, 66)
    fused_matches_float64(backbone, images, TiledConv2d, count=7, tolerance=2e-5)
    narrow = backbone.float().fuse(torch.bfloat16)
    assert narrow(images)[0].dtype == torch.bfloat16


def draw_linear(inputs=48, outputs=70, bias=True):
    linear = nn.Linear(inputs, outputs, bias=bias)
    packed = copy.copy(linear)
    assert not use_extension_(packed)  # no convolution
    assert type(packed) is PackedLinear
    return linear, packed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(197, 48), (2, 99, 48), (2, 3, 50, 48), (1, 1000, 48)])
@torch.no_grad()
def test_linear_layers_match_float64(shape, bias):
    linear, packed = draw_linear(bias=bias)
    x = torch.randn(shape)
    truth = copy.deepcopy(linear).double()(x.double())
    assert max_error(packed(x), truth) < 2e-6
    assert packed._layer is not None
    assert max_error(packed(x.mT.contiguous().mT), truth) < 2e-6
    wide = torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., :48]
    assert max_error(packed(wide), truth) < 2e-6


def test_linear_layers_of_few_rows_with_gradients_or_in_other_precisions_are_pytorchs():
    linear, packed = draw_linear()
    x = torch.randn(300, 48)
    packed(x).sum().backward()
    with torch.no_grad():
        for few in (x[:3], x[:0], x[0]):
            assert torch.equal(packed(few), linear(few))
        assert torch.equal(
            copy.deepcopy(packed).double()(x.double()), copy.deepcopy(linear).double()(x.double())
        )
        torch._dynamo.reset()
        assert torch.equal(torch.compile(packed, fullgraph=True, backend="eager")(x), linear(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(x).dtype == torch.bfloat16
        assert packed._layer is None
        with pytest.raises(RuntimeError, match="shape"):
            packed(torch.randn(300, 47))


@torch.no_grad()
def test_what_happens_to_linear_weights_is_seen():
    linear, packed = draw_linear()
    x = torch.randn(300, 48)
    before = packed(x)
    linear.weight.mul_(2)  # whose parameters it shares
    assert max_error(packed(x), linear(x)) < 1e-5
    assert max_error(packed(x), before) > 0.1
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x), packed(x))


def test_which_linear_layers_are_replaced():
    def hook(module, inputs, output):
        return output

    hooked = nn.Linear(64, 64)
    hooked.register_forward_hook(hook)
    network = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16), hooked, nn.Bilinear(64, 64, 64))
    assert not use_extension_(network)
    assert [type(module) is PackedLinear for module in network] == [True, False, False, False]
    use_pytorch_(network)
    assert type(network[0]) is nn.Linear


def test_fused_transformers_have_them():
    torch.manual_seed(0)
    backbone = create_backbone("deit_tiny_patch16_224", out_indices=(2,), weights=None)
    fused_matches_float64(backbone, torch.rand(1, 3, 224, 224), PackedLinear, count=12, tolerance=1e-5)


@pytest.mark.parametrize(("make", "shape"), [(draw, (1, 24, 6, 6)), (draw_linear, (300, 48))])
def test_other_parameters_are_seen(make, shape):
    module, x = make()[1], torch.randn(shape)
    with torch.no_grad():
        module(x)
    for _ in range(20):  # the memory of one may be that of the next
        module.weight = nn.Parameter(torch.randn_like(module.weight), requires_grad=False)
        module.bias = nn.Parameter(torch.randn_like(module.bias), requires_grad=False)
        truth = copy.deepcopy(module).double()(x.double())
        with torch.no_grad():
            assert max_error(module(x), truth) < 1e-4
    module.bias.requires_grad_()
    assert module(x).requires_grad


@torch.inference_mode()
def test_parameters_of_inference_mode_are_pytorchs():
    plain, module = draw()
    x = torch.randn(1, 24, 6, 6)
    assert torch.equal(module(x), plain(x))
    plain.weight.normal_()  # of which nothing tells
    assert torch.equal(module(x), plain(x))


def test_backbones_fused_in_inference_mode_run_in_the_extension():
    model = FastFlow(create_backbone("test_resnet.r160_in1k", weights=None)).eval()
    with torch.inference_mode():
        fused = model.fuse()
    assert not any(p.is_inference() for p in (*fused.parameters(), *fused.buffers()))
    assert not any(p.requires_grad for p in fused.parameters())


@torch.no_grad()
def test_a_layer_whose_weight_was_replaced_by_a_wider_one_takes_what_that_takes():
    linear = nn.Linear(64, 128)
    assert use_extension_(linear) is False
    assert type(linear) is PackedLinear
    linear.weight = nn.Parameter(torch.randn(128, 192))
    with pytest.raises(RuntimeError, match="shape"):
        linear(torch.randn(4096, 64))
    x = torch.randn(4096, 192)
    assert max_error(linear(x), nn.functional.linear(x, linear.weight, linear.bias)) < 1e-4
