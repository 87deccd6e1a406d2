"""The reversible backward pass: the gradients of the standard one, little memory, and no silent errors."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers import conv_subnet, linear_subnet, max_error, randomise_, shapes
from hypothesis import given, settings
from torch import nn

from usf_kernels.nn import ActNorm, FlowSequence, FlowStep, LUConv1x1, Permutation

pytestmark = pytest.mark.usefixtures("nan_memory")

COUPLINGS, LINEARS = ("additive", "affine"), ("lu", "permutation", "none")


class Shear(nn.Module):
    """A flow module that has no `pull_back`, with a condition and a log-determinant that is data."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, cond=None):
        shift = 0 if cond is None else cond.sum(1, keepdim=True).tanh()
        log_det = self.log_scale * x[0].numel()
        return x * self.log_scale.exp() + shift, log_det.expand(x.shape[0])

    def inverse(self, z, cond=None):
        shift = 0 if cond is None else cond.sum(1, keepdim=True).tanh()
        return (z - shift) * (-self.log_scale).exp(), -self.log_scale * z[0].numel()


class Pointwise(nn.Linear):
    """A conditioner for any number of positions; convolutions refuse none."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).tanh()


def sequence(channels, subnet=conv_subnet, cond_channels=0, memory="reversible"):
    """Steps of every kind, one of them twice and some nested."""
    options = {"subnet": subnet, "cond_channels": cond_channels, "zero_init": False}
    steps = [FlowStep(channels, coupling=c, linear=k, **options) for c in COUPLINGS for k in LINEARS]
    nested = FlowSequence([FlowStep(channels, act_norm=False, **options), Permutation(channels)])
    frozen = [ActNorm(channels, trainable=False), LUConv1x1(channels, diagonal="fixed", bias=False)]
    return FlowSequence([LUConv1x1(channels), *steps, nested, Shear(), steps[0], *frozen], memory=memory)


def backward(flow, x, cond=None):
    """Gradients of x, cond and the parameters, of a loss that weights everything differently."""
    inputs = [t for t in (x, cond) if t is not None and t.requires_grad]
    inputs += [p for p in flow.parameters() if p.requires_grad]
    z, log_det = flow(x, cond)
    weights = torch.linspace(0.5, 2, z.numel(), dtype=z.dtype).view_as(z)
    loss = (weights * z.square()).sum() - (log_det * torch.arange(1, x.shape[0] + 1)).sum()
    return loss.detach(), torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_same_gradients(flow, x, cond=None, tolerance=1e-10):
    standard = copy.deepcopy(flow)
    standard.memory = "standard"
    truth, expected = backward(standard, x, cond)
    loss, actual = backward(flow, x, cond)
    assert abs(loss - truth) <= 1e-12 * truth.abs()
    for value, reference in zip(actual, expected, strict=True):
        if reference is not None or value is not None:
            assert (value - reference).norm() <= tolerance * reference.norm() + 1e-14, value.shape


@pytest.mark.parametrize("cond_channels", [0, 2])
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4, 3)])
def test_gradients_are_the_standard_ones(shape, cond_channels):
    flow = sequence(5, conv_subnet if len(shape) == 4 else linear_subnet, cond_channels).double()
    x = (2 * torch.randn(shape, dtype=torch.float64) + 1).requires_grad_()
    cond = None
    if cond_channels:  # one for the whole batch
        cond = torch.randn(1, cond_channels, *shape[2:], dtype=torch.float64, requires_grad=True)
    flow(x, cond)  # initialises the ActNorms
    randomise_(flow)
    assert_same_gradients(flow, x, cond)
    for name, parameter in flow.named_parameters():  # frozen ones, on the way to others
        parameter.requires_grad_("subnet" not in name and "0" in name)
    assert_same_gradients(flow, x.detach(), None if cond is None else cond.detach())
    flow.eval().requires_grad_(False)
    assert_same_gradients(flow, x, cond)
    if cond_channels:
        assert_same_gradients(flow, x.detach(), cond)


@given(shapes(min_channels=2))
@settings(max_examples=15)
def test_any_shape(shape):
    channels = shape[1]
    steps = [FlowStep(channels, coupling=c, linear=k, subnet=Pointwise) for c in COUPLINGS for k in LINEARS]
    flow = randomise_(FlowSequence(steps, memory="reversible").double())
    assert_same_gradients(flow, torch.randn(shape, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_float32_gradients(coupling, linear):
    """To 1e-5 of the standard ones, or as close as those are to the truth where terms cancel."""
    steps = [
        FlowStep(64, subnet=conv_subnet, coupling=coupling, linear=linear, zero_init=False) for _ in range(8)
    ]
    flow, x = FlowSequence(steps), torch.randn(2, 64, 8, 8)
    flow(x)
    standard = FlowSequence(copy.deepcopy(steps), memory="standard")
    double = copy.deepcopy(standard).double()
    _, actual = backward(flow, x)
    _, expected = backward(standard, x)
    _, truth = backward(double, x.double())
    for a, e, t in zip(actual, expected, truth, strict=True):
        assert (a - e).norm() <= max(1e-5 * e.norm(), 2 * (e - t).norm())


def saved_bytes(flow, x):
    """What the graph keeps of one forward pass, parameters aside."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in flow.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z, _ = flow(x)
    kept = getattr(z.grad_fn, "samples", [])
    return sum(storages.values()) + sum(t.nbytes for t in kept)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_memory_does_not_grow_with_depth(coupling):
    def make(depth, memory):
        steps = [FlowStep(16, subnet=conv_subnet, coupling=coupling) for _ in range(depth)]
        return FlowSequence(steps, memory=memory)

    x = torch.randn(4, 16, 16, 16)
    standard, few = saved_bytes(make(8, "standard"), x), saved_bytes(make(8, "reversible"), x)
    assert few < standard / 5
    assert saved_bytes(make(64, "auto"), x) < 1.5 * few
    assert few < 1.1 * x.nbytes


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


