"""The baseline against the textbook's formula."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from usf_kernels.models import Backbone, Mahalanobis
from usf_kernels.models.mahalanobis import moments
from usf_kernels.ops import squared_norm


class Network(nn.Module):
    """Stands in for one of two scales."""

    feature_info = SimpleNamespace(channels=lambda: (3, 6), reduction=lambda: (1, 2))

    def forward(self, images):
        half = nn.functional.avg_pool2d(images, 2)
        return [images.cumsum(1), torch.cat([half.square(), half + half.flip(1)], 1)]


def two():
    return Backbone(Network(), {"name": "two"}, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.fixture
def images():
    return torch.rand(20, 3, 12, 16)


def test_moments_are_over_images_and_positions(images):
    mean, covariance = moments(images)
    rows = images.permute(0, 2, 3, 1).reshape(-1, 3).double()
    assert torch.allclose(mean, rows.mean(0))
    centred = rows - rows.mean(0)
    assert torch.allclose(covariance, centred.T @ centred / (len(rows) - 1))


@pytest.mark.parametrize("shrinkage", [1e-3, 0.1])
def test_squared_norm_is_the_squared_distance(images, shrinkage):
    features = two()(images)
    model = Mahalanobis(two()).fit(features, shrinkage=shrinkage)
    for border, maps, z in zip(model.borders, features, model.latents(features), strict=True):
        maps, _ = border(maps)
        mean, covariance = moments(maps)
        covariance = covariance + shrinkage * covariance.diagonal().mean() * torch.eye(len(mean))
        rows = maps.permute(0, 2, 3, 1).double() - mean
        expected = (rows @ torch.linalg.inv(covariance) * rows).sum(-1)
        assert torch.allclose(squared_norm(z).double(), expected, rtol=1e-3, atol=1e-4)


def test_predicts_like_a_model(images):
    model = Mahalanobis(two()).fit(two()(images))
    assert model.null is None
    with pytest.warns(UserWarning, match="not calibrated") as caught:
        model.predict(images)
    assert caught[0].filename == __file__
    null = model.calibrate(two()(images))
    assert model.null == null
    damaged = images.clone()
    damaged[7, :, 4:8, 4:8] = torch.tensor([3.0, -2.0, 3.0]).view(3, 1, 1)
    result = model.predict(damaged)
    assert result.score.argmax() == 7
    assert result.anomaly_map.shape == result.mask.shape == (20, 1, 12, 16)
    assert result.mask[7, 0, 4:8, 4:8].all()
    assert [len(found) > 0 for found in result.regions][7]
    again = model.predict(damaged, two()(damaged))
    assert torch.equal(again.score, result.score)
    fused = model.fuse()
    assert fused.null == null
    torch.testing.assert_close(fused.predict(damaged).score, result.score, rtol=1e-4, atol=0)
    assert torch.equal(fused.predict(damaged).mask, result.mask)


def test_nothing_in_it_is_trainable(images):
    model = Mahalanobis(two()).fit(two()(images))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_images_do_for_features(images):
    """In parts: batches of 32 or of what is asked for."""
    images = images.repeat(2, 1, 1, 1)[:33]
    model, from_images = Mahalanobis(two()), Mahalanobis(two())
    features = model.features(images)
    model.fit(features).calibrate(features)
    from_images.fit(images).calibrate(images, batch_size=5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(from_images.state_dict()[name], value)
    assert from_images.mean_square(images) == pytest.approx(model.mean_square(features))
    for found, expected in zip(from_images(images), model.latents(features), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_null_model_keeps_its_digits_and_goes_where_it_can(images):
    model = Mahalanobis(two()).fit(images)
    model.calibrate(images)
    null = model.null
    assert model.to(torch.bfloat16).null == null
    assert model.to(torch.float32).null == null
    assert model.to("meta").null_parameters.is_meta
    model = model.to_empty(device="cpu")
    assert model.null is None
    assert model.null_parameters.dtype is torch.float64

    def refusing(t):  # as a device without float64
        if t.dtype is torch.float64:
            raise TypeError("no float64 here")
        return t

    shared = Mahalanobis(two()).share_memory()
    assert shared.null_parameters.is_shared()
    assert model._apply(refusing) is model
    assert model.state_dict()["null_parameters"].dtype is torch.float64


def test_a_new_fit_forgets_the_threshold(images):
    model = Mahalanobis(two()).fit(images)
    model.calibrate(images)
    assert model.fit(images[:10]).null is None
