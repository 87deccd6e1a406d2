"""Memory: the most a call needs, and what a forward pass keeps for its backward."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory during one call, above that before it; the result counts.

    On a CPU this is resident memory, which Linux tells: None elsewhere. Freed memory is given back to the
    system first, so that the call cannot hide in it.
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
    """Bytes of the tensors that a forward pass saves for its backward, each storage counted once.

    Args:
        forward: runs the forward pass.
        ignore: tensors that live anyway: parameters, buffers, the input.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in ignore}
    found: dict[int, int] = {}
    kept = []  # storages must not be freed and reused while they are being counted

    def pack(tensor: Tensor) -> Tensor:
        # Without its history: a node that held its own output would hold itself, and never be freed.
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