def test_backward_twice_through_one_graph():
    flow = FlowSequence([FlowStep(4, subnet=conv_subnet, zero_init=False) for _ in range(4)])
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    z, _ = flow(x)
    inputs = [x, *flow.parameters()]
    first, second = (torch.autograd.grad(z.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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


def test_when_it_is_used():
    x = torch.randn(2, 4, 5, 5)

    def uses(flow, x=x):
        return "Reversible" in type(flow(x)[0].grad_fn).__name__

    steps = [FlowStep(4, subnet=conv_subnet) for _ in range(4)]
    flow = FlowSequence(steps)
    assert uses(flow)
    assert uses(FlowSequence(steps[:1], memory="reversible"))
    assert uses(FlowSequence(steps, memory="reversible")[1:])
    assert not uses(flow[1:])
    assert not uses(FlowSequence(steps, memory="standard"))
    assert not uses(torch.compile(flow, backend="eager", fullgraph=True))
    frozen = copy.deepcopy(flow).requires_grad_(False)
    assert not uses(frozen)
    assert uses(frozen, x.clone().requires_grad_())
    with torch.no_grad():
        assert not flow(x)[0].requires_grad
    jacobian = torch.func.jacrev(lambda v: flow(v.view(1, 4, 1, 1))[0].flatten())(torch.randn(4))
    assert jacobian.shape == (4, 4)
    for clone in (copy.deepcopy(flow), flow[:]):
        assert repr(clone) == repr(flow)
        assert uses(clone)


def nearly_singular_at(step, depth=5, **options):
    flow = FlowSequence([FlowStep(4, subnet=conv_subnet, act_norm=False) for _ in range(depth)], **options)
    with torch.no_grad():
        flow[step].linear.log_diagonal[1] = -12.0
    return flow


def test_lost_precision_is_an_error():
    x = torch.randn(4, 4, 6, 6)
    z, _ = nearly_singular_at(3)(x)
    with pytest.raises(
        RuntimeError, match=r"the inverse of step 3 lost precision: .* off by .*in torch.float32"
    ):
        z.sum().backward()
    nearly_singular_at(3).double()(x.double())[0].sum().backward()  # has the digits for it
    nearly_singular_at(3, check_every=0)(x)[0].sum().backward()
    nearly_singular_at(3, memory="standard")(x)[0].sum().backward()
    flow = nearly_singular_at(2, check_every=3)
    flow._check.count = 1  # as after a first pass
    for parts in (flow, flow[:4]):  # a slice counts together with the whole
        parts(x)[0].sum().backward()
    z, _ = flow[1:](x)
    with pytest.raises(RuntimeError, match="the inverse of step 1 lost precision"):
        z.sum().backward()


def test_errors():
    x = torch.randn(2, 4, 5, 5)
    steps = [FlowStep(4, subnet=conv_subnet) for _ in range(4)]
    with pytest.raises(
        ValueError, match="memory: expected one of 'auto', 'reversible', 'standard', found 'low'"
    ):
        FlowSequence(steps, memory="low")
    with pytest.raises(ValueError, match="check_every: expected an int at least 0, found -1"):
        FlowSequence(steps, check_every=-1)
    flow = FlowSequence(steps)
    z, _ = flow(x)
    with pytest.raises(RuntimeError, match="has no second derivative, found create_graph=True"):
        torch.autograd.grad(z.square().sum(), flow[0].linear.lower, create_graph=True)
    z, _ = flow(x)
    with torch.no_grad():
        flow[0].linear.lower.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


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


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_distributed_gradients_are_averages(tmp_path):
    x, threads = torch.randn(4, 4, 5, 5), torch.get_num_threads()
    other = torch.multiprocessing.get_context("spawn").Process(
        target=distributed_gradients, args=(1, tmp_path / "store", x)
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
