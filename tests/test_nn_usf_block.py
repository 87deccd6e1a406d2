"""The conjugated block against A^-1 . C . A written out; its inverse, log-determinant and gradients."""

import copy

import pytest
import torch
from helpers import conv_subnet, jacobian_log_det, linear_subnet, max_error, randomise_
from torch import nn

from usf_kernels.nn import FlowSequence, FlowStep, LUConv1x1, Permutation, USFBlock

pytestmark = pytest.mark.usefixtures("nan_memory")

MASKS = ("half", "channel", "checkerboard")
CASES = [
    pytest.param(mask, shape, cond, id=f"{mask}-{shape[1]}-{len(shape) - 2}d{'-cond' if cond else ''}")
    for mask in MASKS
    for shape in ((3, 5), (3, 4), (2, 5, 3, 2), (2, 2, 2, 3), (2, 3, 1, 1))
    for cond in (0, 2)
    if len(shape) > 2 or mask != "checkerboard"
]


def make(mask, shape, cond_channels=0):
    subnet = conv_subnet if len(shape) == 4 else linear_subnet
    block = USFBlock(shape[1], subnet=subnet, mask=mask, cond_channels=cond_channels, zero_init=False)
    cond = torch.randn(1, cond_channels, *shape[2:], dtype=torch.float64) if cond_channels else None
    return randomise_(block.double()), torch.randn(shape, dtype=torch.float64), cond


@pytest.mark.parametrize(("mask", "shape", "cond_channels"), CASES)
def test_is_the_conjugated_coupling(mask, shape, cond_channels):
    block, x, cond = make(mask, shape, cond_channels)
    h, _ = block.linear(x)
    if mask == "checkerboard":
        indices = torch.stack(torch.meshgrid(*map(torch.arange, shape[2:]), indexing="ij")).sum(0)
        even = (indices % 2 == 0).double()
        inputs = h * even
    else:
        passive = torch.arange(shape[1]) < block.coupling.split
        passive = torch.arange(shape[1]) % 2 == 0 if mask == "channel" else passive
        inputs = h[:, passive]
    if cond is not None:
        inputs = torch.cat([inputs, cond.expand(len(x), *cond.shape[1:])], 1)
    if mask == "checkerboard":
        h = h + (1 - even) * block.coupling.subnet(inputs)
    else:
        h = h.clone()
        h[:, ~passive] += block.coupling.subnet(inputs)
    expected, _ = block.linear.inverse(h)

    z, log_det = block(x, cond)
    assert max_error(z, expected) < 1e-10
    assert log_det.shape == ()
    assert log_det == 0
    if mask != "checkerboard" or x[0, 0].numel() > 1:  # a single position conditions nothing
        assert max_error(z, x) > 1e-3
    back, log_det = block.inverse(z, cond)
    assert max_error(back, x) < 1e-10
    assert log_det == 0
    assert jacobian_log_det(lambda v: block(v, cond)[0], x).abs().max() < 1e-9
    coupling = block.coupling
    if cond is None:
        assert max_error(coupling.inverse(coupling(x)[0])[0], x) < 1e-12


@pytest.mark.parametrize(("mask", "shape", "cond_channels"), CASES)
def test_reversible_gradients(mask, shape, cond_channels):
    block, x, cond = make(mask, shape, cond_channels)
    steps = [LUConv1x1(shape[1]).double(), block, make(mask, shape, cond_channels)[0], Permutation(shape[1])]
    inputs = [t.requires_grad_() for t in (x, cond) if t is not None]
    parameters = [p for step in steps for p in step.parameters()]
    results = []
    for memory in ("standard", "reversible"):
        z, log_det = FlowSequence(steps, memory=memory)(x, cond)
        weights = torch.linspace(0.5, 2, z.numel(), dtype=z.dtype).view_as(z)
        loss = (weights * z.square()).sum() - log_det
        results.append(torch.autograd.grad(loss, inputs + parameters, allow_unused=True))
    for expected, actual in zip(*results, strict=True):
        if expected is None:
            assert actual is None
        else:
            assert (actual - expected).norm() <= 1e-10 * expected.norm() + 1e-13


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_match_numerical_ones(mask):
    block, x, cond = make(mask, (2, 3, 2, 2), 1)
    inputs = (x.requires_grad_(), cond.requires_grad_())
    assert torch.autograd.gradcheck(lambda *v: block(*v)[0], inputs)
    assert torch.autograd.gradcheck(lambda *v: block.inverse(*v)[0], inputs)
    names = ["linear.lower", "linear.upper", "linear.log_diagonal", "linear.bias"]
    values = [block.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def output(*values):
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x.detach(), cond))[0]

    assert torch.autograd.gradcheck(output, values)


