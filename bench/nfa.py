"""The whole a-contrario test on squared norms, against the paper's text in plain Python."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

import usf_kernels as usf
from bench.subject import PEER, Case, Provider, Subject

MS_CAIT = ((28, 816), (14, 192))  # sides and channels of U-Flow's latents
ORACLE = Path(__file__).parents[1] / "tests" / "nfa_oracle.py"
LARGEST = 28  # side of a map for which plain Python takes seconds, not minutes


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
    if batch == 1 and scales[0][0] <= LARGEST and ORACLE.exists() and find_spec("mpmath"):
        oracle = _oracle()
        sizes = [side * side for side, _ in scales]

        def plain() -> list[list[object]]:
            found = [
                oracle.final_regions(u[0].double().numpy(), c, sizes=sizes)
                for u, c in zip(maps, channels, strict=True)
            ]
            return [[region for regions, _ in found for region in regions if region.value <= 0]]

        yield Provider("plain Python", plain, PEER, check=_check, direction="chernoff", capture=False)


def _oracle() -> ModuleType:
    """The algorithm as it is printed; the tests' oracle is that."""
    spec = importlib.util.spec_from_file_location("nfa_oracle", ORACLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _check(regions: list[list[object]]) -> str | None:
    """White noise: at most one detection per image."""
    found = sum(map(len, regions))
    return None if found <= len(regions) else f"{found} detections on {len(regions)} clean images"


def _case(name: str, scales: tuple[tuple[int, int], ...], batch: int) -> Case:
    def providers(device: torch.device) -> list[Provider]:
        return list(_providers(scales, batch, device))

    shape = {"side": scales[0][0], "batch": batch} if len(scales) == 1 else {"batch": batch}
    return Case(name, providers, shape)


SUBJECT = Subject(
    name="nfa",
    about="component tree, probabilities, prune and merge of squared norms, one thread",
    cases=(
        _case("14^2, batch 1", ((14, 192),), 1),
        _case("28^2 + 14^2, batch 1", MS_CAIT, 1),
        _case("28^2 + 14^2, batch 32", MS_CAIT, 32),
        _case("224^2, batch 1", ((224, 64),), 1),
    ),
    peers={"mpmath": "pip install mpmath"},
    devices=("cpu",),
)
