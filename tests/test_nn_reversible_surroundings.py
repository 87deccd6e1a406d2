"""The reversible backward pass and what is around it: random states, buffers, autocast, hooks, processes."""

import contextlib
import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers import conv_subnet, max_error
from test_nn_reversible import COUPLINGS, assert_same_gradients, backward
from torch import nn

from usf_kernels.nn import AffineCheckerboard, FlowSequence, FlowStep, USFBlock
from usf_kernels.nn.reversible import ReconstructionCheck

pytestmark = pytest.mark.usefixtures("nan_memory")


class Noisy(nn.Module):
    """What is not the same twice: dropout, noise, running averages, power iterations."""

    def __init__(self, c_in, c_out):
        super().__init__()
        normed = nn.utils.parametrizations.spectral_norm(nn.Conv2d(c_in, 8, 1))
        self.layers = nn.Sequential(normed, nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, c_out, 1))

    def forward(self, x):
        return self.layers(x) + 0.1 * torch.randn_like(x[:, :1])


def test_conditioners_with_a_state():
    steps = [FlowStep(6, subnet=Noisy, coupling=c, zero_init=False) for c in COUPLINGS for _ in range(2)]
    flow, standard = (
        FlowSequence(steps).double(),
        FlowSequence(copy.deepcopy(steps), memory="standard").double(),
    )
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    results = []
    for module in (flow, standard):
        torch.manual_seed(3)
        for _ in range(2):
            result = backward(module, x)
        results.append((result, torch.rand(()), module.state_dict()))
    (actual, draw, state), (expected, other_draw, other_state) = results
    for a, e in zip(actual[1], expected[1], strict=True):
        assert max_error(a, e) < 1e-10 * (1 + e.abs().max())
    assert draw == other_draw  # the backward pass leaves the generator as it was
    for name, value in state.items():  # one update for one forward pass
        assert max_error(value, other_state[name]) < 1e-12


def test_autocast_is_as_it_was():
    steps = [
        FlowStep(6, subnet=conv_subnet, coupling=c, zero_init=False) for c in COUPLINGS for _ in range(2)
    ]
    flow, x = FlowSequence(steps), torch.randn(4, 6, 8, 8)
    flow(x)
    standard = FlowSequence(copy.deepcopy(steps), memory="standard")
    gradients = []
    for module in (flow, standard):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, log_det = module(x)
            again = (
                module[0].coupling.subnet(x[:, :3]).float().sum()
            )  # weights are not cached without a graph
        loss = z.square().sum() - log_det.sum()
        gradients.append(torch.autograd.grad(loss + again, list(module.parameters())))
    with torch.no_grad():
        assert max_error(z, flow(x)[0]) > 1e-4  # the conditioner was rounded
    for a, e in zip(*gradients, strict=True):
        assert (a - e).norm() <= 0.02 * e.norm()
        assert a.dtype == torch.float32


def test_narrow_dtypes():
    steps = [FlowStep(6, subnet=conv_subnet, zero_init=False) for _ in range(4)]
    x = torch.randn(4, 6, 8, 8)
    flow = FlowSequence(steps)
    flow(x)
    standard = FlowSequence(copy.deepcopy(steps), memory="standard")
    x = x.bfloat16().requires_grad_()
    (_, actual), (_, expected) = backward(flow.bfloat16(), x), backward(standard.bfloat16(), x)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype == torch.bfloat16
        assert (a - e).float().norm() <= 0.05 * e.float().norm()


def test_first_batch_initialises_and_hooks_run_once():
    flow = FlowSequence([FlowStep(4, subnet=conv_subnet, linear="permutation") for _ in range(4)])
    standard = copy.deepcopy(flow)
    standard.memory = "standard"
    calls = []
    flow[0].act_norm.bias.register_hook(lambda grad: calls.append("tensor"))
    flow[0].act_norm.bias.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    x = 3 * torch.randn(5, 4, 6, 6) + 2
    for module in (flow, standard):
        for _ in range(2):  # two batches into one gradient
            z, log_det = module(x)
            (z.square().mean() - log_det.sum() / x.numel()).backward()
    assert calls == ["tensor", "accumulated"] * 2
    assert flow(x)[0].mean((0, 2, 3)).abs().max() < 1e-4
    for (name, a), e in zip(flow.named_parameters(), standard.parameters(), strict=True):
        assert max_error(a, e) == 0, name
        assert max_error(a.grad, e.grad) < 1e-5 * (1 + e.grad.abs().max()), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    steps = [FlowStep(6, subnet=Noisy, coupling=c, zero_init=False) for c in COUPLINGS for _ in range(2)]
    flow = FlowSequence(steps).to("cuda", torch.float64)
    standard = FlowSequence(copy.deepcopy(steps), memory="standard").to("cuda", torch.float64)
    x, results = torch.randn(4, 6, 5, 5, dtype=torch.float64, device="cuda"), []
    for module in (flow, standard):
        torch.manual_seed(3)
        z, log_det = module(x)
        grads = torch.autograd.grad(z.square().sum() - log_det.sum(), list(module.parameters()))
        results.append([*grads, torch.rand((), device="cuda")])
    for a, e in zip(*results, strict=True):
        assert max_error(a, e) < 1e-9 * (1 + e.abs().max())


