"""Couplings against NumPy formulas, their inverses, Jacobians, strides and dtypes."""

import numpy as np
import pytest
import torch
from helpers import DTYPES, SHAPES, assert_within_budget, jacobian_log_det, layouts, max_error, shapes
from hypothesis import given
from torch.autograd import gradcheck, gradgradcheck

from usf_kernels.ops import additive_coupling, affine_coupling, masked_additive_coupling

pytestmark = pytest.mark.usefixtures("nan_memory")


def draw(shape, per_channel=1, dtype=torch.float64, split=None):
    """x and a conditioner's output for it, with the modules' split unless one is given."""
    split = shape[1] - shape[1] // 2 if split is None else split
    other = (shape[0], per_channel * (shape[1] - split), *shape[2:])
    return torch.randn(shape, dtype=dtype), 3 * torch.randn(other, dtype=dtype), split


def naive_affine(x, params, split, clamp):
    c = x.shape[1] - split
    a = 0.1 * params
    s, t = clamp * torch.tanh(a[:, :c]), a[:, c:]
    y = torch.cat([x[:, :split], x[:, split:] * torch.exp(s) + t], 1)
    return y, s.reshape(x.shape[0], int(np.prod(s.shape[1:]))).sum(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_additive_matches_numpy(shape):
    x, shift, split = draw(shape)
    expected = x.numpy().copy()
    expected[:, split:] += shift.numpy()
    y = additive_coupling(x, shift, split=split)
    np.testing.assert_array_equal(y.numpy(), expected)
    assert max_error(additive_coupling(y, shift, split=split, inverse=True), x) < 1e-14


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_matches_additive(shape):
    x, shift, split = draw(shape)
    full = torch.cat([torch.full_like(x[:, :split], 7.0), shift], 1)
    mask = (torch.arange(shape[1]) < split).view(-1, *[1] * (len(shape) - 2))
    for kind in (mask, mask.float(), mask.double().expand(shape)):
        for inverse in (False, True):
            expected = additive_coupling(x, shift, split=split, inverse=inverse)
            y = masked_additive_coupling(x, full, kind, inverse=inverse)
            assert y.dtype == x.dtype
            assert max_error(y, expected) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clamp", [0.5, 2])
def test_affine_matches_numpy(shape, clamp):
    x, params, split = draw(shape, 2)
    c = shape[1] - split
    a = 0.1 * params.numpy()
    s, t = clamp * np.tanh(a[:, :c]), a[:, c:]
    expected = x.numpy().copy()
    expected[:, split:] = expected[:, split:] * np.exp(s) + t
    y, log_det = affine_coupling(x, params, split=split, clamp=clamp)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(log_det.numpy(), s.sum(axis=tuple(range(1, s.ndim))), atol=1e-13)
    back, inverse_log_det = affine_coupling(y, params, split=split, clamp=clamp, inverse=True)
    assert max_error(back, x) < 1e-13
    assert max_error(inverse_log_det, -log_det) == 0
    assert log_det.shape == (shape[0],)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_clamp_that_vanishes_is_one(inverse):
    x, params, split = draw((3, 5, 4), 2, torch.float32)
    x, params = x.requires_grad_(), params.requires_grad_()
    results = [
        affine_coupling(x, params, split=split, clamp=1e-50, inverse=inverse, impl=impl)
        for impl in (None, "reference")
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    actual, expected = (torch.autograd.grad([r.sum() for r in both], (x, params)) for both in results)
    torch.testing.assert_close(actual, expected)


def test_affine_log_det_is_the_jacobians():
    x, params, split = draw((3, 5, 2, 2), 2)
    for inverse in (False, True):
        _, log_det = affine_coupling(x, params, split=split, inverse=inverse)
        for i in range(3):
            p = params[i : i + 1]

            def apply(v, p=p, inverse=inverse):
                return affine_coupling(v, p, split=split, inverse=inverse)[0]

            assert max_error(jacobian_log_det(apply, x[i : i + 1]), log_det[i : i + 1]) < 1e-12


@given(shapes())
def test_any_shape_and_split_inverts(shape):
    for split in range(shape[1] + 1):
        x, shift, _ = draw(shape, 1, split=split)
        y = additive_coupling(x, shift, split=split)
        assert max_error(additive_coupling(y, shift, split=split, inverse=True), x) < 1e-13
        x, params, _ = draw(shape, 2, split=split)
        y, log_det = affine_coupling(x, params, split=split)
        back, _ = affine_coupling(y, params, split=split, inverse=True)
        assert max_error(back, x) < 1e-13
        assert log_det.shape == (shape[0],)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_dtypes_within_budget(dtype, inverse):
    x, params, split = draw((4, 33, 7, 5), 2, dtype=dtype)
    if inverse:
        x = naive_affine(x.double(), params.double(), split, 2.0)[0].to(dtype)

    def naive(x, params):
        y, log_det = naive_affine(x, params, split, 2.0)
        if not inverse:
            return y, log_det
        c = x.shape[1] - split
        a = 0.1 * params
        s, t = 2.0 * torch.tanh(a[:, :c]), a[:, c:]
        return torch.cat([x[:, :split], (x[:, split:] - t) * torch.exp(-s)], 1), -log_det

    y, log_det = affine_coupling(x, params, split=split, inverse=inverse)
    assert y.dtype == dtype
    assert log_det.dtype == torch.promote_types(dtype, torch.float32)
    truth, eager = naive(x.double(), params.double()), naive(x, params)
    assert_within_budget(y, eager[0], truth[0])
    assert_within_budget(log_det, naive(x.to(log_det.dtype), params.to(log_det.dtype))[1], truth[1])
    x, shift, split = draw((4, 33, 7, 5), dtype=dtype)
    y = additive_coupling(x, shift, split=split, inverse=inverse)
    sign = -1 if inverse else 1
    exact = torch.cat([x[:, :split].double(), x[:, split:].double() + sign * shift.double()], 1)
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", [0, 1])
def test_mixed_dtypes_promote(narrow, which):
    pair = list(draw((2, 5, 3, 3), 2)[:2])
    pair = [t.to(narrow if i == which else torch.float32) for i, t in enumerate(pair)]
    y, log_det = affine_coupling(*pair, split=3)
    truth = affine_coupling(pair[0].double(), pair[1].double(), split=3)
    assert y.dtype == log_det.dtype == torch.float32
    assert max_error(y, truth[0]) < 1e-5
    pair[1] = pair[1][:, :2]
    y = additive_coupling(*pair, split=3)
    assert y.dtype == torch.float32
    assert max_error(y, additive_coupling(pair[0].double(), pair[1].double(), split=3)) < 1e-6


def test_any_strides():
    x, params, split = draw((2, 5, 3, 4), 2)
    expected = affine_coupling(x, params, split=split)
    shifted = additive_coupling(x, params[:, :2], split=split)
    for name, strided in layouts(x):
        for _, other in layouts(params):
            before = strided.clone(), other.clone()
            y, log_det = affine_coupling(strided, other, split=split)
            assert max_error(y, expected[0]) + max_error(log_det, expected[1]) < 1e-13, name
            assert max_error(additive_coupling(strided, other[:, :2], split=split), shifted) == 0, name
            assert torch.equal(strided, before[0])
            assert torch.equal(other, before[1])
    y = additive_coupling(x.to(memory_format=torch.channels_last), params[:, :2], split=split)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(inverse):
    x, params, split = (t.requires_grad_() if torch.is_tensor(t) else t for t in draw((2, 3, 2), 2))
    mask = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)

    def affine(x, params):
        return affine_coupling(x, params, split=split, inverse=inverse)

    def additive(x, params):
        return additive_coupling(x, params[:, :1] ** 2, split=split, inverse=inverse)

    def masked(x, params):
        shift = torch.cat([params, params[:, :1] ** 2], 1)
        return masked_additive_coupling(x, shift, mask, inverse=inverse)

    for fn in (affine, additive, masked):
        assert gradcheck(fn, (x, params))
        assert gradgradcheck(fn, (x, params))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x: expected a torch.Tensor, found list"),
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, TypeError, r"x: expected float32.*found torch.int64"),
        ({"x": torch.ones(4)}, ValueError, r"x: expected shape \(B, C, \*spatial\), found \(4,\)"),
        ({"shift": torch.ones(2, 3)}, ValueError, r"shift: expected shape \(2, 2\) = .*found \(2, 3\)"),
        ({"shift": None}, TypeError, r"shift: expected a torch.Tensor, found NoneType"),
        ({"split": 5}, ValueError, r"split: expected an int in 0..4, found 5"),
        ({"split": -1}, ValueError, r"split: expected an int in 0..4, found -1"),
        ({"split": 2.0}, TypeError, r"split: expected an int, found float"),
        ({"split": True}, TypeError, r"split: expected an int, found bool"),
        ({"impl": "cuda"}, ValueError, r"impl: expected one of 'reference', 'triton', found 'cuda'"),
    ],
)
def test_additive_errors(change, error, message):
    arguments = {"x": torch.ones(2, 4), "shift": torch.ones(2, 2), "split": 2} | change
    with pytest.raises(error, match=message):
        additive_coupling(**arguments)


