"""FastFlow: likelihood, initialisation, scores, calibration, checkpoint contract."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import usf_kernels as usf
from usf_kernels.models import Backbone, FastFlow, Mahalanobis, create_backbone, image_score

VARIANTS = [("additive", "lu"), ("affine", "permutation"), ("affine", "lu"), ("additive", "permutation")]


class Pyramid(nn.Module):
    """A fixed random convolution per scale, with correlated and badly scaled channels as real ones have."""

    def __init__(self, channels=(5, 8), strides=(2, 4)):
        super().__init__()
        self.feature_info = SimpleNamespace(channels=lambda: channels, reduction=lambda: strides)
        self.layers = nn.ModuleList(
            nn.Conv2d(3, c, s, stride=s) for c, s in zip(channels, strides, strict=True)
        )
        for layer in self.layers:
            layer.weight.data *= torch.linspace(0.5, 8, len(layer.weight)).view(-1, 1, 1, 1)

    def forward(self, images):
        return [torch.relu(layer(images)) + 0.1 * layer(images) for layer in self.layers]


@pytest.fixture
def backbone():
    return Backbone(Pyramid(), {"name": "pyramid"}, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def images():
    return torch.rand(24, 3, 16, 24)


def perturbed(model):
    """The model with couplings that do something."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("coupling", "linear"), VARIANTS)
