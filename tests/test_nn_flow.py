"""Every module: exact inverse, the log-determinant of the float64 Jacobian, saving, compiling, export."""

import copy
import io
import pickle

import pytest
import torch
from helpers import conv_subnet, jacobian_log_det, linear_subnet, max_error, randomise_
from torch import nn
from torch.utils.checkpoint import checkpoint

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

pytestmark = pytest.mark.usefixtures("nan_memory")

COUPLINGS, LINEARS = ("additive", "affine"), ("lu", "permutation", "none")


def modules(channels, subnet, cond_channels=0):
    """(name, module, uniformly scaling) of every kind, then of a sequence mixing them."""
    conditioned = {"subnet": subnet, "cond_channels": cond_channels, "zero_init": False}
    yield "additive", AdditiveCoupling(channels, **conditioned), True
    yield "affine", AffineCoupling(channels, **conditioned, clamp=1.5), False
    yield "lu", LUConv1x1(channels, init="orthogonal"), True
    yield "lu fixed", LUConv1x1(channels, diagonal="fixed", init="orthogonal", bias=False), True
    yield "act norm", ActNorm(channels), True
    yield "frozen act norm", ActNorm(channels, trainable=False), True
    yield "permutation", Permutation(channels), True
    for coupling in COUPLINGS:
        for linear in LINEARS:
            for act_norm in (True, False):
                step = FlowStep(channels, coupling=coupling, linear=linear, act_norm=act_norm, **conditioned)
                yield f"{coupling}, {linear}, act_norm={act_norm}", step, coupling == "additive"
    steps = [FlowStep(channels, linear=linear, **conditioned) for linear in LINEARS]
    yield (
        "uniformly scaling sequence",
        FlowSequence([LUConv1x1(channels), *steps, Permutation(channels)]),
        True,
    )
    steps.append(FlowStep(channels, coupling="affine", **conditioned))
    yield "mixed sequence", FlowSequence([*steps, LUConv1x1(channels, diagonal="fixed")]), False
    yield "empty sequence", FlowSequence([]), True


CASES = [
    pytest.param(shape, cond, name, id=f"{name}-{len(shape) - 2}d{'-cond' if cond else ''}")
    for shape in ((3, 5), (2, 3, 2, 2), (2, 2, 3))
    for cond in (0, 2)
    for name in (
        [n for n, *_ in modules(2, linear_subnet)] if len(shape) != 3 else ["lu", "act norm", "permutation"]
    )
]


@pytest.mark.parametrize(("shape", "cond_channels", "name"), CASES)
def test_inverse_and_log_det(shape, cond_channels, name):
    subnet = conv_subnet if len(shape) == 4 else linear_subnet
    module, uniform = next((m, u) for n, m, u in modules(shape[1], subnet, cond_channels) if n == name)
    module = randomise_(module.double())
    x = 2 * torch.randn(shape, dtype=torch.float64) + 1
    cond = torch.randn(shape[0], cond_channels, *shape[2:], dtype=torch.float64) if cond_channels else None
    module(x, cond)  # initialises the ActNorms
    module = randomise_(module).eval()

    z, log_det = module(x, cond)
    assert log_det.shape == (() if uniform else (shape[0],))
    truth = torch.cat(
        [
            jacobian_log_det(
                lambda v, i=i: module(v, None if cond is None else cond[i : i + 1])[0], x[i : i + 1]
            )
            for i in range(shape[0])
        ]
    )
    assert max_error(log_det.expand(shape[0]), truth) < 1e-9
    back, inverse_log_det = module.inverse(z, cond)
    assert max_error(back, x) < 1e-9
    assert inverse_log_det.shape == log_det.shape
    assert max_error(inverse_log_det, -log_det) < 1e-9


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_shapes_dtypes_and_strides(coupling, linear):
    step = FlowStep(5, subnet=conv_subnet, coupling=coupling, linear=linear, zero_init=False)
    step(torch.randn(4, 5, 6, 6) * 3)
    x = torch.randn(3, 5, 4, 7)
    z, log_det = step(x)
    last = x.to(memory_format=torch.channels_last)
    assert max_error(step(last)[0], z) < 1e-5
    assert step(x[:0])[0].shape == (0, 5, 4, 7)
    assert step.inverse(x[:0])[1].shape == ((0,) if coupling == "affine" else ())
    for dtype in (torch.bfloat16, torch.float16):
        narrow, narrow_log_det = copy.deepcopy(step).to(dtype)(x.to(dtype))
        assert narrow.dtype == dtype
        assert narrow_log_det.dtype == torch.float32
        assert max_error(narrow, z) < 0.2
        assert max_error(narrow_log_det, log_det) < 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = step(x)
        back, _ = step.inverse(z)
    assert z.dtype == log_det.dtype == torch.float32
    assert max_error(back, x) < 1e-4  # the conditioner is rounded, but the same way twice
    (z.square().sum() - log_det.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in step.parameters())


