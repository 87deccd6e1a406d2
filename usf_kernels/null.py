"""The null model: the distribution of the squared norms at normal positions."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from usf_kernels.ops.checks import check_choice, check_number

TAILS, ALL_TESTS = ("chernoff", "exact"), ("total", "per_size")
SMALLEST_DOF = 1e-6  # below, the exact tail cancels
LARGEST_DOF = 1e9  # limit of the extension; the exact tail takes time proportional to its square root


@dataclass(frozen=True, repr=False)
class Null:
    """Null model: squared norms of normal positions at scale l follow `scale[l] * chi2(dof[l])`.

    Latents of a perfect flow have scale 1 and dof C (`Null.white`); real ones do not, see
    `usf_kernels.calibrate`. Both are positive and finite, and so is their product; `dof` lies in 1e-6..1e9,
    and need not be whole. `tail` and `tests` are the form of the a-contrario test that it was fitted for, and
    the default of `usf_kernels.log_nfa` with this null; unless given, they are the paper's.

    Raises:
        TypeError: a scale or dof that is no tuple of numbers.
        ValueError: no scale, or not as many dof, a number out of range, an unknown tail or form of tests.
    """

    scale: tuple[float, ...]
    dof: tuple[float, ...]
    tail: str = "chernoff"
    tests: str = "total"

    def __post_init__(self) -> None:
        check_choice("tail", self.tail, TAILS)
        check_choice("tests", self.tests, ALL_TESTS)
        for name in ("scale", "dof"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)):
                raise TypeError(f"{name}: expected numbers, one per scale, found {type(values).__name__}")
            for value in values:
                check_number(name, value)
            values = tuple(float(value) for value in values)
            if not values or not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name}: expected positive finite numbers, one per scale, found {values}")
            object.__setattr__(self, name, values)
        if len(self.scale) != len(self.dof):
            raise ValueError(
                f"dof: expected {len(self.scale)} numbers, as many as scale, found {len(self.dof)}"
            )
        if not (min(self.dof) >= SMALLEST_DOF and max(self.dof) <= LARGEST_DOF):
            raise ValueError(f"dof: expected {SMALLEST_DOF:.0e} to {LARGEST_DOF:.0e}, found {self.dof}")
        for a, nu in zip(self.scale, self.dof, strict=True):
            if not (sys.float_info.min <= a * nu < math.inf):
                raise ValueError(f"scale: expected scale * dof within a double's range, found {a} * {nu}")

    @classmethod
    def white(cls, channels: Sequence[int]) -> Null:
        """Return the null of white latents: chi2(C) at each scale."""
        if not isinstance(channels, (tuple, list)):
            raise TypeError(f"channels: expected numbers, one per scale, found {type(channels).__name__}")
        return cls(scale=(1.0,) * len(channels), dof=tuple(channels))

    def to_list(self) -> list[list[float]]:
        """Return [[scale, dof], ...], one pair per scale: plain numbers, for a checkpoint or a JSON file."""
        return [list(pair) for pair in zip(self.scale, self.dof, strict=True)]

    @classmethod
    def from_list(
        cls, pairs: Sequence[Sequence[float]], *, tail: str = "chernoff", tests: str = "total"
    ) -> Null:
        """Invert `to_list`, whose result does not include `tail` and `tests`.

        Raises:
            TypeError, ValueError: `pairs` that are no pairs of numbers, or what `Null` raises for them.
        """
        found = pairs if isinstance(pairs, (tuple, list)) else ()
        if not found or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in found):
            raise ValueError(f"pairs: expected [[scale, dof], ...], one pair per scale, found {pairs!r}")
        return cls(*zip(*pairs, strict=True), tail=tail, tests=tests)

    def __len__(self) -> int:
        return len(self.scale)

    def __repr__(self) -> str:
        terms = (f"{a:.4g} * chi2({nu:.4g})" for a, nu in zip(self.scale, self.dof, strict=True))
        return f"Null({', '.join(terms)})"
