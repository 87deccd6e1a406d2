"""CaiT's attention a few queries at a time, against timm's."""

import copy
import pickle

import pytest
import torch
from helpers import max_error

from usf_kernels.models import native_layers
from usf_kernels.ops import products

pytest.importorskip("timm")
from timm.models.cait import TalkingHeadAttn

from usf_kernels.models import talking_heads
from usf_kernels.models.talking_heads import CachedTalkingHeads


def draw(channels=24, heads=3, **options):
    module = TalkingHeadAttn(channels, heads, qkv_bias=True, **options).eval().requires_grad_(False)
    ours = copy.deepcopy(module)
    assert not native_layers.use_extension_(ours)  # no convolutions
    assert type(ours) is CachedTalkingHeads
    return module, ours


@pytest.fixture
def calls(monkeypatch):
    found = []
    plain = TalkingHeadAttn.forward
    monkeypatch.setattr(TalkingHeadAttn, "forward", lambda *given: found.append(1) or plain(*given))
    return found


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def is_as_accurate(plain, module, x):
    """Whether the errors are at most twice those of timm's code, which is not called."""
    dtype = module.proj_l.weight.dtype
    truth = copy.deepcopy(plain).double()(x.double())
    x, theirs = x.to(dtype), plain.to(dtype)(x.to(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(TalkingHeadAttn, "forward")
        ours = module(x)
    assert ours.dtype == dtype
    assert ours.shape == theirs.shape
    return max_error(ours, truth) <= 2 * max_error(theirs, truth) + 1e-15


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_values_in_any_number_of_pieces(monkeypatch, rows, dtype):
    monkeypatch.setattr(talking_heads, "_fits", lambda *given: False)
    plain, module = draw()
    x = torch.randn(2, 11, 24)
    monkeypatch.setattr(talking_heads, "CACHED", rows * 3 * 11 * x.to(dtype).element_size())
    assert is_as_accurate(plain, module.to(dtype), x)


@pytest.mark.parametrize("shape", [(2, 37, 48), (1, 784, 768), (3, 1, 240)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_values_in_the_extension(monkeypatch, shape, dtype):
    if dtype == torch.bfloat16 and (not products.MULTIPLIES_BFLOAT16 or products.has_amx()):
        pytest.skip("PyTorch computes this")
    monkeypatch.setattr(talking_heads, "_pytorch", None)
    plain, module = draw(shape[-1], shape[-1] // 48)
    assert is_as_accurate(plain, module.to(dtype), torch.randn(shape))


def test_what_the_extension_takes(monkeypatch):
    def fits(x, heads=2):
        return talking_heads._fits(x, heads)

    x = torch.zeros(1, 5, 96)
    assert fits(x) == products.MULTIPLIES
    assert not fits(x.double())
    assert not fits(x[:0])
    assert not fits(x.half())
    monkeypatch.setattr(products, "MULTIPLIES_BFLOAT16", True)
    monkeypatch.setattr(products, "has_amx", lambda: False)
    assert fits(x.bfloat16()) == products.MULTIPLIES
    assert not fits(x.bfloat16(), heads=4)  # of 8 channels
    monkeypatch.setattr(products, "has_amx", lambda: True)
    assert not fits(x.bfloat16())


def test_no_images():
    _, module = draw()
    assert module(torch.zeros(0, 5, 24)).shape == (0, 5, 24)


def test_under_autocast():
    plain, module = draw()
    x = torch.randn(2, 11, 24)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = module(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert max_error(ours, plain(x)) <= 2 * max_error(theirs, plain(x))


def test_timms_code_where_it_could_make_a_difference(calls):
    plain, module = draw(attn_drop=0.5)
    x = torch.randn(2, 7, 24)

    def is_plain(run):
        calls.clear()
        run()
        return bool(calls)

    assert not is_plain(lambda: module(x))
    assert is_plain(lambda: module(x.clone().requires_grad_()))
    assert is_plain(lambda: module.train()(x))
    module.eval()
    assert is_plain(lambda: torch.func.vmap(module)(x[:, None]))
    seen = []
    handle = module.attn_drop.register_forward_hook(lambda *given: seen.append(given[2].shape))
    assert is_plain(lambda: module(x))
    assert seen == [(2, 3, 7, 7)]
    handle.remove()
    module.proj_w = torch.nn.Sequential(module.proj_w)
    assert is_plain(lambda: module(x))
    module.proj_w = module.proj_w[0]
    assert not is_plain(lambda: module(x))
    exported = torch.export.export(module, (x,)).module()
    assert max_error(exported(x), plain(x)) < 1e-6


def test_layers_come_back_and_are_copied_and_pickled():
    plain, module = draw()
    x = torch.randn(1, 5, 24)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is CachedTalkingHeads
        assert torch.equal(other(x), module(x))
    assert plain.state_dict().keys() == module.state_dict().keys()
    native_layers.use_pytorch_(module)
    assert type(module) is TalkingHeadAttn
    assert torch.equal(module(x), plain(x))
