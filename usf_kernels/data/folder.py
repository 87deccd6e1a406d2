"""Folders in MVTec AD layout: train/good, test/<kind>, ground_truth/<kind>/<stem>_mask.png."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterable
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset

from usf_kernels.data.sample import Sample
from usf_kernels.extras import needs_extra
from usf_kernels.max_tree import component_tree
from usf_kernels.ops.checks import check_choice, check_size

if TYPE_CHECKING:
    from PIL import Image

NORMAL = ("good", "ok")  # names of folders of normal images; the second is BTAD's
TWELVE_BITS = 4095
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF files, and its value for inverted greys
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # lossless formats
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Read any image file as float32 (3, H, W) in [0, 1].

    Grey images are repeated over the colours. Grey images of 16 bits keep their depth; coloured ones are cut
    to 8. Floating-point images must hold [0, 1]. Transparency is dropped; the camera's orientation tag is
    followed.

    Args:
        path: the file.
        size: (height, width) to resize to (bicubic), or one number for a square; None keeps the image's own.

    Raises:
        ValueError: naming the file, when it is missing, cannot be decoded, or holds values out of range.
        TypeError, ValueError: for a bad size.
    """
    size = None if size is None else check_size(size)
    picture = open_image(path)
    if picture.mode.startswith("I") or picture.mode == "F":  # convert() would clip these at 255
        white = 1 if picture.mode == "F" else 65535
        grey = np.array(picture, dtype=np.float32)
        if white == 65535 and 255 < grey.max() <= TWELVE_BITS:
            warnings.warn(
                f"an image of 16 bits has values up to {TWELVE_BITS} at most, and is dark: multiply those of "
                "a camera of 12 bits by 16",
                stacklevel=2,
            )
        if not (grey.min() >= 0 and grey.max() <= white):  # refuses NaN too
            raise ValueError(
                f"{path}: expected values from 0 to {white} in an image of mode {picture.mode}, "
                f"found {grey.min():g} to {grey.max():g}"
            )
        if picture.format == "TIFF" and picture.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            grey = white - grey  # Pillow does so for 8 bits only
        image = torch.from_numpy(grey / white).expand(3, -1, -1)
    else:
        image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    return image.contiguous() if size is None else resize_image(image, size)


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize an image (3, H, W) in [0, 1] bicubically to (height, width); at its own size it is unchanged."""
    if tuple(image.shape[1:]) != tuple(size):
        image = functional.interpolate(image[None], tuple(size), mode="bicubic", antialias=True)[0]
        image = image.clamp(0, 1)  # bicubic overshoots at edges
    return image.contiguous()


def open_image(path: str | Path, *, decode: bool = True) -> Image.Image:
    """Open an image file, the right way up.

    Args:
        path: the file.
        decode: read the pixels; otherwise only read the header, to check that it is an image.

    Raises:
        ValueError: naming the file, when it is missing or cannot be read as an image.
    """
    with needs_extra("train", "reading images"):
        from PIL import Image, ImageOps, UnidentifiedImageError
    try:
        # Given a name, Pillow maps uncompressed TIFFs into memory and loses their orientation: pass a file.
        with open(path, "rb") as file, Image.open(file) as picture:
            if decode:
                picture.load()
                picture.getexif()  # remembered; without its bytes, damaged tags are not written out again
                picture.info.pop("exif", None)
                ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except Exception as error:  # decoders raise errors of any kind
        known = not isinstance(error, UnidentifiedImageError)  # this message has an object's address
        reason = error if known else "no image of a format that Pillow knows"
        raise ValueError(f"{path}: cannot be read as an image ({reason})") from error


def is_image(path: Path) -> bool:
    """Whether a path is a file named like an image; macOS's companion files (`._name.png`) are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._") and path.is_file()


def is_hidden(path: Path) -> bool:
    """Whether a name begins with a dot, as `.ipynb_checkpoints` does, whose images are copies of others."""
    return path.name.startswith(".")


def images_in(paths: Iterable[Path]) -> list[Path]:
    """Return the paths that are image files, sorted."""
    return sorted(path for path in paths if is_image(path))


def images_below(folder: Path) -> list[Path]:
    """Return the image files in a folder and in the folders inside of it, sorted, but for hidden folders."""
    files = folder.rglob("*")
    return images_in(f for f in files if not any(map(is_hidden, f.relative_to(folder).parents)))