def test_functional_call_and_compiled_conditioner():
    def compiled(c_in, c_out):
        return torch.compile(conv_subnet(c_in, c_out), backend="eager")

    flow = FlowSequence([FlowStep(4, subnet=compiled, zero_init=False) for _ in range(4)]).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    flow(x)
    assert_same_gradients(flow, x.requires_grad_())
    # Parameters handed in for one call are the ones that the gradient belongs to, after the call as well.
    values = {n: (p.detach() + 0.1).requires_grad_() for n, p in flow.named_parameters()}
    sums = []
    for memory in ("standard", "reversible"):
        flow.memory = memory
        z, _ = torch.func.functional_call(flow, values, (x,))
        sums.append(torch.autograd.grad(z.square().sum(), list(values.values()), allow_unused=True))
    assert all(max_error(a, e) < 1e-9 for a, e in zip(*sums, strict=True) if e is not None)


def make_for_processes():
    torch.manual_seed(1)
    return FlowSequence([FlowStep(4, subnet=conv_subnet, zero_init=False) for _ in range(4)])


def distributed_gradients(rank, file, x):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    flow = nn.parallel.DistributedDataParallel(make_for_processes())
    for _ in range(2):
        flow.zero_grad()
        z, log_det = flow(x[2 * rank : 2 * rank + 2])
        (0.5 * z.square().sum() / 2 - log_det).backward()
    dist.destroy_process_group()
    return [p.grad for p in flow.parameters()]


def in_the_other_process(*arguments):
    distributed_gradients(*arguments)
    os._exit(0)  # PyTorch's threads may still run when the interpreter ends, and would abort it


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_distributed_gradients_are_averages(tmp_path):
    x, threads = torch.randn(4, 4, 5, 5), torch.get_num_threads()
    other = torch.multiprocessing.get_context("spawn").Process(
        target=in_the_other_process, args=(1, tmp_path / "store", x)
    )
    other.start()
    actual = distributed_gradients(0, tmp_path / "store", x)
    torch.set_num_threads(threads)
    other.join()
    assert other.exitcode == 0
    flow = make_for_processes()
    for _ in range(2):
        flow.zero_grad()
        z, log_det = flow(x)
        (0.5 * z.square().sum() / 4 - log_det).backward()
    for a, p in zip(actual, flow.parameters(), strict=True):
        assert max_error(a, p.grad) < 1e-4 * (1 + p.grad.abs().max())


def spectral(c_in, c_out):
    """Its weights are those of one more power iteration at every call."""
    first = nn.utils.spectral_norm(nn.Conv2d(c_in, 8, 3, padding=1))
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, c_out, 3, padding=1))


class InPlace(nn.Module):
    """Overwrites what it is given, in a layer that is not registered first."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv, self.act = nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.conv(self.act(x))


class Doubled(FlowStep):
    """Inherits a `pull_back` that is not that of its `forward`."""

    def forward(self, x, cond=None):
        return super().forward(2 * x, cond)

    def inverse(self, z, cond=None):
        x, log_det = super().inverse(z, cond)
        return x / 2, log_det


@pytest.mark.parametrize(
    "make",
    [
        lambda: AffineCheckerboard(6, subnet=spectral, zero_init=False),
        lambda: FlowStep(6, subnet=spectral, zero_init=False),
        lambda: FlowStep(6, subnet=InPlace, zero_init=False),
        lambda: USFBlock(6, subnet=InPlace, zero_init=False),
        lambda: Doubled(6, subnet=conv_subnet, zero_init=False),
    ],
    ids=["no pull_back, buffers", "buffers", "in place", "conjugated, in place", "another forward"],
)
def test_conditioners_and_steps_with_ways_of_their_own(make):
    found = {}
    for memory in ("standard", "reversible"):
        torch.manual_seed(0)
        flow = FlowSequence([make() for _ in range(2)], memory=memory, check_every=0)
        x = torch.randn(4, 6, 6, 6, requires_grad=True)
        z, log_det = flow(x)
        (z.square().mean() + log_det.mean()).backward()
        found[memory] = [x.grad, *(p.grad for p in flow.parameters())]
        found[memory] += [buffer for buffer in flow.buffers() if buffer.is_floating_point()]
    for ours, truth in zip(found["reversible"], found["standard"], strict=True):
        assert (ours is None) == (truth is None)
        assert truth is None or max_error(ours, truth) <= 1e-5 * (1 + truth.abs().max())


def test_gradients_come_one_at_a_time():
    flow = FlowSequence([FlowStep(4, subnet=conv_subnet) for _ in range(2)], memory="reversible")
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    z, _ = flow(x)
    with pytest.raises(RuntimeError, match="one at a time, found is_grads_batched=True"):
        torch.autograd.grad(z, x, torch.ones(2, *z.shape), is_grads_batched=True)


def test_replicas_of_data_parallel_keep_their_gradients():
    """They hold their parameters as attributes, of which a reversible pass would know nothing."""
    step = FlowStep(6, subnet=conv_subnet, zero_init=False)
    flow = FlowSequence([step] * 4)
    x = torch.randn(2, 6, 5, 5)
    flow(x)
    replica = FlowSequence._replicate_for_data_parallel(flow)
    assert flow._reverses(x, None)
    assert not replica._reverses(x.requires_grad_(), None)


def test_products_may_be_rounded_as_tf32():
    norms = [(0, torch.tensor(2e-3), torch.tensor(1.0))]
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, fits in ((True, True), (False, False)):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            expected = contextlib.nullcontext() if fits else pytest.raises(RuntimeError, match="step 0 lost")
            with expected:
                ReconstructionCheck.compare(norms, torch.float32, torch.device("cuda"))
            with pytest.raises(RuntimeError, match="step 0 lost"):
                ReconstructionCheck.compare(norms, torch.float32, torch.device("cpu"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
