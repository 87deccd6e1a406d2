"""What is computed from tensors, kept until they change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from usf_kernels.nn.capture import is_capturing
from usf_kernels.nn.weights import state_of
from usf_kernels.ops.native import somebody_looks

MOST = 4
Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The values of the last few keys, until a tensor that they come from is written to, replaced or moved.

    They are neither copied nor pickled. Compilers, tracers, transforms and CUDA graphs see them computed, and
    so does who has tensors of inference mode, whose changes cannot be seen.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Kept, ()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, tensors: Iterable[Tensor], make: Callable[[], Value]) -> Value:
        """`make()`, or what it gave for this key while the tensors were as they are."""
        tensors = list(tensors)
        if somebody_looks() or is_capturing() or any(t.is_inference() for t in tensors):
            return make()
        # Views: what a value comes from cannot be freed, and its address not be given to other tensors.
        tensors = [t.detach() for t in tensors]
        state = state_of(tensors)
        entry = self._entries.pop(key, None)
        if entry is None or entry.state != state:
            entry = _Entry(tensors, state, _make_ordinary(make))
        self._entries[key] = entry  # what was used last comes last
        for old in list(self._entries)[:-MOST]:  # in one piece: other threads keep values too
            self._entries.pop(old, None)
        return entry.value


def _make_ordinary(make: Callable[[], Value]) -> Value:
    """Tensors of inference mode could not take part when a gradient is asked for later."""
    if not torch.is_inference_mode_enabled():
        return make()
    with torch.inference_mode(False), torch.no_grad():
        return make()


class _Entry(NamedTuple):
    tensors: list[Tensor]
    state: Hashable
    value: object
