import itertools

import pytest
import torch
from helpers import conv_subnet, linear_subnet, max_error, randomise_
from torch import nn

from usf_kernels.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    FlowSequence,
    FlowStep,
    LUConv1x1,
    Permutation,
    USFBlock,
)
from usf_kernels.nn.folding import parts
from usf_kernels.nn.fused_blocks import AdditiveBlock, ProjectedBlock
from usf_kernels.nn.fused_maps import Exchange, Product, Reorder
from usf_kernels.nn.fusing import fuse_parts
from usf_kernels.nn.stage_extension import StageExtension
from usf_kernels.nn.stage_run import StageRun


def pointwise(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, 3, 1), nn.GELU(), nn.Conv2d(3, c_out, 1))


def wide(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_in, 1), nn.ReLU(), nn.Conv2d(c_in, c_out, 1))


def narrow(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, 2, 1), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(2, c_out, 3, padding=1))


def single(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def single_pointwise(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 1)


def unknown(c_in, c_out):
    """Neither its first nor its last layer can take a map in."""
    return nn.Sequential(nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 1), nn.Tanh())


SUBNETS = [conv_subnet, pointwise, narrow, single, single_pointwise, unknown]


def count(fused, kind):
    return sum(isinstance(stage, kind) for stage in fused.modules())


def flow_of(steps, first=()):
    return randomise_(FlowSequence([*first, *steps])).eval()


def step(channels=7, subnet=conv_subnet, **options):
    return FlowStep(channels, subnet=subnet, zero_init=False, **options)


def assert_same(flow, x, cond=None, dtype=torch.float64, tolerance=1e-9):
    """All that the fused flow offers, against the flow, which is in float64."""
    with torch.no_grad():
        z, log_det = flow(x, cond)
    fused, kept = flow.fuse(dtype), x.clone()
    fused_z, fused_log_det = fused(x, cond)
    back, inverse_log_det = fused.inverse(fused_z, cond)
    norm, position_log_det = fused.squared_norm_and_log_det(x, cond)
    assert torch.equal(fused.squared_norm(x, cond), norm)
    assert torch.equal(x, kept)
    assert fused_z.dtype == back.dtype == dtype
    assert fused_log_det.shape == log_det.shape
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(fused_z, z, **close)
    torch.testing.assert_close(fused_log_det, log_det, **close)
    torch.testing.assert_close(norm, z.square().sum(1), **close)
    summed = position_log_det.sum(tuple(range(1, x.ndim - 1))) if x.ndim > 2 else position_log_det
    torch.testing.assert_close(summed, log_det.expand(len(x)), **close)
    torch.testing.assert_close(back, x, **{**close, "atol": 100 * tolerance})
    torch.testing.assert_close(inverse_log_det, -log_det, **{**close, "atol": 100 * tolerance})
    return fused


@pytest.mark.parametrize("subnet", SUBNETS)
@pytest.mark.parametrize("linear", ["lu", "permutation", "none"])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_a_sequence_of_steps(coupling, linear, subnet):
    for act_norm, cond_channels, first, length in itertools.product(
        (True, False), (0, 3), ((), (LUConv1x1(7),), (ActNorm(7), Permutation(7))), (1, 3)
    ):
        options = {"coupling": coupling, "linear": linear, "act_norm": act_norm}
        steps = [step(subnet=subnet, cond_channels=cond_channels, **options) for _ in range(length)]
        flow = flow_of(steps, first).double()
        x = torch.randn(2, 7, 4, 5, dtype=torch.float64)
        assert_same(flow, x, torch.randn(1, 3, 4, 5, dtype=torch.float64) if cond_channels else None)


@pytest.mark.parametrize("mask", ["half", "channel", "checkerboard"])
@pytest.mark.parametrize("subnet", [conv_subnet, pointwise, unknown])
def test_conjugated_blocks(subnet, mask):
    for cond_channels in (0, 2):
        options = {"mask": mask, "cond_channels": cond_channels, "zero_init": False}
        blocks = [USFBlock(5, subnet=subnet, **options) for _ in range(3)]
        x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
        cond = torch.randn(2, 2, 3, 4, dtype=torch.float64) if cond_channels else None
        # Three halves of a product and a whole one take less than six halves where a convolution takes the
        # map behind it in, and in any case less than six and a whole one.
        halves = mask != "checkerboard" and subnet is not pointwise
        alone = halves and subnet is conv_subnet
        for flow, exchanges, products in (
            (flow_of(blocks).double(), 3 * alone, 1 * alone),
            (flow_of(blocks, [LUConv1x1(5)]).double(), 3 * halves, 1),
            (blocks[0], 0, 0),
        ):
            fused = assert_same(flow, x, cond)
            assert count(fused, Exchange) == exchanges
            assert count(fused, Product) == products


