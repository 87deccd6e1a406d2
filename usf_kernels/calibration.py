"""Fitting of the null model to held-out normal images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from usf_kernels.energy import read_energies
from usf_kernels.null import Null
from usf_kernels.ops.checks import check_between
from usf_kernels.segmentation import regions

TAIL, TESTS = "exact", "per_size"  # the recommended form of the a-contrario test


def calibrate(
    latents: Tensor | Sequence[Tensor],
    *,
    false_alarms: float | None = None,
    tail: str = TAIL,
    tests: str = TESTS,
) -> Null:
    """Fit the null model to held-out normal images.

    The mean m and variance v of the squared norm over all images and positions of a scale give
    `scale = v / 2m` and `dof = 2 m^2 / v` (Satterthwaite's moments): correlated or badly scaled channels
    have fewer degrees of freedom than C. Use images that the flow was not trained on.

    This describes single positions. Neighbouring positions of a real image are not independent, though, so
    regions of several positions appear more often (or, in a narrow null, less often) than their number of
    false alarms says. With `false_alarms`, all fitted scales are therefore multiplied by one factor, found by
    bisection, for which these images show that many regions. The models' `calibrate` asks for 0.1.

    Args:
        latents: as in `log_nfa`: one tensor per scale, latents (N, C, H, W) or their squared norms (N, H, W);
            keep the latter when the latents of all images do not fit in memory.
        false_alarms: most regions at log_epsilon = 0 per image, on average; None fits positions only. Scales
            are at most halved for it, however many regions are allowed.
        tail, tests: form of the test that counts the regions, as in `log_nfa`.

    Returns:
        A `Null` with one scale and dof per tensor, and this form of the test; pass it as `null=` to
        `log_nfa`, `segment` and `regions`.

    Raises:
        TypeError, ValueError: as in `log_nfa`; also if the squared norms of a scale do not vary, or the
            number of false alarms is not positive.
    """
    if false_alarms is not None:
        check_between("false_alarms", false_alarms, 0, math.inf, "(]")
    energies, _ = read_energies(latents)
    fitted = replace(_of_positions(energies), tail=tail, tests=tests)
    if false_alarms is None:
        return fitted

    def stretched(factor: float) -> Null:
        return replace(fitted, scale=tuple(factor * scale for scale in fitted.scale))

    def alarms(factor: float) -> float:
        found = regions(energies, null=stretched(factor))
        return sum(len(image) for image in found) / len(found)

    low, high = 0.5, 1.0
    while alarms(high) > false_alarms:
        low, high = high, 1.5 * high
    while high / low > 1.005:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if alarms(middle) <= false_alarms else (middle, high)
    return stretched(high)


def _of_positions(energies: Sequence[Tensor]) -> Null:
    scale, dof = [], []
    for i, u in enumerate(energies):
        if u.numel() < 2:
            raise ValueError(
                f"latents[{i}]: expected at least two positions to fit to, found shape {tuple(u.shape)}"
            )
        u = u.double()
        largest = u.max().item() or 1.0  # a unit in which no square overflows
        mean, variance = (u / largest).mean().item(), (u / largest).var().item()
        if not variance > 1e-8 * mean**2:
            everywhere = f"{largest * mean:.6g} everywhere"
            raise ValueError(f"latents[{i}]: expected squared norms that vary, found {everywhere}")
        scale.append(largest * (variance / (2 * mean)))
        dof.append(2 * mean**2 / variance)
    return Null(tuple(scale), tuple(dof))
