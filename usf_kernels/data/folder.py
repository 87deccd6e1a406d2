"""Folders in MVTec AD layout: train/good, test/<kind>, ground_truth/<kind>/<stem>_mask.png."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset

from usf_kernels.data.sample import Sample

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Read any image file as float32 (3, H, W) in [0, 1].

    Grey images are repeated, transparency is dropped, 16-bit images keep their depth, floating-point ones
    hold [0, 1] already, and what the camera says about its orientation is followed.

    Args:
        path: the file.
        size: (height, width) to resize to (bicubic), or None to keep the image's own.

    Raises:
        ValueError: naming the file, when it is missing, cannot be decoded, or holds values out of range.
    """
    picture = open_image(path)
    if picture.mode.startswith("I") or picture.mode == "F":  # convert() would clip these at 255
        white = 1 if picture.mode == "F" else 65535
        grey = np.array(picture, dtype=np.float32)
        if not (grey.min() >= 0 and grey.max() <= white):  # nor NaN
            raise ValueError(
                f"{path}: expected values from 0 to {white} in an image of mode {picture.mode}, "
                f"found {grey.min():g} to {grey.max():g}"
            )
        image = torch.from_numpy(grey / white).expand(3, -1, -1)
    else:
        image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    return image.contiguous() if size is None else resize_image(image, size)


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """An image (3, H, W) in [0, 1] in another size (height, width), bicubic; the same image for its own."""
    if tuple(image.shape[1:]) != tuple(size):
        image = functional.interpolate(image[None], tuple(size), mode="bicubic", antialias=True)[0]
        image = image.clamp(0, 1)  # bicubic overshoots at edges
    return image.contiguous()


def open_image(path: str | Path, *, decode: bool = True) -> Image.Image:
    """Open an image file, the right way up.

    Args:
        path: the file.
        decode: read the pixels; without it only the header is looked at, to see whether it is an image.

    Raises:
        ValueError: naming the file, when it is missing or cannot be read as an image.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'usf-kernels[train]'") from error
    try:
        # Given the name, Pillow maps uncompressed TIFFs into memory, and they lose their orientation.
        with open(path, "rb") as file, Image.open(file) as picture:
            if decode:
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


class FolderDataset(Dataset[Sample]):
    """One category of MVTec AD, VisA (in its MVTec form), BTAD, or any folder laid out like them.

    Args:
        root: the folder that holds `train/good` and `test`.
        split: "train" or "test".
        size: (height, width), or one number for a square, to which images are resized; masks go along
            (nearest). None keeps each image's own size, and then only batches of one collate.

    Raises:
        ValueError: naming the folder, when it is missing or holds no image; naming the file, when an image
            cannot be read, or its mask is missing or has another size than it. Files are opened when an item
            is read.
    """

    def __init__(
        self, root: str | Path, split: str = "train", *, size: int | tuple[int, int] | None = 256
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test'; got {split!r}")
        self.root, self.split = Path(root), split
        self.size = (size, size) if isinstance(size, int) else size
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder")
        kinds = [self.root / "train" / "good"] if split == "train" else self._kinds()
        for folder in kinds:
            if not folder.is_dir():
                raise ValueError(f"{folder}: no such folder; normal training images are expected there")
        self.files = [path for folder in kinds for path in _images(folder)]
        if not self.files:
            raise ValueError(f"{kinds[0] if split == 'train' else self.root / 'test'}: holds no image")

    def _kinds(self) -> list[Path]:
        test = self.root / "test"
        if not test.is_dir():
            raise ValueError(f"{test}: no such folder; test images are expected in {test}/<kind>")
        return sorted(folder for folder in test.iterdir() if folder.is_dir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path = self.files[index]
        kind = path.parent.name
        image = read_image(path)
        own = tuple(image.shape[1:])
        size = own if self.size is None else self.size
        if kind == "good":
            mask = torch.zeros(1, *size, dtype=torch.bool)
        else:
            mask = self._mask(path, kind, own, size)
        return Sample(resize_image(image, size), mask, int(kind != "good"), str(path), kind)

    def checksum(self) -> str:
        """CRC-32 of the files' names and contents, in order: tells one set of images from another."""
        value = 0
        for path in self.files:
            value = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), value))
        return f"{value:08x}"

    def _mask(self, path: Path, kind: str, own: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        folder = self.root / "ground_truth" / kind
        candidates = [folder / f"{path.stem}{end}" for end in ("_mask.png", ".png", "_mask.bmp", ".bmp")]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise ValueError(f"{candidates[0]}: no such mask for {path}")
        mask = torch.from_numpy(np.array(open_image(found).convert("L")) > 0)[None]
        if tuple(mask.shape[1:]) != own:
            raise ValueError(f"{found}: mask is {tuple(mask.shape[1:])}, its image {path} is {own}")
        resized = functional.interpolate(mask[None].float(), size, mode="nearest-exact")[0]
        if mask.any() and not resized.any():  # a defect thinner than a pixel must not vanish
            resized = functional.adaptive_max_pool2d(mask.float(), size)
        return resized > 0.5
