"""An LU map from its parameters: values against NumPy, gradients to the second order, who runs it."""

import itertools

import numpy as np
import pytest
import torch
from helpers import assert_within_budget, max_error
from torch.autograd import gradcheck, gradgradcheck

from usf_kernels.nn import ActNorm, LUConv1x1
from usf_kernels.ops import lu_map as module
from usf_kernels.ops import native_lu_map, products
from usf_kernels.ops.lu_map import apply_factors, lu_map
from usf_kernels.ops.matrices import apply_matrix

pytestmark = pytest.mark.usefixtures("nan_memory")

FREE, BIAS, ACT_NORM = "log_diagonal", "bias", "act_norm"
CHOICES = [set(c) for n in range(4) for c in itertools.combinations((FREE, BIAS, ACT_NORM), n)]


def draw(channels, choice, dtype=torch.float64):
    """The arguments, those of `choice` given and the others None. Below and above the triangles is noise."""
    lower, upper = torch.randn(2, channels, channels, dtype=dtype) / channels**0.5
    signs = torch.randn(channels, dtype=dtype).sign()
    vectors = torch.randn(4, channels, dtype=dtype) / 2
    given = (FREE in choice, BIAS in choice, ACT_NORM in choice, ACT_NORM in choice)
    optional = [
        v.clone().requires_grad_() if there else None for v, there in zip(vectors, given, strict=True)
    ]
    return lower.requires_grad_(), upper.requires_grad_(), signs, *optional