@pytest.mark.parametrize(
    "module",
    [
        ActNorm(5),
        Permutation(5, seed=1),
        LUConv1x1(5, init="orthogonal"),
        AdditiveCoupling(5, subnet=conv_subnet, zero_init=False),
        AffineCoupling(5, subnet=conv_subnet, zero_init=False, clamp=0.7),
        step(5),
    ],
    ids=lambda module: type(module).__name__,
)
def test_every_module(module):
    assert_same(randomise_(module).double().eval(), torch.randn(2, 5, 3, 4, dtype=torch.float64))


def test_vectors_volumes_and_layouts():
    vectors = flow_of([step(subnet=linear_subnet) for _ in range(2)]).double()
    assert_same(vectors, torch.randn(6, 7, dtype=torch.float64))
    volumes = flow_of([step(subnet=lambda i, o: nn.Conv3d(i, o, 3, padding=1)) for _ in range(2)]).double()
    assert_same(volumes, torch.randn(2, 7, 3, 2, 4, dtype=torch.float64))
    maps = flow_of([step(coupling="affine", linear="permutation") for _ in range(2)]).double()
    x = torch.randn(2, 9, 4, 5, dtype=torch.float64)[:, 1:8]
    for layout in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        assert_same(maps, layout)
    assert_same(maps, x[:0])
    assert_same(vectors, torch.randn(0, 7, dtype=torch.float64))


def test_a_conditioner_sees_half_of_a_product():
    flow = flow_of([step(8, subnet) for subnet in (conv_subnet, pointwise, conv_subnet)]).double()
    fused = assert_same(flow, torch.randn(2, 8, 4, 5, dtype=torch.float64))
    kinds = [type(stage) for run in fused.stages for stage in getattr(run, "stages", [run])]
    # The two layers of 3 in the pointwise one take the maps in: as many multiplications as half a product.
    assert kinds == [AdditiveBlock, ProjectedBlock, Exchange, AdditiveBlock, Product]
    (exchange,) = (stage for stage in fused.modules() if isinstance(stage, Exchange))
    assert exchange.weight.shape == (4, 8)
    rows = torch.randn(6, 8, dtype=torch.float64)
    there, _ = exchange(rows.clone(), (6,), None, inverse=False)
    assert not torch.equal(there, rows)
    assert max_error(exchange(there.clone(), (6,), None, inverse=True)[0], rows) < 1e-9


@pytest.mark.parametrize(
    ("dtype", "device", "halves"),
    [(torch.float32, "cpu", 2), (torch.bfloat16, "cpu", 0), (torch.float32, "meta", 0)],
)
def test_on_gpus_and_in_half_precision_there_are_no_halves_of_products(dtype, device, halves):
    flow = flow_of([step(8) for _ in range(3)])
    assert count(fuse_parts(list(parts(flow)), dtype, torch.device(device)), Exchange) == halves


@pytest.mark.parametrize("linear", ["lu", "permutation"])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_float32_errs_as_little_as_the_flow_itself(coupling, linear):
    for subnet in (conv_subnet, pointwise):
        options = {"coupling": coupling, "linear": linear}
        flow = flow_of([step(20, subnet, **options) for _ in range(8)], [LUConv1x1(20)])
        x = torch.randn(2, 20, 6, 6)
        with torch.no_grad():
            eager = flow(x)[0]
            fused = flow.fuse()(x)[0]
            truth = flow.double()(x.double())[0]
        allowed = 4 * (eager - truth).abs().max() + 1e-6 * truth.abs().max()
        assert (fused - truth).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_half_precision(coupling, dtype):
    options = {"coupling": coupling, "linear": "permutation"}
    flow = FlowSequence([step(12, pointwise, **options) for _ in range(4)]).eval()
    x = torch.randn(3, 12, 5, 4)
    with torch.no_grad():
        z, log_det = flow(x)
    fused_z, fused_log_det = flow.fuse(dtype)(x)
    assert fused_z.dtype == dtype
    assert (fused_z - z).abs().max() < 0.05
    assert fused_log_det.dtype == torch.float32
    torch.testing.assert_close(fused_log_det, log_det, rtol=0.02, atol=0.3)


