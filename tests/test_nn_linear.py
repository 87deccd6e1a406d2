"""LUConv1x1: initialisations, whitening and prior."""

import copy
import math

import pytest
import torch
from helpers import linear_subnet, max_error, randomise_

from usf_kernels import ops
from usf_kernels.nn import FlowSequence, FlowStep, LUConv1x1

pytestmark = pytest.mark.usefixtures("nan_memory")


def dense(module):
    """The map's matrix, from its action on the unit vectors."""
    eye = torch.eye(module.channels, dtype=torch.float64)
    module = copy.deepcopy(module).double()
    return (module(eye)[0] - module(0 * eye)[0]).mT


def correlated(samples, channels):
    mixing = torch.randn(channels, channels, dtype=torch.float64) / channels**0.5
    return 5 + torch.randn(samples, channels, dtype=torch.float64) @ mixing.mT


@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_initialisations(channels):
    eye = torch.eye(channels, dtype=torch.float64)
    assert torch.equal(dense(LUConv1x1(channels)), eye)
    rotation = dense(LUConv1x1(channels, init="orthogonal"))
    assert max_error(rotation @ rotation.mT, eye) < 1e-4
    module = LUConv1x1(channels, init="orthogonal", diagonal="fixed")
    assert torch.linalg.cond(dense(module)) < 8
    assert module.log_det(100) == 0
    assert not any("diagonal" in name for name, _ in module.named_parameters())
    assert torch.linalg.slogdet(dense(module))[1].abs() < 1e-6


def test_orthogonal_start_is_well_conditioned_when_wide():
    module = LUConv1x1(320, init="orthogonal")
    x = torch.randn(2, 320, 8, 8)
    z, log_det = module(x)
    assert max_error(module.inverse(z)[0], x) < 1e-3
    assert abs(log_det.item()) < 0.1
    assert module.lower.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whitening(dtype):
    x = correlated(4000, 12)
    module = LUConv1x1(12, init="orthogonal").to(dtype)
    assert module.whiten_(x.mean(0).to(dtype), x.T.cov(correction=0), eps=0) is module
    z, log_det = module(x.to(dtype))
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    assert z.mean(0).abs().max() < tolerance
    assert max_error(z.T.cov(correction=0), torch.eye(12)) < tolerance
    # An untrained flow then scores like the Mahalanobis distance.
    centred = x - x.mean(0)
    mahalanobis = (centred @ torch.linalg.inv(x.T.cov(correction=0)) * centred).sum(1)
    assert max_error(ops.squared_norm(z), mahalanobis) < 100 * tolerance
    assert abs(log_det.item() + 0.5 * torch.logdet(x.T.cov(correction=0)).item()) < 100 * tolerance
    assert max_error(module.inverse(z)[0], x) < 100 * tolerance


def test_whitening_survives_dead_channels_and_refuses_what_it_cannot_do():
    x = correlated(500, 5)
    x[:, 2] = 1.0
    module = LUConv1x1(5)
    module.whiten_(x.mean(0), x.T.cov())
    z, _ = module(x.float())
    assert z.isfinite().all()
    assert (z.std(0) < 1.01).all()
    with pytest.raises(ValueError, match="covariance: expected a finite, positive definite matrix"):
        module.whiten_(x.mean(0), x.T.cov(), eps=0)
    with pytest.raises(ValueError, match="covariance: expected a finite, positive definite matrix"):
        module.whiten_(x.mean(0), torch.full((5, 5), torch.nan))
    with pytest.raises(ValueError, match="diagonal: expected 'free' for whiten_"):
        LUConv1x1(5, diagonal="fixed").whiten_(x.mean(0), x.T.cov())
    with pytest.raises(ValueError, match="bias: expected True for whiten_"):
        LUConv1x1(5, bias=False).whiten_(x.mean(0), x.T.cov())
    with pytest.raises(ValueError, match=r"mean: expected shape \(5,\) = \(C,\), found \(4,\)"):
        module.whiten_(x.mean(0)[:4], x.T.cov())
    with pytest.raises(TypeError, match="eps: expected a number, found str"):
        module.whiten_(x.mean(0), x.T.cov(), eps="small")


def test_log_prior_is_the_log_normal_density():
    module = randomise_(LUConv1x1(6, init="orthogonal", prior_scale=30.0))  # a rotation's ln|u_ii| sum to 0
    sizes = module.log_diagonal.detach().double().exp()
    expected = torch.distributions.LogNormal(0.0, 30.0 / (6 * 8)).log_prob(sizes).sum()
    assert abs(module.log_prior(8).item() / expected.item() - 1) < 1e-6
    flow = FlowSequence([module, FlowStep(6, subnet=linear_subnet), LUConv1x1(6, prior_scale=1.0)])
    flow.log_prior(8).backward()
    assert max_error(flow.log_prior(8), module.log_prior(8) + flow[2].log_prior(8)) == 0
    assert module.log_diagonal.grad.abs().min() > 0
    assert LUConv1x1(6, diagonal="fixed", prior_scale=1.0).log_prior(8) == 0
    assert LUConv1x1(6).log_prior(8) == 0
    with pytest.raises(ValueError, match="prior_scale: expected a positive finite number, found -1"):
        LUConv1x1(6, prior_scale=-1)
    for wrong in ("a", True):
        with pytest.raises(TypeError, match=r"prior_scale: expected a number, found (str|bool)"):
            LUConv1x1(6, prior_scale=wrong)
    with pytest.raises(ValueError, match="diagonal: expected one of 'free', 'fixed', found 'unit'"):
        LUConv1x1(6, diagonal="unit")


def test_the_ridge_of_a_whitening_is_in_units_of_the_variance():
    half = torch.randn(3, 3, dtype=torch.float64)
    covariance = half @ half.mT
    one, other = (
        LUConv1x1(3).double().whiten_(torch.zeros(3), scale * covariance, eps=0.1) for scale in (1, 100)
    )
    torch.testing.assert_close(other.log_diagonal, one.log_diagonal - math.log(10))