def test_inverse_undoes_forward(backbone, images, coupling, linear, fused):
    model = FastFlow(backbone, coupling=coupling, linear=linear, steps=3).double()
    features = model.features(images.double())
    model = perturbed(model.initialize(features))
    model = model.fuse() if fused else model
    latents, _ = model.latents(features)
    for found, expected in zip(model.inverse(latents), features, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="latents"):
        model.inverse([z[:, 1:] for z in latents])


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS)
def test_log_det_is_that_of_the_jacobian(backbone, images, coupling, linear):
    model = FastFlow(backbone, coupling=coupling, linear=linear, steps=3)
    model.initialize(model.features(images))
    model = perturbed(model).double()
    features = [maps[:1, :, :2, :3].double() for maps in model.features(images.double())]
    expected = 0.0
    for flow, border, maps in zip(model.flows, model.borders, features, strict=True):
        border.log_scale.normal_()
        jacobian = torch.func.jacrev(lambda x, f=flow, b=border: f(b(x)[0])[0].flatten())(maps)
        expected += torch.linalg.slogdet(jacobian.reshape(maps.numel(), maps.numel()))[1]
    _, log_det = model.latents(features)
    assert log_det.shape == (() if coupling == "additive" else (1,))
    assert log_det.item() == pytest.approx(expected.item(), abs=1e-8)


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS)
def test_loss_is_the_likelihood_per_dimension(backbone, images, coupling, linear):
    model = perturbed(FastFlow(backbone, coupling=coupling, linear=linear, steps=2))
    for border in model.borders:
        border.log_scale.fill_(0.3)
    latents, log_det = model(images)
    dimensions = sum(z[0].numel() for z in latents)
    energies = sum(0.5 * z.square().flatten(1).sum(1) for z in latents)
    expected = ((energies - log_det) / dimensions).mean()
    assert model.loss(images).item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.loss(model.features(images)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_noise_is_for_training_only(backbone, images):
    model = FastFlow(backbone, noise=0.5, steps=1)
    model.initialize(model.features(images))
    clean = model.eval().loss(images).item()
    assert model.loss(images).item() == clean
    noisy = model.train().loss(images).item()
    assert noisy == pytest.approx(clean + 0.5 * 0.5**2, rel=0.05)  # E[z^2] grows by the noise's variance


def test_untrained_flow_scores_as_the_mahalanobis_distance(backbone, images):
    features = backbone(images)
    model = FastFlow(backbone, steps=4).eval().initialize(features, shrinkage=1e-4)
    baseline = Mahalanobis(backbone).fit(features, shrinkage=1e-4)
    assert model.mean_square(features) == pytest.approx([1.0, 1.0], abs=0.05)
    ours, theirs = model.predict(images), baseline.predict(images)
    assert torch.allclose(ours.anomaly_map, theirs.anomaly_map, atol=1e-5)
    assert torch.allclose(ours.score, theirs.score, atol=1e-5)


def test_actnorm_variant_starts_standardised(backbone, images):
    model = FastFlow(backbone, coupling="affine", linear="permutation", steps=2).eval()
    features = model.features(images)
    model.initialize(features)
    assert not model.training
    assert model.mean_square(features) == pytest.approx([1.0, 1.0], abs=1e-3)


@pytest.mark.parametrize("model_class", [FastFlow, Mahalanobis])
def test_a_failed_start_changes_nothing(backbone, images, model_class):
    options = {} if model_class is Mahalanobis else {"steps": 2, "linear": "permutation"}
    model = model_class(backbone, **options)
    start = model.fit if model_class is Mahalanobis else model.initialize
    features = model.features(images)
    start(features)
    before = copy.deepcopy(model.state_dict())
    broken = [features[0], features[1] * torch.nan]
    none = [maps[:0] for maps in features]
    models = [(model, start, before)]
    if model_class is FastFlow:
        model = perturbed(FastFlow(backbone, steps=2)).train()
        model.initialize(features)
        models.append((model, model.initialize, copy.deepcopy(model.state_dict())))
    for (model, start, before), wrong in itertools.product(
        models, (broken, [features[0], features[1][:3]], *([none] * (model_class is not Mahalanobis)))
    ):
        with pytest.raises(ValueError, match=r"covariance|mean|as many images|at least one image"):
            start(wrong)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    fused = model.fuse()
    with pytest.raises(TypeError, match="expected a model to train, found its inference form"):
        (fused.fit if model_class is Mahalanobis else fused.initialize)(features)


def test_starting_again_scales_again(backbone, images):
    model = FastFlow(backbone, steps=2, linear="permutation", coupling="affine")
    features = model.features(images)
    model.train().loss(features)  # an ActNorm has seen data
    other = [5 * maps + 3 for maps in features]
    for z in model.initialize(other).latents(other)[0]:
        assert z.detach().std() == pytest.approx(1, abs=0.2)


def test_frozen_parts_stay_frozen(backbone, images):
    model = FastFlow(backbone, steps=2).train()
    model.flows[0].eval()
    features = model.features(images)
    model.initialize(features)
    model.mean_square(features)
    assert not any(part.training for part in model.flows[0].modules())
    assert model.flows[1].training
    with pytest.raises(ValueError, match="batch_size: expected an int at least 1, found 0"):
        model.calibrate(features, batch_size=0)
    for wrong, error in ((math.inf, ValueError), ("a", TypeError), (True, TypeError)):
        with pytest.raises(error, match="noise"):
            FastFlow(backbone, noise=wrong)
        with pytest.raises(error, match="hidden_ratio"):
            FastFlow(backbone, hidden_ratio=wrong)
    with pytest.raises(ValueError, match="clamp"):
        FastFlow(backbone, clamp=-1.0)
    with pytest.raises(ValueError, match=r"share: expected a number in \(0, 1\], found 2"):
        image_score(images, share=2.0)


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS[:2])
def test_the_likelihood_is_bounded(backbone, images, coupling, linear):
    """With a trainable scale outside the log-determinant, z^2 would collapse and the loss run away."""
    model = FastFlow(backbone, coupling=coupling, linear=linear, steps=2, noise=0.3)
    features = model.features(images)
    model.initialize(features).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model.loss(features).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(features)
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    assert all(0.6 < value < 1.2 for value in model.mean_square(features))


def test_everything_trainable_learns_and_the_backbone_does_not(backbone, images):
    model = perturbed(FastFlow(backbone, coupling="affine", steps=2)).train()
    model.loss(images).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert not model.backbone.training