def tensors(values):
    return [v for v in values if v is not None]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_matches_numpy(choice, with_gradients):
    for channels in (1, 2, 7):
        given = draw(channels, choice)
        with torch.set_grad_enabled(with_gradients):
            matrix, bias, log_det = lu_map(*given)
        zeros = np.zeros(channels)
        lower, upper, signs, log_diagonal, shift, log_scale, offset = (
            zeros if v is None else v.detach().numpy() for v in given
        )
        diagonal = signs * np.exp(log_diagonal)
        a = (np.tril(lower, -1) + np.eye(channels)) @ (np.triu(upper, 1) + np.diag(diagonal))
        np.testing.assert_allclose(matrix.detach(), a * np.exp(log_scale), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(log_det.item(), np.linalg.slogdet(matrix.detach())[1], atol=1e-12)
        if choice & {BIAS, ACT_NORM}:
            np.testing.assert_allclose(bias.detach(), shift + a @ offset, rtol=1e-12, atol=1e-14)
        else:
            assert bias is None
        assert (matrix.grad_fn is not None and "Map" in type(matrix.grad_fn).__name__) == with_gradients


@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_match_numerical_ones_twice(choice):
    given = draw(3, choice)

    def some(*values):
        values = iter(values)
        return tuple(tensors(lu_map(*(v if v is None else next(values) for v in given))))

    assert gradcheck(some, tensors(given), check_batched_grad=True)
    assert gradgradcheck(some, tensors(given))


@pytest.mark.parametrize("channels", [5, 131])
def test_gradients_of_one_result_alone(channels):
    for choice in ({FREE, BIAS, ACT_NORM}, set()):
        for i in range(3):
            given = draw(channels, choice)
            outputs, plain = lu_map(*given), module._plain(*given)
            if outputs[i] is None or not plain[i].requires_grad:
                continue
            inputs = [v for v in tensors(given) if v.requires_grad]
            found, truth = (
                torch.autograd.grad(out[i].square().sum(), inputs, materialize_grads=True)
                for out in (outputs, plain)
            )
            for f, t in zip(found, truth, strict=True):
                assert max_error(f, t) < 2e-14 * channels


def test_errs_as_the_operations_written_out():
    given = draw(64, {FREE, BIAS, ACT_NORM}, torch.float32)

    def run(function, dtype):
        inputs = [v.detach().to(dtype).requires_grad_() for v in given]
        outputs = function(*inputs)
        weighted = [torch.linspace(0.3, 2, v.numel(), dtype=dtype).view_as(v) for v in outputs]
        leaves = [v for i, v in enumerate(inputs) if i != 2]
        return [*outputs, *torch.autograd.grad(outputs, leaves, weighted)]

    results = run(lu_map, torch.float32), run(module._plain, torch.float32), run(module._plain, torch.float64)
    for actual, eager, truth in zip(*results, strict=True):
        assert_within_budget(actual, eager, truth, factor=4.0)


def written_out(*given):
    matrix, bias, log_det = module._plain(*given)
    return matrix, given[4] if bias is None else bias, log_det


@pytest.mark.skipif(not products.MULTIPLIES, reason="the extension has no products here")
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("channels", [1, 2, 7, 33, 131])
def test_the_extension_errs_as_the_operations_written_out(monkeypatch, choice, channels):
    given, taken = draw(channels, choice), []
    for name in ("lu_map", "gradients"):
        run = getattr(native_lu_map, name)
        monkeypatch.setattr(native_lu_map, name, lambda *a, n=name, r=run: (taken.append(n), r(*a))[1])

    def run(function, dtype):
        inputs = [
            None if v is None else v.detach().to(dtype).requires_grad_(i != 2) for i, v in enumerate(given)
        ]
        outputs = tensors(function(*inputs))
        outputs = outputs if choice & {FREE, ACT_NORM} else outputs[:-1]  # a constant log-determinant
        weighted = [torch.linspace(0.3, 2, v.numel(), dtype=dtype).view_as(v) for v in outputs]
        return [
            *outputs,
            *torch.autograd.grad(outputs, [v for v in tensors(inputs) if v.requires_grad], weighted),
        ]

    results = run(lu_map, torch.float32), run(written_out, torch.float32), run(written_out, torch.float64)
    assert taken == ["lu_map", "gradients"]
    for actual, eager, truth in zip(*results, strict=True):
        assert_within_budget(actual, eager, truth, factor=4.0)


@pytest.mark.skipif(not products.MULTIPLIES, reason="the extension has no products here")
def test_the_extension_takes_any_vectors_and_leaves_other_matrices(monkeypatch):
    def strided(v):
        if v is None or v.ndim > 1:
            return v
        wide = v.new_full((2 * len(v),), torch.nan)
        wide[::2] = v
        return wide[::2]

    given = [v.detach().float() for v in draw(40, {FREE, BIAS, ACT_NORM})]
    expected = lu_map(*given)
    for actual, truth in zip(lu_map(*map(strided, given)), expected, strict=True):
        assert torch.equal(actual, truth)
    wide = torch.full((2, 40, 50), torch.nan)
    wide[..., :40] = torch.stack(given[:2])
    for actual, truth in zip(lu_map(*wide[..., :40], *given[2:]), expected, strict=True):
        assert torch.equal(actual, truth)
    monkeypatch.setattr(native_lu_map, "lu_map", None)
    for actual, truth in zip(
        lu_map(*(v.mT.contiguous().mT for v in given[:2]), *given[2:]), expected, strict=True
    ):
        assert max_error(actual, truth) < 1e-4


def test_transforms_and_compilers_see_the_operations():
    given = draw(4, {FREE, BIAS, ACT_NORM})

    def norm(lower):
        return lu_map(lower, *given[1:])[0].square().sum()

    found = torch.func.grad(norm)(given[0])
    assert max_error(found, torch.autograd.grad(norm(given[0]), given[0])[0]) < 1e-12
    torch._dynamo.reset()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert max_error(torch.autograd.grad(compiled(given[0]), given[0])[0], found) < 1e-12


def test_autocast_rounds_neither_the_map_nor_its_gradients():
    linear, act_norm = LUConv1x1(16, init="orthogonal"), ActNorm(16)
    with torch.no_grad():
        act_norm.log_scale.normal_()
        act_norm.bias.normal_()

    def run(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = linear.map(torch.float32, act_norm)
            loss = sum(v.square().sum() for v in outputs)
            return [*outputs, *torch.autograd.grad(loss, [*linear.parameters(), *act_norm.parameters()])]

    for actual, truth in zip(run(True), run(False), strict=True):
        assert torch.equal(actual, truth)


def by_matrix(x, *given):
    matrix, bias, _ = module._plain(*given)
    return apply_matrix(matrix, x, given[4] if bias is None else bias)


@pytest.mark.parametrize("choice", CHOICES)
def test_factors_one_after_the_other_are_the_matrix(choice):
    for shape in ((2, 5, 3, 2), (4, 5), (1, 5, 3), (0, 5, 2, 2), (2, 5, 0)):
        given, x = draw(5, choice), torch.randn(shape, dtype=torch.float64, requires_grad=True)
        leaves = [x, *(v for v in tensors(given) if v.requires_grad)]
        found, truth = apply_factors(x, *given), by_matrix(x, *given)
        assert max_error(found, truth) < 1e-14
        weight = torch.randn_like(truth)
        for f, t in zip(*(torch.autograd.grad(y, leaves, weight) for y in (found, truth)), strict=True):
            assert max_error(f, t) < 1e-13


@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_through_factors_match_numerical_ones_twice(choice):
    given, x = draw(3, choice), torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        values = iter(values)
        return apply_factors(x, *(v if v is None else next(values) for v in given))

    assert gradcheck(run, (x, *tensors(given)), check_batched_grad=True)
    assert gradgradcheck(run, (x, *tensors(given)))


def test_factors_err_as_the_matrix():
    given, x = draw(64, {FREE, BIAS, ACT_NORM}, torch.float32), torch.randn(1, 64, 5, 5)
    given[2].requires_grad_(False)

    def run(function, dtype):
        inputs = [v.detach().to(dtype).requires_grad_(i != 3) for i, v in enumerate((x, *given))]
        y = function(*inputs)
        weight = torch.linspace(0.3, 2, y.numel(), dtype=dtype).view_as(y)
        return [y, *torch.autograd.grad(y, [v for v in inputs if v.requires_grad], weight)]

    results = (
        run(apply_factors, torch.float32),
        run(by_matrix, torch.float32),
        run(by_matrix, torch.float64),
    )
    for actual, eager, truth in zip(*results, strict=True):
        assert_within_budget(actual, eager, truth, factor=4.0)


def test_few_positions_go_through_the_factors():
    linear, act_norm = LUConv1x1(16, init="orthogonal"), ActNorm(16)

    def taken(x):
        return type(linear.run(x, inverse=False, act_norm=act_norm)[0].grad_fn).__name__

    assert "Factors" in taken(torch.randn(1, 16, 3, 5))
    assert "Factors" in taken(torch.randn(1, 16, 3, 9))
    assert "Factors" not in taken(torch.randn(1, 16, 4, 7))
    assert "Factors" not in taken(torch.randn(1, 16, 3, 5, dtype=torch.float64))
    x = torch.randn(1, 16, 3, 5, dtype=torch.float32)
    matrix, bias, _ = linear.map(torch.float32, act_norm)
    torch.testing.assert_close(
        linear.run(x, inverse=False, act_norm=act_norm)[0], apply_matrix(matrix, x, bias)
    )

    def norm(x):
        return linear(x)[0].square().sum()

    torch.testing.assert_close(torch.func.grad(norm)(x), torch.autograd.grad(norm(x.requires_grad_()), x)[0])
