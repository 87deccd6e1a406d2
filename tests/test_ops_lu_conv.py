"""LU 1x1 convolution against NumPy, its inverse, log-det, strides, dtypes and gradients."""

import numpy as np
import pytest
import torch
from helpers import DTYPES, SHAPES, assert_within_budget, jacobian_log_det, layouts, max_error, shapes
from hypothesis import given
from torch.autograd import gradcheck, gradgradcheck

from usf_kernels.ops import lu_conv1x1, lu_log_det, matrices

pytestmark = pytest.mark.usefixtures("nan_memory")


def draw(channels, dtype=torch.float64):
    """Full matrices with NaN wherever they must not be read, and a bias."""
    lower, upper = torch.randn(2, channels, channels, dtype=dtype) / channels
    signs = torch.randn(channels, dtype=dtype).sign()
    upper = upper.triu(1) + torch.diag(signs * torch.empty(channels, dtype=dtype).uniform_(0.5, 2))
    read = torch.ones(channels, channels).tril(-1).bool()
    return (
        lower.masked_fill(~read, torch.nan),
        upper.masked_fill(read, torch.nan),
        torch.randn(channels).to(dtype),
    )


def matrix(lower, upper):
    eye = np.eye(lower.shape[0])
    strict = np.where(np.tri(len(eye), k=-1, dtype=bool), lower.double().numpy(), 0)
    return (strict + eye) @ np.where(np.tri(len(eye), dtype=bool).T, upper.double().numpy(), 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_numpy(shape):
    x, (lower, upper, bias) = torch.randn(shape, dtype=torch.float64), draw(shape[1])
    a = matrix(lower, upper)
    expected = np.einsum("ij,bj...->bi...", a, x.numpy())
    for b in (bias, None):
        offset = 0 if b is None else b.numpy().reshape(-1, *[1] * (len(shape) - 2))
        y = lu_conv1x1(x, lower, upper, b)
        np.testing.assert_allclose(y.numpy(), expected + offset, rtol=1e-12, atol=1e-12)
        back = lu_conv1x1(x, lower, upper, b, inverse=True)
        solved = np.einsum("ij,bj...->bi...", np.linalg.inv(a), x.numpy() - offset)
        np.testing.assert_allclose(back.numpy(), solved, rtol=1e-11, atol=1e-11)


@given(shapes())
def test_any_shape_inverts(shape):
    x, (lower, upper, bias) = torch.randn(shape, dtype=torch.float64), draw(shape[1])
    y = lu_conv1x1(x, lower, upper, bias)
    assert y.shape == x.shape
    assert max_error(lu_conv1x1(y, lower, upper, bias, inverse=True), x) < 1e-10


def test_log_det_is_the_jacobians():
    lower, upper, bias = draw(4)
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    forward = jacobian_log_det(lambda v: lu_conv1x1(v, lower.nan_to_num(), upper.nan_to_num(), bias), x)
    assert max_error(lu_log_det(upper, 6), forward[0]) < 1e-12
    assert lu_log_det(upper, 6).shape == ()
    assert lu_log_det(upper, 0) == 0
    assert lu_log_det(torch.zeros(2, 2), 3) == -torch.inf
    assert lu_log_det(upper.bfloat16(), 2).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 37, 9, 5), (3, 64, 11), (7, 13)])
def test_dtypes_within_budget(dtype, inverse, shape):
    x, (lower, upper, bias) = torch.randn(shape).to(dtype), draw(shape[1])
    lower, upper, bias = lower.nan_to_num().to(dtype), upper.nan_to_num().to(dtype), bias.to(dtype)

    def naive(x, lower, upper, bias):
        offset = bias.view(-1, *[1] * (x.ndim - 2))
        low = lower + torch.eye(shape[1], dtype=lower.dtype)
        if not inverse:
            return torch.einsum("ij,bj...->bi...", low @ upper, x) + offset
        y = (x - offset).transpose(0, 1).reshape(shape[1], -1)
        y = torch.linalg.solve_triangular(low, y, upper=False, unitriangular=True)
        y = torch.linalg.solve_triangular(upper, y, upper=True)
        return y.view(shape[1], shape[0], *shape[2:]).transpose(0, 1)

    arguments = (x, lower, upper, bias)
    y = lu_conv1x1(*arguments, inverse=inverse)
    eager = naive(*(t.float() for t in arguments)).to(dtype)
    truth = naive(*(t.double() for t in arguments))
    assert y.dtype == dtype
    assert_within_budget(y, eager, truth)


