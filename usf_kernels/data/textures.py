"""The embedded textures: brick, grass and gravel, photographs that scikit-image ships.

Each 512 x 512 photograph is cut into three bands of columns. Crops of the left band train a model, crops
of the middle one are held out (early stopping, calibration), crops of the right one are the test set, and
half of those get a defect. No pixel is in two bands. Turned or scaled crops are interpolated by a spline,
through which pixels beyond the border of their band contribute up to a grey level.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch.utils.data import Dataset

from usf_kernels.data.defects import DEFECTS, render_defect
from usf_kernels.data.folder import resize_image, resize_mask
from usf_kernels.data.sample import Sample
from usf_kernels.extras import needs_extra
from usf_kernels.ops.checks import check_choice, check_int

TEXTURES = ("brick", "grass", "gravel")
ISOTROPIC = ("grass", "gravel")  # these look the same after a quarter turn; the brick wall does not
BANDS = {"train": (0, 240), "validation": (240, 376), "test": (376, 512)}


@cache
def texture(name: str) -> np.ndarray:
    """Return the photograph as float32 (512, 512) in [0, 1], read-only.

    Raises:
        ValueError: for a name that is not one of `TEXTURES`.
        ImportError: without scikit-image.
    """
    check_choice("name", name, TEXTURES)
    with needs_extra("train", "the embedded textures"):
        from skimage import data
    image = getattr(data, name)().astype(np.float32) / 255
    image.flags.writeable = False
    return image


class TextureDataset(Dataset[Sample]):
    """Crops of one texture; image `i` depends only on the arguments, `seed` and `i`.

    Args:
        name: one of `TEXTURES`.
        split: "train" and "validation" give normal crops; "test" alternates clean and defective ones, the
            defective ones going through the five kinds of `DEFECTS` in turn.
        count: number of crops.
        crop: side of a crop in pixels of the photograph, 64 to 136.
        size: side to which crops are resized (bicubic), with their defects; None keeps `crop`.
        augment: mirror crops, turn them by up to 5 degrees (grass and gravel also by quarters), scale
            them by up to 10 %, and vary brightness and contrast a little. Default: in "train" only.
        seed: seed of the whole set. Different splits draw different numbers from one seed.

    Raises:
        ValueError: for an unknown name or split, a count or size below 1, or a crop outside 64 to 136.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        count: int = 100,
        crop: int = 128,
        size: int | None = None,
        augment: bool | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("split", split, tuple(BANDS))
        check_int("count", count, 1)
        check_int("crop", crop, 64, 136)  # from what `render_defect` takes to the width of the narrowest band
        self.photograph = texture(name)
        if size is not None:
            check_int("size", size, 1)
        self.name, self.split, self.count, self.seed = name, split, count, seed
        self.crop, self.size = crop, crop if size is None else size
        self.augment = split == "train" if augment is None else augment

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not -self.count <= index < self.count:
            raise IndexError(f"index: expected {-self.count}..{self.count - 1}, found {index}")
        index %= self.count  # as a sequence counts from the end
        stream = [self.seed, TEXTURES.index(self.name), list(BANDS).index(self.split), index]
        rng = np.random.default_rng(stream)
        image = self._augmented_crop(rng) if self.augment else self._cut(self.photograph, rng, self.crop)
        mask, kind = np.zeros(image.shape, bool), "good"
        if self.split == "test" and index % 2:
            kind = list(DEFECTS)[index // 2 % len(DEFECTS)]
            others = [texture(other) for other in TEXTURES if other != self.name]
            other = self._cut(others[rng.integers(len(others))], rng, self.crop)
            image, mask = render_defect(image, kind, rng, other)
        grey = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None]
        return Sample(
            image=resize_image(grey, (self.size, self.size)).clamp(0, 1).expand(3, -1, -1).contiguous(),
            mask=resize_mask(torch.from_numpy(mask)[None], (self.size, self.size)),
            label=int(kind != "good"),
            name=f"{self.name}/{self.split}/{index:04d}",
            kind=kind,
        )

    def _cut(self, photograph: np.ndarray, rng: np.random.Generator, side: int) -> np.ndarray:
        left, right = BANDS[self.split]
        y = rng.integers(photograph.shape[0] - side + 1)
        x = rng.integers(left, right - side + 1)
        return photograph[y : y + side, x : x + side]

    def _augmented_crop(self, rng: np.random.Generator) -> np.ndarray:
        image = self._warped(rng) if rng.random() < 0.5 else self._cut(self.photograph, rng, self.crop)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        if self.name in ISOTROPIC:
            image = np.rot90(image, rng.integers(4))
        middle = image.mean()
        return np.clip((image - middle) * rng.uniform(0.9, 1.1) + middle + rng.uniform(-0.04, 0.04), 0, 1)

    def _warped(self, rng: np.random.Generator) -> np.ndarray:
        """Cut a crop that is turned by up to 5 degrees and scaled by up to 10 %."""
        from scipy.ndimage import map_coordinates

        left, right = BANDS[self.split]
        turn = np.deg2rad(rng.uniform(-5, 5))
        widest = min(1.1, (right - left - 1) / (self.crop * (np.cos(turn) + abs(np.sin(turn)))))
        scale = rng.uniform(0.9 * widest / 1.1, widest)
        reach = scale * self.crop * (np.cos(turn) + abs(np.sin(turn))) / 2
        y0 = rng.uniform(reach, self.photograph.shape[0] - 1 - reach)
        x0 = rng.uniform(left + reach, right - 1 - reach)
        y, x = (np.mgrid[: self.crop, : self.crop] - (self.crop - 1) / 2) * scale
        rows, columns = y0 + np.cos(turn) * y - np.sin(turn) * x, x0 + np.sin(turn) * y + np.cos(turn) * x
        return map_coordinates(self.photograph, (rows, columns), order=3)
