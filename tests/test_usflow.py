"""USFlow and NonUSFlow: densities, inverses, priors, inference forms and checkpoints, over all options."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import jacobian_log_det, max_error, randomise_
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from usf_kernels.checkpoint import load_checkpoint, save_checkpoint
from usf_kernels.models import NonUSFlow, USFlow
from usf_kernels.nn import LUConv1x1
from usf_kernels.optimization import parameter_groups

KINDS = [USFlow, NonUSFlow]
LINEAR = ("lu", "householder", "permutation")
MASKS = ("half", "channel", "checkerboard")


def make(kind, shape, **options):
    model = kind(shape, **{"blocks": 2, "hidden": 5, "layers": 1} | options)
    return randomise_(model.double())


def samples(shape, n=3):
    return torch.randn(n, *(shape if isinstance(shape, tuple) else (shape,)), dtype=torch.float64)


def assert_consistent(model, x):
    """Log-likelihood, inverse and inference form agree with each other and with autograd."""
    z, log_det = model(x)
    back, inverse_log_det = model.inverse(z)
    assert max_error(back, x) < 1e-8
    assert max_error(inverse_log_det, -log_det) < 1e-9
    log_prob = model.log_prob(x)
    if len(x):
        truth = jacobian_log_det(lambda v: model(v)[0], x)
        assert max_error(log_prob, model.base.log_prob(z) + truth) < 1e-8
    assert max_error(model.predict(x), -log_prob) < 1e-12
    fused = model.fuse()
    assert max_error(fused.log_prob(x), log_prob) < 1e-8
    assert max_error(fused.inverse(z)[0], x) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("shape", [(5,), (3, 2, 3), (2, 2, 1, 2)], ids=["vector", "image", "volume"])
def test_every_form_is_a_density(kind, linear, shape):
    for mask in MASKS if len(shape) > 1 else MASKS[:2]:
        model = make(kind, shape, mask=mask, linear=linear, memory="standard")
        x = samples(shape, 2)
        assert_consistent(model, x)
        assert model(x)[1].shape == (() if kind is USFlow else (2,))
        assert model.log_prob(x[:0]).shape == model.fuse().log_prob(x[:0]).shape == (0,)


@given(
    kind=st.sampled_from(KINDS),
    shape=st.lists(st.integers(1, 4), max_size=2).map(tuple),
    channels=st.integers(2, 4),
    batch=st.integers(0, 2),
    linear=st.sampled_from(LINEAR),
    mask=st.sampled_from(MASKS),
    base=st.sampled_from(["normal", "laplace", "student_t", "radial", "normal_mixture"]),
    blocks=st.integers(0, 3),
)
def test_any_shape_and_options(kind, shape, channels, batch, linear, mask, base, blocks):
    mask = "channel" if not shape else mask
    options = {"linear": linear, "mask": mask, "base": base, "blocks": blocks, "memory": "standard"}
    model = make(kind, (channels, *shape), **options)
    assert_consistent(model, samples((channels, *shape), batch))
    assert model.sample(batch).shape == (batch, channels, *shape)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_integrates_to_one_and_samples_follow_it(kind):
    model = make(kind, 2, base="laplace", memory="standard")
    model.flow[-1].log_diagonal.data += 0.5
    line = torch.linspace(-12, 12, 601, dtype=torch.float64) + 0.0031
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(-1, 2)
    with torch.no_grad():
        log_prob = model.log_prob(grid)
        area = (line[1] - line[0]) ** 2
        assert (log_prob.exp().sum() * area).item() == pytest.approx(1, abs=5e-3)
        entropy = -(log_prob.exp() * log_prob).sum() * area
        assert -model.log_prob(model.sample(20_000)).mean().item() == pytest.approx(entropy.item(), abs=0.04)


def test_the_latent_norm_of_a_uniformly_scaling_flow_ranks_as_its_likelihood():
    x = samples((6,), 200)
    for kind, exact in ((USFlow, True), (NonUSFlow, False)):
        model = make(kind, 6, clamp=3.0)
        norm = model(x)[0].norm(dim=1)
        assert torch.equal(norm.argsort(), model.predict(x).argsort()) == exact


def test_one_channel_images_have_checkerboards():
    for kind in KINDS:
        model = make(kind, (1, 4, 3), mask="checkerboard", blocks=4)
        assert_consistent(model, samples((1, 4, 3), 2))
        z, _ = model(samples((1, 4, 3), 2))
        z.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_initialize_whitens_and_the_untrained_flow_has_unit_scale():
    for kind in KINDS:
        for linear in LINEAR:
            model = kind((4, 5, 5), blocks=3, linear=linear, hidden=8)
            x = torch.randn(40, 4, 5, 5) @ torch.diag(torch.tensor([0.1, 5.0, 1.0, 2.0, 0.5])) + 3
            assert max_error(model.flow[:-1](x)[0], x) < 1e-4
            model.initialize(x, shrinkage=1e-6)
            z = model(x)[0].transpose(0, 1).flatten(1)
            assert max_error(z.mean(1), torch.zeros(4)) < 1e-3
            assert max_error(torch.cov(z), torch.eye(4)) < 1e-2


def test_the_prior_is_the_papers_and_reaches_every_map():
    model = make(USFlow, (3, 2, 4), blocks=2, prior_scale=1.5, prior_weight=0.1)
    s0 = 1.5 / 24
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), s0)
    maps = [m for m in model.flow.modules() if isinstance(m, LUConv1x1)]
    assert len(maps) == 3
    expected = sum((normal.log_prob(m.log_diagonal) - m.log_diagonal).sum() for m in maps)
    assert max_error(model.log_prior(), expected) < 1e-9
    gradients = torch.autograd.grad(model.log_prior(), [m.log_diagonal for m in maps])
    assert all((g != 0).all() for g in gradients)
    x = samples((3, 2, 4))
    loss = -(model.log_prob(x).mean() + 0.1 * expected) / 24
    assert max_error(model.loss(x), loss) < 1e-9
    without = make(USFlow, (3, 2, 4))
    assert without.log_prior() == 0
    assert max_error(without.loss(x), -without.log_prob(x).mean() / 24) < 1e-12


def test_a_prior_pulls_the_determinant_to_one():
    x = 4 * torch.randn(200, 3)
    for scale, low, high in ((None, -9, -3.5), (0.03, -0.2, 0.2)):
        torch.manual_seed(1)
        model = USFlow(3, blocks=1, hidden=4, layers=1, prior_scale=scale)
        start = [m.log_diagonal.abs().max().item() for m in model.flow.modules() if isinstance(m, LUConv1x1)]
        assert scale is None or max(start) == 0  # the prior's mode
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(80):
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
        assert low < model(x)[1].item() < high


def test_training_reaches_the_likelihood_of_correlated_data():
    torch.manual_seed(0)
    mixing = torch.tensor([[1.0, 0.0], [1.5, 0.5]])
    x = torch.randn(512, 2) @ mixing.T
    model = USFlow(2, blocks=4, hidden=16, layers=1).initialize(x)
    truth = torch.distributions.MultivariateNormal(torch.zeros(2), mixing @ mixing.T).log_prob(x).mean()
    assert model.log_prob(x).mean() > truth - 0.02
    bent = torch.stack([x[:, 0], x[:, 1] + x[:, 0] ** 2], 1)
    model.initialize(bent)
    before = model.loss(bent).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(bent).backward()
        optimizer.step()
    assert model.loss(bent).item() < before - 0.4
    assert model.log_prob(bent).mean().item() == pytest.approx(truth.item(), abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [{"name": "radial", "p": math.inf, "components": 2}, "normal_mixture"])
def test_config_state_and_checkpoint_rebuild_the_model(kind, base, tmp_path):
    options = {"mask": "checkerboard", "linear": "lu", "base": base, "prior_scale": 2.0, "clamp": 1.0}
    model = randomise_(kind((2, 3, 4), blocks=3, hidden=4, **options))
    save_checkpoint(tmp_path / "model.pt", model)
    again = load_checkpoint(tmp_path / "model.pt")
    assert type(again) is kind
    assert again.config == json.loads(json.dumps(model.config))
    x = torch.randn(3, 2, 3, 4)
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    assert torch.equal(again.log_prior(), model.log_prior())
    assert torch.equal(again.fuse().log_prob(x), model.fuse().log_prob(x))
    fused, other = model.fuse(), model.fuse()
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other.log_prob(x), fused.log_prob(x))


def test_narrow_inference_forms():
    model = randomise_(USFlow((4, 3, 3), blocks=2, hidden=6))
    x = torch.randn(5, 4, 3, 3)
    fused = model.fuse(torch.bfloat16)
    assert model.training
    assert not fused.training
    assert fused(x)[0].dtype == torch.bfloat16
    assert fused.log_prob(x).dtype == torch.float32
    expected = model.log_prob(x)
    assert ((fused.log_prob(x) - expected).abs() < 0.05 * expected.abs()).all()
    assert fused.fuse().flow is not None
    for method in (lambda: fused.loss(x), fused.log_prior, lambda: fused.initialize(x)):
        with pytest.raises(TypeError, match="expected a model to train, found its inference form"):
            method()


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((), {}, ValueError, r"shape: expected \(C, \*spatial\) with at most 3 spatial sizes, found \(\)"),
        ((2, 0, 3), {}, ValueError, r"shape\[1\]: expected an int at least 1, found 0"),
        ((2.0,), {}, TypeError, r"shape\[0\]: expected an int, found float"),
        ((2, 1, 1, 1, 1), {}, ValueError, "shape"),
        (1, {}, ValueError, r"shape: expected at least 2 channels for mask=.half., found \(1,\)"),
        ((1, 8, 8), {}, ValueError, "mask=.checkerboard. takes one"),
        (4, {"mask": "checkerboard"}, ValueError, "mask: a checkerboard needs spatial dimensions"),
        (4, {"mask": "row"}, ValueError, "mask.*'row'"),
        (4, {"linear": "qr"}, ValueError, "linear.*'qr'"),
        (4, {"kernel": 2}, ValueError, "kernel: expected an odd size, found 2"),
        ((2, 4, 4), {"hidden": 1}, ValueError, "hidden: expected at least 2, found 1"),
        (4, {"base": "cauchy"}, ValueError, "base.*'cauchy'"),
        (4, {"prior_scale": -1.0}, ValueError, "prior_scale.*-1.0"),
        (4, {"prior_weight": math.inf}, ValueError, "prior_weight.*inf"),
        (4, {"blocks": -1}, ValueError, "blocks.*-1"),
    ],
)
def test_wrong_options_are_named(shape, options, error, message):
    with pytest.raises(error, match=message):
        USFlow(shape, **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"clamp": -1.0}, ValueError),
        ({"reflections": 0}, ValueError),
        ({"prior_weight": True}, TypeError),
        ({"prior_weight": "1"}, TypeError),
        ({"base": None}, TypeError),
        ({"base": {"name": "normal", "scale": True}}, TypeError),
    ],
)
def test_options_that_are_not_used_are_checked_as_well(options, error):
    with pytest.raises(error, match=r"clamp|reflections|prior_weight|base|scale"):
        USFlow(4, **options)


@pytest.mark.parametrize("kind", [USFlow, NonUSFlow])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_samples_of_any_dtype(kind, dtype):
    for shape in ((4,), (2, 4, 4)):
        model = make(kind, shape).float()
        x = samples(shape).to(dtype)
        assert torch.equal(model.log_prob(x), model.log_prob(x.float()))
        assert model.initialize(samples(shape, 64).to(dtype)).inverse(x)[0].dtype == torch.float32


def test_the_base_does_not_decay():
    model = USFlow((2, 3, 3), blocks=1, base={"name": "student_t", "trainable": True})
    groups = parameter_groups(model, 0.1)
    (kept,) = (group["params"] for group in groups if group["weight_decay"] == 0)
    trained = [p for p in model.base.parameters() if p.requires_grad]
    assert len(trained) == 3
    assert all(any(p is other for other in kept) for p in trained)


def test_sizes_of_numpy_are_sizes():
    model = USFlow(np.int64(4), blocks=np.int64(2), hidden=np.int64(8))
    assert USFlow.from_config(json.loads(json.dumps(model.config))).shape == (4,)


def test_a_model_made_without_memory():
    model = make(USFlow, (6,), mask="channel")
    with torch.device("meta"):
        empty = USFlow(6, mask="channel", **{k: model.config[k] for k in ("blocks", "hidden", "layers")})
    empty = empty.double().to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    x = samples((6,))
    assert torch.equal(empty.log_prob(x), model.log_prob(x))


def test_wrong_inputs_are_named():
    model = USFlow((3, 4, 4), blocks=1)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 3, 4, 4\), found \(2, 3, 4, 5\)"):
        model.log_prob(torch.zeros(2, 3, 4, 5))
    with pytest.raises(TypeError, match=r"x: expected float32.*found torch.uint8"):
        model(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"z: expected shape"):
        model.inverse(torch.zeros(2, 3))


def test_initialize_with_one_channel():
    samples = 3 * torch.rand(64, 1, 8, 8) + 5
    flow = USFlow((1, 8, 8), mask="checkerboard", blocks=1).initialize(samples)
    z = flow(samples)[0]
    assert abs(z.mean()) < 0.3
    assert 0.5 < z.std() < 2


@pytest.mark.parametrize("count", [3, 9])
def test_forward_mode(count):
    """Whether or not the batch is large enough to rebuild activations in a backward pass."""
    model, x = randomise_(USFlow(3, blocks=4, hidden=5)), torch.randn(count, 3)
    _, expected = torch.func.jvp(model.log_prob, (x,), (x,))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model.log_prob(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(found, expected)


def test_a_configuration_is_plain_values():
    config = USFlow(3, blocks=1, prior_scale=np.float32(0.5), prior_weight=np.float32(0.25)).config
    assert json.loads(json.dumps(config)) == config


def test_initialize_needs_a_covariance():
    with pytest.raises(ValueError, match=r"samples: expected at least two positions.*\(1, 3\)"):
        USFlow(3, blocks=1).initialize(torch.randn(1, 3))


def test_fused_in_inference_mode():
    model = make(USFlow, 6)
    with torch.inference_mode():
        fused = model.fuse()
    assert not any(t.is_inference() for t in fused.state_dict().values())
    fused.load_state_dict(fused.state_dict())


def test_places_of_the_base_are_stored_as_plain_numbers(tmp_path):
    for loc in (torch.ones(3), np.ones(3), [1.0, 1.0, 1.0]):
        flow = USFlow(3, blocks=1, base={"name": "normal", "loc": loc})
        save_checkpoint(tmp_path / "flow.pt", flow)
        assert load_checkpoint(tmp_path / "flow.pt").config["base"]["loc"] == [1.0, 1.0, 1.0]


def test_a_scale_that_is_no_number_is_named():
    with pytest.raises(TypeError, match=r"prior_scale: expected"):
        USFlow(3, prior_scale="a")


@pytest.mark.parametrize("kind", KINDS)
def test_the_colours_of_checkerboards_alternate(kind):
    flow = kind((2, 4, 4), blocks=3, mask="checkerboard", hidden=4).flow
    assert [block.coupling.odd for block in flow[:-1]] == [False, True, False]
