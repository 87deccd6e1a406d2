"""Conjugated blocks of any kind, reflections, affine checkerboards: inverses, log-dets, gradients, fusing."""

import pytest
import torch
from helpers import conv_subnet, jacobian_log_det, linear_subnet, max_error, randomise_

from usf_kernels.nn import (
    AdditiveCoupling,
    AffineCheckerboard,
    AffineCoupling,
    Conjugated,
    FlowSequence,
    Householder,
    LUConv1x1,
    Permutation,
    USFBlock,
)
from usf_kernels.nn.usf_block import CheckerboardCoupling

pytestmark = pytest.mark.usefixtures("nan_memory")

SHAPES = [(3, 5), (2, 4, 3, 2), (2, 3, 1, 3), (0, 4, 2, 2), (2, 2, 1, 2)]


def maps(channels):
    return [
        LUConv1x1(channels, init="orthogonal"),
        Householder(channels, reflections=3),
        FlowSequence([Householder(channels), Permutation(channels)], memory="standard"),
    ]


def couplings(shape):
    subnet = conv_subnet if len(shape) == 4 else linear_subnet
    yield AdditiveCoupling(shape[1], subnet=subnet)
    yield AffineCoupling(shape[1], subnet=subnet)
    if len(shape) > 2:
        yield CheckerboardCoupling(shape[1], subnet=conv_subnet, odd=True)
        yield AffineCheckerboard(shape[1], subnet=conv_subnet)
        yield AffineCheckerboard(shape[1], subnet=conv_subnet, odd=True, clamp=1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_have_inverses_log_dets_and_inference_forms(shape):
    x = torch.randn(shape, dtype=torch.float64)
    for linear in maps(shape[1]):
        for coupling in couplings(shape):
            block = randomise_(Conjugated(linear, coupling).double())
            z, log_det = block(x)
            back, inverse_log_det = block.inverse(z)
            assert max_error(back, x) < 1e-9
            assert max_error(inverse_log_det, -log_det) < 1e-9
            if x.numel():
                assert max_error(log_det.expand(len(x)), jacobian_log_det(lambda v: block(v)[0], x)) < 1e-9  # noqa: B023
                assert max_error(z, x) > 1e-3
            fused = block.fuse()
            expected = (z, log_det, x)
            found = (*fused(x), fused.inverse(z)[0])
            for ours, theirs in zip(found, expected, strict=True):
                assert max_error(ours, theirs) < 1e-9


def test_householder_is_orthogonal_and_a_product_of_reflections():
    layer = randomise_(Householder(4, reflections=3).double())
    matrix = layer.matrix()
    assert max_error(matrix @ matrix.mT, torch.eye(4)) < 1e-14
    assert torch.linalg.det(matrix).item() == pytest.approx(-1)
    expected = torch.eye(4, dtype=torch.float64)
    for v in layer.vectors:
        expected = expected @ (torch.eye(4) - 2 * torch.outer(v, v) / (v @ v))
    assert max_error(matrix, expected) < 1e-14
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    assert max_error(layer(x)[0], torch.einsum("ij,bjp->bip", matrix, x)) < 1e-14
    assert layer(x)[1] == 0
    assert torch.autograd.gradcheck(lambda v: layer(v)[0], x.requires_grad_())
    assert layer.float()(x[:0].float())[0].shape == (0, 4, 3)
    assert layer.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("odd", [False, True])
def test_affine_checkerboard_is_the_coupling_written_out(odd):
    coupling = randomise_(AffineCheckerboard(2, subnet=conv_subnet, odd=odd, cond_channels=1).double())
    x, cond = torch.randn(3, 2, 3, 4, dtype=torch.float64), torch.randn(1, 1, 3, 4, dtype=torch.float64)
    total = torch.arange(3)[:, None] + torch.arange(4)
    passive = (total % 2 == int(odd)).double()
    params = coupling.subnet(torch.cat([x * passive, cond.expand(3, 1, 3, 4)], 1))
    log_scale = 2.0 * torch.tanh(0.1 * params[:, :2]) * (1 - passive)
    expected = x * log_scale.exp() + 0.1 * params[:, 2:] * (1 - passive)
    y, log_det = coupling(x, cond)
    assert max_error(y, expected) < 1e-12
    assert max_error(log_det, log_scale.flatten(1).sum(1)) < 1e-12
    assert max_error(y * passive, x * passive) == 0
    assert max_error(coupling.fuse()(x, cond)[0], y) < 1e-12
    assert torch.autograd.gradcheck(lambda v: coupling(v, cond), x.requires_grad_())


def test_reversible_gradients_are_those_of_autograd():
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    blocks = [Conjugated(linear, c) for linear in maps(4) for c in couplings(x.shape)]
    blocks.append(USFBlock(4, subnet=conv_subnet, mask="checkerboard", odd=True))
    flow = randomise_(FlowSequence(blocks).double())
    results = []
    for memory in ("standard", "reversible"):
        flow.memory = memory
        z, log_det = flow(x)
        loss = (torch.linspace(0.5, 2, z.numel()).view_as(z) * z.square()).sum() - log_det.sum()
        results.append(torch.autograd.grad(loss, [x, *flow.parameters()], allow_unused=True))
    for expected, actual in zip(*results, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert (actual - expected).norm() <= 1e-8 * expected.norm() + 1e-12


def test_both_colours_of_checkerboards_reach_every_position():
    blocks = [USFBlock(1, subnet=conv_subnet, mask="checkerboard", odd=odd) for odd in (False, True)]
    flow = randomise_(FlowSequence(blocks))
    x = torch.randn(2, 1, 3, 4)
    z, _ = flow(x)
    assert ((z - x).abs() > 1e-6).all()
    one, _ = blocks[0](x)
    assert torch.equal((one - x)[:, :, 0, ::2], torch.zeros(2, 1, 2))
    assert max_error(flow.fuse()(x)[0], z) < 1e-5
    assert max_error(flow.inverse(z)[0], x) < 1e-5


def test_errors():
    with pytest.raises(ValueError, match="reflections: expected an int at least 1, found 0"):
        Householder(3, reflections=0)
    with pytest.raises(ValueError, match=r"x: expected 3 channels in dimension 1, found shape \(2, 4\)"):
        Householder(3)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="clamp"):
        AffineCheckerboard(3, subnet=conv_subnet, clamp=0.0)
    with pytest.raises(ValueError, match="a checkerboard needs spatial dimensions"):
        AffineCheckerboard(3, subnet=linear_subnet)(torch.randn(2, 3))
    with pytest.raises(ValueError, match="odd: expected False for mask='half', found True"):
        USFBlock(4, subnet=conv_subnet, odd=True)


def test_a_conjugated_block_passes_its_condition_both_ways():
    block = Conjugated(Householder(4), AffineCoupling(4, subnet=conv_subnet, cond_channels=2))
    block = randomise_(block.double())
    x, cond = (torch.randn(2, channels, 3, 3, dtype=torch.float64) for channels in (4, 2))
    z, log_det = block(x, cond)
    back, inverse_log_det = block.inverse(z, cond)
    assert max_error(back, x) < 1e-12
    assert max_error(inverse_log_det, -log_det) < 1e-12
