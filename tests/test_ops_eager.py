"""The steps with gradients by hand against the plain ones: values, gradients to the second order, strides."""

import pytest
import torch
from helpers import SHAPES, assert_within_budget, layouts, max_error, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from usf_kernels.nn import FlowStep
from usf_kernels.ops import eager, reference
from usf_kernels.ops.step import coupling_matrix, coupling_step

pytestmark = pytest.mark.usefixtures("nan_memory")

CLAMPS = (None, 1.5)


def draw(shape, clamp, dtype=torch.float64):
    """x and params that need gradients, split."""
    split, outputs = shape[1] - shape[1] // 2, (1 if clamp is None else 2) * (shape[1] // 2)
    x, params = (
        torch.randn((shape[0], c, *shape[2:]), dtype=dtype, requires_grad=True) for c in (shape[1], outputs)
    )
    return x, params, split


def draw_exits(channels, kind, dtype=torch.float64):
    """index, scale and bias: all, some or none."""
    index = torch.randperm(channels) if kind in ("all", "index") else None
    if kind not in ("all", "scale"):
        return index, None, None
    scale = (0.5 + torch.rand(channels, dtype=dtype)).requires_grad_()
    return index, scale, torch.randn(channels, dtype=dtype, requires_grad=True)


def draw_matrix(channels, dtype=torch.float64):
    matrix = torch.randn(channels, channels, dtype=dtype) / channels**0.5
    return [v.requires_grad_() for v in (matrix, torch.randn(channels, dtype=dtype))]


def gradients(results, inputs):
    results = [r for r in results if r.requires_grad]
    weighted = [torch.linspace(0.3, 2, r.numel(), dtype=r.dtype).view_as(r) for r in results]
    inputs = [v for v in inputs if v is not None and v.requires_grad]
    return torch.autograd.grad(results, inputs, weighted)


def plain_matrix(x, params, matrix, bias, *, split, clamp):
    y, log_det = reference.coupling_step(x, params, None, None, None, split, clamp, False)
    return reference.linear(y, matrix, bias), log_det


@given(shapes(), st.sampled_from(["all", "index", "scale", "none"]), st.sampled_from(CLAMPS))
@settings(max_examples=60)
def test_gather_step_is_the_plain_one(shape, kind, clamp):
    x, params, split = draw(shape, clamp)
    index, scale, bias = draw_exits(shape[1], kind)
    inputs = x, params, scale, bias
    expected = reference.coupling_step(x, params, index, scale, bias, split, clamp, False)
    expected = [*expected, *gradients(expected, inputs)]
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-13)):
        given = [v if v is None else v.detach().to(dtype).requires_grad_() for v in inputs]
        exits = {"index": index, "scale": given[2], "bias": given[3]}
        actual = coupling_step(*given[:2], split=split, clamp=clamp, **exits)
        # One function of the extension, or the operations as they are written.
        assert ("GatherStep" in type(actual[0].grad_fn).__name__) == (dtype == torch.float32)
        for a, e in zip([*actual, *gradients(actual, given)], expected, strict=True):
            assert max_error(a, e) < 10 * tolerance * (1 + (e.abs().max().item() if e.numel() else 0))


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matrix_step_is_the_plain_one(shape, clamp):
    x, params, split = draw(shape, clamp)
    matrix, some_bias = draw_matrix(shape[1])
    for bias in (some_bias, None):
        inputs = x, params, matrix, bias
        options = {"split": split, "clamp": clamp}
        actual = coupling_matrix(*inputs, **options)
        expected = plain_matrix(*inputs, **options)
        assert "MatrixStep" in type(actual[0].grad_fn).__name__
        for a, e in zip(actual, expected, strict=True):
            assert max_error(a, e) < 1e-12
        for a, e in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
            assert max_error(a, e) < 1e-11 * (1 + (e.abs().max().item() if e.numel() else 0))


@pytest.mark.parametrize("clamp", CLAMPS)
def test_gradients_match_numerical_ones_twice(clamp):
    x, params, split = draw((2, 3, 2), clamp)
    index, scale, bias = draw_exits(3, "all")

    def gather(*inputs):
        y, log_det = coupling_step(
            *inputs[:2], split=split, clamp=clamp, index=index, scale=inputs[2], bias=inputs[3]
        )
        return y if clamp is None else (y, log_det)

    def matrix(*inputs):
        y, log_det = coupling_matrix(*inputs, split=split, clamp=clamp)
        return y if clamp is None else (y, log_det)

    for function, inputs in ((gather, (x, params, scale, bias)), (matrix, (x, params, *draw_matrix(3)))):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)
        assert gradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("clamp", CLAMPS)
