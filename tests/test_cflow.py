"""CFlow: likelihood, encoding, stretches of positions, sampling, inference form, checkpoint contract."""

import copy
import io
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fastflow import Pyramid, perturbed

from usf_kernels.checkpoint import load_checkpoint, save_checkpoint
from usf_kernels.data import TextureDataset
from usf_kernels.demo import extract
from usf_kernels.models import Backbone, CFlow, Mahalanobis, create_backbone
from usf_kernels.models.cflow import in_stretches
from usf_kernels.models.encoding import Encodings, positional_encoding
from usf_kernels.models.kept import MOST
from usf_kernels.training import CachedFeatures, fit

VARIANTS = [("additive", "lu"), ("affine", "permutation"), ("affine", "lu"), ("additive", "permutation")]


@pytest.fixture
def backbone():
    return Backbone(Pyramid(), {"name": "pyramid"}, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def images():
    return torch.rand(6, 3, 16, 24)


def cflow(backbone, images, **options):
    """Small, initialised, and with couplings that do something; in evaluation mode."""
    options = {"steps": 3, "encoding_channels": 8} | options
    model = CFlow(backbone, **options)
    model.initialize(model.features(images))
    return perturbed(model)


@given(st.integers(1, 8).map(lambda n: 4 * n), st.integers(0, 9), st.integers(0, 9))
def test_positional_encoding_is_its_formula(channels, height, width):
    found = positional_encoding(channels, height, width, dtype=torch.float64)
    assert found.shape == (channels, height, width)
    half = channels // 2
    for channel in range(channels):
        wave = math.cos if channel % 2 else math.sin
        frequency = 10000 ** (-((channel % half) // 2 * 2) / half)
        for row in range(height):
            for column in range(width):
                place = column if channel < half else row
                assert found[channel, row, column].item() == pytest.approx(wave(place * frequency), abs=1e-12)


def test_positional_encoding_takes_a_dtype():
    assert positional_encoding(4, 2, 3).dtype == torch.float32
    narrow = positional_encoding(128, 200, 2, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, positional_encoding(128, 200, 2).bfloat16())  # rounded at the end only


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS)
def test_log_det_is_that_of_the_jacobian(backbone, images, coupling, linear):
    model = cflow(backbone, images, coupling=coupling, linear=linear).double()
    features = [maps[:1, :, :2, :3].double() for maps in model.features(images.double())]
    _, log_det = model.latents(features)
    expected = 0.0
    for i, maps in enumerate(features):
        others = features[:i], features[i + 1 :]

        def scale(x, i=i, others=others):
            return model.latents([*others[0], x, *others[1]])[0][i].flatten()

        jacobian = torch.func.jacrev(scale)(maps).reshape(maps.numel(), maps.numel())
        expected += torch.linalg.slogdet(jacobian)[1]
        # A latent depends on the features of its own position alone.
        positions = jacobian.view(maps.shape[1], -1, maps.shape[1], maps.shape[2] * maps.shape[3])
        assert not positions[:, 0, :, 1].any()
        assert positions[:, 1, :, 1].any()
    assert log_det.shape == (() if coupling == "additive" else (1,))
    assert log_det.item() == pytest.approx(expected.item(), abs=1e-8)


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS)
@pytest.mark.parametrize("fused", [False, True])
def test_inverse_undoes_forward(backbone, images, coupling, linear, fused):
    model = cflow(backbone, images, coupling=coupling, linear=linear).double()
    features = model.features(images.double())
    model = model.fuse() if fused else model
    latents, _ = model.latents(features)
    model.train(not fused)  # the mode changes nothing
    for found, expected in zip(model.inverse(latents), features, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_place_matters(backbone, images):
    model = cflow(backbone, images)
    maps = [torch.ones_like(maps[:1]) for maps in model.features(images)]
    first, second = model.latents(maps)[0]
    for z in (first, second):
        assert not torch.allclose(z[..., 0, 0], z[..., 0, 1])
        assert not torch.allclose(z[..., 0, 0], z[..., 1, 0])


def test_untrained_flow_scores_as_the_mahalanobis_distance(backbone):
    images = torch.rand(24, 3, 16, 24)
    features = backbone(images)
    model = CFlow(backbone, steps=4).eval().initialize(features, shrinkage=1e-4)
    baseline = Mahalanobis(backbone).fit(features, shrinkage=1e-4)
    assert torch.allclose(model.predict(images).score, baseline.predict(images).score, atol=1e-5)


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS[:2])
@pytest.mark.parametrize("fused", [False, True])
def test_results_do_not_depend_on_the_memory_budget(backbone, images, coupling, linear, fused):
    def latents(budget):
        torch.manual_seed(1)
        model = cflow(backbone, images, coupling=coupling, linear=linear, memory_budget=budget)
        features = model.features(images)
        model = model.fuse() if fused else model
        with torch.no_grad():
            return model.latents(features)

    whole, log_det = latents(1 << 30)
    for budget in (1, 5000, 40_000):  # one position at a time, a few, whole images
        parts, parts_log_det = latents(budget)
        for found, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(parts_log_det, log_det, rtol=1e-5, atol=1e-4)


@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4), st.integers(1, 30))
def test_stretches_cover_everything_once_and_are_short(batch, height, width, positions):
    maps, encoding = torch.randn(batch, 3, height, width), torch.randn(1, 3, height, width)
    seen = []

    def call(x, cond):
        seen.append(x.shape[0] * x.shape[2] * x.shape[3])
        return x + cond, (x * cond).flatten(1).sum(1)

    with torch.no_grad():
        z, log_det = in_stretches(call, maps, encoding, positions)
    assert torch.equal(z, maps + encoding)
    torch.testing.assert_close(log_det, (maps * encoding).flatten(1).sum(1))
    assert sum(seen) == batch * height * width
    assert max(seen) <= positions


