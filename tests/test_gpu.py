"""On a CUDA device: what the operations and modules give there, against float64 on the CPU.

The files test_kernels_*.py run their own checks of every kernel on the device as well, where there is one.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import assert_within_budget, conv_subnet, max_error, randomise_

import usf_kernels as usf
from usf_kernels.nn import FlowSequence, FlowStep, LUConv1x1
from usf_kernels.ops import dispatch
from usf_kernels.ops.row_kernels import add_rows, affine_rows, select_rows
from usf_kernels.ops.step import coupling_step
from usf_kernels.training import fit

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _full_precision():
    """Float32 products as float32: the budget is float32's own rounding."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def affine(x, params):
    y, log_det = usf.affine_coupling(x, params, split=3)
    return y + log_det[:, None, None, None]


def step(x, params, scale, bias, index):
    y, log_det = coupling_step(x, params, split=3, clamp=2.0, index=index, scale=scale, bias=bias)
    return y + log_det[:, None, None, None]


def operations(batch=3, side=(5, 6), device="cpu"):
    """Name, function, floating inputs: every operation with a kernel; its mask and index are on `device`."""

    def draw(channels):
        return torch.randn(batch, channels, *side)

    lower, upper = torch.randn(7, 7) / 7, torch.randn(7, 7) / 7 + torch.eye(7)
    scale, bias, index = torch.rand(7) + 0.5, torch.randn(7), torch.randperm(7).to(device)
    first, last = torch.randn(11, 7) / 7, torch.randn(7, 11) / 11
    latents = [draw(7), torch.randn(batch, 5, 3, 2)]
    mask = (torch.rand(side) < 0.5).to(device)
    yield "additive", lambda x, s: usf.additive_coupling(x, s, split=3), (draw(7), draw(4))
    yield "masked", lambda x, s: usf.masked_additive_coupling(x, s, mask.to(x.device)), (draw(7), draw(7))
    yield "affine", affine, (draw(7), draw(8))
    yield "step", lambda *v: step(*v, index.to(v[0].device)), (draw(7), draw(8), scale, bias)
    yield "lu", lambda x, low, up: usf.lu_conv1x1(x, low, up), (draw(7), lower, upper)
    yield "lu inverse", lambda x, low, up: usf.lu_conv1x1(x, low, up, inverse=True), (draw(7), lower, upper)
    yield "residual", lambda x, a, b: usf.ops.residual_mlp(x, a, None, b, None), (draw(7), first, last)
    yield "linear norm", lambda x, a, b: usf.ops.linear_squared_norm(x, a, b), (draw(7), upper, bias)
    yield "squared norm", usf.squared_norm, (draw(7),)
    for reading in ("likelihood", "latent"):
        yield reading, lambda a, b, r=reading: usf.anomaly_map([a, b], (11, 9), interpolate=r), latents


NAMES = [name for name, _, _ in operations()]


def find(name, **sizes):
    return next((call, inputs) for found, call, inputs in operations(**sizes) if found == name)


def run(call, inputs, device, dtype):
    """The result and the gradients of its sum of squares, on the CPU."""
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    out = call(*leaves)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    return [v.detach().cpu() for v in (out, *gradients)]


def test_operations_run_triton():
    probe = torch.empty(1, device=DEVICE)
    assert all(dispatch.runs_triton(name, probe) for name in dispatch._kernels)
    assert not dispatch.runs_triton("additive_coupling", probe.double())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "side"), [(3, (5, 6)), (2, (40, 64))])
