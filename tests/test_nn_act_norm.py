"""ActNorm's data-dependent start."""

import threading

import pytest
import torch
from helpers import max_error
from torch import nn
from torch.nn.utils import parametrize

from usf_kernels.nn import ActNorm, act_norm

pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.mark.parametrize("shape", [(50, 3), (8, 3, 5, 4), (2, 3, 3, 3, 3)])
@pytest.mark.parametrize("grad", [True, False])
def test_act_norm_normalises_the_first_training_batch(shape, grad):
    module, x = ActNorm(3), 4 * torch.randn(shape) + 100
    dims = [d for d in range(len(shape)) if d != 1]
    assert torch.equal(module.eval()(x)[0], x)  # never initialised in eval mode
    assert torch.equal(module.inverse(x)[0], x)
    assert not module.initialized
    module.train()(x[:0])  # nor by an empty batch
    assert not module.initialized
    with torch.set_grad_enabled(grad):
        z, log_det = module(x)
    assert module.initialized
    assert z.requires_grad == grad
    assert z.mean(dims).abs().max() < 1e-3
    assert (z.std(dims, correction=0) - 1).abs().max() < 1e-3
    positions = x[0, 0].numel()
    assert abs(log_det.item() + positions * x.std(dims, correction=0).log().sum().item()) < 1e-3 * positions
    before = module.log_scale.clone()
    module(10 * x)
    assert torch.equal(module.log_scale, before)


def test_act_norm_with_constant_channels_or_one_position():
    x = torch.randn(4, 3, 5, 5)
    x[:, 1] = 1234.567
    module = ActNorm(3)
    z, _ = module(x)
    assert module.log_scale[1] == 0
    assert z[:, 1].abs().max() < 1e-3
    assert abs(z[:, 0].std().item() - 1) < 0.01
    for single in (torch.randn(1, 3), torch.zeros(2, 3, 2)):
        module = ActNorm(3)
        z, log_det = module(single)
        assert log_det == 0
        assert z.abs().max() < 1e-6
    module = ActNorm(3, trainable=False)
    module(x)
    assert not list(module.parameters())
    assert set(module.state_dict()) == {"log_scale", "bias", "initialized"}


def test_act_norm_agrees_between_processes(monkeypatch):
    batches, modules = [torch.randn(6, 3) + 5, 3 * torch.randn(2, 3)], [ActNorm(3), ActNorm(3)]
    barrier, values = threading.Barrier(2), {}

    def sum_over_threads(value):
        values[threading.current_thread().name] = value
        barrier.wait()
        total = values["0"] + values["1"]
        barrier.wait()
        return total

    monkeypatch.setattr(act_norm, "_sum_over_processes", sum_over_threads)
    threads = [
        threading.Thread(target=m, args=(b,), name=str(i))
        for i, (m, b) in enumerate(zip(modules, batches, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    alone = ActNorm(3)
    alone(torch.cat(batches))
    for module in modules:
        assert max_error(module.log_scale, alone.log_scale) < 1e-6
        assert max_error(module.bias, alone.bias) < 1e-5


def test_act_norm_is_initialised_where_its_buffer_says_so():
    first, x = ActNorm(3), torch.randn(8, 3)
    first(x)
    copied = ActNorm(3)
    for ours, theirs in zip(copied.state_dict().values(), first.state_dict().values(), strict=True):
        ours.copy_(theirs)
    copied(5 * x + 1)
    for ours, theirs in zip(copied.state_dict().values(), first.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    other, x = ActNorm(3), 5 * x + 1
    state = {name: value.clone() for name, value in other.state_dict().items()}
    torch.func.functional_call(other, state, (x,))  # sets these, and not its own
    assert state["initialized"]
    assert not other.initialized
    assert max_error(other(x)[0].std(0, correction=0), torch.ones(3)) < 1e-5
    other.forget_()
    assert max_error(other(7 * x)[0].std(0, correction=0), torch.ones(3)) < 1e-5
    with torch.device("meta"):
        loaded = ActNorm(3)
    state = {name: first.state_dict()[name] for name in ("log_scale", "bias")}
    loaded.load_state_dict(state, strict=False, assign=True)
    assert torch.equal(loaded.eval()(x)[0], first(x)[0])


def test_parametrized_values_are_set_through_their_inverse():
    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

        def right_inverse(self, value):
            return value / 2

    module, x = ActNorm(3), 5 * torch.randn(64, 3) + 2
    for name in ("log_scale", "bias"):
        parametrize.register_parametrization(module, name, Doubled())
    y, _ = module.train()(x)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(y.mean(0), torch.zeros(3), rtol=0, atol=1e-5)


def test_batches_that_are_empty_in_all_processes_initialise_nothing(monkeypatch):
    monkeypatch.setattr(act_norm, "_distributed", lambda: True)
    monkeypatch.setattr(act_norm, "_sum_over_processes", lambda value: value)
    module = ActNorm(3).train()
    module(torch.empty(0, 3))
    assert module.initialized == 0
    module(torch.randn(8, 3))
    assert module.initialized == 1
    assert module.bias.isfinite().all()
