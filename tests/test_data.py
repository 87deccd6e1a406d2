"""Textures, rendered defects and folders."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from usf_kernels.data import (
    DEFECTS,
    TEXTURES,
    FolderDataset,
    TextureDataset,
    read_image,
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
    with pytest.raises(IndexError):
        data[12]


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
        ({"name": "sand"}, "brick, grass, gravel; got 'sand'"),
        ({"split": "val"}, "train, validation, test; got 'val'"),
        ({"count": 0}, "count .* got 0"),
        ({"crop": 137}, "crop .* got 137"),
        ({"size": 0}, "size .* got 0"),
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


@pytest.fixture
def folder(tmp_path):
    """A category of two training images, one clean and two defective test images of 40 x 60 pixels."""
    rng = np.random.default_rng(0)
    for name in ("train/good/000", "train/good/001", "test/good/000", "test/hole/000", "test/hole/001"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    truth = tmp_path / "ground_truth" / "hole"
    truth.mkdir(parents=True)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 30:50] = 255
    for number in ("000", "001"):
        Image.fromarray(mask).save(truth / f"{number}_mask.png")
    (tmp_path / "train" / "good" / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder_reads_mvtec_layout(folder):
    train, test = FolderDataset(folder, "train", size=None), FolderDataset(folder, "test", size=None)
    assert [len(train), len(test)] == [2, 3]
    assert [sample.kind for sample in test] == ["good", "hole", "hole"]
    sample = test[1]
    expected = np.array(Image.open(folder / "test/hole/000.png")).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(sample.image.numpy(), expected)
    assert sample.mask[0, 10:20, 30:50].all()
    assert sample.mask.sum() == 200
    assert sample.label == 1
    assert sample.name == str(folder / "test/hole/000.png")
    assert not test[0].mask.any()
    resized = FolderDataset(folder, "test", size=(20, 30))[1]
    assert resized.image.shape == (3, 20, 30)
    assert resized.mask[0, 5:10, 15:25].all()
    assert resized.mask.sum() == 50
    assert FolderDataset(folder, "train", size=32)[0].image.shape == (3, 32, 32)


def test_a_thin_defect_survives_shrinking(folder):
    mask = np.zeros((40, 60), np.uint8)
    mask[7, 13] = 255
    Image.fromarray(mask).save(folder / "ground_truth/hole/000_mask.png")
    assert FolderDataset(folder, "test", size=(10, 15))[1].mask.any()


def test_folder_errors_name_the_file_or_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        FolderDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'valid'"):
        FolderDataset(folder, "valid")
    (folder / "test/hole/000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"hole.000\.png"):
        FolderDataset(folder, "test")[1]
    (folder / "ground_truth/hole/001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"001_mask\.png"):
        FolderDataset(folder, "test")[2]
    for path in (folder / "train/good").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"good: holds no image"):
        FolderDataset(folder)
    (folder / "train/good").rename(folder / "train/bad")
    with pytest.raises(ValueError, match=r"train.good: no such folder"):
        FolderDataset(folder)


def test_mask_of_another_size_is_an_error(folder):
    Image.fromarray(np.ones((40, 61), np.uint8)).save(folder / "ground_truth/hole/000_mask.png")
    for size in (None, 32):
        with pytest.raises(ValueError, match=r"000_mask\.png.*\(40, 61\)"):
            FolderDataset(folder, "test", size=size)[1]


def test_the_checksum_is_that_of_names_and_contents(folder):
    before = FolderDataset(folder).checksum()
    moved = folder.rename(folder.with_name("moved"))
    assert FolderDataset(moved).checksum() == before
    first, second = (moved / "train/good" / name for name in ("000.png", "001.png"))
    first.write_bytes(second.read_bytes())
    changed = FolderDataset(moved).checksum()
    first.rename(first.with_name("0.png"))
    assert len({before, changed, FolderDataset(moved).checksum()}) == 3


def test_read_image_takes_every_mode(tmp_path):
    grey = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    expected = torch.from_numpy(grey / np.float32(255)).expand(3, -1, -1)
    pictures = {
        "grey": Image.fromarray(grey),
        "deep": Image.fromarray(grey.astype(np.uint16) * 257),
        "alpha": Image.fromarray(np.stack([grey, np.full_like(grey, 255)], -1), "LA"),
        "palette": Image.fromarray(grey).convert("P"),
    }
    for name, picture in pictures.items():
        path = tmp_path / f"{name}.png"
        picture.save(path)
        assert torch.allclose(read_image(path), expected, atol=1e-4), name
    assert read_image(path, (8, 4)).shape == (3, 8, 4)


def test_the_camera_s_orientation_is_followed(folder):
    image, mask = folder / "test/hole/000.png", folder / "ground_truth/hole/000_mask.png"
    expected = torch.rot90(read_image(image), -1, (1, 2))
    for path in (image, mask):
        picture = Image.open(path)
        exif = picture.getexif()
        exif[0x0112] = 6  # to be turned clockwise
        picture.save(path, exif=exif)
    sample = FolderDataset(folder, "test", size=None)[1]
    assert torch.equal(sample.image, expected)
    assert sample.mask[0, 30:50, 20:30].all()


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_the_orientation_of_a_tiff_is_followed(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new(mode, (30, 20)).save(tmp_path / "a.tif", exif=exif)
    assert read_image(tmp_path / "a.tif").shape == ((3, 20, 30) if orientation == 3 else (3, 30, 20))


@pytest.mark.parametrize(("values", "found"), [((0, 255), "0 to 255"), ((0, np.nan), "nan"), ((-1, 1), "-1")])
def test_floating_point_images_out_of_range_are_named(tmp_path, values, found):
    path = tmp_path / "float.tiff"
    Image.fromarray(np.array([values, (0.0, 0.5)], np.float32)).save(path)
    with pytest.raises(ValueError, match=rf"float\.tiff: expected values from 0 to 1 .* found {found}"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n truncated", b"text"])
def test_unreadable_images_are_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png"):
        read_image(path)
    with pytest.raises(ValueError, match=r"missing\.png: no such file$"):
        read_image(tmp_path / "missing.png")
