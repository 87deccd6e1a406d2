"""Folders of images and their masks, and images of every kind."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from usf_kernels.data import FolderDataset, ImageFiles, read_image
from usf_kernels.data.folder import images_below, is_image, resize_mask
from usf_kernels.max_tree import component_tree


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


def test_capital_letters_in_the_suffix_of_a_mask_make_no_difference(folder):
    truth = folder / "ground_truth/hole"
    (truth / "000_mask.png").rename(truth / "000_mask.PNG")
    assert FolderDataset(folder, "test", size=None)[1].mask.sum() == 200


def test_the_mask_of_another_image_whose_name_goes_on_is_not_taken(folder):
    truth = folder / "ground_truth/hole"
    (truth / "000_mask.png").rename(truth / "000.2_mask.png")
    with pytest.raises(ValueError, match=r"000_mask\.png: no such mask for .*000\.png$"):
        FolderDataset(folder, "test", size=None)[1]


def test_folder_errors_name_the_file_or_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        FolderDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'valid'"):
        FolderDataset(folder, "valid")
    (folder / "test/hole/000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"hole.000\.png"):
        FolderDataset(folder, "test")[1]
    (folder / "ground_truth/hole/001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"001_mask\.png: no such mask for .*001\.png$"):
        FolderDataset(folder, "test")[2]
    Image.new("L", (60, 40), 255).save(folder / "ground_truth/hole/001_mask.jpg")
    with pytest.raises(ValueError, match=r"no such mask for .*; 001_mask\.jpg is not in a lossless format"):
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


def test_animations_are_their_first_picture(tmp_path):
    first, second = (Image.new("P", (4, 3), color) for color in (0, 1))
    first.putpalette([255, 0, 0, 0, 0, 255])
    second.putpalette([255, 0, 0, 0, 0, 255])
    path = tmp_path / "a.gif"
    first.save(path, save_all=True, append_images=[second])
    assert is_image(path)
    assert read_image(path)[:, 0, 0].tolist() == [1, 0, 0]


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


def test_a_damaged_tag_takes_neither_image_nor_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 48), "grey").save(path, exif=exif)
    # The camera's name, a text, becomes a width, a number.
    path.write_bytes(path.read_bytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02"))
    assert read_image(path).shape == (3, 64, 48)


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


def test_errors_of_any_kind_name_the_file(folder, monkeypatch):
    def fail(picture):
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(ValueError, match=r"000\.png: cannot be read as an image \(Failed to decode image\)"):
        read_image(folder / "train/good/000.png")


def test_a_region_thinner_than_a_pixel_survives_beside_a_large_one():
    mask = torch.zeros(1, 400, 500, dtype=torch.bool)
    mask[:, 50:150, 100:200] = True
    mask[:, 300, 401] = mask[:, 7, 3] = True
    small = resize_mask(mask, (64, 64))
    assert len(component_tree(small[0].to(torch.uint8)).leaves) == 3
    assert small.sum() == resize_mask(mask & (mask.cumsum(1) > 1), (64, 64)).sum() + 2
    assert torch.equal(resize_mask(mask, (400, 500)), mask)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_masks_of_every_mode_and_colour(folder, mode):
    """Colours whose luma rounds to 0 are marks, too; opaque black is none."""
    marked = np.zeros((40, 60), bool)
    marked[10:20, 30:50] = True
    if mode == "P":
        picture = Image.fromarray(marked.astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 0, 0, 1])
    elif mode in ("RGB", "RGBA"):
        picture = Image.fromarray(marked[..., None] * np.array([0, 0, 3], np.uint8)).convert(mode)
    else:
        picture = Image.fromarray(marked.astype(np.uint8) * 255)
        picture = picture.convert("RGB").convert(mode) if mode == "CMYK" else picture.convert(mode)
    end = "_mask.bmp" if mode == "CMYK" else "_mask.png"
    for number in ("000", "001"):
        (folder / "ground_truth/hole" / f"{number}_mask.png").unlink()
        path = folder / "ground_truth/hole" / f"{number}{end}"
        picture.save(path, format="TIFF" if mode == "CMYK" else "PNG")
    for sample in list(FolderDataset(folder, "test", size=None))[1:]:
        assert np.array_equal(sample.mask[0].numpy(), marked)


def test_a_mask_that_marks_nothing_is_named(folder):
    path = folder / "ground_truth/hole/001_mask.png"
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"001_mask.png: marks nothing, but .*001.png is one of the defects"):
        FolderDataset(folder, "test")[2]


def test_btad_calls_normal_images_ok(folder):
    for split in ("train", "test"):
        (folder / split / "good").rename(folder / split / "ok")
    assert len(FolderDataset(folder)) == 2
    assert [s.label for s in FolderDataset(folder, "test")] == [1, 1, 0]


def test_what_only_looks_like_an_image_is_left_out(folder):
    (folder / "train/good/x.png").mkdir()
    (folder / "train/good/._000.png").write_bytes(b"of macOS")
    assert len(FolderDataset(folder)) == 2
    copies = folder / "test/.ipynb_checkpoints"
    copies.mkdir()
    (copies / "000-checkpoint.png").write_bytes((folder / "test/hole/000.png").read_bytes())
    assert [s.kind for s in FolderDataset(folder, "test")] == ["good", "hole", "hole"]
    assert len(images_below(folder / "test")) == 3
    assert images_below(copies) == [copies / "000-checkpoint.png"]  # it was asked for


@pytest.mark.parametrize("size", [0, -1, (32, 32, 3), (3, 0), "32", 2.5])
def test_sizes_are_checked_at_once(folder, size):
    for read in (lambda: FolderDataset(folder, size=size), lambda: read_image("any", size)):
        with pytest.raises((TypeError, ValueError), match="size"):
            read()
    assert FolderDataset(folder, size=np.int64(8))[0].image.shape == (3, 8, 8)


def test_white_may_be_zero_in_a_tiff_of_16_bits(tmp_path):
    values = np.array([[0, 1000], [30000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert Image.open(tmp_path / "a.tif").tag_v2[262] == 0
    expected = 1 - values / np.float32(65535)
    assert np.allclose(read_image(tmp_path / "a.tif")[0], expected, atol=1e-6)


def test_images_of_twelve_bits_are_told(tmp_path):
    values = np.random.default_rng(0).integers(300, 4096, (9, 8), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "dark.png")
    with pytest.warns(UserWarning, match="multiply those of a camera of 12 bits by 16"):
        read_image(tmp_path / "dark.png")
    Image.fromarray(16 * values).save(tmp_path / "bright.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "bright.png")


def test_files_that_are_no_images_say_so(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.png: cannot be read as an image \(no image of a format that"):
        read_image(tmp_path / "a.png")


def test_a_folder_of_images(tmp_path):
    for name in "ab":
        Image.fromarray(np.full((9, 8, 3), 255, np.uint8)).save(tmp_path / f"{name}.png")
    data = ImageFiles(tmp_path, size=(4, 6))
    assert len(data) == 2
    assert data[1].image.shape == (3, 4, 6)
    assert (data[1].label, data[1].kind, data[1].mask.any()) == (0, "good", False)
    with pytest.raises(ValueError, match="no such folder"):
        ImageFiles(tmp_path / "c")
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        ImageFiles(tmp_path / "d")
