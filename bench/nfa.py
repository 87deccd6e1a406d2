"""The whole a-contrario test on squared norms, against the authors' algorithm in plain Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec

import torch

import usf_kernels as usf
from bench.subject import PEER, Case, Provider, Subject

MS_CAIT = ((28, 816), (14, 192))  # sides and channels of U-Flow's latents
LARGEST = 56  # side of a map for which plain Python takes seconds, not minutes
PEERS = {"skimage": "pip install scikit-image", "mpmath": "pip install mpmath"}


def energies(scales: Sequence[tuple[int, int]], batch: int) -> list[torch.Tensor]:
    """Squared norms (B, H, W) of white latents per scale: chi-square, as many degrees as channels."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for side, channels in scales:
        shape = torch.full((batch, side, side), channels / 2)
        maps.append(2 * torch._standard_gamma(shape, generator=generator))
    return maps


def _providers(scales: tuple[tuple[int, int], ...], batch: int, device: torch.device) -> Iterator[Provider]:
    maps = energies(scales, batch)
    channels = [c for _, c in scales]
    # Regions come before any upsampling: tree, probabilities, prune and merge, and nothing else.
    for tail in ("chernoff", "exact"):
        call = partial(usf.regions, maps, channels=channels, tail=tail, threads=1)
        yield Provider(f"usf_kernels {tail}", call, check=_check, direction=tail, capture=False)
    if batch == 1 and scales[0][0] <= LARGEST and all(map(find_spec, PEERS)):
        from bench.plain_nfa import detections

        images = [u[0].numpy() for u in maps]
        yield Provider(
            "plain Python",
            lambda: [detections(images, channels)],
            PEER,
            direction="chernoff",
            check=_check,
            capture=False,
        )


def _check(regions: list[list[object]]) -> str | None:
    """White noise: at most one detection per image."""
    found = sum(map(len, regions))
    return None if found <= len(regions) else f"{found} detections on {len(regions)} clean images"


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
