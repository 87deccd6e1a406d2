"""What every kernel shares: the launch, and the helpers that turn a program's number into a tile."""

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
    """A launch as it would have been."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Case(NamedTuple):
    """Something that `python -m bench.compile_check` compiles for every target.

    Attributes:
        name: what it is.
        call: runs a launcher on tensors of the meta device.
        needs: per kernel's name, what its machine code must have: "vectors" (16-byte loads and stores),
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
    """Note the launches made inside instead of making them, as on a device with warps of this size and of
    this compute capability (90 for 9.0; 0 on AMD). With tensors on the meta device this shows what such a
    device would be asked to compile."""
    global _recording
    _recording = _Recording([], warp_size, capability)
    try:
        yield _recording.launches
    finally:
        _recording = None


def is_recording() -> bool:
    """Whether launches are only being noted."""
    return _recording is not None


def warp_size() -> int:
    """Threads of a warp."""
    if _recording is not None:
        return _recording.warp_size
    return _properties().warp_size if torch.version.hip else 32


def capability(device: torch.device) -> int:
    """The compute capability of a CUDA device, 90 for 9.0; 0 of any other."""
    if _recording is not None:
        return _recording.capability
    return _capability(device.index) if device.type == "cuda" and not torch.version.hip else 0


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def product_precision() -> str:
    """How float32 products may be rounded: as torch's own setting for CUDA matrix products says."""
    return "tf32" if rounds_to_tf32() and _multiplies_tf32() else "ieee"


def _multiplies_tf32() -> bool:
    """Of AMD's processors, Triton compiles such products for gfx942 alone."""
    if _recording is not None or not torch.version.hip:
        return True
    return _properties().gcnArchName.startswith("gfx942")


def _properties() -> Any:
    return torch.cuda.get_device_properties(torch.cuda.current_device())


_thread = threading.local()


@contextlib.contextmanager
def hearing(listener: Callable[[Sequence[torch.Tensor], compiled.Relaunch], None]) -> Iterator[None]:
    """Inside, of this thread, `listener(tensors, relaunch)` is called after each launch: its tensors, and a
    function that launches the same on others of their forms."""
    _thread.listener = listener
    try:
        yield
    finally:
        _thread.listener = None


def is_direct(device: torch.device) -> bool:
    """Whether a launch on this device is one and nothing more: no other one is current, no profiler hears."""
    return device.type != "cuda" or (device.index == torch.cuda.current_device() and not compiled.hooked())


def launch(kernel: Any, programs: int, *arguments: Any, device: torch.device, **options: Any) -> None:
    """Run `programs` programs of `kernel` on `device` and its current stream; none for an empty result."""
    if programs == 0:
        return
    if _recording is not None:
        _recording.launches.append(Launch(kernel, arguments, options))
        return
    # Triton launches on the current device, whatever the tensors' own.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    listener = getattr(_thread, "listener", None)
    # The interpreter copies tensors with torch, which is nothing that a listener is to see.
    with (
        torch.cuda.device(device) if elsewhere else contextlib.nullcontext(),
        _disable_current_modes() if listener else contextlib.nullcontext(),
    ):
        compiled.launch(kernel, programs, arguments, options, device)
    if listener is not None:
        listener(*compiled.again(kernel, programs, arguments, options, device))


def cdiv(n: int, block: int) -> int:
    """Blocks of `block` that cover n."""
    return -(-n // block)


def runtime(*tensors: str) -> list[str]:
    """Names of the sizes and strides of a kernel: values that compile no new one when they change."""
    return ["C", "P", *(f"{name}_{axis}" for name in tensors for axis in "bcp")]


@triton.jit
def aligned(value, UNIT: tl.constexpr):
    """`value`, which is a multiple of UNIT, in a form from which the compiler can tell."""
    return value // UNIT * UNIT


@triton.jit
def walk(index, stride, UNIT: tl.constexpr):
    """`index * stride`, where None is a stride of 1 and any other is a multiple of UNIT."""
    if stride is None:
        return index
    else:
        return index * aligned(stride, UNIT)


@triton.jit
def bound(size, stride, UNIT: tl.constexpr):
    """`size` of an axis, known to be a multiple of UNIT if the axis is contiguous."""
    if stride is None:
        return aligned(size, UNIT)
    else:
        return size


@triton.jit
def tile(
    C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr = 1
):  # fmt: skip
    """Image b (64 bits), channels (BLOCK_C, 1) and positions (1, BLOCK_P) of this program, of which the first
    of RUN tiles where it has several."""
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
    """A float32 `value` rounded to what `pointer` points to."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts the low half off: round to nearest, ties to even, before it does. Not NaN: its
        # bits would carry into the sign.
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)
    return value.to(dtype)