def test_prediction_keeps_its_contract(backbone, images):
    model = FastFlow(backbone, steps=2).train()
    features = model.features(images)
    model.initialize(features)
    model.calibrate(features, false_alarms=2.0)
    result = model.predict(images)
    assert any(result.regions)
    assert model.training  # as it was
    assert result.score.shape == (24,)
    assert 0 <= result.anomaly_map.min() <= result.anomaly_map.max() <= 1
    for maps in (result.anomaly_map, result.log_nfa, result.mask):
        assert maps.shape == (24, 1, 16, 24)
    assert result.mask.dtype == torch.bool
    assert torch.equal(result.mask, result.log_nfa <= 0)
    assert len(result.regions) == 24
    assert torch.equal(result.anomalous, result.mask.flatten(1).any(1))
    assert torch.equal(model.predict(images, features).log_nfa, result.log_nfa)
    for mask, found in zip(result.mask, result.regions, strict=True):
        boxes = torch.zeros_like(mask)
        for region in found:
            top, left, bottom, right = region.image_box((16, 24))
            assert mask[0, top:bottom, left:right].any()
            boxes[0, top:bottom, left:right] = True
        assert not (mask & ~boxes).any()  # the mask shows the regions, all of them and nothing else
    strict = model.predict(images, log_epsilon=-1e6)
    assert not strict.mask.any()
    assert not any(strict.regions)


def test_a_captured_model_predicts_the_same(backbone, images, graphs):
    model = perturbed(FastFlow(backbone, steps=2)).double()
    images = images.double()
    call = model.fuse().capture(images[:2])
    with pytest.warns(UserWarning, match="not calibrated") as found:
        call(images[:2])
    assert found[0].filename == __file__
    model.calibrate(model.features(images))
    call = model.fuse().capture(images[:2])
    assert len(graphs) == 2
    for i in (0, 2):
        prediction, expected = call(images[i : i + 2]), model.predict(images[i : i + 2])
        for name in ("score", "anomaly_map", "log_nfa"):
            torch.testing.assert_close(getattr(prediction, name), getattr(expected, name))
    with pytest.raises(ValueError, match="expected the captured"):
        call(images[:1])


def test_a_score_depends_on_its_own_image_only(backbone, images):
    model = FastFlow(backbone, steps=2)
    features = model.features(images)
    model.initialize(features)
    model.calibrate(features)
    perturbed(model)
    together = model.predict(torch.cat([images[:3], 10 * images[3:6]]))
    for i in range(3):
        alone = model.predict(images[i : i + 1])
        assert torch.allclose(alone.score, together.score[i : i + 1], atol=1e-6)
        assert torch.allclose(alone.anomaly_map, together.anomaly_map[i : i + 1], atol=1e-6)
        assert len(alone.regions[0]) == len(together.regions[i])


def test_a_planted_defect_is_found(backbone, images):
    model = FastFlow(backbone, steps=2)
    features = model.features(images)
    model.initialize(features)
    model.calibrate(features)
    damaged = images.clone()
    damaged[0, :, 4:12, 8:16] = torch.tensor([3.0, -2.0, 3.0]).view(3, 1, 1)
    result = model.predict(damaged)
    assert result.score.argmax() == 0
    assert result.anomaly_map[0, 0, 6:10, 10:14].min() > result.anomaly_map[0, 0, :, 18:].mean()
    assert result.mask[0, 0, 6:10, 10:14].any()


def test_calibration_bounds_the_alarms_on_held_out_images(backbone):
    model = perturbed(FastFlow(backbone, steps=2))  # not whitened: badly scaled, correlated latents
    smooth = nn.functional.avg_pool2d(torch.rand(40, 3, 18, 26), 3, 1)
    features = model.features(smooth)
    assert model.null is None
    null = model.calibrate(features, false_alarms=0.1)
    assert model.null == null
    counts = [len(found) for found in model.predict(smooth).regions]
    assert sum(counts) / len(counts) <= 0.1
    looser = usf.calibrate(model.squared_norms(features), false_alarms=1.0)
    assert all(a < b for a, b in zip(looser.scale, null.scale, strict=True))
    assert looser.dof == pytest.approx(null.dof)


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS)
def test_the_inference_form_predicts_the_same(backbone, images, coupling, linear):
    model = FastFlow(backbone, coupling=coupling, linear=linear, steps=4)
    features = model.features(images)
    model.initialize(features)
    perturbed(model)
    model.calibrate(features)
    fused = model.train().fuse()
    assert model.training
    assert not fused.training
    expected, found = model.predict(images), fused.predict(images)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_nfa, expected.log_nfa, rtol=1e-3, atol=1e-2)
    rough = model.fuse(torch.bfloat16)
    assert rough.latents(features)[0][0].dtype == torch.bfloat16
    assert (rough.predict(images).score - expected.score).abs().max() < 0.03
    with pytest.raises(TypeError, match="loss: expected a model to train"):
        fused.loss(images)


