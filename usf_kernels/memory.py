"""CPU memory: freed blocks are kept for reuse, and large results are put into huge pages."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

from usf_kernels import _core

LARGE = 4 << 20  # bytes: two huge pages; smaller blocks mostly come from memory that was written before
# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MOST_KEPT = (1 << 31) - 1  # bytes at the end of the heap


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, up to 2 GB, for its next allocations.

    The C library of Linux (glibc) gives blocks of more than 32 MB, such as the maps of a batch, back to the
    system when they are freed. The next operation gets them page by page as it writes to them, which takes
    longer than many operations do. PyTorch's memory on the CPU is the C library's. Call this once, at the
    start of a program; `usf-kernels` does. It holds for the whole process, which will be somewhat larger:
    memory that was freed between blocks in use stays with it.

    Returns:
        Whether the C library took it; False on other systems, where nothing happens.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, MOST_KEPT))


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Return `fresh`, a CPU tensor that is not written yet; if it is large, ask Linux to back it with huge
    pages, which come faster than many small ones (see `keep_freed_memory`).

    Only Linux has them, where `/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`.
    """
    if fresh.nbytes >= LARGE:
        _core.use_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh
