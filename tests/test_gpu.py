"""On a CUDA device: what the operations and modules give there, against float64 on the CPU."""

import pytest
import torch
from helpers import assert_within_budget, conv_subnet

import usf_kernels as usf
from usf_kernels.nn import FlowSequence, FlowStep, LUConv1x1

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


def operations():
    x, shift, params = torch.randn(3, 7, 5, 6), torch.randn(3, 4, 5, 6), torch.randn(3, 8, 5, 6)
    lower, upper = torch.randn(7, 7) / 7, torch.randn(7, 7) / 7 + torch.eye(7)
    latents = [torch.randn(3, 7, 5, 6), torch.randn(3, 5, 3, 2)]
    yield "additive", lambda x, s: usf.additive_coupling(x, s, split=3), (x, shift)
    yield "affine", affine, (x, params)
    yield "lu", lambda x, low, up: usf.lu_conv1x1(x, low, up), (x, lower, upper)
    yield "lu inverse", lambda x, low, up: usf.lu_conv1x1(x, low, up, inverse=True), (x, lower, upper)
    yield "squared norm", usf.squared_norm, (x,)
    for reading in ("likelihood", "latent"):
        yield reading, lambda a, b, r=reading: usf.anomaly_map([a, b], (11, 9), interpolate=r), latents


@pytest.mark.parametrize("name", [name for name, _, _ in operations()])
def test_operations_and_their_gradients(name):
    call, inputs = next((call, inputs) for found, call, inputs in operations() if found == name)

    def run(device, dtype):
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        out = call(*leaves)
        out.square().sum().backward()
        return [v.detach().cpu() for v in (out, *(leaf.grad for leaf in leaves))]

    for actual, eager, truth in zip(
        run(DEVICE, torch.float32), run("cpu", torch.float32), run("cpu", torch.float64), strict=True
    ):
        assert_within_budget(actual, eager, truth, factor=4.0)


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
