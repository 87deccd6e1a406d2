"""The shape of a benchmark: a subject has cases, a case has an input and those who are timed on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: how the rows call it.
        dtype: of the input.
        pixels: in one call.
        providers: makes the input and returns whom to time by name, ours first. A peer that is not installed
            is missing from it.
        check: takes the providers, returns what is wrong by name; those are reported and not timed.
        seconds: to spend on it.
        peak: whether to measure the memory of our first provider as well.
        quick: whether it belongs to the quick run.
    """

    name: str
    dtype: str
    pixels: int
    providers: Callable[[], Mapping[str, Call]]
    check: Callable[[Mapping[str, Call]], dict[str, str]]
    seconds: float = 2.0
    peak: bool = False
    quick: bool = True


@dataclass(frozen=True)
class Subject:
    """What is measured, why, and on which inputs."""

    name: str
    about: str
    cases: tuple[Case, ...]
    peers: Mapping[str, str]  # module to how to install it

    def case(self, name: str) -> Case:
        for case in self.cases:
            if case.name == name:
                return case
        raise KeyError(f"{self.name} has no case {name!r}")
