"""Timing: all providers of a case in one process, in turn, so that what disturbs one disturbs all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

NOISY = 1.5  # p80 / p20 above which a row is marked
TURN = 1e-3  # seconds
BRIEF = 0.5  # seconds


@dataclass(frozen=True)
class Timing:
    """Percentiles of one provider's seconds per call."""

    p20: float
    p50: float
    p80: float
    repeats: int

    @property
    def noisy(self) -> bool:
        return self.p80 > NOISY * self.p20


def alternate(
    providers: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 3, most: int = 1000
) -> dict[str, Timing]:
    """Call the providers in turn for about `seconds`, at least `least` rounds, after one to warm up.

    A turn takes at least a millisecond: short calls are repeated in it, and count with their mean. A call
    that does not count comes before it, unless that would take long, so that nobody pays for the state of
    the memory that the one before left behind.
    """
    turns, brief = {}, {}
    for name, call in providers.items():
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        turns[name] = max(1, min(100, round(TURN / taken)))
        brief[name] = taken < BRIEF
    samples: dict[str, list[float]] = {name: [] for name in providers}
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for name, call in providers.items():
            if brief[name]:
                call()
            start = time.perf_counter()
            for _ in range(turns[name]):
                call()
            samples[name].append((time.perf_counter() - start) / turns[name])
    return {
        name: Timing(*np.percentile(seconds, (20, 50, 80)).tolist(), repeats=len(seconds))
        for name, seconds in samples.items()
    }


_PEAK = """
import sys
from bench.registry import SUBJECTS

def kilobytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))

call = next(iter(SUBJECTS[sys.argv[1]].case(sys.argv[2]).providers().values()))
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the high-water mark starts again
before = kilobytes("VmRSS")
result = call()
print((kilobytes("VmHWM") - before) * 1024)
"""


def peak_bytes(subject: str, case: str) -> int | None:
    """Most resident memory during one call of the first provider, above that before it; the result counts.

    Measured in a process of its own. None where the system does not tell (it takes Linux's /proc).
    """
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, subject, case], capture_output=True, text=True, check=True
    )
    return int(done.stdout)
