"""Detection of changes to weights since something was computed from them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_unseen_steps = 0


def _count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count steps of optimisers with `fused=True`, which do not raise the versions of parameters."""
    global _unseen_steps
    if not torch.compiler.is_compiling() and any(group.get("fused") for group in optimizer.param_groups):
        _unseen_steps += 1


register_optimizer_step_post_hook(_count)


def state_of(tensors: Iterable[Tensor]) -> Hashable:
    """Value that stays equal while these tensors keep their memory and dtype and are not written to.

    Writes through `.data` leave no trace. Neither do writes to inference tensors, so that with one of these
    no two values are equal.
    """
    states = ((t.data_ptr(), t.dtype, object() if t.is_inference() else t._version) for t in tensors)
    return _unseen_steps, *states


class _Weight(NamedTuple):
    """A parameter or buffer as it was, and where its present value is found."""

    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    memory: Tensor  # a view: keeps the memory, whose address could otherwise be reused
    address: int
    version: int | None  # None for an inference tensor, which has none


class Weights:
    """Snapshot of the parameters and buffers of modules, and of what their children are.

    Attributes:
        tensors: all of them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._children = [(module._modules, dict(module._modules)) for module in modules if module._modules]
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
        """Whether any weight has been written to, or it or a child replaced. Writes through `.data` leave no
        trace; nor do writes to inference tensors, which therefore always count as written to."""
        if self._unseen_steps != _unseen_steps or any(now != then for now, then in self._children):
            return True
        for owner, name, tensor, _, address, version in self._weights:  # unpacked: it runs at every call
            if owner.get(name) is not tensor or version is None:
                return True
            if tensor._version != version or tensor.data_ptr() != address:
                return True
        return False
