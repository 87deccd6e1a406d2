"""UFlow in training: where it starts, what it settles at, what learns."""

import pytest
import torch
from test_fastflow import VARIANTS, perturbed
from test_uflow import flat, pyramid, uflow

from usf_kernels.data import TextureDataset
from usf_kernels.demo import extract
from usf_kernels.models import Mahalanobis, UFlow, create_backbone
from usf_kernels.nn import ActNorm
from usf_kernels.training import CachedFeatures, fit


@pytest.fixture
def backbone():
    return pyramid()


@pytest.fixture
def images():
    return torch.rand(12, 3, 16, 24)


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_the_untrained_flow_is_a_mahalanobis_distance(images, coupling):
    backbone = pyramid((5, 8, 9), (1, 2, 4))
    model = UFlow(backbone, coupling=coupling)
    features = model.features(images)
    model.initialize(features)
    whitened = Mahalanobis(backbone).fit(features).latents(features)
    ours, _ = model.eval().latents(features)
    expected = flat(whitened).square().sum(1)
    torch.testing.assert_close(flat(ours).square().sum(1), expected, rtol=1e-4, atol=1e-3)


def test_actnorm_variant_starts_standardised(backbone, images):
    model = UFlow(backbone, coupling="affine", linear="permutation")
    features = model.features(images)
    model.initialize(features)
    assert all(module.initialized for module in model.modules() if isinstance(module, ActNorm))
    assert model.mean_square(features) == pytest.approx([1.0, 1.0], abs=1e-3)


def settled(batch_size, loss):
    """Mean z^2 of a flow that has been trained on Gaussian features with this loss."""
    torch.manual_seed(1)
    model = UFlow(pyramid(), steps=1, noise=0.0)
    mixing = [torch.randn(c, c) for c in model.backbone.channels]

    def features(count):
        noise = (torch.randn(count, c, s, s) for c, s in zip((5, 8), (8, 4), strict=True))
        return [torch.einsum("ij,bjhw->bihw", m, x) + 1 for m, x in zip(mixing, noise, strict=True)]

    model.initialize(features(64)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-2)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 4e-2 * (1 - step / 100)
        optimizer.zero_grad()
        loss(model, features(batch_size)).backward()
        optimizer.step()
    return model.mean_square(features(256))


def summed_loss(model, features):
    """As in anomalib 2.7: z^2 is summed over the batch, the log-determinant averaged."""
    latents, log_det = model.latents(features)
    return (0.5 * flat(latents).square().sum() - log_det).mean() / flat(latents).shape[1]


@pytest.mark.parametrize("batch_size", [4, 16])
def test_latents_settle_at_unit_variance_whatever_the_batch_size(batch_size):
    assert settled(batch_size, UFlow.loss) == pytest.approx([1.0, 1.0], rel=0.1)
    assert settled(batch_size, summed_loss) == pytest.approx([1 / batch_size] * 2, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("coupling", "linear"), VARIANTS[:2])
def test_held_out_latents_of_photographs_have_unit_variance(coupling, linear):
    """What every NFA rests on; with the defaults, and few crops."""
    backbone = create_backbone(out_indices=(2, 3))
    train, held_out = (
        extract(backbone, TextureDataset("brick", split, count=count, crop=128, size=128)).features
        for split, count in (("train", 96), ("validation", 24))
    )
    model = UFlow(backbone, coupling=coupling, linear=linear, memory="standard").initialize(train)
    data = CachedFeatures(train), CachedFeatures(held_out)
    history = fit(model, *data, max_epochs=3, lr=2e-3, accelerator="cpu", progress=False)
    losses = [row["validation_loss"] for row in history.rows]
    assert losses[-1] < losses[0]
    assert all(0.7 < value < 1.5 for value in model.mean_square(held_out))


def test_everything_trainable_learns_and_the_backbone_does_not(backbone, images):
    model = perturbed(UFlow(backbone, coupling="affine", steps=2)).train()
    model.loss(images).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_noise_is_for_training_only(backbone, images):
    model = UFlow(backbone, noise=0.5, steps=1)
    model.initialize(model.features(images))
    clean = model.eval().loss(images).item()
    assert model.loss(images).item() == clean
    assert model.train().loss(images).item() == pytest.approx(clean + 0.5 * 0.5**2, rel=0.05)


def test_reversible_training_has_the_same_gradients(backbone, images):
    gradients = []
    for memory in ("standard", "reversible"):
        torch.manual_seed(2)
        model = uflow(backbone, images, memory=memory, noise=0.0).train().double()
        model.loss(images.double()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)
