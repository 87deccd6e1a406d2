"""Deep SVDD: its two objectives, centre, collapse; and what links it to uniformly scaling flows."""

import math

import pytest
import torch
from helpers import max_error, randomise_

from usf_kernels.checkpoint import load_checkpoint, save_checkpoint
from usf_kernels.models import DeepSVDD, USFlow
from usf_kernels.models.deep_svdd import MOMENTUM, one_class_loss, soft_boundary_loss

SHAPES = [(6,), (3, 9, 7), (2, 4, 5, 3)]


@pytest.mark.parametrize("shape", [(5,), (3, 4, 2), (2, 2, 3, 2)], ids=["vector", "image", "volume"])
@pytest.mark.parametrize("linear", ["lu", "householder", "permutation"])
def test_maximum_likelihood_of_a_uniformly_scaling_flow_is_deep_svdd_minus_log_det(shape, linear):
    centre = torch.randn(shape, dtype=torch.float64)
    base = {"name": "normal", "scale": math.sqrt(0.5)}
    flow = randomise_(USFlow(shape, linear=linear, base=base, blocks=3, hidden=6).double())
    flow.base.loc.copy_(centre)
    flow.base.log_scale.fill_(0.5 * math.log(0.5))
    x = torch.randn(8, *shape, dtype=torch.float64)
    z, log_det = flow(x)
    dimensions = math.prod(shape)
    negative_log_likelihood = -flow.log_prob(x).mean()
    right = one_class_loss(z, centre) - log_det + dimensions / 2 * math.log(math.pi)
    assert abs(negative_log_likelihood - right) < 1e-10 * max(1, abs(right))
    assert abs(flow.loss(x) * dimensions - right) < 1e-10 * max(1, abs(right))
    parameters = [p for p in flow.parameters() if p.requires_grad]
    results = [
        torch.autograd.grad(v, parameters, retain_graph=True) for v in (negative_log_likelihood, right)
    ]
    for ours, theirs in zip(*results, strict=True):
        assert max_error(ours, theirs) < 1e-10 * max(1, theirs.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", ["one_class", "soft_boundary"])
def test_the_objectives_are_the_papers(shape, objective):
    model = DeepSVDD(shape, objective=objective, nu=0.25, latent=4, hidden=6).double()
    x = torch.randn(8, *shape, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="centre: not set yet"):
        model.eval().loss(x)
    loss = model.train().loss(x)
    z = model(x)
    assert z.shape == (8, 4)
    mean = z.mean(0)
    assert (model.centre.abs() >= 0.1 - 1e-12).all()
    far = mean.abs() >= 0.1
    assert max_error(model.centre[far], mean[far]) < 1e-12
    distance = (z - model.centre).square().sum(1)
    if objective == "one_class":
        assert max_error(loss, distance.mean()) < 1e-12
        assert max_error(model.predict(x), distance) < 1e-12
    else:
        radius = distance.sort().values[6]  # one of eight samples stays outside, less than a quarter
        expected = radius + (distance - radius).clamp_min(0).mean() / 0.25
        assert max_error(loss, expected) < 1e-12
        for other in distance:  # it is the best radius for this batch
            assert soft_boundary_loss(z, model.centre, other, 0.25) >= loss - 1e-12
        assert (model.predict(x) > 0).sum() == (distance > radius).sum()
        before = model.squared_radius.clone()
        model.loss(2 * x)
        assert model.squared_radius != before
        kept = model.squared_radius.clone()
        model.eval().loss(3 * x)
        assert model.squared_radius == kept
    centre = model.centre.clone()
    model.train().loss(x + 1)
    assert torch.equal(model.centre, centre)


def test_without_biases_zero_maps_to_zero():
    for shape in SHAPES:
        zero = torch.zeros(2, *shape)
        assert not any(name.endswith("bias") for name, _ in DeepSVDD(shape).named_parameters())
        assert DeepSVDD(shape)(zero).abs().max() == 0
        assert DeepSVDD(shape, bias=True)(zero).abs().max() > 0


def test_collapse_is_seen():
    x = torch.randn(64, 5)
    model = DeepSVDD(5, latent=3, hidden=8).initialize(x)
    healthy = model.collapse(x)
    assert not healthy.collapsed
    assert healthy.relative_spread == pytest.approx(1, abs=1e-5)
    assert 1 < healthy.effective_dimensions <= 3
    z = model(x)
    assert healthy.spread == pytest.approx((z - z.mean(0)).square().sum(1).mean().sqrt().item(), rel=1e-5)
    assert healthy.distance == pytest.approx((z - model.centre).norm(dim=1).mean().item(), rel=1e-5)
    with torch.no_grad():
        model.network[-1].weight.mul_(1e-3)
    assert model.collapse(x).collapsed
    assert not model.collapse(x, threshold=1e-4).collapsed
    with torch.no_grad():
        model.network[-1].weight.zero_()
    gone = model.collapse(x)
    assert gone.collapsed
    assert gone.spread == gone.effective_dimensions == 0


def test_training_with_biases_collapses_and_a_flow_does_not():
    """The point of the extra term."""
    x = torch.randn(256, 4)
    svdd = DeepSVDD(4, latent=4, hidden=16, bias=True)
    flow = USFlow(4, blocks=2, hidden=16, layers=1)
    for model in (svdd, flow):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(250):
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
    assert svdd.collapse(x).relative_spread < 0.1
    assert 0.8 < flow(x)[0].std() < 1.2


@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoint_and_inference_form(shape, tmp_path):
    options = {"objective": "soft_boundary", "latent": 5, "hidden": 4, "bias": True, "nu": 0.2}
    model = DeepSVDD(shape, **options)
    x = torch.randn(6, *shape)
    model.loss(x)
    save_checkpoint(tmp_path / "model.pt", model)
    again = load_checkpoint(tmp_path / "model.pt")
    assert torch.equal(again.predict(x), model.predict(x))
    assert again.collapse(x) == model.collapse(x)
    fused = model.fuse()
    assert torch.equal(fused.predict(x), model.predict(x))
    again.fuse().load_state_dict(fused.state_dict())
    narrow = model.fuse(torch.bfloat16)
    assert narrow(x).dtype == torch.bfloat16
    assert narrow.predict(x).dtype == torch.float32
    assert max_error(narrow.predict(x), model.predict(x)) < 0.05
    assert model.predict(x[:0]).shape == (0,)
    with pytest.raises(TypeError, match="loss: expected a model to train"):
        fused.loss(x)


def test_errors():
    for options, message in (
        ({"objective": "hard"}, "objective.*'hard'"),
        ({"nu": 1.0}, "nu: expected a number in \\(0, 1\\), found 1.0"),
        ({"latent": 0}, "latent.*0"),
        ({"layers": -1}, "layers.*-1"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepSVDD(4, **options)
    model = DeepSVDD(4)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 4\), found \(2, 3\)"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="samples: expected at least one, found none"):
        model.initialize(torch.zeros(0, 4))
    with pytest.raises(RuntimeError, match="centre: not set yet"):
        model.predict(torch.zeros(2, 4))
    model.initialize(torch.randn(3, 4))
    centre = model.centre.clone()
    with pytest.raises(ValueError, match="samples: expected finite latents"):
        model.initialize(torch.full((3, 4), torch.nan))
    assert torch.equal(model.centre, centre)
    with pytest.raises(TypeError, match="nu: expected a number, found str"):
        DeepSVDD(4, nu="a")
    with pytest.raises(ValueError, match="samples: expected at least two, found 1"):
        model.collapse(torch.randn(1, 4))
    with pytest.raises(TypeError, match=r"dtype: expected float32.*found torch.int8"):
        model.fuse(torch.int8)


def test_a_soft_boundary_is_there_from_the_start():
    samples = torch.randn(200, 6)
    model = DeepSVDD(6, objective="soft_boundary", nu=0.1).initialize(samples).eval()
    outside = (model.predict(samples) > 0).double().mean().item()
    assert 0.05 <= outside <= 0.1
    assert model.loss(samples).isfinite()
    assert model.fuse().predict(samples).isfinite().all()


@pytest.mark.parametrize("nu", [0.1, 0.45, 0.5, 0.9])
@pytest.mark.parametrize("samples", [1, 2, 3, 8, 25])
def test_no_other_radius_is_better_for_the_batch(nu, samples):
    model = DeepSVDD(3, objective="soft_boundary", nu=nu, latent=4).double()
    x = torch.randn(samples, 3, dtype=torch.float64)
    model.initialize(x)
    z = model(x).detach()
    loss = soft_boundary_loss(z, model.centre, model.squared_radius, nu)
    for other in (z - model.centre).square().sum(1):
        assert loss <= soft_boundary_loss(z, model.centre, other, nu) + 1e-12


def test_an_empty_batch_is_refused():
    model = DeepSVDD(4, objective="soft_boundary").initialize(torch.randn(20, 4))
    with pytest.raises(ValueError, match="batch: expected at least one sample, found none"):
        model.loss(torch.zeros(0, 4))


def test_an_inference_form_keeps_its_centre():
    fused = DeepSVDD(4).initialize(torch.randn(20, 4)).fuse()
    with pytest.raises(TypeError, match="initialize: expected a model to train, found its inference form"):
        fused.initialize(torch.randn(20, 4))


def test_collapse_counts_dimensions_and_the_radius_is_a_running_mean():
    model, x = DeepSVDD(3, objective="soft_boundary", latent=3, layers=0), torch.randn(64, 3)
    with torch.no_grad():
        model.network[-1].weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    model.loss(x)
    spectrum = torch.linalg.eigvalsh(torch.cov(model(x).T))
    expected = (spectrum.sum() ** 2 / spectrum.square().sum()).item()
    assert model.collapse(x).effective_dimensions == pytest.approx(expected, rel=1e-4)
    before = model.squared_radius.clone()
    model.loss(2 * x)
    now = model._radius_of(model(2 * x))
    torch.testing.assert_close(model.squared_radius, before.lerp(now, MOMENTUM))
