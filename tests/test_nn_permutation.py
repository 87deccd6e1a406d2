"""Fixed permutations."""

from copy import deepcopy

import pytest
import torch
from helpers import conv_subnet
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from usf_kernels.nn import FlowSequence, FlowStep, Permutation

pytestmark = pytest.mark.usefixtures("nan_memory")


def test_permutation():
    x = torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True)
    module = Permutation(9, seed=3)
    y, log_det = module(x)
    assert torch.equal(y, x[:, module.index])
    assert torch.equal(module.index.sort().values, torch.arange(9))
    assert log_det == 0
    assert torch.equal(module.inverse(y)[0], x)
    assert torch.equal(Permutation(9, seed=3).index, module.index)
    assert not torch.equal(Permutation(9).index, Permutation(9).index)
    with torch.device("meta"):
        assert Permutation(9, seed=3).index.is_meta
    assert torch.autograd.gradcheck(lambda v: module(v)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda v: module.inverse(v)[0] ** 2, (x[:1, :, :1, :2],))
    assert all(not b.is_floating_point() and b.numel() == 9 for b in module.state_dict().values())


def test_a_wrong_seed_is_named():
    with pytest.raises(TypeError, match="seed: expected an int, found str"):
        Permutation(4, seed="a")


def test_of_a_given_order():
    module = Permutation.of(torch.tensor([2, 0, 1]))
    assert torch.equal(module(torch.arange(3.0)[None])[0], torch.tensor([[2.0, 0.0, 1.0]]))
    assert torch.equal(module.inverse(torch.arange(3.0)[None])[0], torch.tensor([[1.0, 2.0, 0.0]]))
    with pytest.raises(ValueError, match=r"index: expected a permutation, found \[0, 0, 1\]"):
        Permutation.of(torch.tensor([0, 0, 1]))
    for index in ([1, 0], torch.tensor([1.0, 0.0])):
        with pytest.raises(TypeError, match=r"index: expected a tensor of int64, found (list|torch.float32)"):
            Permutation.of(index)


def test_a_damaged_state_is_refused():
    module = Permutation(4, seed=0)
    state = module.state_dict() | {"index": torch.tensor([0, 1, 1, 3])}
    with pytest.raises(RuntimeError, match="index: expected a permutation of 4 channels"):
        module.load_state_dict(state)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
def test_averages_of_buffers_leave_the_order_as_it_is(average):
    """Of integers, they take the mean in floating point and round it down."""
    steps = [FlowStep(12, subnet=conv_subnet, coupling="affine", linear="permutation") for _ in range(3)]
    flow = FlowSequence(steps).train()
    x = torch.randn(2, 12, 5, 4)
    flow(x)  # initialises
    averaged = AveragedModel(flow, multi_avg_fn=average, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(flow)
    averaged(x)  # in training mode nobody looks at the order
    if average is not None:
        assert not torch.equal(averaged.module[0].linear.index, flow[0].linear.index)
    again = FlowSequence(
        [FlowStep(12, subnet=conv_subnet, coupling="affine", linear="permutation") for _ in range(3)]
    )
    again.load_state_dict(averaged.module.state_dict())
    for found in (averaged.module, again):
        z, _ = found.eval()(x)
        torch.testing.assert_close(z, flow.eval()(x)[0])
        torch.testing.assert_close(found.inverse(z)[0], x, rtol=1e-4, atol=1e-4)
    assert averaged.module[0].act_norm.initialized > 0.5


def test_a_copy_counts_changes_of_its_own():
    module = Permutation.of(torch.tensor([2, 0, 1])).eval()
    for _ in range(3):
        module.index.copy_(module.index.clone())
    order = module.order()[0].clone()
    copied = deepcopy(module)
    assert copied.index._version < module.index._version
    while copied.index._version < module.index._version:
        copied.index.zero_()
    assert torch.equal(copied.order()[0], order)


def test_an_average_goes_on_with_the_order_that_training_had():
    """DistributedDataParallel writes it before the first step."""
    module = Permutation(8, seed=0).train()
    module.index.copy_(torch.arange(8).flip(0))
    module.inverse_index.copy_(module.index)
    module(torch.randn(2, 8))
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        average.update_parameters(module)
    assert torch.equal(average.eval().module.order()[0], torch.arange(8).flip(0))
