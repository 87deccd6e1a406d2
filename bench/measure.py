"""Timing of all providers of a case in one process, in turn, so that disturbances hit all of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from usf_kernels.nn.capture import undoing_failed_capture

Call = Callable[[], object]

NOISY = 1.5  # p80 / p20 above which a row is marked
BUSY = 0.1  # share of the cores taken by others above which a row is marked too
TURN = 1e-3  # seconds
BRIEF, LONG = 0.5, 5.0  # seconds
ROUNDS, FEW = 5, 3  # least number of rounds; the second if a round takes `LONG`
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """Percentiles of one provider's seconds per call."""

    p20: float
    p50: float
    p80: float
    repeats: int

    @property
    def noisy(self) -> bool:
        """Whether something disturbed the measurement."""
        return self.p80 > NOISY * self.p20


def alternate(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    least: int | None = None,
    most: int = 1000,
    device: torch.device = CPU,
    cold: bool = False,
    known: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Call the providers in turn for about `seconds`, at least some rounds, after one to warm up.

    A turn takes at least a millisecond: short calls are repeated in it, and count with their mean. Before it
    comes a call that does not count, unless that would take long, so that no provider pays for the state of
    memory that the previous one left. The garbage collector stays on: its work for a provider is a part of
    the cost, and its pauses do not move a median.

    Args:
        calls: what to time, by name.
        seconds: time for all of them together.
        least, most: numbers of rounds; `least` is `ROUNDS` or `FEW` by default.
        device: CUDA devices are timed with events on their current stream.
        cold: empty the caches before every call, and make one call per turn.
        known: seconds of an earlier call, by name; calls that took long are not warmed up again.
    """
    elapsed = _cuda_elapsed if device.type == "cuda" else _cpu_elapsed
    flush = _flush(device) if cold else None
    turns, brief, total = {}, {}, 0.0
    for name, call in calls.items():
        taken = (known or {}).get(name, 0.0)
        if taken < LONG:
            taken = elapsed(call, 1)
        turns[name] = 1 if cold else max(1, min(100, round(TURN / max(taken, 1e-9))))
        brief[name] = taken < BRIEF
        total += taken
    if least is None:
        least = ROUNDS if total < LONG else FEW
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if brief[name]:
                call()
            if flush is not None:
                flush()
            samples[name].append(elapsed(call, turns[name]) / turns[name])
    return {
        name: Timing(*np.percentile(taken, (20, 50, 80)).tolist(), repeats=len(taken))
        for name, taken in samples.items()
    }


def _cpu_elapsed(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def _cuda_elapsed(call: Call, times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _flush(device: torch.device) -> Call:
    """Return a call that writes more than the last-level cache holds."""
    scratch = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    return scratch.zero_


def first_call(call: Call, device: torch.device = CPU, *, limit: int = 0) -> tuple[object, float]:
    """Return a call's result and its seconds, as a user waits for them at the start, compilation included.

    Raises:
        TimeoutError: after `limit` seconds (whole ones, 0 for none; only where the system has SIGALRM).
    """
    with _alarm(limit):
        start = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result, time.perf_counter() - start


def least_seconds(call: Call, device: torch.device = CPU) -> float:
    """Return the least time of three calls after a first one, or that of the first if it is `LONG`."""
    _, seconds = first_call(call, device)
    return seconds if seconds >= LONG else min(first_call(call, device)[1] for _ in range(3))


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    if not seconds or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"the first call took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def captured(call: Call) -> Call:
    """Return the call's work as a CUDA graph: one launch for any number of kernels.

    Raises:
        Exception: whatever the call or the capture raises; CUDA stays usable.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
        with _nothing_read_back():
            call()
    before = torch.cuda.current_stream()
    before.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with undoing_failed_capture(before, pool), torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay


@contextmanager
def _nothing_read_back() -> Iterator[None]:
    """Raise for anything that waits for the device, before it would break a capture."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class Neighbours:
    """Measures the share of the cores that other processes take between two calls of `share`.

    A busy neighbour can triple the time of everything that uses all cores, so evenly that no percentile shows
    it. Linux only: elsewhere the share is 0.
    """

    def __init__(self) -> None:
        self.before = self._ticks()

    def share(self) -> float:
        """Return the share since the last call, or since the beginning: 0 to 1."""
        before, self.before = self.before, self._ticks()
        total, busy, own = (now - then for now, then in zip(self.before, before, strict=True))
        return min(1.0, max(0.0, busy - own) / total) if total > 0 else 0.0

    @staticmethod
    def _ticks() -> tuple[float, float, float]:
        """Return the seconds of all cores together, the part that was not idle, and those of this process."""
        try:
            with open("/proc/stat") as stat:
                user, nice, system, idle, iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
        except (OSError, ValueError):
            return 0.0, 0.0, 0.0
        busy = user + nice + system + irq + softirq + steal
        ticks = os.sysconf("SC_CLK_TCK")
        return (busy + idle + iowait) / ticks, busy / ticks, sum(os.times()[:2])


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
