"""Launches of compiled kernels without the work that Triton repeats at each launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton

# On devices other than CUDA's, machine code depends on more than `inspected` knows.
BY_TRITON = bool(triton.knobs.runtime.interpret or torch.version.hip)
Relaunch = Callable[[Sequence[torch.Tensor]], None]


class _Compiled(NamedTuple):
    """A compiled kernel, and what each launch needs besides the kernel's arguments."""

    kernel: Any
    run: Callable[..., None]
    function: int
    metadata: Any
    constants: list[Any]

    def launch(self, programs: int, values: list[Any], device: torch.device) -> None:
        """Launch directly: Triton's own call would look up the device and ask hooks first."""
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        nobody = None, None, None
        self.run(programs, 1, 1, stream, self.function, self.metadata, *nobody, *values, *self.constants)


_compiled: dict[tuple[Any, ...], _Compiled] = {}


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    device: torch.device,
) -> None:
    """Launch `kernel[(programs,)](...)` on the current device. Triton binds and inspects all arguments each
    time; here its findings are kept, under a key of no more than what they depend on."""
    if BY_TRITON:
        kernel[(programs,)](*arguments, **options)
        return
    found, values, key = _found(kernel, arguments, options, device)
    if found is None:
        compiled = kernel[(programs,)](*arguments, **options)
        constants = [options[parameter.name] for parameter in kernel.params[len(arguments) :]]
        attributes = compiled.run, compiled.function, compiled.packed_metadata
        _compiled[key] = _Compiled(compiled, *attributes, constants)
    elif hooked():  # a profiler has to see the launch
        found.kernel[(programs, 1, 1)](*arguments, *found.constants)
    else:
        found.launch(programs, values, device)


def _found(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> tuple[_Compiled | None, list[Any], tuple[Any, ...]]:
    """Return the kernel compiled for such arguments, or None; the arguments with addresses; and its key."""
    kinds: list[Any] = [id(kernel), device, *options.values()]
    values = inspected(arguments, kinds)
    key = tuple(kinds)
    return _compiled.get(key), values, key


def hooked() -> bool:
    """Whether a profiler has to see every launch."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def inspected(arguments: tuple[Any, ...], kinds: list[Any]) -> list[Any]:
    """Return the arguments with addresses in place of tensors, which Triton would look up; append to `kinds`
    what the machine code depends on.

    Kernels declare that they take any size, stride or factor (`do_not_specialize`): code depends only on a
    number's width. Inside tuples Triton specialises regardless: a 1 becomes a constant, and multiples of 16
    are noted."""
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


def again(
    kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> tuple[list[torch.Tensor], Relaunch]:
    """Return the tensors among the arguments, and a function that launches with others in their places."""
    tensors: list[torch.Tensor] = []
    holes: list[tuple[int, slice | int]] = []
    values: list[Any] = list(arguments)
    for i, value in enumerate(arguments):
        inner = [v for v in (value if type(value) is tuple else (value,)) if isinstance(v, torch.Tensor)]
        if inner:
            start = len(tensors)
            holes.append((i, slice(start, start + len(inner)) if type(value) is tuple else start))
            tensors += inner
            values[i] = None  # the function must not keep the tensors alive
    found = None if BY_TRITON else _found(kernel, arguments, options, device)[0]

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