@pytest.mark.parametrize("mask", MASKS)
def test_float32_inverse_is_accurate_where_the_map_is_wide(mask):
    subnet = conv_subnet if mask == "checkerboard" else (lambda c_in, c_out: nn.Conv2d(c_in, c_out, 1))
    block = randomised_slightly(USFBlock(192, subnet=subnet, mask=mask, zero_init=False))
    x = torch.randn(2, 192, 6, 5)
    z, _ = block(x)
    assert max_error(z, x) > 0.1
    assert max_error(block.inverse(z)[0], x) < 2e-5
    last = x.to(memory_format=torch.channels_last)
    assert max_error(block(last)[0], z) < 2e-5
    assert max_error(z, copy.deepcopy(block).double()(x.double())[0]) < 1e-4


def randomised_slightly(block):
    with torch.no_grad():
        for parameter in block.linear.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter) / 192**0.5)
    return block


@pytest.mark.parametrize("mask", MASKS)
def test_starts_as_the_identity_and_takes_dtypes_and_empty_batches(mask):
    block = USFBlock(5, subnet=conv_subnet, mask=mask)
    x = torch.randn(2, 5, 4, 3)
    assert torch.equal(block(x)[0], x)
    randomise_(block)
    z, _ = block(x)
    assert block(x[:0])[0].shape == (0, 5, 4, 3)
    for dtype in (torch.bfloat16, torch.float16):
        narrow, log_det = copy.deepcopy(block).to(dtype)(x.to(dtype))
        assert narrow.dtype == dtype
        assert log_det.dtype == torch.float32
        assert max_error(narrow, z) < 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = block(x)
        back, _ = block.inverse(rounded)
    assert rounded.dtype == torch.float32
    assert max_error(back, x) < 2e-2  # the conditioner's input is rounded, almost always the same way twice
    assert block.state_dict().keys() == copy.deepcopy(block).state_dict().keys()
    flow = FlowSequence([copy.deepcopy(block) for _ in range(4)])
    flow(x)[0].square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert max_error(compiled(x)[0], z) < 1e-5


def test_in_a_sequence_with_steps():
    flow = FlowSequence(
        [USFBlock(4, subnet=conv_subnet, mask=m) for m in MASKS] + [FlowStep(4, subnet=conv_subnet)]
    )
    x = torch.randn(2, 4, 3, 3)
    flow(x)
    randomise_(flow)
    z, log_det = flow(x)
    assert log_det.shape == ()
    assert max_error(flow.inverse(z)[0], x) < 1e-3
    torch.autograd.backward([z.square().sum(), -log_det])
    assert flow[0].linear.lower.grad.abs().max() > 0


def test_errors():
    block = USFBlock(4, subnet=linear_subnet, mask="checkerboard")
    with pytest.raises(ValueError, match=r"a checkerboard needs spatial dimensions.*found \(2, 4\)"):
        block(torch.randn(2, 4))
    with pytest.raises(
        ValueError, match="mask: expected one of 'half', 'checkerboard', 'channel', found 'row'"
    ):
        USFBlock(4, subnet=conv_subnet, mask="row")
    with pytest.raises(ValueError, match="channels: expected an int at least 2, found 1"):
        USFBlock(1, subnet=conv_subnet)
    block = USFBlock(4, subnet=conv_subnet)
    with pytest.raises(
        ValueError, match=r"x: expected 4 channels in dimension 1, found shape \(2, 5, 3, 3\)"
    ):
        block(torch.randn(2, 5, 3, 3))
    with pytest.raises(TypeError, match=r"z: expected float32.*found torch.int64"):
        block.inverse(torch.ones(2, 4, 3, 3).long())
    with pytest.raises(ValueError, match="cond: expected None because cond_channels is 0"):
        block(torch.randn(2, 4, 3, 3), torch.randn(2, 1, 3, 3))
