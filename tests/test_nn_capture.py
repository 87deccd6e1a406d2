"""What a captured call keeps and copies; CUDA itself is not needed for that. See test_gpu for the replay."""

import contextlib
import gc
import weakref

import pytest
import torch
from helpers import conv_subnet

from usf_kernels.nn import FlowSequence, FlowStep
from usf_kernels.nn.capture import CapturedCall


class Nothing:
    """A stream, or a graph."""

    def wait_stream(self, other):
        pass

    def replay(self):
        pass


@pytest.fixture
def on_cpu(monkeypatch):
    """Capturing runs the call, replaying does nothing."""

    def nothing(*arguments):
        return contextlib.nullcontext()

    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Nothing)


class OnCuda(torch.Tensor):
    is_cuda = True


def test_weights_stay_while_the_call_does(on_cpu):
    steps = [FlowStep(6, subnet=conv_subnet, linear="permutation") for _ in range(2)]
    fused = FlowSequence(steps).eval().fuse()
    weights = [weakref.ref(v) for v in (*fused.parameters(), *fused.buffers())]
    call = fused.capture(torch.randn(2, 6, 4, 4).as_subclass(OnCuda))
    del fused
    gc.collect()
    assert weights
    assert all(weight() is not None for weight in weights)
    assert call(torch.randn(2, 6, 4, 4))[0].shape == (2, 6, 4, 4)


def test_inputs_are_copied_and_nothing_is_recorded(on_cpu):
    with torch.inference_mode():
        call = CapturedCall(lambda x: x, torch.zeros(3).as_subclass(OnCuda))
    leaf = torch.ones(3, requires_grad=True)
    for factor in (1, 2):
        assert call(factor * leaf).eq(factor).all()
    assert all(kept.grad_fn is None for kept in call._inputs)
