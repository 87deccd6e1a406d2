"""torch.compile as in a process that compiles one thing: no case uses what another one compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import torch


def forget() -> None:
    """Forget what was compiled.

    Cases share functions, and torch compiles a function a few times only: then it silently runs eagerly.
    """
    torch.compiler.reset()


@contextmanager
def first() -> Iterator[None]:
    """Run the first call of a compiled function in this block: all is compiled now, nothing comes from disk.

    Raises:
        RuntimeError: when nothing was compiled, or a function would be more often than torch allows.
    """
    from torch._dynamo import config, exc, utils
    from torch._inductor.utils import fresh_cache

    graphs = utils.counters["stats"]["unique_graphs"]
    try:
        with (
            TemporaryDirectory() as folder,
            fresh_cache(dir=folder, delete=False),
            config.patch(fail_on_recompile_limit_hit=True),
        ):
            yield
    except exc.FailOnRecompileLimitHit as error:
        raise RuntimeError("a function was to be compiled more often than torch allows") from error
    if utils.counters["stats"]["unique_graphs"] == graphs:
        raise RuntimeError("nothing was compiled")
