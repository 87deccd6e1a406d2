"""Unsupervised segmentation of latents: the a-contrario test on the component tree of their squared norms.

M. Tailanian, A. Pardo, P. Musé, "U-Flow: A U-shaped Normalizing Flow for Anomaly Detection with Unsupervised
Threshold", JMIV 2024, arXiv:2211.12353: number of false alarms, procedures 1 (prune) and 2 (merge).

Everything here is in units of log10: a log NFA of -3 is a number of false alarms of 0.001.
"""

from __future__ import annotations

import atexit
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from usf_kernels import _core
from usf_kernels.energy import check_channels, read_energies
from usf_kernels.max_tree import check_threads
from usf_kernels.null import ALL_TESTS, TAILS, Null
from usf_kernels.number_of_tests import Count, counts, log_number_of_tests
from usf_kernels.ops.checks import check_choice, check_number, check_size

__all__ = ["Null", "Region", "log_nfa", "log_number_of_tests", "regions", "segment"]


@lru_cache(maxsize=256)
def _tail(scale: float, dof: float, tail: str) -> _core.Tail:
    return _core.Tail(dof, scale, tail == "exact")


# Objects that outlive the interpreter, such as tables of compilers and exporters, may keep this module alive.
# The cached tails would then be reported as leaks when the extension is unloaded.
atexit.register(_tail.cache_clear)


@dataclass(frozen=True)
class _Test:
    """Common input of `log_nfa` and `regions`: checked maps, and the tail and count of each scale."""

    energies: list[Tensor]  # (B, H, W)
    tails: list[_core.Tail]
    counts: list[Count]
    threads: int

    def scales(self) -> list[tuple[np.ndarray, _core.Tail, Count]]:
        return [(u.numpy(), *rest) for u, *rest in zip(self.energies, self.tails, self.counts, strict=True)]


def _prepare(
    latents: Tensor | Sequence[Tensor],
    tail: str | None,
    tests: str | None,
    null: Null | None,
    channels: Sequence[int] | int | None,
    threads: int | None,
) -> _Test:
    energies, found = read_energies(latents)
    if channels is not None:
        channels = check_channels(channels, len(energies))
        for i, (given, c) in enumerate(zip(channels, found, strict=True)):
            if c is not None and c != given:
                raise ValueError(f"channels[{i}]: expected the {c} of latents[{i}], found {given}")
        found = list(channels)
    if null is None:
        if None in found:
            i = found.index(None)
            raise ValueError(
                f"latents[{i}]: shape {tuple(energies[i].shape)} reads as squared norms (B, H, W), which "
                "need `channels` or `null`; latents are (B, C, H, W)"
            )
        null = Null.white(found)
    elif not isinstance(null, Null):
        raise TypeError(f"null: expected a Null (see calibrate) or None, found {type(null).__name__}")
    if len(null) != len(energies):
        raise ValueError(f"null: expected {len(energies)} scales, as many as latents, found {len(null)}")
    tail, tests = null.tail if tail is None else tail, null.tests if tests is None else tests
    check_choice("tail", tail, TAILS)
    check_choice("tests", tests, ALL_TESTS)
    threads = check_threads(threads, sum(u.numel() for u in energies))
    tails = [_tail(scale, dof, tail) for scale, dof in zip(null.scale, null.dof, strict=True)]
    positions = tuple(u.shape[1] * u.shape[2] for u in energies)
    return _Test(energies, tails, counts(positions, tests), threads)


def log_nfa(
    latents: Tensor | Sequence[Tensor],
    size: int | tuple[int, int],
    *,
    tail: str | None = None,
    tests: str | None = None,
    null: Null | None = None,
    channels: Sequence[int] | int | None = None,
    upsample: str = "bilinear",
    threads: int | None = None,
) -> Tensor:
    """Map the log10 number of false alarms (NFA) of the most significant region at each position.

    At each scale, every connected component of an upper level set of the squared norms (4-connectivity) is a
    candidate. One of n pixels at level t has `log10 PFA = n * log10 Pr(X >= t)`, where X follows `null`, and
    `log10 NFA = log10 PFA + log10(number of tests)`. Nested candidates are pruned to the most significant
    one, and siblings merged into the component around them if that is at least as significant as each
    (procedures 1 and 2, until nothing changes). This leaves disjoint final regions.

    Pixels of a final region get its log10 NFA. Others get that of a region of probability 1: with
    `tests="total"` the number of tests, as in the paper's map; with `tests="per_size"` that of a single
    pixel, which is also the upper limit of all regions. The maps are upsampled to `size` and the minimum over
    scales is kept.

    If latents of clean images follow `null` and are independent, there is on average at most one false
    detection per clean image at `log_nfa <= 0`.

    Args:
        latents: one tensor, or a list or tuple of them, one per scale: latents (B, C, H, W) or their squared
            norms (B, H, W), float32, float64, float16 or bfloat16, on one device, or NumPy arrays, such as
            another runtime's outputs. B may be 0. Gradients do not flow.
        size: (H, W) of the result, or one int for a square.
        tail: "chernoff", the paper's bound `C / (2 ln 10) * (1 + ln(t/C) - t/C)` of log10 Pr(chi2_C >= t) for
            t > C, and 0 for t <= C; or "exact", the probability itself, which finds a little more. None takes
            that of `null`: what it was fitted with, or else the paper's.
        tests: "total", the paper's N_T for every region (see `log_number_of_tests`); or "per_size", where a
            region of r pixels at scale l counts `S * P_l * ALPHA * BETA^r / r` tests, S = sum of all P_l, the
            number of pairs (l, r). It gives the same guarantee, and is far more sensitive to small regions.
            None takes that of `null`.
        null: distribution of squared norms at normal positions; None stands for white latents, chi2 with C
            degrees of freedom. See `calibrate`.
        channels: C of each scale, needed for squared norms if `null` is None.
        upsample: "bilinear" (align_corners=False; the paper), which shaves the border of a region and can
            hide one of a few pixels; or "nearest", where each region keeps all of its pixels (if `size` is no
            smaller than the maps).
        threads: CPU threads, over the images; None takes PyTorch's number, fewer for little work. The result
            has the same bits for any number.

    Returns:
        (B, 1, H, W) float32 on the device of the latents.

    Raises:
        TypeError: for an argument of another type or dtype.
        ValueError: for wrong or contradictory shapes, NaN, infinity, negative squared norms, unknown options.
    """
    test = _prepare(latents, tail, tests, null, channels, threads)
    size = check_size(size)
    check_choice("upsample", upsample, ("bilinear", "nearest"))
    first = latents[0] if isinstance(latents, (list, tuple)) else latents
    device = first.device if isinstance(first, Tensor) else "cpu"
    result = None
    for u, log_tail, count in test.scales():
        maps = torch.from_numpy(_core.log_nfa_maps(u, log_tail, *count, test.threads))[:, None].to(device)
        if len(maps) == 0:
            return maps.new_empty((0, 1, *size))
        if upsample == "nearest":
            maps = F.interpolate(maps, size=size, mode="nearest-exact")
        else:
            maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
            # The weights may add up to more than 1 by rounding, and overflow to -inf.
            maps = maps.clamp(min=torch.finfo(maps.dtype).min)
        result = maps if result is None else torch.minimum(result, maps)
    return result


