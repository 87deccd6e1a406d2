"""Kernels that apply a matrix to channels, against float64: shapes, strides, dtypes, gradients, compilers."""

import pytest
import torch
from helpers import DEVICE, DTYPES, SHAPES, assert_within_budget, layouts, max_error, shapes
from hypothesis import given, settings

from usf_kernels.ops import linear_squared_norm, residual_mlp
from usf_kernels.ops.linear import Linear, Outer

pytest.importorskip("triton")
from usf_kernels.kernels import block, linear_norm, products, replay, vendor
from usf_kernels.kernels import outer as outer_file
from usf_kernels.kernels.finish import finish
from usf_kernels.kernels.layout import View, empty_output

pytestmark = pytest.mark.usefixtures("nan_memory")
linear, outer = torch.ops.usf_kernels.linear, torch.ops.usf_kernels.outer


def draw(shape, outputs=None, dtype=torch.float32):
    """x, a matrix and a bias."""
    x, matrix = torch.randn(shape), torch.randn(outputs or shape[1] + 2, shape[1])
    return [t.to(DEVICE, dtype) for t in (x, matrix, torch.randn(len(matrix)))]


def naive_linear(x, matrix, bias):
    y = torch.einsum("nc,bc...->bn...", matrix, x)
    return y if bias is None else y + bias.view(-1, *[1] * (x.ndim - 2))


def naive_norm(x, matrix, bias):
    return naive_linear(x, matrix, bias).square().sum(1)


def naive_outer(a, x):
    return torch.einsum("bmp,bnp->mn", a.flatten(2), x.flatten(2)) if a.ndim > 2 else a.mT @ x


def norm(x, matrix, bias):
    return linear_squared_norm(x, matrix, bias, impl="triton")


def check(kernel, naive, arguments):
    """Within twice the error of straightforward float32 code, plus one rounding of the result."""
    actual = kernel(*arguments)
    eager, truth = (
        naive(*(None if t is None else t.to(d) for t in arguments)) for d in (torch.float, torch.double)
    )
    assert_within_budget(actual, eager.to(actual.dtype), truth)
    return actual


@settings(max_examples=15)
@given(shapes())
def test_any_shape(shape):
    x, matrix, bias = draw(shape)
    y = check(linear, naive_linear, (x, matrix, bias))
    assert y.is_contiguous()
    check(norm, naive_norm, (x, matrix, None))
    check(outer, naive_outer, (y, x))


@pytest.mark.parametrize(("shape", "dtype"), [((2, 70, 33), torch.float32), ((40, 20), torch.bfloat16)])
def test_more_than_one_tile_along_each_axis(shape, dtype):
    x, matrix, bias = draw(shape, outputs=80, dtype=dtype)
    y = check(linear, naive_linear, (x, matrix, bias))
    check(outer, naive_outer, (y, x))
    check(norm, naive_norm, (x, matrix, bias))


def test_sums_in_runs_are_sums(monkeypatch):
    """Positions enough for several runs, and a matrix enough for several of outputs."""
    a, x = torch.randn(9, 3, 65, device=DEVICE), torch.randn(9, 5, 65, device=DEVICE)
    check(outer, naive_outer, (a, x))
    monkeypatch.setattr(products, "power_of_2", lambda n, low, high: 16)
    check(norm, naive_norm, draw((3, 18, 7), outputs=50))


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 6), (2, 5, 3, 4), (2, 3, 2, 3, 2)])
def test_any_strides(shape):
    x, matrix, bias = draw(shape)
    expected = naive_linear(x.double(), matrix.double(), bias.double())
    for name, strided in [("contiguous", x), *layouts(x), ("expanded", x[:1].expand_as(x))]:
        truth = expected if name != "expanded" else expected[:1].expand_as(expected)
        y = linear(strided, matrix.mT.contiguous().mT, bias)
        assert max_error(y, truth) < 1e-5, name
        last = strided.ndim > 2 and strided.stride(1) == 1
        assert (y.movedim(1, -1) if last else y).is_contiguous(), name
        assert max_error(norm(strided, matrix, bias), truth.square().sum(1)) < 1e-4, name
        for other in (y, y.contiguous()):
            assert max_error(outer(other, strided), naive_outer(truth, strided.double())) < 1e-4, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_dtypes(dtype, other):
    x, matrix, bias = draw((2, 9, 5))
    x, matrix = x.to(dtype), matrix.to(other)
    assert check(linear, naive_linear, (x, matrix, bias)).dtype == torch.promote_types(dtype, other)
    u = check(norm, naive_norm, (x, matrix, bias))
    assert u.dtype == torch.float32
    assert check(outer, naive_outer, (x, x.to(other))).dtype == torch.float32


def test_offsets_of_64_bits_walk_the_same(monkeypatch):
    arguments = draw((2, 19, 4, 5))
    expected = linear(*arguments), norm(*arguments), outer(arguments[0], arguments[0])
    monkeypatch.setattr(View, "is_wide", lambda self: True)
    replay.forget()
    actual = linear(*arguments), norm(*arguments), outer(arguments[0], arguments[0])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


KINDS = ("ieee", "tf32", "half")