@pytest.mark.parametrize("images", [0, 1, 5])  # of the condition; 0 for none
@pytest.mark.parametrize("linear", ["lu", "permutation"])
def test_long_runs_of_pointwise_blocks_go_in_stretches(monkeypatch, linear, images):
    coupling = "affine" if linear == "permutation" else "additive"
    options = {"coupling": coupling, "linear": linear, "cond_channels": 3 if images else 0}
    flow = flow_of([step(8, wide, **options) for _ in range(3)])
    fused, x = flow.fuse(), torch.randn(5, 8, 6, 7)
    cond = torch.randn(images, 3, 6, 7) if images else None
    run = next(stage for stage in fused.stages if isinstance(stage, StageRun))
    whole, log_det = fused(x, cond)
    monkeypatch.setattr(StageExtension, "takes", lambda rows: False)
    lengths = []
    run.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
    for size in (1, 5, 84, 130):  # rows: one, a few of an image, two images, three and a bit
        monkeypatch.setattr("usf_kernels.nn.stage_run.CHUNK_BYTES", size * 32)
        lengths.clear()
        parts, part_log_det = fused(x, cond)
        assert max(lengths) <= size
        assert sum(lengths) == 5 * 6 * 7
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(part_log_det, log_det)
        torch.testing.assert_close(fused.inverse(parts, cond)[0], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coupling", ["additive", "affine"])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_conditions_of_vectors(batch, coupling):
    def subnet(c_in, c_out):
        return nn.Sequential(nn.Linear(c_in, 4), nn.ReLU(), nn.Linear(4, c_out))

    options = {"subnet": subnet, "cond_channels": 3, "coupling": coupling}
    flow = flow_of([step(**options) for _ in range(2)]).double()
    x = torch.randn(batch, 7, dtype=torch.float64)
    for images in {1, batch}:
        assert_same(flow, x, torch.randn(images, 3, dtype=torch.float64))


@pytest.mark.parametrize("subnet", [conv_subnet, wide, unknown])
def test_a_condition_is_projected_once_for_many_inputs(subnet):
    flow = flow_of([step(subnet=subnet, cond_channels=2, coupling="affine") for _ in range(2)])
    fused, cond = flow.fuse(), torch.randn(1, 2, 3, 4)
    projected = fused.project(cond)
    assert [p.shape[:2] for p in projected] == 2 * [(1, 12)]
    for batch in (0, 1, 3):
        x = torch.randn(batch, 7, 3, 4)
        for found, expected in zip(fused(x, projected), fused(x, cond), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(fused.inverse(x, projected)[0], fused.inverse(x, cond)[0])
        assert torch.equal(fused.squared_norm(x, projected), fused.squared_norm(x, cond))
    with pytest.raises(
        ValueError, match=r"cond: expected what `project` returns, \(1 or 1, 15, D\).*found \[\(1, 12"
    ):
        fused(torch.randn(1, 7, 3, 5), projected)
    for wrong in (
        projected[:1],
        [p[..., :-1] for p in projected],
        [p[0] for p in projected],
        [p.to("meta") for p in projected],
        [None, None],
    ):
        with pytest.raises(ValueError, match=r"cond: expected what `project` returns, \(1 or 3, 12, D\)"):
            fused(x, wrong)
    with pytest.raises(ValueError, match=r"cond: expected 2 channels"):
        fused.project(torch.randn(1, 3, 3, 4))


def test_maps_between_conditioners_are_one():
    first = [LUConv1x1(20), ActNorm(20), Permutation(20)]
    lu = flow_of([step(20, wide) for _ in range(3)], first).fuse()
    (run,) = lu.stages
    assert [type(stage) for stage in run.stages] == [Product, *3 * [ProjectedBlock]]
    orders = flow_of([step(20, linear="permutation") for _ in range(3)]).fuse()
    assert sum(isinstance(stage, Reorder) for stage in orders.stages) == 1
    assert not any(isinstance(module, Product) for module in orders.modules())


def test_maps_that_cannot_be_undone_well_are_not_undone():
    steps = [step(20, pointwise, act_norm=False) for _ in range(3)]
    for one in steps:
        one.linear.log_diagonal.data[:] = torch.linspace(-5, 5, 20)
    flow = FlowSequence(steps).eval()
    x = torch.randn(2, 20, 3, 3)
    with torch.no_grad():
        truth = flow.double()(x.double())[0]
    error = (flow.float().fuse()(x)[0] - truth).abs().max() / truth.abs().max()
    assert error < 1e-5
    assert sum(isinstance(stage, Product) for stage in flow.fuse().modules()) == 3


def test_the_flow_stays_as_it_is():
    flow = flow_of([step() for _ in range(2)]).train()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    x = torch.randn(2, 7, 3, 3, requires_grad=True)
    z, _ = flow.fuse()(x)
    assert not z.requires_grad
    assert flow.training
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())
    assert all(p.requires_grad for p in flow.parameters())


def test_it_stays_in_evaluation_mode_as_part_of_a_model_that_trains():
    fused, x = flow_of([step(subnet=unknown)]).fuse(), torch.randn(4, 7, 3, 3)
    expected = fused(x)[0]
    nn.Sequential(fused).train()
    assert torch.equal(fused(x)[0], expected)


def test_any_default_device():
    options = {"coupling": "affine", "cond_channels": 2}
    for flow in (
        flow_of([step(**options), step(linear="permutation", **options)], [ActNorm(7)]),
        flow_of([USFBlock(6, subnet=pointwise, mask=mask) for mask in ("half", "checkerboard")]),
    ):
        channels, conditioned = (7, True) if isinstance(flow[0], ActNorm) else (6, False)
        x, cond = torch.randn(2, channels, 3, 4), torch.randn(1, 2, 3, 4) if conditioned else None
        expected = flow.fuse()(x, cond)[0]
        with torch.device("meta"):
            fused = flow.fuse()
            assert torch.equal(fused(x, cond)[0], expected)
            fused.load_state_dict(fused.state_dict())


def test_the_state_holds_the_log_determinant_too():
    x = torch.randn(2, 6, 3, 4)
    forms = [flow_of([step(6, act_norm=False) for _ in range(2)]).fuse() for _ in range(2)]
    first, second = forms
    assert first(x)[1] != second(x)[1]
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x)[1], second(x)[1])
    assert torch.equal(first(x)[0], second(x)[0])


