"""The extension's loops on the CPU against the plain operations: values, gradients, strides, who runs."""

import subprocess
import sys

import pytest
import torch
from helpers import SHAPES, layouts, max_error, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from usf_kernels.ops import (
    additive_coupling,
    affine_coupling,
    eager,
    linear_squared_norm,
    lu_conv1x1,
    native,
    products,
    reference,
    residual_mlp,
    squared_norm,
)
from usf_kernels.ops.dispatch import implementation
from usf_kernels.ops.step import coupling_step

pytestmark = pytest.mark.usefixtures("nan_memory")

LONG = [(2, 34, 300), (3, 70, 9, 31), (1, 300, 2, 2), (700, 37), (2, 3, 1000), (40, 64, 1, 1)]


def draw(shape, affine, split=None):
    split = shape[1] - shape[1] // 2 if split is None else split
    outputs = (2 if affine else 1) * (shape[1] - split)
    x, params = torch.randn(shape), torch.randn((shape[0], outputs, *shape[2:])) * 4
    return x, params, split


def operations(split, channels):
    """Operation, number of params per active channel, call(impl, x, params); channels of the exits."""
    index = torch.randperm(channels)
    scale, bias = 0.5 + torch.rand(channels), torch.randn(channels)

    def additive(inverse):
        return lambda impl, x, shift: (additive_coupling(x, shift, split=split, inverse=inverse, impl=impl),)

    def affine(inverse):
        return lambda impl, x, p: affine_coupling(x, p, split=split, clamp=1.9, inverse=inverse, impl=impl)

    def step(clamp, **exits):
        def call(impl, x, params):
            exit_values = {k: v if k == "index" else v.to(x.dtype) for k, v in exits.items()}
            return coupling_step(x, params, split=split, clamp=clamp, impl=impl, **exit_values)

        return call

    yield from ((False, additive(inverse)) for inverse in (False, True))
    yield from ((True, affine(inverse)) for inverse in (False, True))
    for clamp in (None, 1.9):
        for exits in ({}, {"index": index}, {"scale": scale, "bias": bias}):
            yield clamp is not None, step(clamp, **exits)
        yield clamp is not None, step(clamp, index=index, scale=scale, bias=bias)


def results(call, impl, *inputs):
    """What the operation returns, and the gradients of a weighted sum of it."""
    inputs = [v.detach().requires_grad_() for v in inputs]
    values = call(impl, *inputs)
    summed = [v for v in values if v.requires_grad]
    weights = [torch.linspace(0.3, 2, v.numel(), dtype=v.dtype).view_as(v) for v in summed]
    return [*values, *torch.autograd.grad(summed, inputs, weights)]


def check(call, *inputs):
    """Errors of at most four times the plain operation's, which are next to none where results are few, and
    four roundings more."""
    truth = results(call, "reference", *(v.double() for v in inputs))
    plain = results(call, "reference", *inputs)
    actual = results(call, None, *inputs)
    for a, p, t in zip(actual, plain, truth, strict=True):
        assert a.dtype == torch.float32
        scale = t.abs().max().item() if t.numel() else 0.0
        assert max_error(a, t) <= 4 * max_error(p, t) + 4 * torch.finfo(a.dtype).eps * scale
    with torch.no_grad():  # another way through the code
        for a, b in zip(call(None, *inputs), actual, strict=False):
            assert torch.equal(a, b)


@given(shapes(), st.integers(0, 7))
@settings(max_examples=40)
def test_any_shape_and_split(shape, split):
    split = min(split, shape[1])
    for affine, call in operations(split, shape[1]):
        check(call, *draw(shape, affine, split)[:2])