def test_a_sampled_loss_is_an_estimate_of_the_whole(backbone):
    images = torch.rand(4, 3, 16, 24)
    whole = cflow(backbone, images, noise=0.0).train()
    sampled = cflow(backbone, images, noise=0.0, position_share=0.25).train()
    sampled.load_state_dict(whole.state_dict())
    features = whole.features(images)
    expected = whole.loss(features).item()
    losses = torch.tensor([sampled.loss(features).item() for _ in range(200)])
    assert losses.std() > 0
    assert abs(losses.mean() - expected) < 4 * losses.std() / 200**0.5
    assert sampled.eval().loss(features).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("memory", ["standard", "reversible"])
def test_a_shared_condition_is_as_one_per_image(backbone, images, memory):
    flow = cflow(backbone, images, coupling="affine", memory=memory).flows[0].double().train()
    x, cond = torch.randn(4, 5, 3, 2, dtype=torch.float64), torch.randn(1, 8, 3, 2, dtype=torch.float64)
    gradients = []
    for condition in (cond, cond.expand(4, -1, -1, -1)):
        z, log_det = flow(x, condition.clone())
        gradients.append(torch.autograd.grad(z.square().sum() - log_det.sum(), list(flow.parameters())))
    for shared, one_each in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, one_each, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS[:2])
def test_everything_trainable_learns_and_the_likelihood_is_bounded(backbone, images, coupling, linear):
    model = CFlow(backbone, coupling=coupling, linear=linear, steps=2, encoding_channels=8)
    features = model.features(images)
    model.initialize(features).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model.loss(features).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(features)
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    assert all(0.5 < value < 1.2 for value in model.mean_square(features))
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            assert parameter.grad.abs().sum() > 0, name


