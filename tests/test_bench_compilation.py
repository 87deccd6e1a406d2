"""What the rows of torch.compile measure was compiled, in every case, and from scratch."""

import os
from argparse import Namespace

import pytest
import torch

from bench import compilation, run
from bench.measure import CPU
from bench.subject import PEER, Case, Provider, Subject


@pytest.fixture(autouse=True)
def _clean():
    yield
    compilation.forget()


def double(x):
    return x * 2


def measured(call):
    """The rows of a case that has one provider."""
    case = Case("a", lambda device: [Provider("peer", call, PEER, compiles=True)], seconds=0)
    options = Namespace(quick=False, minutes=None, providers=None, cold=False)
    return list(run.measure(Subject("tiny", "a test", (case,)), case, CPU, options, {"copy": 10.0}))


def test_every_case_is_compiled():
    """More of them than torch compiles of one function."""
    caches = []

    def backend(graph, inputs):
        caches.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        return graph

    count = torch._dynamo.config.recompile_limit + 2
    for i in range(count):
        compiled, x = torch.compile(double, backend=backend, dynamic=False), torch.ones(i + 1)
        assert len(measured(lambda compiled=compiled, x=x: compiled(x))) == 1
    assert len(caches) == len(set(caches)) == count
    assert not any(map(os.path.exists, caches))


def test_what_compiles_nothing_is_not_timed(capsys):
    assert measured(lambda: double(torch.ones(1))) == []
    assert "peer, float32, forward: not timed: nothing was compiled" in capsys.readouterr().out


@torch._dynamo.config.patch(recompile_limit=2)
def test_the_limit_of_compilations_is_an_error():
    compiled = torch.compile(double, backend="eager", dynamic=False)
    compiled(torch.ones(1))
    compiled(torch.ones(2))
    with pytest.raises(RuntimeError, match="more often than torch allows"), compilation.first():
        compiled(torch.ones(3))