def segment(
    latents: Tensor | Sequence[Tensor],
    size: int | tuple[int, int],
    *,
    log_epsilon: float = 0.0,
    tail: str | None = None,
    tests: str | None = None,
    null: Null | None = None,
    channels: Sequence[int] | int | None = None,
    upsample: str = "bilinear",
    threads: int | None = None,
) -> Tensor:
    """Return the mask of the anomalous positions: `log_nfa(...) <= log_epsilon`.

    Args:
        latents, size, tail, tests, null, channels, upsample, threads: as in `log_nfa`.
        log_epsilon: log10 of the accepted number of false detections per clean image.

    Returns:
        (B, 1, H, W) bool on the device of the latents.

    Raises:
        TypeError, ValueError: as `log_nfa`; also for a log_epsilon that is not a number.
    """
    log_epsilon = _check_log_epsilon(log_epsilon)
    values = log_nfa(
        latents,
        size,
        tail=tail,
        tests=tests,
        null=null,
        channels=channels,
        upsample=upsample,
        threads=threads,
    )
    return values <= log_epsilon


@dataclass(frozen=True, order=True)
class Region:
    """A region that chance does not explain. Coordinates are in pixels of its scale's map.

    Attributes:
        log_nfa: log10 of the number of false alarms; regions sort by it, the most significant first.
        scale: index into the latents.
        box: (top, left, bottom, right), half open.
        area: number of pixels.
        level: the smallest squared norm in the region.
        centroid: (row, column) of the mean pixel; the first pixel's centre is (0, 0).
        map_size: (H, W) of the map.
    """

    log_nfa: float
    scale: int
    box: tuple[int, int, int, int]
    area: int
    level: float
    centroid: tuple[float, float]
    map_size: tuple[int, int]

    def image_box(self, size: int | tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the box in pixels of an image of `size` (H, W), grown to whole pixels.

        Raises:
            TypeError, ValueError: a size that is no positive whole number or pair of them.
        """
        (height, width), (h, w) = check_size(size), self.map_size
        top, left, bottom, right = self.box
        return top * height // h, left * width // w, -(-bottom * height // h), -(-right * width // w)


def regions(
    latents: Tensor | Sequence[Tensor],
    *,
    log_epsilon: float = 0.0,
    tail: str | None = None,
    tests: str | None = None,
    null: Null | None = None,
    channels: Sequence[int] | int | None = None,
    threads: int | None = None,
) -> list[list[Region]]:
    """Return the final regions of all scales with `log10 NFA <= log_epsilon`, before any upsampling.

    Regions of one scale are disjoint; those of different scales may overlap.

    Args:
        latents, tail, tests, null, channels, threads: as in `log_nfa`.
        log_epsilon: log10 of the accepted number of false detections per clean image; inf returns all.

    Returns:
        The regions of each image, the most significant first.

    Raises:
        TypeError, ValueError: as `log_nfa`; also for a log_epsilon that is not a number.
    """
    log_epsilon = _check_log_epsilon(log_epsilon)
    test = _prepare(latents, tail, tests, null, channels, threads)
    found: list[list[Region]] = [[] for _ in range(len(test.energies[0]))]
    for scale, (u, log_tail, count) in enumerate(test.scales()):
        per_image = _core.find_regions(u, log_tail, count.by_size, count.offset, log_epsilon, test.threads)
        for image, rows in zip(found, per_image, strict=True):
            for *box, area, level, value, row, column in rows:
                image.append(Region(value, scale, tuple(box), area, level, (row, column), u.shape[1:]))
    return [sorted(image) for image in found]


def _check_log_epsilon(log_epsilon: float) -> float:
    check_number("log_epsilon", log_epsilon)
    if math.isnan(log_epsilon):
        raise ValueError("log_epsilon: expected a number, found NaN")
    return float(log_epsilon)
