"""AllInOneBlocks made uniformly scaling: what of them survives, what does not, and the way back."""

import copy
import pickle

import pytest
import torch
from helpers import jacobian_log_det
from torch import nn

import usf_kernels as usf

pytest.importorskip("FrEIA")
from FrEIA import framework, modules
from freia_toys import LAYERS, trained

from usf_kernels.integrations import freia
from usf_kernels.integrations.uniform import NOTE, UniformBlock
from usf_kernels.nn import LUConv1x1

OPTIONS = [
    {},
    {"permute_soft": True, "global_affine_type": "SIGMOID"},
    {"learned_householder_permutation": 2, "permute_soft": True},
    {"reverse_permutation": True, "global_affine_type": "EXP"},
    {"reverse_permutation": True, "permute_soft": True},
]


def subnet_of(rank):
    layer, options = LAYERS[rank], {} if rank == 0 else {"kernel_size": 3, "padding": 1}
    return lambda c_in, c_out: nn.Sequential(
        nn.Sequential(layer(c_in, 6, **options), nn.ReLU()), nn.Dropout(0.5), layer(6, c_out, **options)
    )


def block_class(package):
    if package == "FrEIA":
        return modules.AllInOneBlock
    return pytest.importorskip("anomalib.models.components.flow").AllInOneBlock


def block(package="FrEIA", dims=(7, 4, 3), dims_c=(), subnet=None, **options):
    """In evaluation mode and float64, with parameters off their initial values."""
    options["subnet_constructor"] = subnet or subnet_of(len(dims) - 1)
    return trained(block_class(package)([dims], list(dims_c), **options)).eval()


def without_log_scales(made):
    """The same with s = 0: additive, so it survives as a whole."""
    with torch.no_grad():
        for parameter in made.subnet[-1].parameters():
            parameter[: made.splits[1]] = 0
    return made


def features(rank=2, batch=2, channels=7):
    return torch.randn(batch, channels, *(4, 3, 2)[:rank], dtype=torch.float64)


def run(model, x, c=None, rev=False):
    (y,), log_det = model((x,), c or [], rev=rev)
    return y, log_det


