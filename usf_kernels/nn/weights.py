"""Weights as they were when something was made of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_unseen_steps = 0


def _count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Optimisers with `fused=True` write to parameters without counting it in their versions."""
    global _unseen_steps
    if not torch.compiler.is_compiling() and any(group.get("fused") for group in optimizer.param_groups):
        _unseen_steps += 1


register_optimizer_step_post_hook(_count)


def state_of(tensors: Iterable[Tensor]) -> Hashable:
    """Equal to what it was for as long as these tensors are where and what they were, as far as that can be
    seen: what is written through `.data` leaves no trace. Never equal where one is of inference mode, to
    which writes leave none either."""
    states = ((t.data_ptr(), t.dtype, object() if t.is_inference() else t._version) for t in tensors)
    return _unseen_steps, *states


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
        self._unseen_steps = _unseen_steps

    @property
    def outdated(self) -> bool:
        """Whether any has been written to or replaced, as far as that can be seen: what is written through
        `.data` leaves no trace, and nor do writes to tensors of inference mode, so that these count as
        written to."""
        if self._unseen_steps != _unseen_steps:
            return True
        for owner, name, tensor, _, address, version in self._weights:  # at every call, so unpacked
            if owner.get(name) is not tensor or version is None:
                return True
            if tensor._version != version or tensor.data_ptr() != address:
                return True
        return False
