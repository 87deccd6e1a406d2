"""Contexts that change a module or PyTorch for a while: modes, or values in case of an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from usf_kernels.nn.act_norm import ActNorm

F = TypeVar("F", bound=Callable)


def makes_weights(function: F) -> F:
    """Decorator that runs a function without gradients and outside of inference mode: inference tensors have
    no versions, which tell of changes."""
    return torch.inference_mode(False)(torch.no_grad()(function))


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Context with all parts of a module in one mode; each gets its own back, since some may be frozen.

    Where several threads do so with one module, only the one that changed a part changes it back.
    """
    changed = [part for part in module.modules() if part.training != training]
    module.train(training)
    try:
        yield
    finally:
        for part in changed:
            part.training = not training


@contextmanager
def unchanged_on_error(*modules: nn.Module) -> Iterator[None]:
    """Context that restores parameters and buffers of these modules if it ends in an exception."""
    parts = [part for module in modules for part in module.modules()]
    values = [t for part in parts for t in (*part._parameters.values(), *part._buffers.values())]
    before = [(t, t.detach().clone()) for t in values if t is not None]
    flags = [(part, part._initialized) for part in parts if isinstance(part, ActNorm)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for value, was in before:
                value.copy_(was)
        for part, was in flags:
            part._initialized = was
        raise
