"""UFlow: shape of the U, likelihood, inverse, sizes that do not fit, inference form, checkpoint contract."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fastflow import VARIANTS, Pyramid, perturbed

from usf_kernels.checkpoint import load_checkpoint, save_checkpoint
from usf_kernels.models import Backbone, UFlow, create_backbone
from usf_kernels.nn import Permutation


def pyramid(channels=(5, 8), strides=(2, 4)):
    return Backbone(Pyramid(channels, strides), {"name": "pyramid"}, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def backbone():
    return pyramid()


@pytest.fixture
def images():
    return torch.rand(12, 3, 16, 24)


def uflow(backbone, images, **options):
    """Initialised, and with couplings that do something; in evaluation mode."""
    model = UFlow(backbone, **options)
    model.initialize(model.features(images))
    return perturbed(model)


def flat(maps):
    return torch.cat([m.flatten(1) for m in maps], dim=1)


@pytest.mark.parametrize(
    ("channels", "strides", "stages", "latents"),
    [
        ((768, 384), (16, 32), (816, 384), (816, 192)),  # MS-CaiT
        ((256, 512, 1024), (4, 8, 16), (336, 640, 1024), (336, 320, 512)),  # Wide-ResNet-50-2
        ((5, 9), (8, 16), (6, 9), (6, 5)),
        ((3, 40), (2, 8), (4, 40), (4, 24)),  # four times the side: 16 positions for each
        ((6, 7), (16, 16), (9, 7), (9, 4)),  # the same side
    ],
)
def test_channels_are_those_of_the_paper(channels, strides, stages, latents):
    model = UFlow(pyramid(channels, strides), steps=0)
    assert model.latent_channels == latents
    assert tuple(c + p for c, p in zip(latents, model.passed, strict=True)) == stages
    found, _ = model(torch.rand(1, 3, 2 * strides[-1], strides[-1]))
    sides = [strides[-1] // stride for stride in strides]
    assert [tuple(z.shape) for z in found] == [(1, c, 2 * s, s) for c, s in zip(latents, sides, strict=True)]
    assert sum(z.numel() for z in found) == sum(2 * c * s**2 for c, s in zip(channels, sides, strict=True))


def test_information_goes_up_the_u(backbone, images):
    model = uflow(backbone, images)
    features = model.features(images)
    (fine, coarse), _ = model.latents(features)
    other = [maps.clone() for maps in features]
    other[0] += 1
    (moved_fine, same_coarse), _ = model.latents(other)
    assert torch.equal(same_coarse, coarse)
    assert not torch.allclose(moved_fine, fine, atol=0.1)
    other = [maps.clone() for maps in features]
    other[1][:, :, 0, 0] += 1
    (moved_fine, moved_coarse), _ = model.latents(other)
    assert not torch.allclose(moved_coarse, coarse, atol=0.1)
    assert not torch.allclose(moved_fine[..., :2, :2], fine[..., :2, :2], atol=0.1)
    reach = (
        2 * 2 + 2 * 2 * 2
    )  # two 3 x 3 conditioners per scale, of two such convolutions each, one at half size
    assert torch.equal(moved_fine[..., reach + 2 :], fine[..., reach + 2 :])


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS)
@pytest.mark.parametrize(("height", "width"), [(2, 4), (4, 2)])
def test_log_det_is_that_of_the_jacobian(backbone, images, coupling, linear, height, width):
    model = uflow(backbone, images, coupling=coupling, linear=linear, steps=3).double()
    features = [
        maps[:1, :, : height // s, : width // s].double()
        for maps, s in zip(model.features(images.double()), (1, 2), strict=True)
    ]
    sizes = [maps.numel() for maps in features]

    def transform(x):
        maps = [part.view_as(like) for part, like in zip(x.split(sizes), features, strict=True)]
        return flat(model.latents(maps)[0])[0]

    jacobian = torch.func.jacrev(transform)(flat(features)[0])
    _, log_det = model.latents(features)
    assert log_det.shape == (() if coupling == "additive" else (1,))
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-8)


@settings(max_examples=20)
@given(
    st.sampled_from(VARIANTS),
    st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.tuples(st.integers(2, 4), st.sampled_from((1, 2, 3))), min_size=1, max_size=2),
)
def test_inverse_undoes_any_sizes(variant, size, deeper):
    """The maps of a pyramid of two or three scales, each up to one position off what the ratios ask for."""
    batch, height, width = size
    channels, strides, sides = [3], [1], [(height, width)]
    for extra, ratio in deeper:
        channels.append(ratio**2 + extra)
        strides.append(strides[-1] * ratio)
        sides.append(tuple(max(1, -(-n // strides[-1]) - (extra + n) % 2) for n in (height, width)))
    coupling, linear = variant
    model = perturbed(
        UFlow(pyramid(tuple(channels), tuple(strides)), coupling=coupling, linear=linear, steps=2)
    )
    model = model.double()
    features = [torch.randn(batch, c, *s, dtype=torch.float64) for c, s in zip(channels, sides, strict=True)]
    for form in (model, model.fuse()):
        for border in form.borders:
            border.log_scale.normal_(), border.shift.normal_()
        found = form.inverse(form.latents(features)[0], sizes=sides)
        for maps, expected in zip(found, features, strict=True):
            torch.testing.assert_close(maps, expected, rtol=0, atol=1e-9)
        for border in form.borders:
            border.log_scale.zero_(), border.shift.zero_()
        latents, log_det = form.latents(features)
        assert log_det.shape == (() if coupling == "additive" else (batch,))
        found = form.inverse(latents)
        for maps, expected, z in zip(found, features, latents, strict=True):
            assert maps.shape[2:] == z.shape[2:]
            rows = torch.arange(maps.shape[2]).clamp(max=expected.shape[2] - 1)
            columns = torch.arange(maps.shape[3]).clamp(max=expected.shape[3] - 1)
            torch.testing.assert_close(maps, expected[:, :, rows][:, :, :, columns], rtol=0, atol=1e-9)


def anomalib_flow(channels, strides, side):
    """The flow of anomalib's UflowModel on such a pyramid, with random weights, without its backbone."""
    torch_model = pytest.importorskip("anomalib.models.image.uflow.torch_model")
    settings = SimpleNamespace(
        input_size=(side, side),
        feature_extractor=SimpleNamespace(channels=channels, scale_factors=strides),
        affine_clamp=2.0,
        affine_subnet_channels_ratio=1.0,
        permute_soft=False,
    )
    settings.build_flow_stage = partial(torch_model.UflowModel.build_flow_stage, settings)
    flow = torch_model.UflowModel.build_flow(settings, 4)
    for parameter in flow.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return flow.eval(), [m for m in flow.modules() if isinstance(m, torch_model.AllInOneBlock)]


