"""Weights as they were when something was made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn


class _Weight(NamedTuple):
    """A parameter or buffer as it was, and where to look for what it is now."""

    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    memory: Tensor  # a view: it cannot be freed, and its address not be given to other weights
    address: int
    version: int | None  # None for one of inference mode, which has none


class Weights:
    """Parameters and buffers of modules, not of their children, as they are when this is made.

    Attributes:
        tensors: all of them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._weights = [
            _Weight(
                owner,
                name,
                tensor,
                tensor.detach(),
                tensor.data_ptr(),
                None if tensor.is_inference() else tensor._version,
            )
            for module in modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self.tensors = [weight.tensor for weight in self._weights]

    @property
    def outdated(self) -> bool:
        """Whether any has been written to or replaced, as far as that can be seen: what is written through
        `.data` leaves no trace, and nor do writes to tensors of inference mode, so that these count as
        written to."""
        for owner, name, tensor, _, address, version in self._weights:  # at every call, so unpacked
            if owner.get(name) is not tensor or version is None:
                return True
            if tensor._version != version or tensor.data_ptr() != address:
                return True
        return False
