"""The whole a-contrario test on squared norms, against the paper's time and the authors' algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

import usf_kernels as usf
from bench.subject import Call, Case, Subject

MS_CAIT = ((28, 816), (14, 192))  # sides and channels of U-Flow's latents


def energies(scales: tuple[tuple[int, int], ...], batch: int) -> list[torch.Tensor]:
    """Squared norms (B, H, W) of white latents per scale: chi-square, as many degrees as channels."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for side, channels in scales:
        shape = torch.full((batch, side, side), channels / 2)
        maps.append(2 * torch._standard_gamma(shape, generator=generator))
    return maps


def _providers(scales: tuple[tuple[int, int], ...], batch: int) -> Mapping[str, Call]:
    maps = energies(scales, batch)
    channels = [c for _, c in scales]
    # Regions come before any upsampling: tree, probabilities, prune and merge, and nothing else.
    return {
        f"usf_kernels {tail}": partial(usf.regions, maps, channels=channels, tail=tail, threads=1)
        for tail in ("chernoff", "exact")
    }


def _check(providers: Mapping[str, Call]) -> dict[str, str]:
    """White noise: at most one detection per image."""
    wrong = {}
    for name, call in providers.items():
        found = [len(regions) for regions in call()]
        if sum(found) > len(found):
            wrong[name] = f"{sum(found)} detections on {len(found)} clean images"
    return wrong


def _case(name: str, scales: tuple[tuple[int, int], ...], batch: int) -> Case:
    pixels = batch * sum(side * side for side, _ in scales)
    return Case(name, "float32", pixels, partial(_providers, scales, batch), _check)


SUBJECT = Subject(
    name="nfa",
    about="component tree, probabilities, prune and merge of squared norms, one thread",
    cases=(
        _case("28^2 + 14^2, batch 32", MS_CAIT, 32),
        _case("224^2, batch 1", ((224, 64),), 1),
    ),
    peers={},
)