def test_any_strides(clamp):
    shape = (2, 6, 4, 3)
    x, params, split = (v.detach() if isinstance(v, torch.Tensor) else v for v in draw(shape, clamp))
    index, scale, bias = draw_exits(6, "all")
    matrix = draw_matrix(6)
    options = {"split": split, "clamp": clamp}
    exits = {"index": index, "scale": scale, "bias": bias}
    truths = (
        coupling_step(x, params, **options, **exits)[0],
        coupling_matrix(x, params, *matrix, **options)[0],
    )
    before = x.clone(), params.clone()
    for name, view in layouts(x):
        for _, other in layouts(params):
            view, other = view.detach().requires_grad_(), other.detach().requires_grad_()
            results = (
                coupling_step(view, other, **options, **exits)[0],
                coupling_matrix(view, other, *matrix, **options)[0],
            )
            for result, truth in zip(results, truths, strict=True):
                assert max_error(result, truth) < 1e-12, name
                grads = torch.autograd.grad(result.square().sum(), (view, other))
                assert all(g.isfinite().all() for g in grads), name
    assert torch.equal(x, before[0])
    assert torch.equal(params, before[1])


@pytest.mark.parametrize("clamp", CLAMPS)
def test_float32_errs_as_the_plain_ones(clamp):
    x, params, split = draw((3, 34, 7, 5), clamp, torch.float32)
    index, scale, bias = draw_exits(34, "all", torch.float32)
    inputs = x, params, scale, bias

    def run(function, *inputs):
        results = function(*inputs)
        return [*results, *gradients(results, inputs)]

    def by_hand(x, params, scale, bias):
        return coupling_step(x, params, split=split, clamp=clamp, index=index, scale=scale, bias=bias)

    def plain(x, params, scale, bias):
        return reference.coupling_step(x, params, index, scale, bias, split, clamp, False)

    truth = run(plain, *(v.detach().double().requires_grad_() for v in inputs))
    for a, e, t in zip(run(by_hand, *inputs), run(plain, *inputs), truth, strict=True):
        assert_within_budget(a, e, t, factor=4)  # the scale is computed from a sigmoid in the backward
    huge = torch.full_like(params, 1e9).requires_grad_()
    results = by_hand(x, huge, scale, bias)
    assert all(v.isfinite().all() for v in (*results, *gradients(results, (x, huge, scale, bias))))


def test_what_is_left_to_the_plain_ones():
    x, params, _ = draw((2, 4, 3, 3), 2.0, torch.float32)
    assert eager.by_hand(x, params, None)
    assert not eager.by_hand(x, params.bfloat16())
    assert not eager.by_hand(x.bfloat16(), params.bfloat16())
    assert not eager.by_hand(x.to("meta"), params.to("meta"))
    jacobian = torch.func.jacrev(lambda v: coupling_step(v, params, split=2, clamp=2.0)[0].sum(0))(x)
    assert max_error(jacobian[:2, :, :, 0, :2].flatten(0, 2).flatten(1), torch.eye(18)) == 0
    batched = torch.func.vmap(lambda v, p: coupling_step(v[None], p[None], split=2, clamp=2.0)[0][0])
    assert max_error(batched(x, params), coupling_step(x, params, split=2, clamp=2.0)[0]) < 1e-6


@given(shapes())
@settings(max_examples=60)
def test_sums_over_all_but_the_channels(shape):
    truth = torch.randn(shape, dtype=torch.float64)
    expected = truth.sum(dim=[d for d in range(len(shape)) if d != 1])
    for x in (truth, truth.float()):
        with torch.no_grad():
            found = [eager.channel_sums(x), *(eager.channel_sums(v) for _, v in layouts(x))]
        for sums in found:
            assert sums.dtype == x.dtype
            assert max_error(sums, expected) <= 1e-5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sums_are_as_accurate_as_in_float64(memory_format):
    x = (1 + torch.rand(3, 70, 150, 150)).contiguous(memory_format=memory_format)
    with torch.no_grad():
        found = eager.channel_sums(x)
        torch.testing.assert_close(found, x.double().sum((0, 2, 3)).float(), rtol=1e-6, atol=0)
    assert eager.channel_sums(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sums_of_equal_values_of_few_channels(memory_format):
    """The gradient of a mean: rounding errors of one long sum would all be of one sign."""
    step = FlowStep(2, subnet=lambda i, o: torch.nn.Conv2d(i, o, 1), linear="none", zero_init=False)
    x = torch.randn(1, 2, 128, 128).contiguous(memory_format=memory_format)
    z, _ = step(x)
    z.backward(torch.full_like(z, 0.1))
    total = torch.full((2,), 0.1).double() * 128 * 128
    torch.testing.assert_close(step.act_norm.bias.grad.double(), total, rtol=3e-6, atol=0)
    assert max_error(eager.channel_sums(torch.full_like(x, 0.1)), total) < 3e-6 * 1639
