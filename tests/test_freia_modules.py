"""FrEIA's contract for invertible modules: inverses, log-determinants, tuples, graphs; and its own blocks."""

import pickle

import pytest
import torch
from helpers import jacobian_log_det
from torch import nn

pytest.importorskip("FrEIA")
from FrEIA import framework, modules
from freia_toys import ALL_IN_ONE, CLAMPS, COUPLINGS, subnet_of, trained

from usf_kernels.integrations import freia

FLOWS = {"LU": freia.LUConv1x1, "conjugated": freia.USFBlock, "step": freia.FlowStep}


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


@pytest.mark.parametrize("kind", ["GLOW", "NICE", "AllInOne", "GIN", "LU", "conjugated", "step"])
def test_empty_batches(kind):
    subnet = {"subnet_constructor": subnet_of(2)}
    makers = {"GLOW": freia.FastGLOWCouplingBlock, "NICE": freia.FastNICECouplingBlock, **FLOWS}
    options = {"LU": {}, "GIN": {"gin_block": True, **subnet}}.get(kind, subnet)
    module = makers.get(kind, freia.FastAllInOneBlock)([(4, 3, 2)], **options)
    for rev in (False, True):
        (y,), log_det = module((torch.randn(0, 4, 3, 2),), rev=rev)
        assert y.shape == (0, 4, 3, 2)
        assert log_det.shape == (0,)


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
        assert net.folds is False
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
