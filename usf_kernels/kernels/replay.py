"""Replay of launchers: what they do is noted once, and repeated for tensors of the same forms.

A launcher decides on grids, tiles and strides by the forms of its arguments (shapes, strides, dtypes), and
allocates results. On a small map that takes the CPU longer than the kernel takes the GPU. A replay makes only
the same allocations, launches and sums, with other addresses.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from usf_kernels.kernels import configs, launch

F = TypeVar("F", bound=Callable)
Slots = list[Tensor]  # the arguments' tensors, then those that steps append
MOST = 1 << 14  # largest number of notes; beyond it, all are forgotten

aten = torch.ops.aten
_ROOM = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default}
# Other torch operations that may be repeated. A launcher with any more, such as a copy, is not replayed.
_OPERATIONS = {
    aten.sum.dim_IntList,
    aten._to_copy.default,
    *(aten.detach.default, aten.expand.default, aten.permute.default),
    *(aten.select.int, aten.unsqueeze.default),
}
_thread = threading.local()


def replayed(function: F) -> F:
    """Decorator that lets a launcher be replayed. The launcher takes tensors, sequences of these, numbers and
    strings, returns a tensor, several or None, and must not depend on the tensors' values."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        if named or getattr(_thread, "noting", False) or configs.is_watched():
            return function(*arguments, **named)
        tensors: Slots = []
        key = (function, launch.product_precision(), *_forms(arguments, tensors), *_repeated(tensors))
        notes = _known.get(key, _UNKNOWN)
        if notes is None or not launch.is_direct(tensors[0].device):
            return function(*arguments)
        if notes is not _UNKNOWN:
            return notes.again(tensors)
        if len(_known) >= MOST:
            forget()
        result, _known[key] = _noted(function, arguments, tensors)
        return result

    return run


def _forms(arguments: Sequence[Any], tensors: Slots) -> list[Any]:
    """Return everything that a launcher looks at; append the tensors to `tensors`."""
    forms: list[Any] = []
    for value in arguments:
        if isinstance(value, Tensor):
            tensors.append(value)
            aligned = value.data_ptr() % 16 == 0
            forms += value.shape, value.stride(), value.dtype, value.device, aligned
        elif isinstance(value, (list, tuple)):
            forms += len(value), *_forms(value, tensors)
        else:
            forms.append(value)
    return forms


def _repeated(tensors: Slots) -> Sequence[int]:
    """First place of each tensor, if any has several: steps read only the first. Otherwise empty."""
    names = [id(tensor) for tensor in tensors]
    return () if len(set(names)) == len(names) else [names.index(name) for name in names]


def _noted(function: Callable, arguments: Sequence[Any], tensors: Slots) -> tuple[Any, _Notes | None]:
    """Return the result, and the notes, or None if the call cannot be repeated."""
    notes = _Recorder(tensors)
    _thread.noting = True  # launchers call each other: only the outermost is noted
    try:
        with notes, launch.hearing(notes.launched):
            result = function(*arguments)
    finally:
        _thread.noting = False
    return result, notes.finished(result)


class _Notes(NamedTuple):
    """Steps that read slots and may append one, and the place of the result: a slot, several, or None."""

    steps: list[Callable[[Slots], None]]
    result: int | tuple[int, ...] | None

    def again(self, tensors: Slots) -> Any:
        """Repeat the steps for other tensors of the same forms, and return the result."""
        for step in self.steps:
            step(tensors)
        place = self.result
        if type(place) is int:
            return tensors[place]
        return None if place is None else tuple([tensors[i] for i in place])


_UNKNOWN = _Notes([], None)
_known: dict[tuple[Any, ...], _Notes | None] = {}


def forget() -> None:
    """Forget all notes, after a change of what launchers decide by."""
    _known.clear()


class _Entry(NamedTuple):
    """A step while it is unknown which slots are needed; `make` builds it from the slots' final places."""

    reads: list[int]
    writes: int | None
    make: Callable[[Sequence[int]], Callable[[Slots], None]]


class _Recorder(TorchDispatchMode):
    """Records a launcher's torch operations and its launches."""

    def __init__(self, tensors: Slots) -> None:
        super().__init__()
        self._slots = list(tensors)  # kept alive, so that ids stay unique
        self._places = {id(tensor): i for i, tensor in enumerate(tensors)}
        self._inputs = len(tensors)
        self._entries: list[_Entry] = []
        self._possible = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _ROOM:
            self._made(out, [], lambda _: _room(out))
        elif func in _OPERATIONS and id(args[0]) in self._places:
            again = functools.partial(_operation, func, args[1:], kwargs)
            self._made(out, [self._places[id(args[0])]], lambda places: again(places[0]))
        elif isinstance(out, Tensor):
            self._possible = False
        return out

    def _made(self, out: Tensor, reads: list[int], make: Callable) -> None:
        self._places[id(out)] = len(self._slots)
        self._entries.append(_Entry(reads, len(self._slots), make))
        self._slots.append(out)

    def launched(self, tensors: Sequence[Tensor], relaunch: Callable[[Sequence[Tensor]], None]) -> None:
        """Note a launch on these tensors, and the function that repeats it on others."""
        reads = [self._places.get(id(tensor)) for tensor in tensors]
        if None in reads:
            self._possible = False
        else:
            self._entries.append(_Entry(reads, None, functools.partial(_launch, relaunch)))

    def finished(self, result: Any) -> _Notes | None:
        """Return notes of the steps that the result and the launches need; None if others were seen."""
        results = [result] if isinstance(result, Tensor) else list(result or ())
        if not self._possible or any(id(tensor) not in self._places for tensor in results):
            return None
        needed = {self._places[id(tensor)] for tensor in results}
        for entry in reversed(self._entries):
            if entry.writes is None or entry.writes in needed:
                needed.update(entry.reads)
        kept = [entry for entry in self._entries if entry.writes is None or entry.writes in needed]
        made = [entry.writes for entry in kept if entry.writes is not None]
        places = {old: new for new, old in enumerate([*range(self._inputs), *made])}
        steps = [entry.make([places[i] for i in entry.reads]) for entry in kept]
        found = tuple(places[self._places[id(tensor)]] for tensor in results)
        return _Notes(steps, found[0] if isinstance(result, Tensor) else (found if results else None))


def _room(like: Tensor) -> Callable[[Slots], None]:
    make = functools.partial(
        torch.empty_strided, like.shape, like.stride(), dtype=like.dtype, device=like.device
    )
    return lambda slots: slots.append(make())


def _operation(func: Any, args: tuple, kwargs: dict, place: int) -> Callable[[Slots], None]:
    return lambda slots: slots.append(func(slots[place], *args, **kwargs))


def _launch(relaunch: Callable, places: Sequence[int]) -> Callable[[Slots], None]:
    return lambda slots: relaunch([slots[i] for i in places])
