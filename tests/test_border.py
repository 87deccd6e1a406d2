"""The border of maps: its rings, what `fit` finds, exactness, and that nothing stale is kept."""

import copy
import math

import pytest
import torch
from helpers import max_error
from hypothesis import given
from hypothesis import strategies as st

from usf_kernels.models.border import RINGS, BorderNorm, ring_of


def random_norm(channels=3):
    norm = BorderNorm(channels).double()
    norm.log_scale.normal_()
    norm.shift.normal_()
    return norm


def test_rings():
    expected = torch.zeros(6, 7, dtype=torch.long)
    expected[1:-1, 1:-1] = 1
    expected[2:-2, 2:-2] = 2
    assert torch.equal(ring_of(6, 7), expected)
    assert ring_of(40, 50).max() == RINGS


def test_the_border_becomes_like_the_inside():
    """Maps with another mean and spread in each ring and channel."""
    ring = ring_of(12, 10)
    scale = torch.tensor([[0.5, 4.0], [0.9, 2.0], [1.0, 3.0]]).T[:, ring]
    mean = torch.tensor([[3.0, -1.0], [2.0, 0.0], [1.0, 5.0]]).T[:, ring]
    x = mean + scale * torch.randn(400, 2, 12, 10)
    norm = BorderNorm(2).fit(x)
    y, _ = norm(x)
    for r in range(RINGS + 1):
        values = y[:, :, ring == r]
        torch.testing.assert_close(values.mean((0, 2)), torch.tensor([1.0, 5.0]), rtol=0, atol=0.05)
        torch.testing.assert_close(values.std((0, 2)), torch.tensor([1.0, 3.0]), rtol=0.03, atol=0)
    assert torch.equal(y[:, :, ring == RINGS], x[:, :, ring == RINGS])


@given(st.integers(0, 2), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_inverse_and_log_det(batch, height, width, channels_last):
    norm = random_norm()
    x = torch.randn(batch, 3, height, width, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    y, log_det = norm(x)
    assert max_error(norm.inverse(y), x) < 1e-12
    if batch:
        jacobian = torch.autograd.functional.jacobian(lambda v: norm(v)[0], x[:1]).flatten(4).flatten(0, 3)
        assert math.isclose(jacobian.slogdet()[1].item(), log_det.item(), rel_tol=1e-9, abs_tol=1e-9)


def test_before_fit_and_on_small_maps_nothing_happens():
    x = torch.randn(5, 3, 4, 9)
    assert BorderNorm(3)(x)[0] is x
    norm = random_norm().fit(x.double())
    assert norm(x)[0] is x
    assert norm(x)[1] == 0


def test_constant_channels_stay_finite():
    x = torch.randn(4, 3, 8, 8)
    x[:, 0] = 2.0
    x[:, 1, 2:-2, 2:-2] = 1.0
    y, log_det = BorderNorm(3).fit(x)(x)
    assert y.isfinite().all()
    assert log_det.isfinite()
    assert torch.equal(y[:, 0], x[:, 0])


@pytest.mark.parametrize("change", ["fit", "load", "replace", "to", "copy"])
def test_nothing_stale_is_kept(change):
    x, norm = torch.randn(9, 3, 8, 8).double(), random_norm()
    before, _ = norm(x)
    if change == "fit":
        norm.fit(x)
    elif change == "load":
        norm.load_state_dict(random_norm().state_dict())
    elif change == "replace":  # by one that may come to lie where the old one lay
        norm.shift = None
        norm.shift = torch.ones(2, 3).double()
    elif change == "to":
        norm, x = norm.float(), x.float()
    else:
        norm = copy.deepcopy(norm)
        norm.shift.add_(1)
    fresh = BorderNorm(3).to(x.dtype)
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x)[0], fresh(x)[0])
    assert (change == "to") == (max_error(norm(x)[0], before) < 1e-5)


def test_compiled_for_any_size():
    norm = random_norm()
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 8, 9), (1, 3, 5, 6), (3, 3, 3, 2)):
        x = torch.randn(shape, dtype=torch.float64)
        for found, expected in zip(compiled(x), norm(x), strict=True):
            assert max_error(found, expected) < 1e-12
