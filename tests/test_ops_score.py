"""Squared norms and anomaly maps, the exact latent reading against resized latents."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, SHAPES, assert_within_budget, layouts, max_error
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from usf_kernels.ops import anomaly_map, dispatch, squared_norm

pytestmark = pytest.mark.usefixtures("nan_memory")

SIDE = st.integers(1, 9)


def resize(v, size):
    return F.interpolate(v, size=size, mode="bilinear", align_corners=False)


def naive_map(latents, size, interpolate):
    """As printed: z resized before it is squared, or the likelihood resized."""
    total = 0
    for z in latents:
        if interpolate == "latent":
            total = total + torch.exp(-resize(z, size).square().sum(1, keepdim=True) / (2 * z.shape[1]))
        else:
            total = total + resize(torch.exp(-z.square().sum(1, keepdim=True) / (2 * z.shape[1])), size)
    return 1 - total / len(latents)


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_norm_matches_numpy(shape):
    z = torch.randn(shape, dtype=torch.float64)
    np.testing.assert_allclose(squared_norm(z).numpy(), (z.numpy() ** 2).sum(1), rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norm_dtypes_and_strides(dtype):
    z = torch.randn(3, 300, 4, 5).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    truth = z.double().square().sum(1)
    for _, strided in [("contiguous", z), *layouts(z)]:
        u = squared_norm(strided)
        assert u.dtype == wide
        assert_within_budget(u, z.to(wide).square().sum(1), truth)
    large = torch.full((1, 4096), 200.0, dtype=dtype)  # overflows float16 if summed there
    assert squared_norm(large) == 4096 * 200.0**2


@given(SIDE, SIDE, SIDE, st.integers(1, 40), st.integers(1, 40))
def test_exact_latent_map_at_any_size(channels, h, w, height, width):
    z = torch.randn(2, channels, h, w, dtype=torch.float64)
    actual = anomaly_map(z, (height, width), interpolate="latent")
    assert max_error(actual, naive_map([z], (height, width), "latent")) < 1e-12


@pytest.mark.parametrize("interpolate", ["likelihood", "latent"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(37, 50), (28, 28), (5, 3), (448, 56), (1, 1)])
def test_several_scales_within_budget(dtype, size, interpolate):
    latents = [
        torch.randn(2, c, h, w).to(dtype) for c, h, w in ((33, 14, 20), (5, 7, 10), (8, 1, 3), (4, 28, 28))
    ]
    wide = torch.promote_types(dtype, torch.float32)
    actual = anomaly_map(latents, size, interpolate=interpolate)
    truth = naive_map([z.double() for z in latents], size, interpolate)
    assert actual.dtype == wide
    assert actual.shape == (2, 1, *size)
    assert actual.min() >= 0
    assert actual.max() <= 1
    assert_within_budget(actual, naive_map([z.to(wide) for z in latents], size, interpolate), truth)


@pytest.mark.parametrize("interpolate", ["likelihood", "latent"])
def test_loops_of_the_extension(interpolate):
    """Where gradients are recorded, PyTorch's operations run instead."""
    latents = [torch.randn(3, 70, 40, 33), torch.randn(3, 5, 1, 9), torch.randn(3, 2, 7, 1)]
    size = (150, 210)  # several tasks per image
    expected = anomaly_map([z.double() for z in latents], size, interpolate=interpolate)
    for maps in (latents, [z.contiguous(memory_format=torch.channels_last) for z in latents]):
        found = anomaly_map(maps, size, interpolate=interpolate)
        assert max_error(found, expected) < 1e-6
        for i in range(3):
            alone = anomaly_map([z[i : i + 1] for z in maps], size, interpolate=interpolate)
            assert torch.equal(alone, found[i : i + 1])
    leaf = latents[0].clone().requires_grad_()
    recorded = anomaly_map([leaf, *latents[1:]], size, interpolate=interpolate)
    assert max_error(recorded.detach(), expected) < 2e-6
    recorded.sum().backward()
    assert leaf.grad.abs().max() > 0
    latents[0][1, 0, 2, 3] = torch.nan
    assert anomaly_map(latents, size, interpolate=interpolate).isnan().any((1, 2, 3)).tolist() == [
        False, True, False,
    ]  # fmt: skip


def test_values_that_are_not_finite_stay_where_nothing_is_resized():
    z = torch.randn(1, 5, 8, 6)
    z[0, 2, 3, 4] = torch.nan
    found, expected = (anomaly_map(z, (8, 6), impl=impl) for impl in (None, "reference"))
    assert found.isnan().sum() == 1
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_two_readings_differ_between_pixels_and_agree_on_them():
    z = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    assert max_error(anomaly_map(z, 4), anomaly_map(z, 4, interpolate="latent")) < 1e-14
    assert max_error(anomaly_map(z, 16), anomaly_map(z, 16, interpolate="latent")) > 0.01


def test_small_scores_keep_their_digits():
    z = torch.full((1, 4, 2, 2), 1e-6)
    for interpolate in ("likelihood", "latent"):
        actual = anomaly_map(z, 5, interpolate=interpolate)
        assert max_error(actual / 0.5e-12, torch.ones(1, 1, 5, 5)) < 1e-5


@pytest.mark.parametrize("interpolate", ["likelihood", "latent"])
def test_strides_gradients_and_empty_batch(interpolate):
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = anomaly_map(z, (7, 3), interpolate=interpolate)
    for name, strided in layouts(z):
        assert max_error(anomaly_map(strided, (7, 3), interpolate=interpolate), expected) < 1e-14, name
    assert anomaly_map(z[:0], (7, 3), interpolate=interpolate).shape == (0, 1, 7, 3)
    z = z[:1, :, :3, :2].clone().requires_grad_()
    assert gradcheck(lambda v: anomaly_map(v, (4, 5), interpolate=interpolate), (z,))
    assert gradgradcheck(lambda v: anomaly_map(v, (2, 3), interpolate=interpolate), (z,))
    assert gradgradcheck(squared_norm, (z,))


def test_errors(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    z = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match="latents: expected at least one tensor"):
        anomaly_map([], 4)
    with pytest.raises(TypeError, match="latents: expected tensors or one tensor, found NoneType"):
        anomaly_map(None, 4)
    with pytest.raises(ValueError, match=r"latents\[1\]: expected batch size 2 as latents\[0\], found 1"):
        anomaly_map([z, z[:1]], 4)
    for bad in (z[0], z[..., :0], z[:, :0]):
        with pytest.raises(ValueError, match=r"latents\[0\]: expected shape \(B, C, h, w\)"):
            anomaly_map(bad, 4)
    with pytest.raises(
        ValueError, match="interpolate: expected one of 'likelihood', 'latent', found 'nearest'"
    ):
        anomaly_map(z, 4, interpolate="nearest")
    for size, error in (
        (0, ValueError),
        ((4, -1), ValueError),
        (4.0, TypeError),
        ((4, 4, 4), TypeError),
        (None, TypeError),
    ):
        with pytest.raises(error, match="size"):
            anomaly_map(z, size)
    with pytest.raises(RuntimeError, match="anomaly_map: impl='triton' is not available: it needs CUDA"):
        anomaly_map(z, 4, impl="triton")
    with pytest.raises(RuntimeError, match="squared_norm: impl='triton' is not available: it needs CUDA"):
        squared_norm(z, impl="triton")
    with pytest.raises(ValueError, match=r"z: expected shape \(B, C, \*spatial\), found \(3,\)"):
        squared_norm(torch.ones(3))