def test_whatever_is_made_of_the_vendors_products_is_ours(monkeypatch):
    for shape in SHAPES:
        x, matrix, bias = draw(shape)
        hidden = torch.randn(3, *x.shape[2:], device=DEVICE).expand(len(x), 3, *x.shape[2:])
        first, last = torch.randn(3, shape[1], device=DEVICE), torch.randn(shape[1], 3, device=DEVICE)
        calls = (
            lambda x, m=matrix, b=bias: linear_squared_norm(x, m, b, impl="triton"),
            lambda x, a=first, b=last, h=hidden: residual_mlp(
                x, a, None, b, None, bias_map=h, inverse=True, impl="triton"
            ),
            lambda x: outer(x, x),
        )
        for strided in (x, *(v for _, v in layouts(x))):
            ours = [call(strided) for call in calls]
            monkeypatch.setattr(vendor, "VENDOR_CHANNELS", dict.fromkeys(KINDS, (1, 1)))
            monkeypatch.setattr(outer_file, "_vendor_is_faster", lambda *_: True)
            for file in (products, block, outer_file, linear_norm):
                monkeypatch.setattr(file, "launch", None)
            replay.forget()
            theirs = [call(strided) for call in calls]
            monkeypatch.undo()
            replay.forget()
            for found, expected in zip(theirs, ours, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_the_vendors_product_is_ours(monkeypatch):
    for shape in SHAPES:
        for bias in (True, False):
            x, matrix, b = draw(shape)
            for strided in (x, *(v for _, v in layouts(x))):
                ours = products.linear(strided, matrix, b if bias else None)
                monkeypatch.setattr(vendor, "VENDOR_CHANNELS", dict.fromkeys(KINDS, (1, 1)))
                monkeypatch.setattr(products, "linear", None)
                theirs = linear(strided, matrix, b if bias else None)
                monkeypatch.undo()
                assert max_error(theirs, ours.double()) < 1e-5
                assert theirs.stride() == ours.stride()


def test_tf32_only_where_torch_allows_it():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, precision in ((False, "ieee"), (True, "tf32")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert products.product_precision() == precision
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def derivatives(call, arguments, dtype, weight):
    """The result, its gradients, and theirs."""
    leaves = [a.to(dtype).requires_grad_() for a in arguments]
    y = call(*leaves)
    first = torch.autograd.grad((weight.to(dtype) * y * y).sum(), leaves, create_graph=True)
    return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]


@pytest.mark.parametrize("name", ["linear", "outer", "norm"])
def test_gradients_to_second_order(name):
    # Several draws at once: what eager errs in one of them is a matter of luck when a result has six values.
    results = [[], [], []]
    for _ in range(8):
        x, matrix, bias = draw((2, 4, 3, 2))
        calls = {
            "linear": (Linear.apply, naive_linear, (x, matrix, bias)),
            "outer": (Outer.apply, naive_outer, (torch.randn(2, 3, 3, 2, device=DEVICE), x)),
            "norm": (norm, naive_norm, (x, matrix, bias)),
        }
        kernel, naive, arguments = calls[name]
        weight = torch.randn_like(naive(*arguments))
        ways = (kernel, torch.float32), (naive, torch.float32), (naive, torch.float64)
        for result, (call, dtype) in zip(results, ways, strict=True):
            result.append(derivatives(call, arguments, dtype, weight))
    draws_of_each = [[torch.stack(values) for values in zip(*result, strict=True)] for result in results]
    for actual, eager, truth in zip(*draws_of_each, strict=True):
        assert_within_budget(actual, eager, truth, factor=4)


def test_only_the_gradients_asked_for():
    x, matrix, bias = draw((2, 4, 3))
    for call in (Linear.apply, norm):
        (grad,) = torch.autograd.grad(call(x, matrix.requires_grad_(), bias).sum(), matrix)
        assert grad.shape == matrix.shape
        matrix.requires_grad_(False)
        (grad,) = torch.autograd.grad(call(x, matrix, bias.requires_grad_()).sum(), bias)
        assert grad.shape == bias.shape
        bias.requires_grad_(False)


def test_are_torch_ops():
    for shape in ((2, 5), (2, 5, 3, 4), (0, 4, 3)):
        x, matrix, bias = draw(shape)
        for strided in (x, *(v for name, v in layouts(x) if name in ("reversed", "channels-last slice"))):
            torch.library.opcheck(linear.default, (strided, matrix, bias))
            torch.library.opcheck(outer.default, (strided, x))
        torch.library.opcheck(torch.ops.usf_kernels.linear_squared_norm.default, (x, matrix, None))


def test_errors():
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"matrix: expected shape \(N, C\) = \(N, 3\), found \(3, 2\)"):
        linear_squared_norm(x, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"bias: expected shape \(5,\) = \(N,\), found \(3,\)"):
        linear_squared_norm(x, torch.ones(5, 3), torch.ones(3))
    with pytest.raises(TypeError, match=r"matrix: expected float32.*found torch.int64"):
        linear_squared_norm(x, torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="found float64"):
        linear_squared_norm(x.double(), torch.ones(5, 3), impl="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
def test_what_stands_around_a_product(dtype, relu):
    for shape in ((2, 6, 5, 4), (3, 7), (2, 4, 4, 4), (0, 3, 2)):
        x, hidden = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
        bias = torch.randn(shape[1], device=DEVICE).to(dtype)
        for b, h in ((bias, None), (None, hidden), (bias, hidden), (None, None)):
            for _, strided in (("contiguous", x), *layouts(x)):
                exact = strided.double()
                if b is not None:
                    exact = exact - b.double().view(-1, *[1] * (x.ndim - 2))
                exact = exact if h is None else exact + h.double()
                exact = exact.relu() if relu else exact
                y = empty_output(strided, dtype)
                assert finish(strided, b, h, relu, -1, y) is y
                assert max_error(y, exact) <= 2 * torch.finfo(dtype).eps * max(
                    1, float(exact.abs().max()) if exact.numel() else 0
                )
        assert finish(x, bias, None, relu, 1, x) is x  # in place
