"""Choice of a kernel's configuration: pinned for each range of shapes, or the fastest of a few measured here.

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
# Products go to the vendor's library if both sides of the matrix are at least this long, for x contiguous and
# for x channels-last. Below, memory bandwidth is the limit, or nearly so.
VENDOR_CHANNELS = {"ieee": (128, 64), "tf32": (512, 1024), "half": (1024, 1024)}
# The same for inputs with many positions in the whole batch.
VENDOR_CHANNELS_OF_MANY = {"ieee": (64, 64), "tf32": (512, 1024), "half": (1024, 256)}
MANY_POSITIONS = 1 << 17
AUTOTUNE = os.environ.get("USF_AUTOTUNE") == "1"
Listener = Callable[[str, list[Config], Callable[[Config], Any]], None]
_listener: Listener | None = None


@contextlib.contextmanager
def hearing(listener: Listener) -> Iterator[None]:
    """Context in which `listener(name, candidates, attempt)` is called before each choice; `attempt(config)`
    runs the kernel in question with any configuration."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def kind_of(dtype: torch.dtype) -> str:
    """Kind of products in this dtype: "half", or how float32 is rounded ("tf32", "ieee")."""
    return product_precision() if dtype == torch.float32 else "half"


def is_watched() -> bool:
    """Whether every choice has to be seen, by a tuner, a listener or a recording of launches."""
    return AUTOTUNE or _listener is not None or is_recording()


def pick(
    name: str,
    key: Key,
    candidates: list[Config],
    run: Callable[[Config], Result],
    device: torch.device,
) -> Result:
    """Call `run` with the configuration to use: the first candidate, unless tuning was requested.

    Args:
        name: name of the kernel.
        key: what the best choice depends on besides the first candidate; keep the number of keys small.
        candidates: configurations, the pinned one first.
        run: allocates, launches and returns the result; called several times when tuning.
        device: device of the launch.
    """
    return run(choose(name, key, candidates, run, device))


def choose(
    name: str,
    key: Key,
    candidates: list[Config],
    attempt: Callable[[Config], Any],
    device: torch.device,
) -> Config:
    """Return the configuration that `pick` uses. Tuning and recordings call `attempt`, which must run kernels
    that change their input on a copy."""
    if _listener is not None:
        _listener(name, candidates, attempt)
    if is_recording():  # a recording includes the other candidates
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

    Each thread loads 16 bytes about eight times in all, less often if multiprocessors would be idle. Of the
    tiles that waste the fewest lanes, the longest along the contiguous axis is taken. With `whole`, tiles
    have all channels of a position if these fit: kernels that gather channels then read each cache line once.
    """
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
    elements = 16 // itemsize * warp  # loaded by one warp at a time
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
    """The smallest power of 2 that is at least n."""
    return 2 ** max(n - 1, 0).bit_length()


def _lanes(length: int, inner: int, width: int, size: int) -> int:
    """Number of lanes with which tiles of `size`, `inner` long, cover length * width."""
    return cdiv(length, inner) * cdiv(width, size // inner) * size


def reduction(
    itemsize: int, operands: int, channels: int, positions: int, channels_last: bool
) -> list[Config]:
    """Tiles of (channels, positions) for kernels that walk all channels of some positions.

    Tiles have few positions and many channels: then every multiprocessor has programs, and each starts many
    loads before it waits. Many positions (counted over all images) give enough programs anyway, and tiles
    span whole cache lines. In channels-last memory, with four operands or more, tiles span whole rows."""
    if channels_last:
        block_c = min(_power_of_2(channels), 256 if operands < 4 else 1024 // itemsize)
        size = warp_size() * 16 // itemsize * max(1, 2 // operands)  # loaded by one warp
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
    except (OSError, ValueError):  # absent or incomplete: measure again
        return {}


def _write(path: Path, best: dict[str, Config]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(best, indent=1))
    os.replace(temporary, path)  # other processes read either the old file or the new one