@pytest.mark.parametrize("shape", LONG)
def test_many_pieces(shape):
    for affine, call in operations(shape[1] // 2, shape[1]):
        check(call, *draw(shape, affine, shape[1] // 2)[:2])


def test_any_strides():
    shape = (2, 6, 4, 3)
    for affine, call in operations(3, 6):
        x, params, _ = draw(shape, affine)
        expected = results(call, None, x, params)
        for name, view in layouts(x):
            for _, other in layouts(params):
                before = view.clone(), other.clone()
                for actual, e in zip(results(call, None, view, other), expected, strict=True):
                    assert max_error(actual, e) < 1e-5, name
                assert torch.equal(view, before[0])
                assert torch.equal(other, before[1])
    for v in (x.expand(2, 6, 4, 3), x[:1].expand(2, 6, 4, 3), x[:, :, :1].expand(2, 6, 4, 3)):
        check(call, v, params)
    negative = torch.complex(x, x).conj().imag
    assert negative.is_neg()
    check(call, negative, params)
    last = x.to(memory_format=torch.channels_last)
    assert call(None, last, params)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [*SHAPES, *LONG])
def test_squared_norm(shape):
    def call(impl, z):
        return (squared_norm(z, impl=impl),)

    z = torch.randn(shape)
    check(call, z)
    for _, view in layouts(z):
        check(call, view)


def test_linear_squared_norm():
    x, matrix, bias = torch.randn(2, 40, 5, 6), torch.randn(40, 40), torch.randn(40)

    def call(impl, x, matrix, bias):
        return (linear_squared_norm(x, matrix, bias, impl=impl),)

    check(call, x, matrix, bias)


def test_second_derivatives():
    for affine, call in operations(2, 4):
        x, params, _ = draw((2, 4, 3), affine)

        def twice(impl, call=call, x=x, params=params):
            inputs = [v.clone().requires_grad_() for v in (x, params)]
            loss = sum(v.square().sum() for v in call(impl, *inputs))
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

        for actual, expected in zip(twice(None), twice("reference"), strict=True):
            assert max_error(actual, expected) < 1e-5 * (1 + expected.abs().max().item())
    z = torch.randn(2, 4, 3, requires_grad=True)
    (first,) = torch.autograd.grad(squared_norm(z).square().sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    u = z.square().sum(1, keepdim=True)
    assert max_error(second, 4 * u + 8 * z * z.sum(1, keepdim=True)) < 1e-4


def test_gradients_of_leaves_have_memory_of_their_own():
    for split in (0, 2):
        x, shift, _ = (v if isinstance(v, int) else v.requires_grad_() for v in draw((1, 4, 3), False, split))
        additive_coupling(x, shift, split=split).sum().backward()
        x.grad.zero_()
        assert torch.equal(shift.grad, torch.ones_like(shift))


def test_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for shape in ((5, 64, 17, 19), (3000, 64)):
            for affine, call in operations(32, 64):
                x, params, _ = draw(shape, affine)
                found = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    found.append([*results(call, None, x, params), squared_norm(x)])
                for other in found[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_values_that_are_not_finite():
    x, params, split = draw((2, 8, 5, 5), True)
    for value in (float("inf"), float("-inf"), float("nan"), 1e9):
        broken = params.clone()
        broken[0, 1, 2, 3], broken[1, 5, 0, 0] = value, value
        for inverse in (False, True):
            found, expected = (
                affine_coupling(x, broken, split=split, inverse=inverse, impl=impl)
                for impl in (None, "reference")
            )
            for a, e in zip(found, expected, strict=True):
                torch.testing.assert_close(a, e, equal_nan=True)
    large = {"split": split, "clamp": 2 * native.LARGEST_CLAMP}
    for impl in (None, "reference"):
        assert affine_coupling(x, params.abs() * 1e3, **large, impl=impl)[0].isinf().any()


def test_who_runs_what():
    x, params, split = draw((2, 4, 3, 3), True)

    def taken(*tensors):
        return implementation("affine_coupling", None, *tensors) is not reference.affine_coupling

    assert taken(x, params)
    assert not taken(x.double(), params)
    assert not taken(x.bfloat16(), params.bfloat16())
    assert not taken(x.to("meta"), params.to("meta"))
    assert implementation("affine_coupling", "reference", x, params) is reference.affine_coupling
    seen = []
    torch.func.vmap(lambda v, p: seen.append(taken(v, p)) or v)(x, params)
    torch.func.grad(lambda v: seen.append(taken(v, params)) or v.sum())(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(taken(torch.autograd.forward_ad.make_dual(x, x), params))
    torch.jit.trace(lambda v: seen.append(taken(v, params)) or v + 1, x, check_trace=False)
    assert not any(seen)
    assert len(seen) == 4

    def call(v):
        y, log_det = affine_coupling(v, params, split=split)
        return squared_norm(additive_coupling(y, y[:, :2], split=split)), log_det

    class Module(torch.nn.Module):
        forward = staticmethod(call)

    exported = torch.export.export(Module(), (x,)).module()
    for run in (torch.compile(call, fullgraph=True), exported):
        for actual, expected in zip(run(x), call(x), strict=True):
            assert max_error(actual, expected) < 1e-5
    norm, tangent = torch.func.jvp(squared_norm, (x,), (x,))
    assert max_error(tangent, 2 * norm) < 1e-5


@pytest.mark.skipif(not products.MULTIPLIES, reason="the extension has no products")
def test_products_are_the_extensions_unless_the_reference_is_asked_for(monkeypatch):
    calls = []
    for name in ("map_product", "row_product"):
        run = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, r=run, **k: calls.append(r) or r(*a, **k))
    x, (lower, upper) = torch.randn(4, 32, 16, 16), torch.randn(2, 32, 32) / 32 + torch.eye(32)
    operations = {
        "lu_conv1x1": lambda **options: lu_conv1x1(x, lower, upper, **options),
        "linear_squared_norm": lambda **options: linear_squared_norm(x, upper, **options),
        "residual_mlp": lambda **options: residual_mlp(x, lower, None, upper, None, **options),
    }
    for name, operation in operations.items():
        with torch.no_grad():
            expected = operation(impl="reference")
            assert not calls, name
            found = operation()
            assert calls, name
        assert max_error(found, expected) < 1e-5
        calls.clear()


def test_steps_take_the_loops(monkeypatch):
    calls = []
    for name in ("couple", "couple_gradient", "uncouple", "uncouple_gradient_"):
        run = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, n=name, r=run, **k: calls.append(n) or r(*a, **k))
    x, params, split = draw((2, 4, 3, 3), True)
    x.requires_grad_()
    coupling_step(x, params, split=split, clamp=2.0)[0].sum().backward()
    assert calls == ["couple", "couple_gradient"]
    x = x.detach()
    y, _ = eager.couple(x, params, split, 2.0)
    grad, zero = torch.ones_like(y), torch.zeros(2)
    expected = reference.affine_coupling_gradients(x, params, split, 2.0, False, grad, zero)
    for undo in (False, True):
        grad, value = torch.ones_like(y), y.clone()
        if undo:
            exits = None, None, None
            value, grad, grad_params, *_ = eager.uncouple(value, grad, zero, params, *exits, split, 2.0)
            assert max_error(value, x) < 1e-5
        else:
            grad, grad_params = eager.uncoupled_gradients(grad, zero, x, params, split, 2.0)
        assert max_error(grad, expected[0]) < 1e-5
        assert max_error(grad_params, expected[1]) < 1e-5
    assert calls[2:] == ["couple", "uncouple_gradient_", "uncouple"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [False, True])
def test_steps_are_undone(affine, layout, dtype):
    """In the extension's loops and, in float64, without them."""
    x, params, split = draw((3, 5, 4, 6), affine)
    x, params = (v.to(dtype, memory_format=layout).requires_grad_() for v in (x, params))
    clamp, index = (1.9, None)[not affine], torch.tensor([3, 0, 4, 1, 2])
    scale, bias = torch.linspace(-1, -2, 5, dtype=dtype), torch.linspace(-1, 1, 5, dtype=dtype)
    scale, bias = scale.requires_grad_(), bias.requires_grad_()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for exits in ((None, None, None), (index, None, None), (None, scale, bias), (index, scale, bias)):
        inputs = [x, params, *(v for v in exits[1:] if v is not None)]
        named = dict(zip(("index", "scale", "bias"), exits, strict=True))
        y, log_det = coupling_step(x, params, split=split, clamp=clamp, **named)
        grad, of_log_det = torch.randn_like(y), torch.randn(3, dtype=dtype)
        loss = (y * grad).sum() + ((log_det * of_log_det).sum() if affine else 0)
        expected = torch.autograd.grad(loss, inputs)
        for strided in (False, True):  # a gradient in the other memory format
            given = grad.mT.contiguous().mT if strided else grad.clone()
            values = (v if v is None else v.detach() for v in (y.clone(), given, of_log_det, params, *exits))
            with torch.no_grad():
                found, *grads = eager.uncouple(*values, split, clamp)
            assert max_error(found, x) < tolerance
            assert [g is None for g in grads[2:]] == [exits[1] is None] * 2
            for actual, truth in zip((g for g in grads if g is not None), expected, strict=True):
                assert max_error(actual, truth) < 10 * tolerance


def test_an_index_that_is_no_permutation_is_left_to_torch():
    x, params, split = draw((2, 4, 3, 3), False)
    index = torch.tensor([0, 0, 1, 3])
    y, _ = coupling_step(x, params, split=split, index=index)
    assert torch.equal(y, coupling_step(x, params, split=split)[0][:, index])


def test_a_missing_extension_is_named():
    code = "import sys; sys.modules['usf_kernels._core'] = None; import usf_kernels"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "its C++ extension is missing" in ended.stderr
    assert "`pip install .` makes it" in ended.stderr
