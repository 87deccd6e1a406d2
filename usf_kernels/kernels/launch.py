"""What all kernels share: the launch, and helpers that turn a program's number into a tile."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes

from usf_kernels.kernels import compiled
from usf_kernels.kernels.plain import rounds_to_tf32

# The interpreter runs kernels on CPU tensors; Triton read the same variable when it was imported.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


class Launch(NamedTuple):
    """A launch that was recorded instead of made."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Case(NamedTuple):
    """Something that `python -m bench.compile_check` compiles for every target.

    Attributes:
        name: description of the case.
        call: runs a launcher on tensors of the meta device.
        needs: for each kernel's name, what its machine code must have: "vectors" (16-byte loads and stores),
            "vector loads", "vector stores" or "tensor cores".
    """

    name: str
    call: Callable[[], Any]
    needs: dict[str, str]


class _Recording(NamedTuple):
    launches: list[Launch]
    warp_size: int
    capability: int


_recording: _Recording | None = None


@contextlib.contextmanager
def record(warp_size: int = 32, capability: int = 90) -> Iterator[list[Launch]]:
    """Context that notes launches instead of making them, as for a device with warps of this size and this
    compute capability (90 for 9.0; 0 on AMD). With tensors on the meta device, it shows what such a device
    would have to compile."""
    global _recording
    _recording = _Recording([], warp_size, capability)
    try:
        yield _recording.launches
    finally:
        _recording = None


def is_recording() -> bool:
    """Whether launches are recorded instead of made."""
    return _recording is not None


def warp_size() -> int:
    """Number of threads in a warp."""
    if _recording is not None:
        return _recording.warp_size
    return _properties().warp_size if torch.version.hip else 32


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, 90 for 9.0; 0 for any other device."""
    if _recording is not None:
        return _recording.capability
    return _capability(device.index) if device.type == "cuda" and not torch.version.hip else 0


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def product_precision() -> str:
    """How float32 products are rounded, "tf32" or "ieee", by torch's setting for CUDA matrix products."""
    return "tf32" if rounds_to_tf32() and _multiplies_tf32() else "ieee"


def _multiplies_tf32() -> bool:
    """Whether Triton compiles TF32 products for this device; of AMD's, only gfx942 has them."""
    if _recording is not None or not torch.version.hip:
        return True
    return _properties().gcnArchName.startswith("gfx942")


def _properties() -> Any:
    return torch.cuda.get_device_properties(torch.cuda.current_device())


_thread = threading.local()


@contextlib.contextmanager
def hearing(listener: Callable[[Sequence[torch.Tensor], compiled.Relaunch], None]) -> Iterator[None]:
    """Context in which `listener(tensors, relaunch)` is called after each launch of this thread, with the
    tensors and a function that repeats the launch on others of the same forms."""
    _thread.listener = listener
    try:
        yield
    finally:
        _thread.listener = None


def is_direct(device: torch.device) -> bool:
    """Whether launching needs nothing else: the device is the current one, and no profiler has to see it."""
    return device.type != "cuda" or (device.index == torch.cuda.current_device() and not compiled.hooked())


def launch(kernel: Any, programs: int, *arguments: Any, device: torch.device, **options: Any) -> None:
    """Launch `programs` programs of `kernel` on the current stream of `device`; 0 programs launch nothing."""
    if programs == 0:
        return
    if _recording is not None:
        _recording.launches.append(Launch(kernel, arguments, options))
        return
    # Triton launches on the current device, whatever that of the tensors.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    listener = getattr(_thread, "listener", None)
    # The interpreter copies tensors with torch, which a listener must not see.
    with (
        torch.cuda.device(device) if elsewhere else contextlib.nullcontext(),
        _disable_current_modes() if listener else contextlib.nullcontext(),
    ):
        compiled.launch(kernel, programs, arguments, options, device)
    if listener is not None:
        listener(*compiled.again(kernel, programs, arguments, options, device))


def cdiv(n: int, block: int) -> int:
    """Number of blocks of size `block` that cover n: ceil(n / block)."""
    return -(-n // block)


def runtime(*tensors: str) -> list[str]:
    """Names of a kernel's sizes and strides: a change of their values must not compile a new kernel."""
    return ["C", "P", *(f"{name}_{axis}" for name in tensors for axis in "bcp")]


@triton.jit
def aligned(value, UNIT: tl.constexpr):
    """`value`, a multiple of UNIT, in a form that lets the compiler know that."""
    return value // UNIT * UNIT


@triton.jit
def walk(index, stride, UNIT: tl.constexpr):
    """`index * stride`; a stride of None means 1, and any other is a multiple of UNIT."""
    if stride is None:
        return index
    else:
        return index * aligned(stride, UNIT)


@triton.jit
def bound(size, stride, UNIT: tl.constexpr):
    """`size` of an axis; the compiler learns that it is a multiple of UNIT if the axis is contiguous."""
    if stride is None:
        return aligned(size, UNIT)
    else:
        return size


@triton.jit
def tile(
    C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr = 1
):  # fmt: skip
    """Image b (64 bits), channels (BLOCK_C, 1) and positions (1, BLOCK_P) of this program; positions are
    those of the first of its RUN tiles."""
    program = tl.program_id(0)
    tiles_p = tl.cdiv(P, BLOCK_P * RUN)
    tiles_c = tl.cdiv(C, BLOCK_C)
    p0 = program % tiles_p
    rest = program // tiles_p
    c0 = rest % tiles_c
    if WIDE:
        p0 = p0.to(tl.int64)
        c0 = c0.to(tl.int64)
    c = c0 * BLOCK_C + tl.arange(0, BLOCK_C)
    p = p0 * (BLOCK_P * RUN) + tl.arange(0, BLOCK_P)
    return (rest // tiles_c).to(tl.int64), c[:, None], p[None, :]


@triton.jit
def narrow(value, pointer):
    """A float32 `value`, rounded to the dtype that `pointer` points to."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts off the low half, so round to nearest, ties to even, before. NaN is left alone:
        # its bits would carry into the sign.
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)
    return value.to(dtype)
