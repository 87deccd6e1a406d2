"""VAEUSFlow: its bound, scores, training of either encoder, inference form and checkpoints."""

import copy
import math

import pytest
import torch
from helpers import max_error, randomise_
from torch import nn

from usf_kernels.checkpoint import load_checkpoint, save_checkpoint
from usf_kernels.models import VAEUSFlow, create_backbone

SMALL = {"image_size": (64, 32), "latent": 6, "width": 4, "blocks": 2, "hidden": 8, "layers": 1}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(3)
    return create_backbone("tf_efficientnet_lite0", out_indices=(1, 2), weights=None)


@pytest.fixture
def images():
    return torch.rand(4, 3, 64, 32)


def test_the_bound_is_below_the_log_likelihood():
    """The ELBO is its three terms written out, and an importance-weighted estimate of log p(x) from many
    samples lies above it."""
    torch.manual_seed(0)
    backbone = create_backbone("tf_efficientnet_lite0", out_indices=(0,), weights=None)
    model = VAEUSFlow(backbone, **SMALL | {"image_size": 4, "latent": 2}).double().eval()
    count = 40
    images = torch.rand(3, 3, 4, 4, dtype=torch.float64).repeat(count, 1, 1, 1)
    with torch.no_grad():
        mean, log_variance = model.posterior(images)
        posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        state = torch.get_rng_state()
        z = mean + posterior.stddev * torch.randn_like(mean)
        torch.set_rng_state(state)
        bound = model.elbo(images)
        likelihood = torch.distributions.Normal(model.decode(z), 0.1).log_prob(images).flatten(1).sum(1)
        joint = likelihood + model.prior.log_prob(z)
    assert max_error(bound, joint + posterior.entropy().sum(1)) < 1e-9
    weights = (joint - posterior.log_prob(z).sum(1)).view(count, 3)
    log_likelihood = torch.logsumexp(weights, 0) - math.log(count)
    assert (bound.view(count, 3).mean(0) < log_likelihood).all()


@pytest.mark.parametrize("trainable", [False, True])
def test_training_lowers_the_loss(backbone, trainable):
    images = torch.rand(4, 3, 1, 1).expand(4, 3, 64, 32)  # of one colour each: easy to learn
    model = VAEUSFlow(backbone, trainable=trainable, **SMALL)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.train().loss(images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5  # single losses vary with the latents drawn
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"head", "decoder", "prior"} | ({"encoder"} if trainable else set())
    assert not any(p.requires_grad for p in backbone.parameters())


def test_scores_are_reconstruction_and_latent_likelihood(backbone, images):
    model = randomise_(VAEUSFlow(backbone, **SMALL)).train()
    prediction = model.predict(images)
    assert model.training
    model.eval()
    mean, _ = model.posterior(images)
    decoded = model.decode(mean)
    latents, log_det = model(images)
    assert decoded.shape == images.shape
    assert latents.shape == (4, 6)
    assert log_det.shape == ()
    likelihood = torch.distributions.Normal(decoded, 0.1).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(prediction.reconstruction, -likelihood, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(prediction.latent, -model.prior.log_prob(mean))
    torch.testing.assert_close(prediction.score, prediction.reconstruction + prediction.latent)
    error = (images - decoded).square().sum(1, keepdim=True)
    torch.testing.assert_close(prediction.anomaly_map, error)
    alone = torch.cat([model.predict(image[None]).score for image in images])
    torch.testing.assert_close(alone, prediction.score, rtol=1e-4, atol=1e-2)
    damaged = images.clone()
    damaged[0, :, 8:24, 8:24] = 1 - damaged[0, :, 8:24, 8:24].round()
    assert model.predict(damaged).reconstruction[0] > prediction.reconstruction[0]
    assert model.sample(2).shape == (2, 3, 64, 32)
    assert model.predict(images[:0]).score.shape == (0,)


@pytest.mark.parametrize("trainable", [False, True])
def test_checkpoint_and_inference_form(images, trainable, tmp_path):
    torch.manual_seed(5)
    encoder = create_backbone("tf_efficientnet_lite0", out_indices=(2,), weights="auto")
    model = VAEUSFlow(encoder, trainable=trainable, **SMALL)
    model.train().loss(images).backward()  # moves the statistics of a trainable encoder
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    save_checkpoint(tmp_path / "model.pt", model)
    again = load_checkpoint(tmp_path / "model.pt")
    expected = model.predict(images)
    for ours, theirs in zip(again.predict(images), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert model.fuse(torch.bfloat16).sample(2).isfinite().all()
    half = copy.deepcopy(model).half().predict(images.half())
    torch.testing.assert_close(half.score, expected.score, rtol=0.05, atol=10)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    model.predict(images)
    assert not frozen.training
    assert model.decoder.training
    fused = model.fuse()
    torch.testing.assert_close(fused.predict(images).score, expected.score, rtol=1e-5, atol=1e-3)
    again.fuse().load_state_dict(fused.state_dict())
    with pytest.raises(TypeError, match="loss: expected a model to train"):
        fused.loss(images)


def test_errors(backbone, images):
    for options, message in (
        ({"image_size": 60}, r"image_size: expected multiples.*found \(60, 60\) for stride 8"),
        ({"latent": 1}, "latent: expected an int at least 2, found 1"),
        ({"sigma": 0.0}, "sigma: expected a positive finite number, found 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            VAEUSFlow(backbone, **SMALL | options)
    with pytest.raises(TypeError, match="backbone: expected one from create_backbone, found Linear"):
        VAEUSFlow(nn.Linear(2, 2), **SMALL)
    model = VAEUSFlow(backbone, **SMALL)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, 64, 32\), found \(4, 3, 32, 64\)"):
        model.predict(images.mT)
    with pytest.raises(TypeError, match=r"images: expected float32.*found torch.uint8"):
        model.predict(images.to(torch.uint8))
    sized = create_backbone("tf_efficientnet_lite0", out_indices=(1,), weights=None, input_size=64)
    with pytest.raises(ValueError, match="backbone: expected no input_size for a trainable encoder"):
        VAEUSFlow(sized, trainable=True, **SMALL)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_in_another_dtype(backbone, images, trainable, dtype):
    model = VAEUSFlow(backbone, trainable=trainable, **SMALL).eval()
    assert (
        max_error(model.predict(images.to(dtype)).score, model.predict(images.to(dtype).float()).score) < 1e-2
    )


def test_encoders_with_their_channels_at_the_end(images):
    """A trainable one is the same network as a frozen one, without the backbone around it."""
    backbone = create_backbone("mambaout_femto", weights=None, out_indices=(0, 1))
    frozen, trainable = (VAEUSFlow(backbone, trainable=t, **SMALL).eval() for t in (False, True))
    trainable.head.load_state_dict(frozen.head.state_dict())
    expected = frozen.posterior(images)
    for model in (trainable, trainable.fuse()):
        torch.testing.assert_close(model.posterior(images), expected, rtol=1e-4, atol=1e-4)


def test_a_frozen_backbone_in_another_dtype(backbone, images):
    model = VAEUSFlow(backbone.fuse(torch.bfloat16), **SMALL).eval()
    assert model.loss(images).dtype is torch.float32
    assert model.posterior(images)[0].isfinite().all()


def test_a_size_that_is_none_is_named(backbone):
    with pytest.raises(ValueError, match=r"image_size\[0\]: expected an int at least 1, found 0"):
        VAEUSFlow(backbone, **SMALL | {"image_size": 0})


def test_the_loss_is_the_bound_per_value(backbone, images):
    model = VAEUSFlow(backbone, **SMALL).eval()
    state = torch.get_rng_state()
    loss = model.loss(images)
    torch.set_rng_state(state)
    torch.testing.assert_close(loss, -model.elbo(images).mean() / images[0].numel())
    with torch.no_grad():
        model.head[-1].bias.fill_(1e4)
    assert model.posterior(images)[1].max() == 8
    assert model.loss(images).isfinite()
