"""What a captured call keeps and copies, with recordings for CUDA's graphs; see test_gpu for these."""

import gc
import weakref

import torch
from helpers import conv_subnet

from usf_kernels.nn import FlowSequence, FlowStep
from usf_kernels.nn.capture import CapturedCall


def test_weights_stay_while_the_call_does(graphs):
    steps = [FlowStep(6, subnet=conv_subnet, linear="permutation") for _ in range(2)]
    fused = FlowSequence(steps).eval().fuse()
    weights = [weakref.ref(v) for v in (*fused.parameters(), *fused.buffers())]
    call = fused.capture(torch.randn(2, 6, 4, 4))
    del fused
    gc.collect()
    assert weights
    assert all(weight() is not None for weight in weights)
    assert call(torch.randn(2, 6, 4, 4))[0].shape == (2, 6, 4, 4)


def test_inputs_are_copied_and_nothing_is_recorded(graphs):
    with torch.inference_mode():
        call = CapturedCall(lambda x: x, torch.zeros(3))
    leaf = torch.ones(3, requires_grad=True)
    for factor in (1, 2):
        assert call(factor * leaf).eq(factor).all()
    assert all(kept.grad_fn is None for kept in call._inputs)
