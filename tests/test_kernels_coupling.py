"""Coupling kernels against the float64 reference: shapes, splits, strides, dtypes, gradients, compilers."""

import pytest
import torch
from helpers import DEVICE, DTYPES, layouts, max_error, shapes
from hypothesis import given, settings

from usf_kernels.ops import additive_coupling, dispatch

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.skipif(pytest.importorskip("triton") is None, reason="no Triton"),
]


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


def test_impl_never_falls_back(monkeypatch):
    x, shift, split = draw((2, 4))
    with pytest.raises(TypeError, match=r"additive_coupling: impl=.triton. is not available: .* float64"):
        additive(x.double(), shift, split)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="it needs CUDA or ROCm tensors, found one on cpu"):
        additive(x.cpu(), shift.cpu(), split)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="impl='triton' is not available: Triton is not installed"):
        additive(x, shift, split)
    assert torch.equal(additive_coupling(x, shift, split=split), exact_additive(x, shift, split))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_additive_compiles_for_changing_shapes(memory_format):
    def step(x, shift):
        return additive(additive(x, shift, 2), shift.tanh(), 2, inverse=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((3, 4, 5, 6), (7, 4, 9, 8)):
            x, shift, _ = draw(shape)
            x = x.to(memory_format=memory_format)
            grads = []
            for call in (compiled, step):
                inputs = [x.detach().requires_grad_(), shift.detach().requires_grad_()]
                y = call(*inputs)
                grads.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
            for actual, expected in zip(*grads, strict=True):
                assert torch.equal(actual, expected)
                assert actual.stride() == expected.stride()
