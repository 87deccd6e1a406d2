"""A module changed for a while: its mode, and its values until something has succeeded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from usf_kernels.nn.act_norm import ActNorm


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """All of a module in one mode, then every part of it in its own again: some may be frozen.

    Of several threads that do so with one module, only that which changed a part changes it back.
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
    """What is written to parameters and buffers inside is taken back where it ends in an exception."""
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
