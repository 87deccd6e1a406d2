"""Which configuration a kernel runs with: pinned per shape band, or the fastest of a few measured here.

A configuration is a dict of a kernel's block sizes and `num_warps` (and `num_stages` where it loops). Each
launcher lists its candidates, the pinned one first. With USF_AUTOTUNE=1 the candidates are timed at the first
call of a key, and the fastest is kept in a file per device under USF_CACHE (~/.cache/usf_kernels by default).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from usf_kernels.kernels.launch import cdiv, is_recording, product_precision, warp_size

Config = dict[str, int]
Key = tuple[Hashable, ...]
Result = TypeVar("Result")
# Products whose matrix has both sides at least this long are the vendor's: with x contiguous, channels-last.
# Below, applying a matrix is limited by memory, or nearly so.
VENDOR_CHANNELS = {"ieee": (128, 64), "tf32": (512, 1024), "half": (1024, 1024)}
# The same for inputs of many positions, in the whole batch.
VENDOR_CHANNELS_OF_MANY = {"ieee": (64, 64), "tf32": (512, 1024), "half": (1024, 256)}
MANY_POSITIONS = 1 << 17
AUTOTUNE = os.environ.get("USF_AUTOTUNE") == "1"
Listener = Callable[[str, list[Config], Callable[[Config], Any]], None]
_listener: Listener | None = None


@contextlib.contextmanager
def hearing(listener: Listener) -> Iterator[None]:
    """Inside, `listener(name, candidates, attempt)` is called before each choice; `attempt(config)` runs the
    kernel that is being chosen for with any configuration."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def kind_of(dtype: torch.dtype) -> str:
    """Of products in this dtype: "half", or how float32 is rounded."""
    return product_precision() if dtype == torch.float32 else "half"


def is_observed() -> bool:
    """Whether someone has to see every choice: a tuner, or who only notes what would be launched."""
    return AUTOTUNE or _listener is not None or is_recording()


def pick(
    name: str,
    key: Key,
    candidates: list[Config],
    run: Callable[[Config], Result],
    device: torch.device,
) -> Result:
    """`run` with the configuration to use: the first candidate, unless tuning was asked for.

    Args:
        name: of the kernel.
        key: what the best choice depends on besides the first candidate; keep the number of keys small.
        candidates: configurations, the pinned one first.
        run: allocates, launches and returns the result; called several times when tuning.
        device: where.
    """
    return run(choose(name, key, candidates, run, device))


def choose(
    name: str,
    key: Key,
    candidates: list[Config],
    attempt: Callable[[Config], Any],
    device: torch.device,
) -> Config:
    """The configuration that `pick` takes. Tuning and recordings call `attempt`: a kernel that changes its
    input is tried on a copy."""
    if _listener is not None:
        _listener(name, candidates, attempt)
    if is_recording():  # the others are to be seen too
        for config in candidates[1:]:
            attempt(config)
    if AUTOTUNE and device.type == "cuda" and len(candidates) > 1:
        return _fastest(name, key, candidates, attempt, device)
    return candidates[0]


def elementwise(
    itemsize: int,
    operands: int,
    batch: int,
    channels: int,
    positions: int,
    channels_last: bool,
    *,
    whole: bool = False,
) -> list[Config]:
    """Tiles of (channels, positions) for kernels that touch each element of so many operands once.

    Some eight loads of 16 bytes per thread in all, fewer where that leaves multiprocessors idle; in the tile
    that wastes the fewest lanes, then the longest along the contiguous axis. With `whole` all channels of a
    position are in one tile where they fit: what gathers them reads every cache line once."""
    return _elementwise(itemsize, operands, batch, channels, positions, channels_last, whole, warp_size())


