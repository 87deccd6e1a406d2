"""Score kernels against the float64 reference: shapes, strides, dtypes, gradients, compilers."""

import pytest
import torch
from helpers import DEVICE, DTYPES, SHAPES, assert_within_budget, layouts, max_error, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from usf_kernels.ops import anomaly_map, squared_norm
from usf_kernels.ops.map_gradients import anomaly_map_gradients

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_memory")
READINGS = ("likelihood", "latent")
SCALES = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=3)


def pyramid(*shapes, batch=2, dtype=torch.float32):
    return [torch.randn(batch, *shape, device=DEVICE).to(dtype) for shape in shapes]


def assert_map_right(latents, size, interpolate, factor=2.0):
    actual = anomaly_map(latents, size, interpolate=interpolate, impl="triton")
    eager = anomaly_map([z.float() for z in latents], size, interpolate=interpolate, impl="reference")
    truth = anomaly_map([z.double() for z in latents], size, interpolate=interpolate, impl="reference")
    assert actual.dtype == torch.float32
    assert_within_budget(actual, eager, truth, factor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norm_at_any_strides(shape, dtype):
    z = torch.randn(shape, device=DEVICE).to(dtype)
    truth, eager = z.double().square().sum(1), z.float().square().sum(1)
    for _, strided in [("contiguous", z), *layouts(z)]:
        u = squared_norm(strided, impl="triton")
        assert u.is_contiguous()
        assert_within_budget(u, eager, truth)


@settings(max_examples=15)
@given(shapes(max_channels=40))
def test_squared_norm_at_any_shape(shape):
    z = torch.randn(shape, device=DEVICE)
    u = squared_norm(z, impl="triton")
    torch.testing.assert_close(u.double(), z.double().square().sum(1), rtol=1e-6, atol=0)


def test_squared_norm_accumulates_in_float32():
    for dtype in DTYPES:
        large = torch.full((1, 4096), 200.0, dtype=dtype, device=DEVICE)
        assert squared_norm(large, impl="triton") == 4096 * 200.0**2


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norm_gradients_are_the_references(dtype):
    for shape in ((2, 5), (2, 3, 4, 5), (0, 3)):
        for _, z in layouts(torch.randn(shape, device=DEVICE).to(dtype)):
            grads = []
            for impl in ("triton", "reference"):
                leaf = z.detach().requires_grad_()
                (first,) = torch.autograd.grad(squared_norm(leaf, impl=impl).sum(), leaf)  # strides of 0
                (again,) = torch.autograd.grad(squared_norm(leaf, impl=impl).square().sum(), leaf)
                assert first.dtype == dtype
                grads.append((first, again))
            for actual, expected in zip(*grads, strict=True):
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("interpolate", READINGS)
@pytest.mark.parametrize("size", [(11, 9), (3, 4), (1, 1), (40, 70)])
def test_map_of_several_scales(size, interpolate):
    assert_map_right(pyramid((7, 5, 6), (33, 3, 2), (3, 1, 4), (2, 1, 1)), size, interpolate)


@pytest.mark.parametrize("interpolate", READINGS)
def test_map_at_any_strides_and_dtypes(interpolate):
    for z in pyramid((5, 4, 6), (3, 5, 3)):
        for (_, strided), dtype in zip(layouts(z), (*DTYPES, *DTYPES), strict=False):
            assert_map_right([strided.to(dtype), z], (7, 8), interpolate)
    assert anomaly_map(pyramid((3, 2, 2), batch=0), 4, interpolate=interpolate, impl="triton").numel() == 0


@settings(max_examples=15)
@given(SCALES, st.integers(1, 20), st.integers(1, 20))
def test_map_at_any_shape(scales, height, width):
    for interpolate in READINGS:
        assert_map_right(pyramid(*scales), (height, width), interpolate, factor=4.0)


def test_small_scores_keep_their_digits_and_nan_stays():
    z = torch.full((1, 4, 2, 2), 1e-6, device=DEVICE)
    for interpolate in READINGS:
        actual = anomaly_map(z, 5, interpolate=interpolate, impl="triton")
        assert max_error(actual / 0.5e-12, torch.ones(1, 1, 5, 5, device=DEVICE)) < 1e-5
        z[0, 1, 0, 0] = torch.nan
        actual = anomaly_map(z, 2, interpolate=interpolate, impl="triton")
        assert actual[0, 0, 0, 0].isnan()
        z[0, 1, 0, 0] = 1e-6


@settings(max_examples=10)
@given(SCALES, st.integers(1, 20), st.integers(1, 20))
def test_map_gradients_at_any_shape(scales, height, width):
    grad = torch.randn(2, 1, height, width, device=DEVICE, dtype=torch.float64)
    for interpolate in READINGS:
        leaves = [z.double().requires_grad_() for z in pyramid(*scales)]
        out = anomaly_map(leaves, (height, width), interpolate=interpolate, impl="reference")
        actual = anomaly_map_gradients(grad, leaves, (height, width), interpolate == "latent")
        for found, expected in zip(actual, torch.autograd.grad(out, leaves, grad), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_map_gradients_are_not_rounded_by_autocast():
    latents, grad = pyramid((3, 4, 5)), torch.randn(2, 1, 7, 6, device=DEVICE)
    for latent in (False, True):
        expected = anomaly_map_gradients(grad, latents, (7, 6), latent)[0]
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(anomaly_map_gradients(grad, latents, (7, 6), latent)[0], expected)


@pytest.mark.parametrize("interpolate", READINGS)
def test_map_differentiates_twice(interpolate):
    grads = []
    latents = pyramid((3, 4, 5), (2, 2, 2))
    for impl in ("triton", "reference"):
        leaves = [z.detach().requires_grad_() for z in latents]
        loss = anomaly_map(leaves, (7, 6), interpolate=interpolate, impl=impl).square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        grads.append([*first, *torch.autograd.grad(first[0].square().sum(), leaves)])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_are_torch_ops():
    namespace = torch.ops.usf_kernels
    for shape in ((2, 4, 3, 3), (0, 3)):
        for _, z in list(layouts(torch.randn(shape, device=DEVICE)))[-2:]:
            torch.library.opcheck(namespace.squared_norm, (z,))
            torch.library.opcheck(namespace.squared_norm_backward, (z.sum(1), z))
    for latent in (False, True):
        latents = pyramid((3, 2, 4), (2, 3, 3))
        latents[0] = latents[0].to(memory_format=torch.channels_last)
        torch.library.opcheck(namespace.anomaly_map, (latents, [5, 6], latent))


def test_compile_for_changing_shapes():
    def scores(z, other, readings):
        size = (2 * z.shape[2], 20)
        maps = [anomaly_map([z, other], size, interpolate=reading, impl="triton") for reading in readings]
        return squared_norm(z, impl="triton"), *maps

    # Without gradients, where Dynamo treats autograd Functions in another way, and with.
    for readings, differentiable in ((READINGS, False), (READINGS[:1], True)):
        torch._dynamo.reset()
        compiled = torch.compile(scores, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch, height, width in ((3, 5, 6), (5, 8, 7)):
                results = []
                z, other = torch.randn(batch, 4, height, width), torch.randn(batch, 2, height + 3, width + 5)
                for call in (compiled, scores):
                    leaves = [v.detach().to(DEVICE).requires_grad_(differentiable) for v in (z, other)]
                    outputs = [*call(*leaves, readings)]
                    if differentiable:
                        outputs += torch.autograd.grad(sum(v.square().sum() for v in outputs), leaves)
                    results.append(outputs)
                for actual, expected in zip(*results, strict=True):
                    assert max_error(actual, expected) < 1e-4
