"""A cache of values computed from tensors, valid until the tensors change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from usf_kernels.nn.capture import is_capturing
from usf_kernels.nn.weights import Weights, state_of
from usf_kernels.ops.native import is_observed

MOST = 4
Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The values of the last few keys, until a tensor that they come from is written to, replaced or moved.

    Values are neither copied nor pickled. They are computed anew, not cached, for compilers, tracers,
    transforms and CUDA graphs, and for inference tensors, whose changes cannot be noticed.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Kept, ()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, tensors: Iterable[Tensor] | Weights, make: Callable[[], Value]) -> Value:
        """Return `make()`, or its earlier value for this key if the tensors have not changed since. A module
        with many tensors can keep a `Weights` of them, which is another object once they have changed."""
        weights = tensors if isinstance(tensors, Weights) else None
        tensors = [] if weights else list(tensors)
        if is_observed() or is_capturing() or any(t.is_inference() for t in tensors):
            return make()
        # Hold views, so that the memory is not freed and its address not given to other tensors.
        tensors = [t.detach() for t in tensors]
        state = weights or state_of(tensors)
        entry = self._entries.pop(key, None)
        if entry is None or entry.state != state:
            entry = _Entry(tensors, state, _make_ordinary(make))
        self._entries[key] = entry  # last used, last in order
        for old in list(self._entries)[:-MOST]:  # a copy of the keys: other threads may add some meanwhile
            self._entries.pop(old, None)
        return entry.value


def _make_ordinary(make: Callable[[], Value]) -> Value:
    """Run `make` outside inference mode: inference tensors could not take part in a later gradient."""
    if not torch.is_inference_mode_enabled():
        return make()
    with torch.inference_mode(False), torch.no_grad():
        return make()


class _Entry(NamedTuple):
    tensors: list[Tensor]
    state: Hashable
    value: object
