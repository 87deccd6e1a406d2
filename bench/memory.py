"""Memory: the peak of a call, and what a forward pass saves for its backward."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of one call above that before it, its result included.

    On a CPU this is resident memory as Linux reports it; None on other systems. Freed memory is given back to
    the system first, so that the call cannot reuse it unnoticed.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not CLEAR.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # the high-water mark starts again
    before = _kilobytes("VmRSS")
    result = call()
    peak = _kilobytes("VmHWM")
    del result
    return (peak - before) * 1024


def _kilobytes(key: str) -> int:
    with open(STATUS) as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))


def saved_bytes(forward: Callable[[], object], *, ignore: tuple[Tensor, ...] = ()) -> int:
    """Return the bytes of tensors that a forward pass saves for its backward, each storage counted once.

    Args:
        forward: runs the forward pass.
        ignore: tensors that exist anyway: parameters, buffers, the input.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in ignore}
    found: dict[int, int] = {}
    kept = []  # so that no storage is freed and its address reused while counting

    def pack(tensor: Tensor) -> Tensor:
        # Detached, since a node that holds its own output would hold itself, and never be freed.
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(found.values())
