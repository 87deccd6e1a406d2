"""Number of regions that an a-contrario test could try, the factor from probabilities to false alarms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from usf_kernels.ops.checks import check_int

# There are about ALPHA * BETA**r / r fixed polyominoes, 4-connected shapes of r pixels.
ALPHA, BETA = 0.316915, 4.062570
MOST_KEPT = 1 << 20  # positions of maps for which counts are kept


def log_number_of_tests(sizes: Sequence[tuple[int, int]]) -> float:
    """Return log10 of the number of tests, `N_T = sum_l P_l * sum_{r=1..P_l} ALPHA * BETA^r / r`.

    P_l = H*W is the number of positions of scale l, at each of which a shape of r pixels may lie; the inner
    sum estimates how many such shapes there are (the number of tests of U-Flow, JMIV 2024, arXiv:2211.12353).
    Computed in log space, so no size overflows; cached.

    Args:
        sizes: (H, W) of each scale.

    Raises:
        TypeError, ValueError: for no scale, or sides that are not positive integers.
    """
    if not isinstance(sizes, (list, tuple)) or not sizes:
        raise ValueError(f"sizes: expected [(H, W), ...], found {sizes!r}")
    for i, size in enumerate(sizes):
        if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
            raise ValueError(f"sizes[{i}]: expected (H, W), found {size!r}")
        for side in size:
            check_int(f"sizes[{i}]", side, 1)
    return _log_total(tuple(int(height) * int(width) for height, width in sizes))


@lru_cache(maxsize=1024)
def _log_total(positions: tuple[int, ...]) -> float:
    logs = []
    for p in positions:
        # Factor out the last term, which dwarfs the others: 64 terms before it, they are below 1e-38 of it.
        # The factor's 1 / p and the P_l outside the sum cancel.
        terms = math.fsum(BETA**-k * p / (p - k) for k in range(min(p, 64)))
        logs.append(math.log10(ALPHA * terms) + p * math.log10(BETA))
    most = max(logs)
    return most + math.log10(math.fsum(10 ** (value - most) for value in logs))


class Count(NamedTuple):
    """log10 of the number of tests of one scale, for a region of r pixels: `offset + by_size[r]`."""

    by_size: np.ndarray  # [P + 1] float64; empty where all sizes count the same
    offset: float
    ceiling: float  # log10 NFA of a position outside all regions


def counts(positions: tuple[int, ...], tests: str) -> list[Count]:
    """Return the count of each scale for tests="total" or "per_size", see `usf_kernels.log_nfa`."""
    made = _counts if sum(positions) <= MOST_KEPT else _counts.__wrapped__
    return made(positions, tests)


@lru_cache(maxsize=8)  # arrays as large as the maps
def _counts(positions: tuple[int, ...], tests: str) -> list[Count]:
    if tests == "total":
        total = _log_total(positions)
        return [Count(np.empty(0), total, total)] * len(positions)
    found = []
    for p in positions:
        r = np.arange(1, p + 1, dtype=np.float64)
        by_size = np.concatenate([[0.0], math.log10(ALPHA) + r * math.log10(BETA) - np.log10(r)])
        offset = math.log10(sum(positions)) + math.log10(p)
        found.append(Count(by_size, offset, float(offset + by_size[1])))
    return found