def resize_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a mask, bool (1, H, W), to (height, width), by nearest neighbours. Parts thinner than a pixel do
    not vanish: at least one pixel is left of each connected region."""
    if tuple(mask.shape[1:]) == tuple(size):
        return mask
    resized = functional.interpolate(mask[None].float(), tuple(size), mode="nearest-exact")[0] > 0.5
    if not mask.any():
        return resized
    regions = torch.from_numpy(component_tree(mask[0].to(torch.uint8).contiguous()).node).long() + 1
    regions[~mask[0]] = 0
    # In float64, since the numbers of regions, up to 2^31, are exact there.
    left = functional.interpolate(regions[None, None].double(), tuple(size), mode="nearest-exact").long()
    lost = ~torch.isin(regions, left.unique()) & mask[0]
    return resized | (functional.adaptive_max_pool2d(lost[None].float(), tuple(size)) > 0.5)


class ImageFiles(Dataset[Sample]):
    """The images in a folder, all of which are normal.

    Args:
        folder: folder that holds the images.
        size: see `FolderDataset`.

    Raises:
        ValueError: naming the folder, when it is missing or holds no image; naming the file, when an image
            cannot be read. Files are opened when an item is read.
        TypeError, ValueError: for a bad size.
    """

    def __init__(self, folder: str | Path, *, size: int | tuple[int, int] | None = 256) -> None:
        self.size = None if size is None else check_size(size)
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder")
        self.files = images_in(Path(folder).iterdir())
        if not self.files:
            raise ValueError(f"{folder}: holds no image")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.files[index], self.size)
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
        return Sample(image, mask, 0, str(self.files[index]), NORMAL[0])


class FolderDataset(Dataset[Sample]):
    """One category of MVTec AD, VisA (in its MVTec form), BTAD, or any folder laid out like them.

    Args:
        root: the folder that holds `train/good` and `test`; BTAD's `ok` is accepted for `good`.
        split: "train" or "test".
        size: (height, width), or one number for a square, to which images and masks are resized (masks by
            `resize_mask`). None keeps each image's own size; batches of more than one may then not collate.
        masks: whether defects have masks. If not, all masks are empty; only labels and kinds show defects.

    Raises:
        ValueError: naming the folder, when it is missing or holds no image; naming the file, when an image
            cannot be read, or its mask is missing, marks nothing or differs from it in size. Files are
            opened when an item is read.
        TypeError, ValueError: for a bad size.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        size: int | tuple[int, int] | None = 256,
        masks: bool = True,
    ) -> None:
        check_choice("split", split, ("train", "test"))
        self.root, self.split, self.masks = Path(root), split, masks
        self.size = None if size is None else check_size(size)
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder")
        kinds = [self._normal()] if split == "train" else self._kinds()
        self.files = [path for folder in kinds for path in images_in(folder.iterdir())]
        if not self.files:
            raise ValueError(f"{kinds[0] if split == 'train' else self.root / 'test'}: holds no image")

    def _normal(self) -> Path:
        folders = [self.root / "train" / name for name in NORMAL]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None:
            raise ValueError(f"{folders[0]}: no such folder; normal training images are expected there")
        return found

    def _kinds(self) -> list[Path]:
        test = self.root / "test"
        if not test.is_dir():
            raise ValueError(f"{test}: no such folder; test images are expected in {test}/<kind>")
        return sorted(folder for folder in test.iterdir() if folder.is_dir() and not is_hidden(folder))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path = self.files[index]
        kind = path.parent.name
        image = read_image(path)
        own = tuple(image.shape[1:])
        size = own if self.size is None else self.size
        if kind in NORMAL or not self.masks:
            mask = torch.zeros(1, *size, dtype=torch.bool)
        else:
            mask = self._mask(path, kind, own, size)
        return Sample(resize_image(image, size), mask, int(kind not in NORMAL), str(path), kind)

    def checksum(self) -> str:
        """Return the CRC-32 of the files' names and contents, in order, which identifies a set of images."""
        value = 0
        for path in self.files:
            value = zlib.crc32(path.read_bytes(), zlib.crc32(os.fsencode(path.name), value))
        return f"{value:08x}"

    def _mask(self, path: Path, kind: str, own: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        folder = self.root / "ground_truth" / kind
        named = [
            file
            for stem in (f"{path.stem}_mask", path.stem)
            for file in images_in(folder.glob(f"{escape(stem)}.*"))
            if file.stem == stem  # not those of another image, whose name has a dot
        ]
        lossless = [file for file in named if file.suffix.lower() in MASK_SUFFIXES]
        found = min(lossless, key=lambda file: MASK_SUFFIXES.index(file.suffix.lower()), default=None)
        if found is None:
            hint = f"; {named[0].name} is not in a lossless format, as {MASK_SUFFIXES[0]} is" if named else ""
            wanted = folder / f"{path.stem}_mask{MASK_SUFFIXES[0]}"
            raise ValueError(f"{wanted}: no such mask for {path}{hint}")
        picture = open_image(found)
        if picture.mode not in ("1", "L", "LA", "I", "I;16", "F"):  # a colour's luma may be 0
            picture = picture.convert("RGB")
        values = np.atleast_3d(np.array(picture))[..., :3]
        values = values[..., :1] if picture.mode == "LA" else values  # without alpha
        mask = torch.from_numpy((values > 0).any(-1))[None]
        if not mask.any():
            raise ValueError(f"{found}: marks nothing, but {path} is one of the defects")
        if tuple(mask.shape[1:]) != own:
            raise ValueError(f"{found}: mask is {tuple(mask.shape[1:])}, its image {path} is {own}")
        return resize_mask(mask, size)
