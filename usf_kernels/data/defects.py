"""Rendered defects with exact masks, for textures without any.

Each kind is a function of a grey image in [0, 1], a generator and another image, and returns the damaged
image. The mask is the set of pixels that the damage changed by more than two grey levels of an 8-bit image,
without pinholes, so that a blur does not claim the flat wall beside the edge that it blurred.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from usf_kernels.ops.checks import check_choice

Image = np.ndarray
GREY_LEVEL = 1 / 255


def _smooth(image: Image, sigma: float) -> Image:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image, sigma, mode="reflect")


def _blob(
    shape: tuple[int, int], rng: np.random.Generator, radius: tuple[float, float], feather: float
) -> Image:
    """Return the opacity in [0, 1] of an irregular ellipse with a soft border, wholly inside the image."""
    height, width = shape
    long, short = rng.uniform(*radius), rng.uniform(*radius)
    reach = max(long, short) * 1.3
    y0, x0 = rng.uniform(reach, height - reach), rng.uniform(reach, width - reach)
    y, x = np.mgrid[:height, :width]
    turn = rng.uniform(0, np.pi)
    along = (np.cos(turn) * (x - x0) + np.sin(turn) * (y - y0)) / long
    across = (np.cos(turn) * (y - y0) - np.sin(turn) * (x - x0)) / short
    angle, distance = np.arctan2(across, along), np.hypot(along, across)
    outline = 1.0
    for harmonic in (2, 3, 4):
        outline = outline + rng.normal(0, 0.16 / harmonic) * np.cos(
            harmonic * angle + rng.uniform(0, 2 * np.pi)
        )
    depth = (outline - distance) * np.sqrt(long * short)
    return np.clip(depth / feather + 0.5, 0, 1)


def _scratch(image: Image, rng: np.random.Generator, other: Image) -> Image:
    """Draw a thin bent line, brighter or darker than its surroundings, fading at its ends."""
    from scipy.spatial import cKDTree

    height, width = image.shape
    length, width_px = rng.uniform(0.3, 0.7) * height, rng.uniform(1.0, 2.2)
    centre = np.array([rng.uniform(0.3, 0.7) * height, rng.uniform(0.3, 0.7) * width])
    t = np.linspace(-0.5, 0.5, 4 * height)
    heading = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.8) * t
    step = length / t.size
    path = centre + np.stack([np.cumsum(np.sin(heading)), np.cumsum(np.cos(heading))], 1) * step
    path += centre - path.mean(0)
    distance, nearest = cKDTree(path).query(np.indices(image.shape).reshape(2, -1).T, distance_upper_bound=3)
    distance = distance.reshape(image.shape)
    fade = np.append(np.sqrt(1 - (2 * t) ** 2), 0)[nearest].reshape(image.shape)  # index t.size: none near
    opacity = np.clip(width_px / 2 + 0.5 - distance, 0, 1) * fade
    contrast = rng.choice([-1, 1]) * rng.uniform(0.15, 0.4)
    return image + opacity * contrast


def _stain(image: Image, rng: np.random.Generator, other: Image) -> Image:
    """Add a soft-edged patch that absorbs light, or a glossy one that adds some."""
    opacity = _blob(image.shape, rng, (9, 22), feather=4)
    gain = rng.uniform(0.5, 0.85) if rng.random() < 0.5 else rng.uniform(1.15, 1.5)
    return image * (1 + opacity * (gain - 1))


def _blur(image: Image, rng: np.random.Generator, other: Image) -> Image:
    """Put a region out of focus."""
    opacity = _blob(image.shape, rng, (12, 24), feather=4)
    return image + opacity * (_smooth(image, rng.uniform(0.9, 2.0)) - image)


def _patch(image: Image, rng: np.random.Generator, other: Image) -> Image:
    """Insert a piece of another material, with the brightness and contrast of the place."""
    opacity = _blob(image.shape, rng, (8, 20), feather=2)
    inside = opacity > 0.5
    piece = (other - other[inside].mean()) / (other[inside].std() + 1e-3)
    piece = piece * max(image[inside].std(), 0.03) + image[inside].mean()
    return image + opacity * (piece - image)


def _missing(image: Image, rng: np.random.Generator, other: Image) -> Image:
    """Remove the structure of a region: a smooth fill, with a camera's grain on it."""
    opacity = _blob(image.shape, rng, (6, 15), feather=2)
    grain = rng.normal(0, 0.01, image.shape)
    return image + opacity * (_smooth(image, 6) + grain - image)


DEFECTS: dict[str, Callable[[Image, np.random.Generator, Image], Image]] = {
    "scratch": _scratch,
    "stain": _stain,
    "blur": _blur,
    "patch": _patch,
    "missing": _missing,
}


MOST_DRAWS = 1000


def render_defect(
    image: Image, kind: str, rng: np.random.Generator, other: Image
) -> tuple[Image, np.ndarray]:
    """Damage a grey image and say exactly where.

    Args:
        image: floating (H, W) in [0, 1], at least 64 pixels a side; not changed.
        kind: one of `DEFECTS`.
        rng: the only source of randomness, so that a seed determines the picture.
        other: an image of another texture with the same shape, from which `patch` cuts.

    Returns:
        The damaged image, in [0, 1], and its mask, bool (H, W), never empty.

    Raises:
        ValueError: for an unknown kind, shapes that are too small or differ, or an image in which the defect
            cannot be seen.
    """
    check_choice("kind", kind, tuple(DEFECTS))
    if image.ndim != 2 or min(image.shape) < 64 or other.shape != image.shape:
        raise ValueError(
            "image, other: expected one shape (H, W) of at least 64 x 64, "
            f"found {tuple(image.shape)} and {tuple(other.shape)}"
        )
    for _ in range(MOST_DRAWS):  # a blur on a flat brick changes nothing: try again somewhere else
        damaged = np.clip(DEFECTS[kind](image, rng, other), 0, 1)
        change = np.abs(damaged - image)
        mask = _region(change > 2 * GREY_LEVEL)
        if mask.sum() >= 40 and change[mask].mean() > 4 * GREY_LEVEL:
            return damaged, mask
    raise ValueError(f"image: a {kind} changes nothing in it that could be seen")


def _region(changed: np.ndarray) -> np.ndarray:
    """Close the pinholes where a damaged pixel happens to keep its value; drop far specks."""
    from scipy.ndimage import binary_closing, binary_fill_holes, label

    disc = np.hypot(*np.mgrid[-2:3, -2:3]) < 2.5
    padded = np.pad(changed, 2)  # closing at the border of the image would otherwise erode
    closed = binary_fill_holes(binary_closing(padded, disc))[2:-2, 2:-2]
    parts, _ = label(closed)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return (sizes >= 12)[parts]