@torch.no_grad()
def test_anomalib_with_the_same_weights_agrees():
    channels, strides, side = (6, 9, 17), (2, 4, 8), 16
    flow, blocks = anomalib_flow(channels, strides, side)
    model = UFlow(pyramid(channels, strides), coupling="affine", linear="permutation").eval()
    steps = [step for stage in reversed(model.stages) for step in stage]
    for step, block in zip(steps, blocks, strict=True):
        step.coupling.subnet.load_state_dict(block.subnet.state_dict())
        step.act_norm.log_scale.copy_(block.global_scale_activation(block.global_scale).log().flatten())
        step.act_norm.bias.copy_(block.global_offset.flatten())
        step.linear = Permutation.of(block.w_perm[:, :, 0, 0].argmax(1))
    features = [torch.randn(3, c, side // s, side // s) for c, s in zip(channels, strides, strict=True)]
    expected, expected_log_det = flow(features, rev=False)
    for form in (model, model.fuse()):
        found, log_det = form.latents(features)
        torch.testing.assert_close(log_det, expected_log_det, rtol=1e-4, atol=1e-2)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_images_whose_maps_do_not_fit(images):
    """66 x 67: maps of 33 x 33 and 16 x 16, which the flow sees as 34 x 34 and 17 x 17."""
    backbone, images = pyramid(), torch.rand(6, 3, 66, 67)
    model = uflow(backbone, images, steps=2)
    features = model.features(images)
    assert [tuple(maps.shape[2:]) for maps in features] == [(33, 33), (16, 16)]
    latents, _ = model(images)
    assert [tuple(z.shape[2:]) for z in latents] == [(34, 34), (17, 17)]
    energy = sum(0.5 * z.square().sum() for z in latents) / len(images)
    _, of_borders = model._enter(features)  # which see the maps as they are
    loss = (energy - model(images)[1] + of_borders) / sum(z[0].numel() for z in latents)
    loss = loss - of_borders / sum(maps[0].numel() for maps in features)
    assert model.loss(images).item() == pytest.approx(loss.item(), rel=1e-5)
    # What was made up is not scored: every position counts once.
    expected = [z[..., :33, :33].square().mean().item() for z in latents[:1]]
    expected.append(latents[1][..., :16, :16].square().mean().item())
    assert model.mean_square(features) == pytest.approx(expected, rel=1e-5)
    model.calibrate(features)
    result = model.predict(images)
    assert result.mask.shape == (6, 1, 66, 67)
    for region in (region for found in result.regions for region in found):
        limit = (33, 16)[region.scale]
        assert max(region.box) <= limit


def test_a_score_depends_on_its_own_image_only(backbone, images):
    model = uflow(backbone, images)
    model.calibrate(model.features(images))
    together = model.predict(torch.cat([images[:3], 10 * images[3:6]]))
    for i in range(3):
        alone = model.predict(images[i : i + 1])
        assert torch.allclose(alone.score, together.score[i : i + 1], atol=1e-6)
        assert torch.allclose(alone.anomaly_map, together.anomaly_map[i : i + 1], atol=1e-6)
        assert len(alone.regions[0]) == len(together.regions[i])


@pytest.mark.parametrize(("coupling", "linear"), VARIANTS)
@pytest.mark.parametrize("steps", [0, 4])
def test_the_inference_form_is_the_same_flow(images, coupling, linear, steps):
    backbone = pyramid((5, 8, 9), (1, 2, 4))
    model = uflow(backbone, images, coupling=coupling, linear=linear, steps=steps)
    features = model.features(images)
    model.calibrate(features)
    fused = model.train().fuse()
    assert model.training
    assert not fused.training
    expected, found = model.eval().latents(features), fused.latents(features)
    assert found[1].shape == (() if coupling == "additive" or steps == 0 else (len(images),))
    assert torch.allclose(found[1].float(), expected[1].float(), rtol=1e-4, atol=1e-2)
    for ours, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    wide, double = model.double(), [maps.double() for maps in features]
    for ours, theirs in zip(wide.fuse().latents(double)[0], wide.latents(double)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    rough = model.fuse(torch.bfloat16)
    assert {z.dtype for z in rough.latents(features)[0]} == {torch.bfloat16}
    assert (rough.predict(images).score - fused.predict(images).score).abs().max() < 0.03
    with pytest.raises(TypeError, match="loss: expected a model to train"):
        fused.loss(images)


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_of_nothing_has_latents_of_nothing(backbone, images, fused):
    model = uflow(backbone, images)
    features = [maps[:0] for maps in model.features(images)]
    latents, _ = (model.fuse() if fused else model).latents(features)
    assert [tuple(z.shape) for z in latents] == [(0, 6, 8, 12), (0, 4, 4, 6)]


def test_checkpoint_keeps_the_model(tmp_path):
    options = {
        "coupling": "affine",
        "linear": "permutation",
        "steps": 2,
        "hidden_ratio": 0.5,
        "kernels": (3,),
        "clamp": 1.5,
        "noise": 0.1,
        "memory": "standard",
    }
    images = torch.rand(4, 3, 64, 96)
    first = uflow(create_backbone(out_indices=(1, 2)), images, **options)
    first.calibrate(first.features(images))
    save_checkpoint(tmp_path / "model.pt", first)
    again = load_checkpoint(tmp_path / "model.pt")
    assert isinstance(again, UFlow)
    assert again.config == first.config == json.loads(json.dumps(first.config))
    assert again.null == first.null
    for ours, theirs in zip(again.predict(images)[:4], first.predict(images)[:4], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "rational"}, "coupling.*'rational'"),
        ({"linear": "none"}, "linear.*'none'"),
        ({"steps": -1}, "steps.*-1"),
        ({"hidden_ratio": -1.0}, "hidden_ratio.*-1"),
        ({"kernels": (2,)}, r"kernels.*\(2,\)"),
        ({"noise": -0.1}, "noise.*-0.1"),
        ({"memory": "none"}, "memory.*'none'"),
    ],
)
def test_wrong_options_are_named(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        UFlow(backbone, **options)


@pytest.mark.parametrize(
    ("channels", "strides", "message"),
    [
        ((5,), (2,), r"backbone.*two scales.*\(2,\)"),
        ((5, 8), (2, 3), r"backbone.*multiple.*\(2, 3\)"),
        ((5, 8), (4, 2), r"backbone.*multiple.*\(4, 2\)"),
        ((5, 4), (2, 4), "backbone.*more than 4 channels.*2 times.*found 4"),
    ],
)
def test_wrong_pyramids_are_named(channels, strides, message):
    with pytest.raises(ValueError, match=message):
        UFlow(pyramid(channels, strides))


def test_wrong_inputs_are_named(backbone, images):
    model = UFlow(backbone, steps=1)
    with pytest.raises(TypeError, match=r"backbone.*Linear"):
        UFlow(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"features.*\[5, 8\].*\[5\]"):
        model.loss(model.features(images)[:1])
    latents, _ = model(images)
    with pytest.raises(ValueError, match="latents: expected 2 maps, found 1"):
        model.inverse(latents[:1])
    with pytest.raises(ValueError, match=r"z.*8.*7"):
        model.inverse([latents[0], latents[1][:, :3]])