@pytest.mark.parametrize("package", ["FrEIA", "anomalib"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_but_the_log_scales_survives(package, options):
    for rank, conditions in ((0, 2), (1, 0), (2, 1), (3, 0)):
        space = (4, 3, 2)[:rank]
        original = without_log_scales(block(package, (7, *space), [(2, *space)] * conditions, **options))
        model = copy.deepcopy(original)
        report = usf.replace_blocks(model, to="usf")
        assert report.replaced == ["AllInOneBlock"]
        assert report.notes == {"AllInOneBlock": NOTE}
        assert isinstance(model, UniformBlock)
        x, c = features(rank), [torch.randn(2, 2, *space, dtype=torch.float64)] * conditions
        for rev in (False, True):
            torch.testing.assert_close(run(model, x, c, rev), run(original, x, c, rev), rtol=1e-9, atol=1e-9)


def test_it_is_uniformly_scaling_and_every_parameter_trains():
    model = block(dims_c=[(2, 4, 3)])
    scale = model.global_scale_activation(model.global_scale).detach()
    usf.replace_blocks(model, to="usf")
    x, c = features(), [torch.randn(2, 2, 4, 3, dtype=torch.float64)]
    z, log_det = run(model, x, c)
    torch.testing.assert_close(log_det, 12 * scale.log().sum().expand(2), rtol=1e-9, atol=1e-9)
    (z.square().sum() - log_det.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    z, log_det = run(model, x, c)
    torch.testing.assert_close(run(model, z, c, True), (x, -log_det), rtol=1e-9, atol=1e-9)
    found = jacobian_log_det(lambda v: run(model, v, [c[0][:1]])[0], x[:1])
    torch.testing.assert_close(log_det[:1], found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("package", ["FrEIA", "anomalib"])
@pytest.mark.parametrize("first", [None, "exact"])
@pytest.mark.parametrize("copied", ["itself", "deepcopy", "pickle"])
def test_restoring_brings_back_the_original(package, first, copied):
    layer = {"subnet": lambda c_in, c_out: nn.Conv2d(c_in, c_out, 1)}
    blocks = [block(package, **layer), block(package, learned_householder_permutation=2, **layer)]
    model, x = nn.ModuleList(blocks), features()
    expected = [run(made, x) for made in model]
    attributes = [set(made.__dict__) for made in model]
    parameters, names = list(model.parameters()), list(model.state_dict())
    if first == "exact":
        usf.replace_blocks(model)
    assert usf.replace_blocks(model, to="usf").count == 2
    converted = run(model[0], x)
    if copied == "deepcopy":
        model = copy.deepcopy(model)
    elif copied == "pickle":
        model = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(run(model[0], x), converted, rtol=0, atol=0)
    model.train()
    assert usf.restore_blocks(model) == 2
    assert [type(made) for made in model] == [block_class(package)] * 2
    assert all(module.training for module in model.modules())
    assert list(model.state_dict()) == names
    assert [set(made.__dict__) for made in model] == attributes
    if copied == "itself":
        assert all(found is one for found, one in zip(model.parameters(), parameters, strict=True))
    for made, result in zip(model, expected, strict=True):
        torch.testing.assert_close(run(made, x), result, rtol=0, atol=0)


def test_a_graph_and_a_sequence_with_all_kinds():
    subnet = {"subnet_constructor": subnet_of(2)}
    nodes = [framework.InputNode(4, 3, 2)]
    for _ in range(2):
        nodes.append(framework.Node(nodes[-1], modules.AllInOneBlock, subnet))
    graph = framework.GraphINN([*nodes, framework.OutputNode(nodes[-1])])
    sequence = framework.SequenceINN(4, 3, 2)
    for options in ({}, {"gin_block": True}):
        sequence.append(modules.AllInOneBlock, **options, **subnet)
    sequence.append(modules.NICECouplingBlock, **subnet)
    sequence.append(modules.GLOWCouplingBlock, **subnet)
    model = nn.ModuleDict({"graph": graph, "sequence": sequence}).double().eval()
    before = sum(parameter.numel() for parameter in model.parameters())
    report = usf.replace_blocks(model, to="usf")
    converted = ["graph.module_list.0", "graph.module_list.1", "sequence.module_list.0"]
    others = ["sequence", "sequence.module_list.1", "sequence.module_list.2"]
    assert sorted(report.replaced) == sorted(converted + others)
    assert list(report.notes) == converted
    assert list(report.left) == ["sequence.module_list.3"]
    assert "of which 3: additive coupling and LU map" in str(report)
    x = features(2, 3, 4)[:, :, :3, :2].contiguous()
    for net in model.values():
        z, log_det = net(x)
        torch.testing.assert_close(net(z, rev=True), (x, -log_det), rtol=1e-6, atol=1e-6)
    assert graph(x)[1].unique().numel() == 1
    with torch.no_grad():  # a row of such blocks runs in its inference form
        row = freia.FastSequenceINN(4, 3, 2)
        row.append(lambda dims: graph.module_list[0])
        row.append(lambda dims: graph.module_list[1])
        torch.testing.assert_close(row.double().eval()(x), graph(x), rtol=1e-9, atol=1e-9)
        assert row._fused is not None
    usf.restore_blocks(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == before


def test_checkpoints_of_what_it_became():
    made, other = block(), block()
    for model in (made, other):
        usf.replace_blocks(model, to="usf")
    other.load_state_dict(made.state_dict())
    x = features()
    torch.testing.assert_close(run(other, x), run(made, x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        block().load_state_dict(made.state_dict())


class Backwards(nn.Module):
    """Whose layer registered last runs first."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.second = nn.Conv2d(c_out, c_out, 1)
        self.first = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.second(self.first(x))


class Flipped(nn.Module):
    """Whose last layer's outputs come in another order."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.layer = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.layer(x).flip(1)


@pytest.mark.parametrize(
    ("subnet", "why"),
    [
        (lambda i, o: nn.Sequential(nn.Conv2d(i, o, 1), nn.Tanh()), r"ends with Tanh\(\)"),
        (
            lambda i, o: nn.Sequential(nn.Conv2d(i, o, 1), nn.Conv2d(o, o, 1, groups=2)),
            "ends with Conv2d.*plain",
        ),
        (lambda i, o: nn.utils.parametrizations.weight_norm(nn.Conv2d(i, o, 1)), "ends with"),
        (Backwards, "does not run with half"),
        (Flipped, "changes the outputs"),
    ],
)
def test_subnets_that_cannot_be_halved(subnet, why):
    model = nn.ModuleList([block(subnet=subnet)])
    state, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"found 0: its subnet .*{why}"):
        usf.replace_blocks(model, to="usf")
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.append(block())
    report = usf.replace_blocks(model, to="usf")
    assert report.replaced == ["1"]
    assert list(report.left) == ["0"]


def test_one_channel_has_nothing_to_couple():
    made = modules.AllInOneBlock([(1, 2, 2)], subnet_constructor=lambda i, o: nn.Identity())
    with pytest.raises(ValueError, match="one channel"):
        usf.replace_blocks(made, to="usf")


def test_frozen_scales_stay_frozen():
    made = nn.Sequential(block())
    for name in ("global_scale", "global_offset"):
        getattr(made[0], name).requires_grad_(False)
    usf.replace_blocks(made, to="usf")
    maps = [module for module in made.modules() if isinstance(module, LUConv1x1)]
    assert maps
    assert not any(p.requires_grad for module in maps for p in module.parameters())