def test_other_errors():
    x = torch.ones(2, 4, 3)
    with pytest.raises(ValueError, match=r"params: expected shape \(2, 4, 3\) = .*found \(2, 2, 3\)"):
        affine_coupling(x, torch.ones(2, 2, 3), split=2)
    for clamp in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="clamp: expected a positive finite number"):
            affine_coupling(x, x, split=2, clamp=clamp)
    with pytest.raises(TypeError, match="clamp: expected a number, found str"):
        affine_coupling(x, x, split=2, clamp="2")
    with pytest.raises(
        ValueError, match="clamp: expected a number that a float holds, found one of 1329 bits"
    ):
        affine_coupling(x, x, split=2, clamp=10**400)
    for shape in ((2,), (1, 2, 4, 3), (3, 4, 3)):
        with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to x's \(2, 4, 3\)"):
            masked_additive_coupling(x, x, torch.ones(shape))
    with pytest.raises(TypeError, match=r"mask: expected float32.*found torch.int64"):
        masked_additive_coupling(x, x, torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("batch", "split"), [(1, 2), (3, 0)])
def test_gradients_of_leaves_do_not_share_memory(dtype, batch, split):
    """Autograd adds into what it has kept of a first backward pass."""
    x = torch.zeros(batch, 4, dtype=dtype, requires_grad=True)
    shift = torch.zeros(batch, 4 - split, dtype=dtype, requires_grad=True)
    weight = torch.tensor([1.0, 2, 3, 4], dtype=dtype).expand(batch, 4)
    for _ in range(2):
        (additive_coupling(x, shift, split=split) * weight).sum().backward()
    assert torch.equal(x.grad, 2 * weight)
    assert torch.equal(shift.grad, 2 * weight[:, split:])


@pytest.mark.parametrize("inverse", [False, True])
def test_batched_gradients_without_passive_channels(inverse):
    x, shift = torch.randn(2, 5, 3), torch.randn(2, 5, 3)

    def couple(x, shift):
        return additive_coupling(x, shift, split=0, inverse=inverse)

    found = torch.autograd.functional.jacobian(couple, (x, shift), vectorize=True)
    expected = torch.autograd.functional.jacobian(couple, (x, shift))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