@functools.lru_cache(4096)  # the search takes longer than a launch
def _elementwise(
    itemsize: int,
    operands: int,
    batch: int,
    channels: int,
    positions: int,
    channels_last: bool,
    whole: bool,
    warp: int,
) -> list[Config]:
    loads = 2 ** round(math.log2(8 / operands))
    elements = 16 // itemsize * warp  # of one load by one warp
    while loads > 1 and batch * channels * positions < 132 * 4 * loads * elements:
        loads //= 2
    configs = []
    for per_thread, warps in ((loads, 4), (max(1, loads // 2), 4), (loads, 8)):
        size = warps * per_thread * elements
        length, width = (channels, positions) if channels_last else (positions, channels)
        shortest = min((128 // itemsize).bit_length() - 1, max(length - 1, 0).bit_length())  # a cache line
        if whole:
            inner = min(size, _power_of_2(length))
        else:
            inner = min(
                (2**k for k in range(shortest, size.bit_length())),
                key=lambda n, size=size: (_lanes(length, n, width, size), -n),
            )
        block_c, block_p = (inner, size // inner) if channels_last else (size // inner, inner)
        configs.append({"BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": warps})
    return _different(configs)


def _different(configs: list[Config]) -> list[Config]:
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


def _power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 2 ** max(n - 1, 0).bit_length()


def _lanes(length: int, inner: int, width: int, size: int) -> int:
    """Lanes that tiles of `size`, `inner` long, take to cover length * width."""
    return cdiv(length, inner) * cdiv(width, size // inner) * size


def reduction(
    itemsize: int, operands: int, channels: int, positions: int, channels_last: bool
) -> list[Config]:
    """Tiles of (channels, positions) for kernels that walk all channels of some positions (of all images).

    Few positions and many channels at a time: then there are programs for every multiprocessor, and each
    has many loads on their way before it waits. Of many positions whole cache lines, where there are enough
    programs anyway. Channels-last, of four operands or more, whole rows."""
    if channels_last:
        block_c = min(_power_of_2(channels), 256 if operands < 4 else 1024 // itemsize)
        size = warp_size() * 16 // itemsize * max(1, 2 // operands)  # of one warp
        shapes = [(block_c, max(1, warps * size // block_c), warps) for warps in (4, 8)]
    elif operands > 1:
        shapes = [(32, 64, 4), (64, 32, 4)]
    elif positions >= MANY_POSITIONS:
        shapes = [(64, 16 * itemsize, 4), (32, 64, 4)]
    elif channels > 64:
        shapes = [(256, 64 // itemsize, 8), (128, 32, 4)]
    else:
        shapes = [(64, 32, 4), (32, 64, 4)]
    return [{"BLOCK_C": c, "BLOCK_P": p, "num_warps": warps} for c, p, warps in shapes]


# ------------------------------------------------------------------------------------------------- tuning


def _fastest(
    name: str,
    key: Key,
    candidates: list[Config],
    run: Callable[[Config], Any],
    device: torch.device,
) -> Config:
    best = _known(device)
    entry = f"{name} {(*key, *candidates[0].values())}"
    if best.get(entry) not in candidates:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]  # timing would end the capture
        from triton.testing import do_bench

        with torch.cuda.device(device):
            times = [do_bench(lambda c=c: run(c), warmup=5, rep=20, return_mode="median") for c in candidates]
        best[entry] = candidates[times.index(min(times))]
        _write(_path(device), best)
    return best[entry]


def _path(device: torch.device) -> Path:
    folder = Path(os.environ.get("USF_CACHE") or Path.home() / ".cache" / "usf_kernels")
    return folder / f"{torch.cuda.get_device_name(device).replace(' ', '_').replace('/', '_')}.json"


@functools.cache
def _known(device: torch.device) -> dict[str, Config]:
    try:
        return json.loads(_path(device).read_text())
    except (OSError, ValueError):  # absent, or cut off: measured again
        return {}


def _write(path: Path, best: dict[str, Config]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(best, indent=1))
    os.replace(temporary, path)  # other processes read either the old file or the new one