def test_a_score_depends_on_its_own_image_only(backbone, images):
    model = cflow(backbone, images)
    model.calibrate(model.features(images))
    together = model.predict(torch.cat([images[:3], 10 * images[3:6]]))
    for i in range(3):
        alone = model.predict(images[i : i + 1])
        assert torch.allclose(alone.score, together.score[i : i + 1], atol=1e-6)
        assert torch.allclose(alone.anomaly_map, together.anomaly_map[i : i + 1], atol=1e-6)


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_inference_form_is_the_same(backbone, images, coupling, linear, dtype, tolerance):
    model = cflow(backbone, images, coupling=coupling, linear=linear).to(dtype)
    fused = model.fuse()
    for batch in (images, images[:1], images[..., :8], images):  # the map's size changes, and comes back
        features = model.features(batch.to(dtype))
        (expected, log_det), (found, fused_log_det) = model.latents(features), fused.latents(features)
        torch.testing.assert_close(fused_log_det, log_det, rtol=tolerance, atol=10 * tolerance)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_projections_of_the_encoding_are_kept_and_never_stale(backbone, images, monkeypatch):
    model = cflow(backbone, images).fuse()
    features = model.features(images)
    counts = []
    for flow in model.flows:
        project = flow.project
        monkeypatch.setattr(flow, "project", lambda cond, f=project: counts.append(1) or f(cond))

    def computed(features=features):
        counts.clear()
        model.latents(features)
        return len(counts)

    assert [computed(), computed()] == [2, 0]
    smaller = [maps[:1, :, :2, :2] for maps in features]
    assert [computed(smaller), computed(smaller), computed()] == [2, 0, 0]
    for size in range(3, 3 + MOST):
        computed([maps[..., :size] for maps in features])
    assert computed(smaller) == 2  # the least recently used one has made room
    (expected, *_), _ = model.latents(features)
    state = {key: value + 0.1 for key, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict(state, strict=False)
    (changed, *_), _ = model.latents(features)
    again, _ = copy.deepcopy(model).latents(features)
    assert not torch.allclose(changed, expected)
    assert torch.equal(again[0], changed)
    model.double()
    (wide, *_), _ = model.latents([maps.double() for maps in features])
    torch.testing.assert_close(wide.float(), changed, rtol=1e-3, atol=1e-3)


def test_an_encoding_is_kept_as_the_maps_lie():
    encodings = Encodings(8)
    maps = torch.zeros(2, 16, 4, 6)
    expected = positional_encoding(8, 4, 6)[None]
    for x in (maps, maps.to(memory_format=torch.channels_last)):
        found = encodings.of(x)
        assert torch.equal(found, expected)
        assert found.stride(1) == (1 if x.stride(1) == 1 else 24)
        assert encodings.of(x) is found
    wide = encodings.of(maps.double())
    torch.testing.assert_close(wide, positional_encoding(8, 4, 6, dtype=torch.float64)[None])
    assert len(copy.deepcopy(encodings)._maps) == 0


def test_training_may_follow_inference_mode(backbone, images):
    model = cflow(backbone, images)
    with torch.inference_mode():
        model(images)
    model.train().loss(images).backward()
    assert all(p.grad is not None for p in model.flows.parameters())


def test_projections_of_the_encoding_are_not_copied_or_stored(backbone, images):
    model = cflow(backbone, images).fuse()
    features = model.features(images)
    expected, _ = model.latents(features)
    assert all(encodings._projected for encodings in model._encodings)
    del model.backbone.network.feature_info  # its lambdas cannot be pickled
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    loaded = torch.load(memory, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert not any(encodings._projected for encodings in other._encodings)
        for found, z in zip(other.latents(features)[0], expected, strict=True):
            assert torch.equal(found, z)
    with torch.inference_mode():
        for found, z in zip(model.latents(features)[0], expected, strict=True):
            assert torch.equal(found, z)


def test_the_inference_form_compiles_and_exports(backbone, images):
    class Latents(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images)[0]

    model = Latents(cflow(backbone, images, coupling="affine", steps=1).fuse())
    expected = model(images)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (images[:3],), dynamic_shapes={"images": {0: batch}})
    compiled = torch.compile(model, backend="aot_eager")
    for found in (program.module()(images), compiled(images)):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("coupling", "linear"), VARIANTS[:2])
def test_latents_of_held_out_images_are_white(coupling, linear):
    """What the automatic threshold rests on: mean z^2 near 1 where nothing was trained on."""
    pytest.importorskip("lightning")
    pytest.importorskip("skimage")
    backbone = create_backbone(out_indices=(2, 3))
    train, held_out = (
        extract(backbone, TextureDataset("brick", split, count=count, crop=128, size=128)).features
        for split, count in (("train", 128), ("validation", 32))
    )
    model = CFlow(backbone, coupling=coupling, linear=linear, position_share=0.25).initialize(train)
    data = CachedFeatures(train), CachedFeatures(held_out)
    history = fit(model, *data, max_epochs=2, batch_size=16, lr=1e-3, accelerator="cpu", progress=False)
    assert history.rows[-1]["validation_loss"] < history.rows[0]["validation_loss"]
    assert all(0.7 < value < 1.5 for value in model.mean_square(held_out)), model.mean_square(held_out)