def test_compiles_and_exports_to_what_it_gives():
    flow = flow_of([step(8, coupling="affine", linear="permutation"), step(8, pointwise)], [LUConv1x1(8)])
    fused, x = flow.fuse(), torch.randn(2, 8, 5, 6)
    expected = fused(x)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
    for ours, theirs in zip(program.module()(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert program.module()(torch.randn(5, 8, 5, 6))[0].shape == (5, 8, 5, 6)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_errors():
    flow = FlowSequence([step(cond_channels=2)]).eval()
    fused = flow.fuse()
    with pytest.raises(ValueError, match="x: expected 7 channels"):
        fused(torch.randn(2, 6, 3, 3))
    with pytest.raises(ValueError, match="cond: expected a tensor with 2 channels, found None"):
        fused(torch.randn(2, 7, 3, 3))
    with pytest.raises(ValueError, match="cond: expected batch size 1 or 2"):
        fused(torch.randn(2, 7, 3, 3), torch.randn(3, 2, 3, 3))
    with pytest.raises(ValueError, match=r"inputs: expected tensors on one CUDA device, found \['cpu'\]"):
        fused.capture(torch.randn(2, 7, 3, 3), torch.randn(1, 2, 3, 3))
    with pytest.raises(TypeError, match="dtype: expected float32"):
        flow.fuse(torch.int32)
    with pytest.raises(ValueError, match="at least one step"):
        FlowSequence([]).fuse()
    with pytest.raises(TypeError, match=r"fuse: expected a flow module of .*, found Linear"):
        FlowSequence([nn.Linear(2, 2)]).fuse()


def test_linear_maps_alone_project_any_condition():
    fused = FlowSequence([LUConv1x1(4), Permutation(4)]).fuse()
    x, cond = torch.randn(2, 4), torch.randn(2, 3)
    assert torch.equal(fused(x, fused.project(cond))[0], fused(x, cond)[0])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_subnet_of_the_wrong_width_is_refused(activation, coupling, kernel):
    """In the extension, too, which would read memory of others. An affine one's outputs go through a linear
    layer, of which PyTorch speaks."""

    def one_output(c_in, c_out):
        return nn.Sequential(nn.Conv2d(c_in, 1, kernel, padding=kernel // 2), activation())

    fused = FlowStep(128, subnet=one_output, coupling=coupling, linear="none").eval().fuse()
    with pytest.raises((ValueError, RuntimeError), match=r"of subnet: expected|mat1 and mat2"):
        fused(torch.randn(2, 128, 5, 4))


def test_a_subnet_that_does_not_fit_its_input_is_refused():
    fused = FlowStep(64, subnet=lambda c_in, c_out: nn.Conv2d(16, c_out, 1), linear="none").eval().fuse()
    with pytest.raises((ValueError, RuntimeError), match=r"input|mat1 and mat2"):
        fused(torch.randn(2, 64, 5, 4))
