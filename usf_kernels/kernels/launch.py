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

# The interpreter runs kernels on CPU tensors; Triton read the same variable when it was imported.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
# Elsewhere than on CUDA devices, machine code depends on more than `_kinds` knows.
_BY_TRITON = bool(triton.knobs.runtime.interpret or torch.version.hip)


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
    return 64 if torch.version.hip else 32


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
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


Relaunch = Callable[[Sequence[torch.Tensor]], None]
_thread = threading.local()


@contextlib.contextmanager
def hearing(listener: Callable[[Sequence[torch.Tensor], Relaunch], None]) -> Iterator[None]:
    """Inside, of this thread, `listener(tensors, relaunch)` is called after each launch: its tensors, and a
    function that launches the same on others of their forms."""
    _thread.listener = listener
    try:
        yield
    finally:
        _thread.listener = None


def is_direct(device: torch.device) -> bool:
    """Whether a launch on this device is one and nothing more: no other one is current, no profiler hears."""
    return device.type != "cuda" or (device.index == torch.cuda.current_device() and not _hooked())


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
        if _BY_TRITON:
            kernel[(programs,)](*arguments, **options)
        else:
            _launch(kernel, programs, arguments, options, device)
    if listener is not None:
        listener(*_again(kernel, programs, arguments, options, device))


def _again(
    kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> tuple[list[torch.Tensor], Relaunch]:
    """The tensors among the arguments, and the launch with others in their places."""
    tensors: list[torch.Tensor] = []
    holes: list[tuple[int, slice | int]] = []
    values: list[Any] = list(arguments)
    for i, value in enumerate(arguments):
        inner = [v for v in (value if type(value) is tuple else (value,)) if isinstance(v, torch.Tensor)]
        if inner:
            start = len(tensors)
            holes.append((i, slice(start, start + len(inner)) if type(value) is tuple else start))
            tensors += inner
            values[i] = None  # what is to be launched again must not keep them
    found = None if _BY_TRITON else _found(kernel, arguments, options, device)[0]

    def relaunch(others: Sequence[torch.Tensor]) -> None:
        given = values.copy()
        if found is None:
            for i, place in holes:
                given[i] = tuple(others[place]) if type(place) is slice else others[place]
            kernel[(programs,)](*given, **options)
            return
        pointers = [tensor.data_ptr() for tensor in others]
        for i, place in holes:
            given[i] = tuple(pointers[place]) if type(place) is slice else pointers[place]
        found.launch(programs, given, device)

    return tensors, relaunch


class _Compiled(NamedTuple):
    """A compiled kernel, and what each of its launches needs apart from its arguments."""

    kernel: Any
    run: Callable[..., None]
    function: int
    metadata: Any
    constants: list[Any]

    def launch(self, programs: int, values: list[Any], device: torch.device) -> None:
        """Past Triton's own way to here, which looks up the device, and asks hooks."""
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        nobody = None, None, None
        self.run(programs, 1, 1, stream, self.function, self.metadata, *nobody, *values, *self.constants)


_compiled: dict[tuple[Any, ...], _Compiled] = {}


def _launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    device: torch.device,
) -> None:
    """As `kernel[(programs,)](...)`, which binds and inspects all arguments at every launch: what it found is
    kept, and asked for by as little as it depends on."""
    found, values, key = _found(kernel, arguments, options, device)
    if found is None:
        compiled = kernel[(programs,)](*arguments, **options)
        constants = [options[parameter.name] for parameter in kernel.params[len(arguments) :]]
        attributes = compiled.run, compiled.function, compiled.packed_metadata
        _compiled[key] = _Compiled(compiled, *attributes, constants)
    elif _hooked():  # by a profiler, which wants to know what is launched
        found.kernel[(programs, 1, 1)](*arguments, *found.constants)
    else:
        found.launch(programs, values, device)


def _found(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> tuple[_Compiled | None, list[Any], tuple[Any, ...]]:
    """The kernel compiled for such arguments, if it is; the arguments with addresses; and its key."""
    kinds: list[Any] = [id(kernel), device, *options.values()]
    values = inspected(arguments, kinds)
    key = tuple(kinds)
    return _compiled.get(key), values, key


def _hooked() -> bool:
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def inspected(arguments: tuple[Any, ...], kinds: list[Any]) -> list[Any]:
    """The arguments with addresses for tensors, which Triton would look up. What the machine code depends on
    goes to `kinds`.

    Kernels declare that they take any size, stride or factor (`do_not_specialize`): of a number it is the
    width alone. In tuples Triton does not heed that: it is a constant where it is 1, and known to be a
    multiple of 16 where it is one."""
    values: list[Any] = []
    for value in arguments:
        kind = type(value)
        if kind is int:
            kinds.append(-(2**31) <= value < 2**31)
        elif value is None:
            kinds.append(None)
        elif isinstance(value, torch.Tensor):
            kinds.append(value.dtype)
            value = value.data_ptr()
            kinds.append(value % 16 == 0)
        elif kind is tuple:
            kinds.append(len(value))
            kinds += [(v == 1, v % 16 == 0) for v in value if type(v) is int]
            value = tuple(inspected(value, kinds))
        else:
            kinds.append(kind)
        values.append(value)
    return values


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
