"""Coupling kernels against the float64 reference: shapes, splits, strides, dtypes, gradients, compilers."""

import itertools
import math

import pytest
import torch
from helpers import DEVICE, DTYPES, assert_within_budget, layouts, max_error, shapes
from hypothesis import given, settings

from usf_kernels.ops import additive_coupling, dispatch, masked_additive_coupling

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_memory")


def draw(shape, per_channel=1, split=None, dtype=torch.float32):
    """x, a conditioner's output for it, and the split: the modules' unless one is given."""
    split = shape[1] - shape[1] // 2 if split is None else split
    other = (shape[0], per_channel * (shape[1] - split), *shape[2:])
    x, params = torch.randn(shape, device=DEVICE), 3 * torch.randn(other, device=DEVICE)
    return x.to(dtype), params.to(dtype), split


def additive(x, shift, split, inverse=False):
    return additive_coupling(x, shift, split=split, inverse=inverse, impl="triton")


def exact_additive(x, shift, split, inverse=False):
    """In float64, rounded once to the promoted dtype: what a sum in float32 must give to the bit."""
    y = additive_coupling(x.double(), shift.double(), split=split, inverse=inverse)
    return y.to(torch.promote_types(x.dtype, shift.dtype))


@settings(max_examples=10)
@given(shapes())
def test_additive_at_any_shape_and_split(shape):
    for split in {0, 1, shape[1] // 2, shape[1]}:
        x, shift, _ = draw(shape, split=split)
        for inverse in (False, True):
            assert torch.equal(additive(x, shift, split, inverse), exact_additive(x, shift, split, inverse))


@pytest.mark.parametrize("shape", [(2, 5), (3, 4, 6), (2, 6, 3, 4), (2, 3, 2, 3, 2)])
def test_additive_at_any_strides(shape):
    x, shift, split = draw(shape)
    expected = exact_additive(x, shift, split)
    for name, strided in [("contiguous", x), *layouts(x)]:
        for other_name, other in [("contiguous", shift), *layouts(shift)]:
            y = additive(strided, other, split)
            assert torch.equal(y, expected), (name, other_name)
            assert y.stride(1) == 1 or strided.stride(1) != 1
    batch = x[:1].expand_as(x)
    assert torch.equal(additive(batch, shift, split), exact_additive(batch, shift, split))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_additive_dtypes(dtype, other):
    x, shift, split = draw((2, 9, 5))
    x, shift = x.to(dtype), shift.to(other)
    y = additive(x, shift, split)
    assert torch.equal(y, exact_additive(x, shift, split))
    assert y.dtype == torch.promote_types(dtype, other)


@pytest.mark.parametrize("inverse", [False, True])
def test_additive_gradients_are_the_references(inverse):
    x, shift, split = draw((2, 5, 3))
    inputs = [x.to(torch.bfloat16).requires_grad_(), shift.requires_grad_()]
    weight = torch.randn(2, 5, 3, device=DEVICE)
    grads = []
    for impl in ("triton", "reference"):
        y = additive_coupling(*inputs, split=split, inverse=inverse, impl=impl)
        loss = (weight * y * y).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        grads.append([*first, *torch.autograd.grad(first[1].square().sum(), inputs)])
    for actual, expected in zip(*grads, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_additive_is_a_torch_op():
    for shape in ((2, 5), (2, 4, 3, 3), (0, 4, 3)):
        x, shift, split = draw(shape)
        for _, strided in list(layouts(x))[-2:]:
            torch.library.opcheck(torch.ops.usf_kernels.additive_coupling, (strided, shift, split, False))


def test_additive_under_functorch():
    x, shift, split = draw((3, 4))
    jacobian = torch.func.jacrev(lambda v: additive(v, shift, split))(x)
    assert max_error(jacobian.reshape(12, 12), torch.eye(12, device=DEVICE)) == 0


def masks(shape):
    """A checkerboard, a channel mask, one per image, a full one and one number; bool and floating."""
    positions = torch.arange(math.prod(shape[2:])).view(shape[2:])
    channels = torch.rand(shape[1], *[1] * len(shape[2:]))
    kinds = (positions % 2 == 0, channels, torch.rand(shape[0], *[1] * (len(shape) - 1)) < 0.5)
    kinds += (torch.rand(shape).to(torch.bfloat16), torch.tensor(0.25), torch.rand(shape[-1:]))
    return [mask.to(DEVICE) for mask in kinds]


def masked(x, shift, mask, inverse=False, impl="triton"):
    return masked_additive_coupling(x, shift, mask, inverse=inverse, impl=impl)


@pytest.mark.parametrize(
    "shape", [(2, 5), (3, 4, 6), (2, 6, 3, 4), (2, 3, 2, 3, 2), (0, 4, 3, 3), (1, 3, 1, 1)]
)
def test_masked_at_any_strides(shape):
    x, _, _ = draw(shape)
    shift = 3 * torch.randn(shape, device=DEVICE)
    pairs = itertools.cycle(zip(layouts(x), list(layouts(shift))[::-1], strict=True))
    for mask, ((_, strided), (_, other)) in zip(masks(shape), pairs, strict=False):
        truth = masked(x.double(), shift.double(), mask, impl="reference")
        eager = masked(x, shift, mask.float(), impl="reference")
        y = masked(strided, other, mask)
        assert_within_budget(y, eager, truth)
        assert max_error(masked(y, shift, mask, inverse=True), x) < 2e-6


@settings(max_examples=10)
@given(shapes())
def test_masked_at_any_shape(shape):
    x, _, _ = draw(shape)
    for mask in masks(shape)[:2]:
        y = masked(x, x.cos(), mask)
        assert max_error(y, masked(x.double(), x.cos().double(), mask, impl="reference")) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_masked_dtypes(dtype, other):
    x, _, _ = draw((2, 9, 5))
    x, shift = x.to(dtype), x.sin().to(other)
    mask = masks(x.shape)[0]
    y = masked(x, shift, mask)
    assert y.dtype == torch.promote_types(dtype, other)
    assert torch.equal(y, masked(x.double(), shift.double(), mask, impl="reference").to(y.dtype))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_masked_gradients_are_the_references(kind, inverse):
    x, _, _ = draw((2, 5, 3))
    mask = masks(x.shape)[kind]
    inputs = [x.requires_grad_(), x.detach().cos().requires_grad_()]
    if mask.is_floating_point():
        inputs.append(mask.float().requires_grad_())
    grads = []
    for impl in ("triton", "reference"):
        y = masked(*inputs[:2], inputs[2] if len(inputs) > 2 else mask, inverse, impl)
        loss = y.pow(3).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        grads.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_masked_is_a_torch_op():
    for shape in ((2, 4, 3, 3), (0, 5)):
        x, _, _ = draw(shape)
        for maybe_x in (x, None):
            torch.library.opcheck(
                torch.ops.usf_kernels.masked_shift, (maybe_x, x.sin(), masks(shape)[0], True)
            )


def test_impl_never_falls_back(monkeypatch):
    x, shift, split = draw((2, 4))
    with pytest.raises(TypeError, match=r"additive_coupling: impl=.triton. is not available: .* float64"):
        additive(x.double(), shift, split)
    monkeypatch.setattr(dispatch, "_check_triton", lambda op, tensors: None)
    with pytest.raises(
        ValueError, match=r"additive_coupling: expected all tensors on one device, found .* and meta"
    ):
        additive(x, shift.to("meta"), split)
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="it needs CUDA or ROCm tensors, found one on cpu"):
        additive(x.cpu(), shift.cpu(), split)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="impl='triton' is not available: Triton is not installed"):
        additive(x, shift, split)
    assert torch.equal(additive_coupling(x, shift, split=split), exact_additive(x, shift, split))


def test_additive_compiles_for_changing_shapes():
    def step(x, shift):
        return additive(additive(x, shift, 2), shift.tanh(), 2, inverse=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((3, 4, 5, 6), (7, 4, 9, 8)):
            x, shift, _ = draw(shape)
            x = x.to(memory_format=torch.channels_last)
            grads = []
            for call in (compiled, step):
                inputs = [x.detach().requires_grad_(), shift.detach().requires_grad_()]
                y = call(*inputs)
                grads.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
            for actual, expected in zip(*grads, strict=True):
                assert torch.equal(actual, expected)
                assert actual.stride() == expected.stride()