def test_gradients_through_a_sequence_match_numerical_ones():
    flow = FlowSequence(
        [FlowStep(3, subnet=linear_subnet, coupling=c, linear=k) for c in COUPLINGS for k in LINEARS]
    )
    flow = randomise_(flow.double()).eval()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flow, (x,))
    assert torch.autograd.gradcheck(flow.inverse, (x,))
    flow.memory = "standard"
    assert torch.autograd.gradgradcheck(lambda v: flow(v)[0].square().sum() - flow(v)[1].sum(), (x,))
    parameters = {n: p.detach().clone().requires_grad_() for n, p in flow.named_parameters() if "linear" in n}

    def loss(*values):
        z, log_det = torch.func.functional_call(
            flow, dict(zip(parameters, values, strict=True)), (x.detach(),)
        )
        return z.square().sum() - log_det.sum()

    for flow.memory in ("standard", "reversible"):
        assert torch.autograd.gradcheck(loss, tuple(parameters.values()))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_untrained_step_is_its_linear_map(coupling):
    step = FlowStep(6, subnet=conv_subnet, coupling=coupling).eval()
    x = torch.randn(2, 6, 4, 4)
    z, log_det = step(x)
    assert max_error(z, step.linear(x)[0]) < 1e-6
    assert max_error(z.norm(dim=1), x.norm(dim=1)) < 1e-5  # the LU starts as a rotation
    assert log_det.abs().max() < 1e-4
    layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    before = layers[0].weight.clone()
    AdditiveCoupling(6, subnet=lambda c_in, c_out: layers)
    assert torch.equal(layers[0].weight, before)  # the last module is an activation: nothing to zero


def test_act_norm_and_lu_in_one_map_equal_one_after_the_other():
    step = FlowStep(5, subnet=conv_subnet).double()
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64) + 2
    step(x)
    randomise_(step)
    h, log_det = step.coupling(x)
    h, act_norm_log_det = step.act_norm(h)
    h, linear_log_det = step.linear(h)
    z, total = step(x)
    assert max_error(z, h) < 1e-12
    assert max_error(total, log_det + act_norm_log_det + linear_log_det) < 1e-12


def test_condition_is_used_and_may_be_shared_by_the_batch():
    step = FlowStep(4, subnet=conv_subnet, cond_channels=3, zero_init=False).eval()
    x, cond = torch.randn(2, 4, 5, 5), torch.randn(1, 3, 5, 5)
    z, _ = step(x, cond)
    assert torch.equal(z, step(x, cond.expand(2, 3, 5, 5))[0])
    assert max_error(z, step(x, cond + 1)[0]) > 1e-2
    with pytest.raises(ValueError, match="cond: expected a tensor with 3 channels, found None"):
        step(x)
    with pytest.raises(
        ValueError, match=r"cond: expected 3 channels in dimension 1, found shape \(1, 2, 5, 5\)"
    ):
        step(x, cond[:, :2])
    with pytest.raises(ValueError, match=r"cond: expected batch size 1 or 2 and spatial size \(5, 5\)"):
        step(x, cond[..., :4])
    with pytest.raises(ValueError, match="cond: expected None because cond_channels is 0"):
        FlowStep(4, subnet=conv_subnet)(x, cond)


def test_saving_copying_and_pickling():
    def make():
        return FlowSequence([FlowStep(5, subnet=conv_subnet, linear=k, zero_init=False) for k in LINEARS])

    flow, other = make(), make()
    x = torch.randn(4, 5, 3, 3) * 4 + 1
    flow(x)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    expected = flow(x)
    for clone in (other, copy.deepcopy(flow)):
        z, log_det = clone(x + 100)  # still in training mode: must not initialise again
        assert max_error(clone(x)[0], expected[0]) == 0
        assert log_det == expected[1]
        assert max_error(clone.inverse(z)[0], x + 100) < 1e-3
    permutation = pickle.loads(pickle.dumps(flow[1].linear))
    assert torch.equal(permutation(x)[0], flow[1].linear(x)[0])
    assert len(flow[:2]) == 2
    assert isinstance(flow[:2], FlowSequence)


def test_compile_initialises_and_matches_eager():
    def make():
        torch.manual_seed(1)
        affine = FlowStep(4, subnet=conv_subnet, coupling="affine", zero_init=False)
        return FlowSequence([affine, FlowStep(4, subnet=conv_subnet, linear="permutation")])

    flow, eager = make(), make()
    compiled = torch.compile(flow, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 4, 5, 6), (3, 4, 7, 8), (4, 4, 9, 5)):
        x = torch.randn(shape)
        outputs, expected = compiled(x), eager(x)
        for actual, truth in zip(outputs, expected, strict=True):
            assert max_error(actual, truth) < 1e-4
        sum(o.square().mean() for o in outputs).backward()
        sum(o.square().mean() for o in expected).backward()
    for actual, truth in zip(flow.parameters(), eager.parameters(), strict=True):
        assert max_error(actual, truth) < 1e-5
        assert max_error(actual.grad, truth.grad) < 1e-3 * (1 + truth.grad.abs().max())


