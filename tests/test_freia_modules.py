"""FrEIA's contract for invertible modules: inverses, log-determinants, tuples, graphs; and its own blocks."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers import jacobian_log_det
from torch import nn

import usf_kernels as usf

pytest.importorskip("FrEIA")
from FrEIA import framework, modules

from usf_kernels.integrations import freia

LAYERS = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]
FLOWS = {"LU": freia.LUConv1x1, "conjugated": freia.USFBlock, "step": freia.FlowStep}
COUPLINGS = [
    (modules.GLOWCouplingBlock, freia.FastGLOWCouplingBlock),
    (modules.RNVPCouplingBlock, freia.FastRNVPCouplingBlock),
    (modules.NICECouplingBlock, freia.FastNICECouplingBlock),
]
ALL_IN_ONE = [
    {},
    {"gin_block": True, "permute_soft": True},
    {"learned_householder_permutation": 2},
    {"learned_householder_permutation": 2, "permute_soft": True, "reverse_permutation": True},
    {"global_affine_type": "SIGMOID", "global_affine_init": 0.8, "reverse_permutation": True},
    {"global_affine_type": "EXP", "affine_clamping": 1.0, "gin_block": True},
]
CLAMPS = ["ATAN", "TANH", "SIGMOID", lambda raw: raw / (1 + raw.abs())]


def subnet_of(rank):
    layer, options = LAYERS[rank], {} if rank == 0 else {"kernel_size": 3, "padding": 1}
    return lambda c_in, c_out: nn.Sequential(layer(c_in, 5, **options), nn.Tanh(), layer(5, c_out, **options))


def trained(module):
    """In float64, parameters off their initial values, rotations more orthogonal than float32 has them."""
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith(("w_perm", "w_0")):
                u, _, v = torch.linalg.svd(parameter.flatten(1))
                parameter.copy_((u @ v).view_as(parameter))
        for block in module.modules():
            if getattr(block, "w_perm_inv", None) is not None:
                block.w_perm_inv.copy_(block.w_perm.transpose(0, 1))
    return module


def check(module, dims, conditions=()):
    """Inverse of forward, and log-dets of both directions against the Jacobian."""
    module = trained(module)
    x = torch.randn(2, *dims, dtype=torch.float64)
    c = [torch.randn(2, *d, dtype=torch.float64) for d in conditions]
    for rev in (False, True):
        (y,), log_det = module((x,), c, rev=rev)
        assert log_det.shape == (2,)
        (again,), back = module([y], c, rev=not rev)
        torch.testing.assert_close(again, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(back, -log_det, rtol=1e-9, atol=1e-9)
        for i in range(2):
            ones = [d[i : i + 1] for d in c]
            one = jacobian_log_det(lambda v, ones=ones, rev=rev: module((v,), ones, rev)[0][0], x[i : i + 1])
            torch.testing.assert_close(log_det[i : i + 1], one, rtol=1e-8, atol=1e-8)
    assert module.output_dims([dims]) == [dims]


@pytest.mark.parametrize("options", ALL_IN_ONE, ids=str)
def test_all_in_one_blocks(options):
    for rank, conditions in ((0, 2), (2, 1)):
        dims, dims_c = (5, *(3, 2)[:rank]), [(2, *(3, 2)[:rank])] * conditions
        block = freia.FastAllInOneBlock([dims], dims_c, subnet_constructor=subnet_of(rank), **options)
        check(block, dims, dims_c)


@pytest.mark.parametrize(("original", "fast"), COUPLINGS)
def test_two_sided_couplings(original, fast):
    clamps = [{}] if original is modules.NICECouplingBlock else [{"clamp_activation": f} for f in CLAMPS]
    for rank, options in enumerate([*clamps, *clamps][: max(2, len(clamps))]):
        rank, split = rank % 4, (0.5, 2, 0.2)[rank % 3]
        dims, dims_c = (5, *(2, 3, 2)[:rank]), [(2, *(2, 3, 2)[:rank])] * (rank % 2)
        block = fast([dims], dims_c, subnet_constructor=subnet_of(rank), split_len=split, **options)
        check(block, dims, dims_c)


@pytest.mark.parametrize("kind", FLOWS)
def test_flow_modules(kind):
    for rank, options in ((0, {}), (1, {}), (2, {}), (3, {})):
        dims, dims_c = (4, *(3, 2, 2)[:rank]), [(2, *(3, 2, 2)[:rank]), (1, *(3, 2, 2)[:rank])]
        if kind == "LU":
            check(freia.LUConv1x1([dims], **options), dims)
            continue
        for conditions in ([], dims_c):
            check(FLOWS[kind]([dims], conditions, subnet_constructor=subnet_of(rank)), dims, conditions)


def test_options_of_flow_modules():
    dims = (4, 3, 2)
    subnet = subnet_of(2)
    check(freia.LUConv1x1([dims], bias=False, diagonal="fixed", init="identity"), dims)
    check(freia.USFBlock([dims], subnet_constructor=subnet, mask="checkerboard"), dims)
    affine = {"coupling": "affine", "linear": "permutation", "act_norm": False, "clamp": 1.0}
    check(freia.FlowStep([dims], subnet_constructor=subnet, zero_init=False, **affine), dims)


@pytest.mark.parametrize(("original", "fast"), COUPLINGS)
def test_couplings_are_the_originals(original, fast):
    clamps = [{}] if original is modules.NICECouplingBlock else [{"clamp_activation": f} for f in CLAMPS]
    for options, dtype in itertools.product(clamps, (torch.float32, torch.float64)):
        dims, dims_c = (7, 4, 3), [(2, 4, 3)]
        theirs = original([dims], dims_c, subnet_constructor=subnet_of(2), **options).to(dtype)
        ours = fast([dims], dims_c, subnet_constructor=subnet_of(2), **options).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        replaced = copy.deepcopy(theirs)
        assert usf.replace_blocks(replaced).count == 1
        assert type(replaced) is fast
        c = [torch.randn(2, 2, 4, 3, dtype=dtype)]
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        for rev, recorded in itertools.product((False, True), (True, False)):
            x = torch.randn(2, *dims, dtype=dtype)
            results = []
            for module in (theirs, ours, replaced):
                leaf = x.clone().requires_grad_(recorded)
                with torch.set_grad_enabled(recorded):
                    (y,), log_det = module((leaf,), c, rev=rev)
                log_det = log_det + torch.zeros(2, dtype=dtype)  # NICE's is a float in FrEIA
                results.append([y, log_det])
                if recorded:
                    module.zero_grad()
                    (y.square().sum() + log_det.sum()).backward()
                    results[-1] += [leaf.grad, *(p.grad for p in module.parameters())]
            for result in results[1:]:
                for found, expected in zip(result, results[0], strict=True):
                    atol = tolerance * max(expected.abs().max().item(), 0.01)
                    torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)
        attributes = set(theirs.__dict__)
        assert usf.restore_blocks(replaced) == 1
        assert type(replaced) is original
        assert set(replaced.__dict__) == attributes


@pytest.mark.parametrize("recorded", [False, True])
def test_under_autocast_and_with_a_subnet_in_another_dtype(recorded):
    def wide(c_in, c_out):
        return nn.Sequential(ToDouble(), nn.Conv2d(c_in, c_out, 1).double())

    cases = list(itertools.product(COUPLINGS, (subnet_of(2), wide)))
    cases.append(((modules.AllInOneBlock, freia.FastAllInOneBlock), subnet_of(2)))
    for (original, fast), subnet in cases:
        options = {"gin_block": True} if original is modules.AllInOneBlock else {}
        theirs = original([(6, 3, 3)], subnet_constructor=subnet, **options)
        ours = fast([(6, 3, 3)], subnet_constructor=subnet, **options)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 6, 3, 3)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=subnet is not wide)
        for rev in (False, True):
            with torch.set_grad_enabled(recorded), mixed:
                found, expected = ours((x,), rev=rev)[0][0], theirs((x,), rev=rev)[0][0]
            tolerance = 1e-6 if subnet is wide else 0.05
            assert found.dtype == torch.promote_types(expected.dtype, torch.float32)
            atol = tolerance * expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=0, atol=atol, check_dtype=False)


class ToDouble(nn.Module):
    def forward(self, x):
        return x.double()


def test_a_subnet_may_return_its_input():
    """Nothing that a subnet returns is written to."""
    for original, fast in COUPLINGS:
        theirs = original([(4, 3)], subnet_constructor=lambda i, o: Repeat(o // i))
        ours = fast([(4, 3)], subnet_constructor=lambda i, o: Repeat(o // i))
        x = torch.randn(2, 4, 3)
        with torch.no_grad():
            expected = theirs((x.clone(),))[0][0]
            torch.testing.assert_close(ours((x,))[0][0], expected)
            torch.testing.assert_close(theirs((x,))[0][0], expected)


class Repeat(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x):
        return x if self.times == 1 else torch.cat([x] * self.times, dim=1)


def in_a_row(sequence):
    subnet = subnet_of(2)
    sequence.append(freia.FastAllInOneBlock, subnet_constructor=subnet)
    sequence.append(modules.AllInOneBlock, subnet_constructor=subnet)
    sequence.append(freia.LUConv1x1)
    sequence.append(freia.FlowStep, subnet_constructor=subnet, cond=0, cond_shape=(2, 4, 2))
    sequence.append(freia.FastGLOWCouplingBlock, subnet_constructor=subnet)
    sequence.append(modules.PermuteRandom, seed=1)
    sequence.append(freia.FastNICECouplingBlock, subnet_constructor=subnet, cond=0, cond_shape=(2, 4, 2))
    sequence.append(freia.USFBlock, subnet_constructor=subnet)
    return sequence.double()


def graph_nodes():
    """Two branches with a condition, joined again."""
    subnet = {"subnet_constructor": subnet_of(2)}
    source, cond = framework.InputNode(4, 4, 2), framework.ConditionNode(2, 4, 2)
    first = framework.Node(source, freia.FastAllInOneBlock, subnet, conditions=cond)
    halves = framework.Node(first, modules.Split, {})
    left = framework.Node(halves.out0, freia.USFBlock, subnet)
    right = framework.Node(halves.out1, modules.GLOWCouplingBlock, subnet)
    joined = framework.Node([left.out0, right.out0], modules.Concat, {})
    last = framework.Node(joined, freia.LUConv1x1, {})
    return [source, cond, first, halves, left, right, joined, last, framework.OutputNode(last)]


@pytest.mark.parametrize("kind", ["SequenceINN", "GraphINN", "ReversibleGraphNet"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_beside_their_own_in_nets(kind):
    if kind == "SequenceINN":
        net = in_a_row(framework.SequenceINN(4, 4, 2))
    else:
        options = {} if kind == "GraphINN" else {"verbose": False}
        net = getattr(framework, kind)(graph_nodes(), **options).double()
    x, c = torch.randn(2, 4, 4, 2, dtype=torch.float64), [torch.randn(2, 2, 4, 2, dtype=torch.float64)]
    z, log_det = net(x, c)
    again, back = net(z, c, rev=True)
    torch.testing.assert_close(again, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back, -log_det, rtol=1e-9, atol=1e-9)
    for i in range(2):
        one = jacobian_log_det(lambda v, i=i: net(v, [c[0][i : i + 1]])[0], x[i : i + 1])
        torch.testing.assert_close(log_det[i : i + 1], one, rtol=1e-8, atol=1e-8)


def test_rows_of_our_modules_run_in_their_inference_form():
    net = freia.FastSequenceINN(4, 3, 3)
    for kind in (freia.FlowStep, freia.USFBlock, freia.FastAllInOneBlock):
        net.append(kind, subnet_constructor=subnet_of(2))
    net.append(freia.LUConv1x1)
    net = trained(net).eval()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for rev in (False, True):
        expected = net(x, rev=rev)
        with torch.no_grad():
            found = net(x, rev=rev)
        torch.testing.assert_close(found, tuple(t.detach() for t in expected), rtol=1e-9, atol=1e-9)
    assert net._fused is not None
    net.append(freia.FastAllInOneBlock, subnet_constructor=subnet_of(2), gin_block=True)
    with torch.no_grad():  # the mean over positions has no such form
        assert net._one_condition() is False
        torch.testing.assert_close(net.double()(x), net(x), rtol=0, atol=0)


def test_all_of_them_pickle():
    subnet = {"subnet_constructor": lambda c_in, c_out: nn.Conv2d(c_in, c_out, 1)}
    made = [fast([(4, 3, 3)], **subnet) for _, fast in COUPLINGS]
    made += [freia.FastGLOWCouplingBlock([(4, 3, 3)], clamp_activation=f, **subnet) for f in CLAMPS[:3]]
    made += [freia.FastAllInOneBlock([(4, 3, 3)], **options, **subnet) for options in ALL_IN_ONE]
    made += [freia.LUConv1x1([(4, 3, 3)]), freia.USFBlock([(4, 3, 3)], **subnet)]
    x = torch.randn(2, 4, 3, 3)
    for module in made:
        again = pickle.loads(pickle.dumps(module))
        for rev in (False, True):
            torch.testing.assert_close(again((x,), rev=rev), module((x,), rev=rev), rtol=0, atol=0)


def test_bad_arguments():
    subnet = {"subnet_constructor": subnet_of(2)}
    with pytest.raises(
        ValueError, match=r"dims_in: expected the shape of one input, found \[\(4,\), \(4,\)\]"
    ):
        freia.LUConv1x1([(4,), (4,)])
    with pytest.raises(ValueError, match=r"dims_c: expected no conditions, found \[\(2, 3, 3\)\]"):
        freia.LUConv1x1([(4, 3, 3)], [(2, 3, 3)])
    with pytest.raises(ValueError, match=r"dims_c: expected the spatial sizes of dims_in \(4, 3, 3\), found"):
        freia.USFBlock([(4, 3, 3)], [(2, 3, 4)], **subnet)
    with pytest.raises(ValueError, match=r"mask: expected one of"):
        freia.USFBlock([(4, 3, 3)], mask="spiral", **subnet)
    with pytest.raises(ValueError, match=r"coupling: expected one of"):
        freia.FlowStep([(4, 3, 3)], coupling="cubic", **subnet)
    with pytest.raises(ValueError, match="Global affine activation"):
        freia.FastAllInOneBlock([(4, 3, 3)], global_affine_type="TAN", **subnet)