def test_config_and_state_rebuild_the_model(images):
    options = {
        "coupling": "affine",
        "steps": 2,
        "hidden_ratio": 0.5,
        "kernels": (3,),
        "clamp": 1.5,
        "noise": 0.1,
        "memory": "standard",
    }
    first = FastFlow(create_backbone(out_indices=(1, 2)), **options)
    images = torch.rand(4, 3, 64, 64)
    features = first.features(images)
    first.initialize(features)
    perturbed(first).calibrate(features)
    config = json.loads(json.dumps(first.config))
    again = FastFlow.from_config(config).eval()
    assert again.config == first.config
    assert {flow.memory for flow in again.flows} == {"standard"}
    assert again.null is None
    again.load_state_dict(first.state_dict())
    assert again.null == first.null
    for ours, theirs in zip(again.predict(images)[:4], first.predict(images)[:4], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("channels", "kernels", "millions"),
    [((64, 128, 256), (3,), 4.9), ((256, 512, 1024), (3, 1), 41.3)],
)
def test_sizes_are_those_of_the_paper(channels, kernels, millions):
    """What the flows on ResNet-18 and Wide-ResNet-50-2 add in parameters."""
    backbone = Backbone(Pyramid(channels, (1, 1, 1)), {}, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = FastFlow(backbone, coupling="affine", linear="permutation", kernels=kernels)
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found / 1e6 == pytest.approx(millions, rel=0.06)


def test_image_score_is_the_mean_of_the_largest():
    maps = torch.zeros(2, 1, 10, 10)
    maps[0, 0, 3, 3], maps[0, 0, 7, 1], maps[1] = 1.0, 0.4, 0.2
    assert image_score(maps, share=0.02).tolist() == pytest.approx([0.7, 0.2])
    assert image_score(maps, share=1e-9).tolist() == pytest.approx([1.0, 0.2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "rational"}, "coupling.*'rational'"),
        ({"linear": "none"}, "linear.*'none'"),
        ({"steps": -1}, "steps.*-1"),
        ({"hidden_ratio": 0.0}, "hidden_ratio.*0"),
        ({"kernels": (2,)}, r"kernels.*\(2,\)"),
        ({"kernels": ()}, "kernels"),
        ({"noise": float("nan")}, "noise.*nan"),
    ],
)
def test_wrong_options_are_named(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        FastFlow(backbone, **options)


def test_wrong_inputs_are_named(backbone, images):
    model = FastFlow(backbone, steps=1)
    with pytest.raises(TypeError, match=r"backbone.*Linear"):
        FastFlow(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"features.*\[5, 8\].*\[5\]"):
        model.loss(model.features(images)[:1])
    with pytest.raises(ValueError, match=r"images.*\(3, 16, 24\)"):
        model.predict(images[0])
    with pytest.raises(ValueError, match="false_alarms"):
        model.calibrate(model.features(images), false_alarms=0)


def test_a_model_is_calibrated_for_the_alarms_asked_for(backbone, images):
    model = perturbed(FastFlow(backbone, steps=2))
    features = model.features(images)
    for asked in (0.1, 2.0):
        expected = usf.calibrate(model.squared_norms(features), false_alarms=asked)
        assert model.calibrate(features, false_alarms=asked) == expected


def test_another_start_forgets_the_threshold(backbone, images):
    model = FastFlow(backbone, steps=1)
    features = model.features(images)
    model.initialize(features).calibrate(features)
    assert model.null is not None
    assert model.initialize(features).null is None


def test_predictions_are_upsampled_as_asked(backbone, images):
    model = perturbed(FastFlow(backbone, steps=2))
    model.calibrate(model.features(images))
    latents, _ = model(images)
    found = {}
    for how in ("nearest", "bilinear"):
        found[how] = model.predict(images, upsample=how).log_nfa
        expected = usf.log_nfa(latents, tuple(images.shape[2:]), null=model.null, upsample=how)
        torch.testing.assert_close(found[how], expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(*found.values())
    assert torch.equal(model.predict(images).log_nfa, found["nearest"])