def test_config_and_state_rebuild_the_model(tmp_path):
    options = {"coupling": "affine", "steps": 2, "hidden_ratio": 0.5, "encoding_channels": 12, "clamp": 1.5}
    options |= {"noise": 0.1, "position_share": 0.5, "memory": "standard", "memory_budget": 1 << 20}
    images = torch.rand(4, 3, 64, 64)
    first = cflow(create_backbone(out_indices=(1, 2)), images, **options)
    first.calibrate(first.features(images))
    assert json.loads(json.dumps(first.config)) == first.config
    assert {key: first.config[key] for key in options} == options
    save_checkpoint(tmp_path / "model.pt", first)
    again = load_checkpoint(tmp_path / "model.pt")
    assert isinstance(again, CFlow)
    assert again.config == first.config
    assert again.null == first.null
    for ours, theirs in zip(again.predict(images)[:4], first.predict(images)[:4], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "rational"}, "coupling.*'rational'"),
        ({"linear": "none"}, "linear.*'none'"),
        ({"steps": -1}, "steps.*-1"),
        ({"hidden_ratio": 0.0}, "hidden_ratio.*0"),
        ({"encoding_channels": 6}, "encoding_channels.*multiple of 4.*6"),
        ({"encoding_channels": 0}, "encoding_channels.*0"),
        ({"position_share": 0.0}, "position_share.*0"),
        ({"position_share": 1.5}, "position_share.*1.5"),
        ({"memory_budget": 0}, "memory_budget.*0"),
        ({"noise": float("nan")}, "noise.*nan"),
    ],
)
def test_wrong_options_are_named(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        CFlow(backbone, **options)


def test_wrong_inputs_are_named(backbone, images):
    model = cflow(backbone, images)
    with pytest.raises(ValueError, match=r"features.*\[5, 8\].*\[5\]"):
        model.loss(model.features(images)[:1])
    with pytest.raises(ValueError, match=r"latents.*\[5, 8\].*\[8, 5\]"):
        model.inverse(model.features(images)[::-1])
    with pytest.raises(TypeError, match="loss: expected a model to train"):
        model.fuse().loss(images)


@pytest.mark.parametrize("linear", ["lu", "permutation"])
def test_without_steps(backbone, images, linear):
    model = cflow(backbone, images, steps=0, linear=linear)
    for found, expected in zip(model.fuse()(images)[0], model(images)[0], strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


def test_an_inference_form_keeps_its_dtype(backbone, images):
    fused = cflow(backbone, images).fuse()
    with pytest.raises(TypeError, match=r"dtype: expected None, since an inference form .* torch.bfloat16"):
        fused.fuse(torch.bfloat16)
    fused.fuse()


def test_calibration_needs_images_and_keeps_the_mode(backbone, images):
    model = cflow(backbone, images).train()
    with pytest.raises(ValueError, match="features: expected those of at least one image, found none"):
        model.calibrate(model.features(images[:0]))
    with pytest.raises(ValueError, match="features: expected maps with"):
        model.calibrate([maps[:, :1] for maps in model.features(images)])
    assert model.training


def test_projections_follow_stages_that_are_replaced(backbone, images):
    fused, other = (cflow(backbone, images).fuse() for _ in range(2))
    with torch.no_grad():
        for weight in other.flows.parameters():
            weight += 0.1 * torch.randn_like(weight)
    features = fused.features(images)
    expected, _ = other.latents(features)
    fused.latents(features)
    for mine, theirs in zip(fused.flows, other.flows, strict=True):
        mine.stages = theirs.stages
    for found, z in zip(fused.latents(features)[0], expected, strict=True):
        assert torch.equal(found, z)


def test_conditioners_of_fused_flows_may_be_replaced(backbone, images):
    fused, other = cflow(backbone, images).fuse(), cflow(backbone, images).fuse()
    with torch.no_grad():
        for weight in other.flows.parameters():
            weight += 0.1 * torch.randn_like(weight)
    features = fused.features(images)
    before, _ = fused.latents(features)
    for mine, theirs in zip(fused.flows.modules(), other.flows.modules(), strict=True):
        if hasattr(mine, "conditioner"):
            mine.conditioner = theirs.conditioner
    found, _ = fused.latents(features)
    assert not torch.equal(found[0], before[0])
    for a, b in zip(found, copy.deepcopy(fused).latents(features)[0], strict=True):
        assert torch.equal(a, b)


def test_sampled_positions_keep_their_encoding(backbone, images):
    model = cflow(backbone, images, noise=0.0, position_share=0.25)
    features = model.features(images)
    whole, _ = model.eval()._transform(features, 0.0)
    state = torch.get_rng_state()
    sampled, _ = model.train()._training_transform(features)
    torch.set_rng_state(state)
    for z, part in zip(whole, sampled, strict=True):
        chosen = torch.randperm(z.shape[2] * z.shape[3])[: part.shape[2]]
        torch.testing.assert_close(part[..., 0], z.flatten(2)[:, :, chosen], rtol=1e-5, atol=1e-5)