def test_mixed_dtypes_promote_and_autocast_stays_exact():
    x, (lower, upper, bias) = torch.randn(2, 5, 3, 3), draw(5, torch.float32)
    truth = lu_conv1x1(x.double(), lower.double(), upper.double(), bias.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for v in (x, x.flatten(2), x[..., 0, 0]):
            y = lu_conv1x1(v, lower, upper, bias)
            assert y.dtype == torch.float32
            assert max_error(lu_conv1x1(y, lower, upper, bias, inverse=True), v) < 1e-4
    y = lu_conv1x1(x.bfloat16(), lower, upper, bias)
    assert y.dtype == torch.float32
    assert max_error(y, truth) < 0.05


def test_any_strides_and_memory_format():
    x, (lower, upper, bias) = torch.randn(2, 5, 3, 4, dtype=torch.float64), draw(5)
    for v in (x, x.flatten(2), x[..., 0].unsqueeze(-1).unsqueeze(-1).expand(2, 5, 3, 2, 2)):
        for inverse in (False, True):
            expected = lu_conv1x1(v, lower, upper, bias, inverse=inverse)
            for name, strided in layouts(v):
                before = strided.clone()
                y = lu_conv1x1(strided, lower.mT.contiguous().mT, upper, bias, inverse=inverse)
                assert max_error(y, expected) < 1e-12, name
                assert torch.equal(strided, before)
    for shape in ((2, 5, 3, 4), (2, 5, 3, 4, 2)):
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x = torch.randn(shape, dtype=torch.float64)
        assert lu_conv1x1(x, lower, upper, bias).is_contiguous()
        y = lu_conv1x1(x.to(memory_format=last), lower, upper, bias, inverse=True)
        assert y.is_contiguous(memory_format=last)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2), (1, 3, 2, 1)])
def test_gradients(inverse, shape):
    lower, upper, bias = (t.nan_to_num().requires_grad_() for t in draw(3))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def fn(*args):
        return lu_conv1x1(*args, inverse=inverse)

    assert gradcheck(fn, (x, lower, upper, bias))
    assert gradgradcheck(fn, (x, lower, upper, bias))
    assert gradcheck(lambda u: lu_log_det(u, 4), (upper,))


@pytest.mark.parametrize("inverse", [False, True])
def test_gradient_is_zero_where_nothing_is_read(inverse):
    lower, upper, bias = (t.nan_to_num().requires_grad_() for t in draw(4))
    lu_conv1x1(
        torch.randn(2, 4, 3, 3).double(), lower, upper, bias, inverse=inverse
    ).square().sum().backward()
    assert lower.grad.triu().abs().max() == 0
    assert upper.grad.tril(-1).abs().max() == 0
    assert lower.grad.tril(-1).abs().min() + upper.grad.diagonal().abs().min() > 0 or inverse


def test_errors():
    x, eye = torch.ones(2, 3, 4), torch.eye(3)
    with pytest.raises(ValueError, match=r"lower: expected shape \(3, 3\) = \(C, C\), found \(3, 2\)"):
        lu_conv1x1(x, eye[:, :2], eye)
    with pytest.raises(ValueError, match=r"upper: expected shape \(3, 3\) = \(C, C\), found \(2, 2\)"):
        lu_conv1x1(x, eye, torch.eye(2))
    with pytest.raises(ValueError, match=r"bias: expected shape \(3,\) = \(C,\), found \(1,\)"):
        lu_conv1x1(x, eye, eye, torch.ones(1))
    with pytest.raises(TypeError, match=r"upper: expected float32.*found torch.complex64"):
        lu_conv1x1(x, eye, eye.cfloat())
    with pytest.raises(TypeError, match=r"lu_conv1x1: impl='triton' is not available.*found float64"):
        lu_conv1x1(x.double(), eye, eye, impl="triton")
    with pytest.raises(ValueError, match=r"upper: expected shape \(C, C\), found \(3,\)"):
        lu_log_det(torch.ones(3), 1)
    with pytest.raises(ValueError, match="positions: expected an int at least 0, found -1"):
        lu_log_det(eye, -1)
    with pytest.raises(TypeError, match="positions: expected an int, found float"):
        lu_log_det(eye, 1.0)


@pytest.mark.parametrize("positions", [1, 5, 6, 20, 22, 40])
@pytest.mark.parametrize("with_bias", [True, False])
def test_factor_after_factor_and_their_product_agree(monkeypatch, positions, with_bias):
    """With few positions, the factors are applied one after the other."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 12, positions // 2 or 1), *(torch.randn(12, 12) for _ in range(2))]
    inputs += [torch.randn(12)] if with_bias else []
    inputs = [t.double().requires_grad_() for t in inputs]

    def run():
        y = lu_conv1x1(*inputs)
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    found = run()
    assert matrices.factors_pay(inputs[0], 12) == (2 * (positions // 2 or 1) < 21)
    monkeypatch.setattr(matrices, "factors_pay", lambda x, channels: False)
    for a, e in zip(found, run(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
