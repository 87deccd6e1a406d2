"""The whole a-contrario test on squared norms, against the authors' algorithm in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

import usf_kernels as usf
from bench.subject import PEER, Case, Provider, Subject

MS_CAIT = ((28, 816), (14, 192))  # sides and channels of U-Flow's latents
LARGEST = 56  # side of a map for which plain Python takes seconds, not minutes
PEERS = {"skimage": "pip install scikit-image", "mpmath": "pip install mpmath"}


def energies(scales: Sequence[tuple[int, int]], batch: int) -> list[torch.Tensor]:
    """Make squared norms (B, H, W) of white latents per scale: chi-square with as many degrees as channels.

    In every map, a square of a quarter of the side has four times their mean: something to find.
    """
    generator = torch.Generator().manual_seed(0)
    maps = []
    for side, channels in scales:
        shape = torch.full((batch, side, side), channels / 2)
        maps.append(2 * torch._standard_gamma(shape, generator=generator))
        maps[-1][:, : side // 4, : side // 4] = 4 * channels
    return maps


def _providers(scales: tuple[tuple[int, int], ...], batch: int, device: torch.device) -> Iterator[Provider]:
    maps = energies(scales, batch)
    channels = [c for _, c in scales]
    sides = [side for side, _ in scales]
    # `regions` does no upsampling: only tree, probabilities, prune and merge are timed.
    for tail in ("chernoff", "exact"):
        call = partial(usf.regions, maps, channels=channels, tail=tail, threads=1)
        check = partial(_check, sides)
        yield Provider(f"usf_kernels {tail}", call, check=check, direction=tail, capture=False)
    if batch == 1 and scales[0][0] <= LARGEST and all(map(find_spec, PEERS)):
        from bench.plain_nfa import detections

        images = [u[0].numpy() for u in maps]
        yield Provider(
            "plain Python",
            lambda: [detections(images, channels)],
            PEER,
            direction="chernoff",
            check=partial(_same, lambda: usf.regions(maps, channels=channels, tail="chernoff", threads=1)),
            capture=False,
        )


def _check(sides: Sequence[int], images: list[list[usf.Region]]) -> str | None:
    """Check that every square is found, and at most one more region per image on average."""
    for i, regions in enumerate(images):
        for scale, side in enumerate(sides):
            square = (scale, (0, 0, side // 4, side // 4), (side // 4) ** 2)
            if square not in [(r.scale, r.box, r.area) for r in regions]:
                return f"image {i}: the square of scale {scale} is not found"
    more = sum(map(len, images)) - len(images) * len(sides)
    return None if more <= len(images) else f"{more} false detections on {len(images)} images"


def _same(ours: Callable[[], list[list[usf.Region]]], images: list[list[tuple]]) -> str | None:
    """Check that plain Python's regions are the same as ours."""
    for mine, theirs in zip(ours(), images, strict=True):
        expected = sorted((r.scale, r.area, r.log_nfa) for r in mine)
        found = sorted((scale, len(pixels), log_nfa) for scale, pixels, log_nfa in theirs)
        if len(found) != len(expected) or not np.allclose(found, expected, rtol=1e-5):
            return f"regions {found}, usf_kernels {expected}"
    return None


def _case(name: str, scales: tuple[tuple[int, int], ...], batch: int) -> Case:
    shape = {"side": scales[0][0], "batch": batch} if len(scales) == 1 else {"batch": batch}
    return Case(name, partial(_providers, scales, batch), shape)


SUBJECT = Subject(
    name="nfa",
    about="component tree, probabilities, prune and merge of squared norms, one thread",
    cases=(
        _case("14^2, batch 1", ((14, 192),), 1),
        _case("56^2, batch 1", ((56, 64),), 1),
        _case("28^2 + 14^2, batch 1", MS_CAIT, 1),
        _case("28^2 + 14^2, batch 32", MS_CAIT, 32),
        _case("224^2, batch 1", ((224, 64),), 1),
    ),
    peers=PEERS,
    devices=("cpu",),
)
