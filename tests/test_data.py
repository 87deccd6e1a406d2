"""Textures and rendered defects."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from usf_kernels.data import (
    DEFECTS,
    TEXTURES,
    TextureDataset,
    render_defect,
    texture,
)
from usf_kernels.data.textures import BANDS


@pytest.mark.parametrize("name", TEXTURES)
def test_texture_is_a_read_only_photograph(name):
    image = texture(name)
    assert image.shape == (512, 512)
    assert image.dtype == np.float32
    assert 0 <= image.min() < 0.3 < image.max() <= 1
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0] = 0


def test_bands_do_not_overlap():
    edges = sorted(BANDS.values())
    assert edges[0][0] == 0
    assert edges[-1][1] == 512
    assert all(left[1] <= right[0] for left, right in pairwise(edges))


@pytest.mark.parametrize("split", BANDS)
def test_items_keep_their_contract(split):
    data = TextureDataset("gravel", split, count=12, seed=3)
    for i in range(len(data)):
        sample = data[i]
        assert sample.image.shape == (3, 128, 128)
        assert sample.image.dtype == torch.float32
        assert 0 <= sample.image.min() <= sample.image.max() <= 1
        assert sample.mask.shape == (1, 128, 128)
        assert sample.mask.dtype == torch.bool
        defective = split == "test" and i % 2 == 1
        assert sample.label == int(defective) == int(sample.kind != "good") == int(sample.mask.any())
    assert sample.name == f"gravel/{split}/0011"
    assert torch.equal(data[-1].image, data[11].image)
    for outside in (12, -13):
        with pytest.raises(IndexError, match=f"index: expected -12..11, found {outside}"):
            data[outside]


def test_items_are_fixed_by_the_seed_and_their_number():
    first, again = (TextureDataset("grass", "test", count=n, seed=5) for n in (4, 9))
    other = TextureDataset("grass", "test", count=4, seed=6)
    for i in (3, 0, 2):  # in any order, from a set of any length
        assert torch.equal(first[i].image, again[i].image)
        assert torch.equal(first[i].mask, again[i].mask)
        assert not torch.equal(first[i].image, other[i].image)
    train = TextureDataset("grass", "train", count=2, seed=5)
    assert not torch.equal(train[0].image, train[1].image)


def test_clean_test_crops_lie_in_their_band():
    left, right = BANDS["test"]
    band = texture("brick")[:, left:right]
    crop = TextureDataset("brick", "test", count=1)[0].image[0].numpy()
    windows = np.lib.stride_tricks.sliding_window_view(band, crop.shape)
    assert any(np.array_equal(window, crop) for row in windows for window in row)


def test_enlarged_crops_show_the_same():
    small, large = (TextureDataset("grass", "test", count=4, size=size)[1] for size in (128, 256))
    assert large.image.shape == (3, 256, 256)
    shrunk = torch.nn.functional.avg_pool2d(large.image, 2)
    assert (shrunk - small.image).abs().mean() < 0.02
    assert abs(large.mask.float().mean() - small.mask.float().mean()) < 0.01


def test_default_collation_batches_samples():
    batch = next(iter(DataLoader(TextureDataset("brick", "test", count=6), batch_size=6)))
    assert batch.image.shape == (6, 3, 128, 128)
    assert batch.mask.sum((1, 2, 3)).gt(0).tolist() == [False, True] * 3
    assert batch.label.tolist() == [0, 1] * 3
    assert list(batch.kind) == ["good", "scratch", "good", "stain", "good", "blur"]


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("name", TEXTURES)
def test_masks_are_exact(kind, name):
    image = texture(name)[:128, -128:]
    other = texture("grass" if name != "grass" else "brick")[:128, :128]
    before = image.copy()
    for seed in range(4):
        damaged, mask = render_defect(image, kind, np.random.default_rng(seed), other)
        change = np.abs(damaged - image)
        assert 0 <= damaged.min() <= damaged.max() <= 1
        assert 0.001 < mask.mean() < 0.3
        assert change[mask].mean() > 4 / 255  # visible, but
        assert change[~mask].max() < 0.05  # nothing to see outside,
        assert (change[mask] > 2 / 255).mean() > 0.6  # and little inside that is as it was
    assert np.array_equal(image, before)


def test_defects_differ_in_how_visible_they_are():
    data, contrast = TextureDataset("brick", "test", count=60), []
    for i in range(3, 60, 10):
        image, mask = data[i].image[0], data[i].mask[0]
        assert data[i].kind == "stain"
        contrast.append((image[mask].mean() - image[~mask].mean()).abs().item())
    assert max(contrast) > 2 * min(contrast)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sand"}, "'brick', 'grass', 'gravel', found 'sand'"),
        ({"split": "val"}, "'train', 'validation', 'test', found 'val'"),
        ({"count": 0}, "count.*found 0"),
        ({"crop": 137}, "crop.*found 137"),
        ({"size": 0}, "size.*found 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextureDataset(**({"name": "brick"} | arguments))


def test_render_defect_checks_its_arguments():
    image, rng = texture("brick")[:128, :128], np.random.default_rng(0)
    with pytest.raises(ValueError, match="'dent'"):
        render_defect(image, "dent", rng, image)
    with pytest.raises(ValueError, match=r"\(32, 32\)"):
        render_defect(image[:32, :32], "stain", rng, image[:32, :32])
    with pytest.raises(ValueError, match=r"\(64, 128\)"):
        render_defect(image, "patch", rng, image[:64])
    flat = np.full((64, 64), 0.5)
    with pytest.raises(ValueError, match="image: a blur changes nothing in it that could be seen"):
        render_defect(flat, "blur", rng, flat)
