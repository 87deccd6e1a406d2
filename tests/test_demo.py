"""The demonstration's recipe, on a few crops."""

import math

import pytest
import torch

from usf_kernels.checkpoint import load_checkpoint, save_checkpoint
from usf_kernels.demo import Recipe, run_texture

pytest.importorskip("lightning")
TINY = Recipe(train=48, validation=16, test=20, epochs=2, steps=2)


@pytest.fixture(scope="module")
def result():
    return run_texture("brick", seed=3, recipe=TINY)


def test_result_is_complete(result):
    assert result.images.shape == (20, 3, 128, 128)
    assert result.targets.shape == result.predictions.mask.shape == (20, 1, 128, 128)
    assert set(result.kinds) == {"good", "scratch", "stain", "blur", "patch", "missing"}
    assert list(result.z2) == ["stride 8", "stride 16"]
    for found in (result.metrics, result.baseline_metrics):
        assert all(math.isfinite(value) for value in found.values())
        assert found["pixel_auroc"] > 0.75
    losses = [row["validation_loss"] for row in result.history.rows]
    assert losses[-1] < losses[0]


def test_seed_fixes_the_result(result):
    again = run_texture("brick", seed=3, recipe=TINY)
    assert torch.equal(again.images, result.images)
    assert torch.allclose(again.predictions.score, result.predictions.score, atol=1e-5)
    other = run_texture("brick", seed=4, recipe=TINY)
    assert not torch.equal(other.images, result.images)


def test_checkpoint_predicts_the_same(result, tmp_path):
    save_checkpoint(tmp_path / "model.pt", result.model, extra=result.extra)
    again = load_checkpoint(tmp_path / "model.pt").predict(result.images)
    assert torch.allclose(again.anomaly_map, result.predictions.anomaly_map, atol=1e-3)
    assert (again.mask == result.predictions.mask).float().mean() > 0.999


def test_unknown_texture_is_named():
    with pytest.raises(ValueError, match="'sand'"):
        run_texture("sand", recipe=TINY)