def test_export_with_dynamic_shapes():
    steps = [FlowStep(4, subnet=conv_subnet, coupling=c, linear=k) for c in COUPLINGS for k in LINEARS]
    flow = randomise_(FlowSequence(steps)).eval()
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    x = torch.randn(3, 4, 5, 6)
    exported = torch.export.export(flow, (x,), dynamic_shapes=(dims,)).module()
    x = torch.randn(2, 4, 9, 7)
    for actual, truth in zip(exported(x), flow(x), strict=True):
        assert max_error(actual, truth) < 1e-4


def test_errors():
    x = torch.ones(2, 4, 3, 3)
    with pytest.raises(ValueError, match="channels: expected an int at least 2, found 1"):
        FlowStep(1, subnet=conv_subnet)
    with pytest.raises(ValueError, match="coupling: expected one of 'additive', 'affine', found 'glow'"):
        FlowStep(4, subnet=conv_subnet, coupling="glow")
    with pytest.raises(ValueError, match="linear: expected one of 'lu', 'permutation', 'none', found None"):
        FlowStep(4, subnet=conv_subnet, linear=None)
    with pytest.raises(TypeError, match=r"subnet: expected a callable .*found int"):
        FlowStep(4, subnet=3)
    with pytest.raises(TypeError, match=r"subnet: expected it to return an nn\.Module, found NoneType"):
        FlowStep(4, subnet=lambda c_in, c_out: None)
    with pytest.raises(
        ValueError, match=r"output of subnet: expected shape \(2, 2, 3, 3\) = .*found \(2, 5, 3, 3\)"
    ):
        FlowStep(4, subnet=lambda c_in, c_out: nn.Conv2d(c_in, 5, 1))(x)
    for _, module, _ in modules(5, conv_subnet):
        if len(list(module.parameters())):
            with pytest.raises(ValueError, match=r"x: expected 5 channels in dimension 1, found shape"):
                module(x)
            with pytest.raises(TypeError, match=r"z: expected float32.*found torch.int64"):
                module.inverse(x.long())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LUConv1x1(4),
        lambda: AffineCoupling(4, subnet=conv_subnet, zero_init=False),
        lambda: FlowStep(4, subnet=conv_subnet, coupling="affine", zero_init=False),
        lambda: USFBlock(4, subnet=conv_subnet, zero_init=False),
    ],
    ids=["LU", "affine coupling", "affine step", "conjugated"],
)
def test_many_gradients_at_once(make):
    module, x = make().double(), torch.randn(2, 4, 2, 2, dtype=torch.float64)
    for part in (0, 1):

        def run(x, part=part):
            return module(x)[part].flatten() + 0 * x.sum()  # of an LU map, the log-det depends on no data

        one, many = (
            torch.autograd.functional.jacobian(run, x, vectorize=vectorize) for vectorize in (False, True)
        )
        torch.testing.assert_close(many, one)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LUConv1x1(4),
        lambda: FlowStep(4, subnet=conv_subnet),
        lambda: USFBlock(4, subnet=conv_subnet, mask="channel"),
        lambda: FlowStep(128, subnet=lambda i, o: torch.nn.Conv2d(i, o, 3, padding=1), linear="none"),
    ],
)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(make, use_reentrant):
    module = randomise_(make())
    channels = module.channels if hasattr(module, "channels") else module.coupling.channels
    x = torch.randn(2, channels, 16, 16, requires_grad=True)
    gradients = []
    for run in (module, lambda v: checkpoint(module, v, use_reentrant=use_reentrant)):
        z, log_det = run(x)
        (z.square().sum() + log_det.sum()).backward()
        leaves = [x, *module.parameters()]
        gradients.append([v.grad for v in leaves if v.grad is not None])
        for leaf in leaves:
            leaf.grad = None
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("linear", ["lu", "permutation"])
def test_another_default_device(linear):
    flow = FlowSequence([FlowStep(8, subnet=conv_subnet, linear=linear) for _ in range(4)])
    x = torch.randn(2, 8, 5, 4, requires_grad=True)
    flow(x)  # sets the ActNorms
    expected = torch.autograd.grad((flow(x)[0] ** 2).sum(), [x, *flow.parameters()])
    with torch.device("meta"):
        found = torch.autograd.grad((flow(x)[0] ** 2).sum(), [x, *flow.parameters()])
    for value, truth in zip(found, expected, strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("memory", ["standard", "reversible"])
@pytest.mark.parametrize("linear", ["lu", "permutation"])
def test_shapes_on_meta_tensors(linear, memory):
    steps = [FlowStep(8, subnet=conv_subnet, linear=linear) for _ in range(4)]
    flow = FlowSequence(steps, memory=memory).eval().to("meta")
    z, _ = flow(torch.empty(2, 8, 5, 4, device="meta"))
    assert z.shape == (2, 8, 5, 4)