def test_operations_and_their_gradients(name, batch, side):
    call, inputs = find(name, batch=batch, side=side)
    results = (run(call, inputs, *where) for where in ((DEVICE, torch.float32), ("cpu", torch.float32),
                                                       ("cpu", torch.float64)))  # fmt: skip
    for actual, eager, truth in zip(*results, strict=True):
        assert_within_budget(actual, eager, truth, factor=4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_couplings_at_the_size_of_a_model(dtype, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, params = (torch.randn(4, c, 28, 28, dtype=dtype).to(memory_format=memory_format) for c in (816, 816))
    truth = usf.affine_coupling(x.double(), params.double(), split=408)
    eager = usf.affine_coupling(x, params, split=408)
    for actual, plain, exact in zip(
        usf.affine_coupling(x.to(DEVICE), params.to(DEVICE), split=408), eager, truth, strict=True
    ):
        assert_within_budget(actual.cpu(), plain, exact)


@pytest.mark.parametrize("name", NAMES)
def test_reruns_give_the_same_bits(name):
    call, inputs = find(name, batch=4, side=(33, 47))
    first, second = (run(call, inputs, DEVICE, torch.float32) for _ in range(2))
    for actual, expected in zip(first, second, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_operations_compile(name):
    call, inputs = find(name)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    actual, expected = (run(fn, inputs, DEVICE, torch.float32) for fn in (compiled, call))
    for found, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_operations_in_a_cuda_graph(name):
    call, inputs = find(name, device=DEVICE)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs]

    def everything():
        out = call(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles
        everything()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = everything()
    with torch.no_grad():
        leaves[0].mul_(-0.5)
    graph.replay()
    for actual, expected in zip(outputs, everything(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_kernels_run_on_the_current_stream():
    x = torch.randn(64, 256, 64, 64, device=DEVICE)
    usf.additive_coupling(x, x[:, 128:], split=128)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        shift = x[:, 128:] * 2  # not there before the sleep is over
        y = usf.additive_coupling(x, shift, split=128)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y[:, 128:], 3 * x[:, 128:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_their_tensors_are():
    inputs = torch.randn(3, 8, 5, 6), torch.randn(3, 4, 5, 6)
    x, shift = (v.to("cuda:1") for v in inputs)
    with torch.cuda.device(0):
        y = usf.additive_coupling(x, shift, split=4)
        norms = usf.squared_norm(y)
    assert y.device == norms.device == torch.device("cuda:1")
    assert max_error(y.cpu(), usf.additive_coupling(*inputs, split=4)) == 0
    with pytest.raises(ValueError, match="expected all tensors on one device"):
        usf.additive_coupling(x, shift.to("cuda:0"), split=4)


def test_offsets_past_two_to_the_31():
    if torch.cuda.mem_get_info()[0] < 28 * 2**30:
        pytest.skip("needs 28 GiB of device memory")
    x = torch.zeros(1, 2, 2**30 + 8, dtype=torch.bfloat16, device=DEVICE)  # one image past 2^31 elements
    x[..., -8:] = 3
    y = usf.additive_coupling(x, x[:, 1:], split=1)
    assert y[0, 0, -1] == 3
    assert y[0, 1, -1] == 6
    assert y[0, 1, :8].abs().max() == 0
    del y
    u = usf.squared_norm(x)
    assert u[0, -1] == 18
    assert u[0, 0] == 0


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_a_flow_inverts(coupling):
    steps = [FlowStep(6, subnet=conv_subnet, coupling=coupling, zero_init=False) for _ in range(4)]
    flow = FlowSequence([LUConv1x1(6), *steps]).to(DEVICE)
    x = torch.randn(2, 6, 8, 5, device=DEVICE).to(memory_format=torch.channels_last)
    flow(x)  # ActNorm takes its statistics
    z, log_det = flow(x)
    back, inverse_log_det = flow.inverse(z)
    assert z.device == x.device == back.device
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-3, atol=1e-2)
    double = FlowSequence.__call__(flow.double().cpu(), x.double().cpu())
    torch.testing.assert_close(z.double().cpu(), double[0], rtol=1e-3, atol=1e-3)


def vector_subnet(c_in, c_out):
    return torch.nn.Sequential(torch.nn.Linear(c_in, 8), torch.nn.ReLU(), torch.nn.Linear(8, c_out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear", ["permutation", "lu"])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_a_fused_flow_is_the_same_as_on_the_cpu(coupling, linear, dtype):
    for subnet, shape in ((conv_subnet, (3, 22, 9, 7)), (vector_subnet, (513, 22))):
        options = {"coupling": coupling, "linear": linear, "zero_init": False}
        flow = randomise_(FlowSequence([FlowStep(22, subnet=subnet, **options) for _ in range(3)])).eval()
        x, results = torch.randn(shape), []
        for device, its_dtype in ((DEVICE, dtype), ("cpu", dtype), ("cpu", torch.float64)):
            fused, its_x = flow.to(device).fuse(its_dtype), x.to(device)
            z, log_det = fused(its_x)
            found = [z, log_det, *fused.squared_norm_and_log_det(its_x), *fused.inverse(its_x)]
            results.append([v.cpu() for v in found])
        for actual, plain, exact in zip(*results, strict=True):
            # Of three sums the CPU's may be lucky each time.
            assert_within_budget(actual, plain, exact, factor=4.0 if actual.numel() > 9 else 16.0)


@pytest.mark.parametrize("linear", ["permutation", "lu"])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_a_fused_flow_compiles_and_is_captured(coupling, linear):
    options = {"coupling": coupling, "linear": linear, "zero_init": False}
    fused = randomise_(FlowSequence([FlowStep(8, subnet=conv_subnet, **options) for _ in range(2)]))
    fused = fused.eval().to(DEVICE).fuse()
    x = torch.randn(2, 8, 6, 5, device=DEVICE)
    torch._dynamo.reset()
    for call in (torch.compile(fused, fullgraph=True, dynamic=True), fused.capture(x)):
        for actual, truth in zip(call(2 * x), fused(2 * x), strict=True):
            torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-4)


def test_compiled_training_has_the_gradients_of_an_lu_map():
    step = randomise_(FlowStep(8, subnet=conv_subnet, zero_init=False)).to(DEVICE)
    x = torch.randn(2, 8, 6, 5, device=DEVICE)
    step(x)
    torch._dynamo.reset()
    grads = []
    for run in (step, torch.compile(step)):
        z, log_det = run(x)
        grads.append(torch.autograd.grad(0.5 * z.square().sum() - log_det, list(step.parameters())))
    for actual, truth in zip(*grads, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-3, atol=1e-3)


def test_a_negated_view_is_read_with_its_sign():
    z = torch.randn(2, 6, 4, dtype=torch.complex64, device=DEVICE)
    x, params = z.conj().imag, torch.randn(2, 6, 4, device=DEVICE)
    assert x.is_neg()
    with torch.no_grad():
        for actual, truth in zip(
            usf.affine_coupling(x, params, split=3),
            usf.affine_coupling(x.clone(), params, split=3),
            strict=True,
        ):
            assert torch.equal(actual, truth)


def test_rows_past_two_to_the_31():
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of device memory")
    rows = torch.zeros(2**25 + 8, 64, dtype=torch.bfloat16, device=DEVICE)
    rows[-8:] = 3
    index = torch.tensor([63, 0], device=DEVICE)
    values = torch.ones(len(rows), 2, dtype=torch.bfloat16, device=DEVICE)
    add_rows(rows, index, values, -1)
    assert select_rows(rows, index)[-8:].eq(2).all()
    outputs = torch.zeros(len(rows), 4, dtype=torch.bfloat16, device=DEVICE)
    log_det = affine_rows(rows, index, outputs, values[0], 1.0, False)
    assert log_det.eq(0).all()
    assert rows[-8:].eq(3).all()
    assert rows[:8].eq(0).all()


@pytest.mark.parametrize("linear", ["permutation", "lu"])
def test_a_training_step_is_captured(linear):
    steps = [FlowStep(8, subnet=conv_subnet, linear=linear, zero_init=False) for _ in range(3)]
    flow = randomise_(FlowSequence(steps, memory="standard")).to(DEVICE)
    x = torch.randn(2, 8, 6, 5, device=DEVICE)

    def step():
        for parameter in flow.parameters():
            parameter.grad = None
        z, log_det = flow(x)
        (0.5 * z.square().sum() - log_det).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and the ActNorms take their statistics
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = [parameter.grad for parameter in flow.parameters()]
    x.mul_(-0.5)
    graph.replay()
    step()
    for parameter, grad in zip(flow.parameters(), captured, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("linear", ["permutation", "lu"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_captures_its_steps(linear, precision):
    """The noise of a step is drawn from the seed that `fit` sets in front of it, in a replay as well."""

    class Likelihood(torch.nn.Module):
        def __init__(self):
            super().__init__()
            steps = [FlowStep(8, subnet=conv_subnet, linear=linear, act_norm=True) for _ in range(5)]
            self.flow = FlowSequence(steps)

        def loss(self, x):
            z, log_det = self.flow(x + 0.1 * torch.randn_like(x))
            return (0.5 * z.float().square().sum() / len(x) - log_det.float().mean()) / x[0].numel()

    torch.manual_seed(0)
    start, data = Likelihood().state_dict(), 3 * torch.randn(32, 8, 6, 6) + 1
    losses = []
    for capture in (False, True):
        model = Likelihood()
        model.load_state_dict(start)
        options = {"precision": precision, "accelerator": "cuda", "progress": False, "capture": capture}
        history = fit(model, data, max_epochs=4, batch_size=8, **options)
        losses.append([row["train_loss"] for row in history.rows])
        assert next(model.parameters()).device.type == "cpu"  # where it was
    tolerance = 1e-3 if precision == "32-true" else 3e-2
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
    assert losses[1][-1] < losses[1][0]


DENSITIES = {
    "soft boundary": (usf.models.DeepSVDD, 6, {"objective": "soft_boundary"}),
    "checkerboard": (usf.models.USFlow, (2, 4, 4), {"mask": "checkerboard", "base": "student_t"}),
}


@pytest.mark.parametrize("name", list(DENSITIES))
def test_density_models_train_by_graphs(name):
    model_class, shape, options = DENSITIES[name]
    model = model_class(shape, **options).to(DEVICE).train()
    gradients = usf.nn.CapturedGradients(model)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(9, *([shape] if isinstance(shape, int) else shape), generator=generator).to(DEVICE)
        found = gradients(x)
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        captured = [parameter.grad.clone() for parameter in trained]
        model.zero_grad()
        expected = model.loss(x)
        expected.backward()
        expected = expected.detach()  # a loss that is held would become part of the recording
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            for parameter, grad in zip(trained, captured, strict=True):
                torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-3)
                parameter -= 0.01 * grad  # which the next replay must see


@pytest.mark.parametrize("model_class", [usf.models.FastFlow, usf.models.UFlow, usf.models.CFlow])
def test_what_is_computed_between_replays_does_not_reach_them(model_class):
    """A graph knows addresses: of tables that are kept, and made again when buffers were written to."""
    network = torch.nn.Identity()  # never called: there are features
    network.feature_info = SimpleNamespace(channels=lambda: (4, 6), reduction=lambda: (1, 2))
    backbone = usf.models.Backbone(network, {"name": "none"}, mean=(0.5,) * 3, std=(0.5,) * 3)
    maps = [torch.randn(9, 4, 8, 8, device=DEVICE), torch.randn(9, 6, 4, 4, device=DEVICE)]
    for part in maps:
        part[..., 0, :] *= 3  # so that borders differ from what is inside
    model = model_class(backbone, noise=0.0).to(DEVICE).initialize(maps).train()
    gradients = usf.nn.CapturedGradients(model)
    for start in (0, 3, 6, 0):
        batch = [part[start : start + 3] for part in maps]
        found = gradients(batch)
        torch.testing.assert_close(found, model.loss(batch).detach(), rtol=1e-3, atol=1e-3)
        model.eval()
        model.load_state_dict(model.state_dict())
        for size in range(4, 14, 2):
            sizes = ((1, 4, size, size), (1, 6, size // 2, size // 2))
            model.loss([torch.randn(shape, device=DEVICE) for shape in sizes])
        torch.cuda.empty_cache()
        model.train()


def test_mixed_precision_trains():
    flow = FlowSequence([FlowStep(8, subnet=conv_subnet) for _ in range(3)]).to(DEVICE)
    x = torch.randn(4, 8, 6, 6, device=DEVICE) * 3 + 1
    flow(x)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        with torch.autocast(DEVICE, torch.bfloat16):
            z, log_det = flow(x)
        loss = 0.5 * z.float().square().sum() / len(x) - log_det
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
