"""Runs of stages in the extension: the same as in torch operations, and never with old weights."""

import copy
import io

import pytest
import torch
from helpers import assert_within_budget, randomise_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from usf_kernels.nn import AffineCoupling, FlowSequence, FlowStep, LUConv1x1, USFBlock
from usf_kernels.nn.fused_blocks import ProjectedBlock
from usf_kernels.nn.fused_maps import Shift
from usf_kernels.nn.stage_extension import StageExtension
from usf_kernels.nn.stage_run import StageRun
from usf_kernels.ops import products

pytestmark = pytest.mark.skipif(not products.MULTIPLIES, reason="built by a compiler without vector types")
FORMS = ["affine, permutation", "affine, lu", "additive, permutation", "additive, lu", "conjugated"]


def subnet_of(hidden, activation=nn.ReLU, kernel=1):
    def make(c_in, c_out):
        first = nn.Conv2d(c_in, hidden, kernel, padding=kernel // 2)
        return nn.Sequential(first, activation(), nn.Conv2d(hidden, c_out, kernel, padding=kernel // 2))

    return make


def flow_of(form, channels, *, steps=3, hidden=6, cond_channels=0, activation=nn.ReLU, kernel=1):
    subnet = subnet_of(hidden, activation, kernel)
    options = {"subnet": subnet, "cond_channels": cond_channels, "zero_init": False}
    if form == "conjugated":
        blocks = [USFBlock(channels, **options) for _ in range(steps)]
    else:
        coupling, linear = form.split(", ")
        blocks = [FlowStep(channels, coupling=coupling, linear=linear, **options) for _ in range(steps)]
    return randomise_(FlowSequence(blocks)).eval()


def runs(fused):
    return [stage for stage in fused.stages if isinstance(stage, StageRun)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("images", [0, 1, 3])  # of the condition; 0 for none
@pytest.mark.parametrize("kernel", [1, 3])
@settings(max_examples=5, deadline=None)
@given(st.integers(2, 40), st.integers(1, 40), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_values_against_float64(form, images, kernel, channels, hidden, size):
    flow = flow_of(form, channels, hidden=hidden, cond_channels=4 if images else 0, kernel=kernel)
    x, cond = torch.randn(3, channels, *size), torch.randn(images, 4, *size) if images else None
    wide = flow.fuse(torch.float64)
    truth = wide(x, cond)
    fused = flow.fuse()
    (run,) = runs(fused)
    found = fused(x, cond)
    assert run._extension.complete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageExtension, "takes", lambda rows: False)
        eager = fused(x, cond)
    for ours, torchs, exact in zip(found, eager, truth, strict=True):
        assert_within_budget(ours, torchs, exact, factor=20.0)  # torch's errors may cancel in so few numbers
    torch.testing.assert_close(fused.squared_norm(x, cond), found[0].square().sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_torch_operations_agree_in_both_directions(monkeypatch, form, kernel):
    flow = flow_of(form, 20, cond_channels=3, kernel=kernel)
    x, cond = torch.randn(2, 20, 5, 7), torch.randn(2, 3, 5, 7)
    fused = flow.fuse()
    ours = [*fused(x, cond), *fused.inverse(x, cond)]
    assert set(runs(fused)[0]._extension._runs) == {True, False}  # both were in the extension
    monkeypatch.setattr(StageExtension, "takes", lambda rows: False)
    for found, expected in zip(ours, [*fused(x, cond), *fused.inverse(x, cond)], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(form, kernel, dtype):
    fused = flow_of(form, 32, hidden=32, kernel=kernel).fuse(dtype=dtype)
    x, before = torch.randn(3, 32, 40, 30, dtype=dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = fused(x)
        for threads in (2, 3, 4):  # an image is left over, each has one, there are fewer images than threads
            torch.set_num_threads(threads)
            for found, one in zip(fused(x), expected, strict=True):
                assert torch.equal(found, one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [0, 1])
def test_vectors_and_empty_batches(batch):
    def subnet(c_in, c_out):
        return nn.Sequential(nn.Linear(c_in, 5), nn.ReLU(), nn.Linear(5, c_out))

    flow = randomise_(FlowSequence([FlowStep(9, subnet=subnet, zero_init=False) for _ in range(2)])).eval()
    x = torch.randn(batch, 9)
    with torch.no_grad():
        torch.testing.assert_close(flow.fuse()(x)[0], flow(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [(3, 1), (5, 3), (1, 7)])
def test_kernels_of_other_sizes_alternate_in_one_run(kernels):
    steps = [
        FlowStep(12, subnet=subnet_of(10, kernel=kernel), coupling="affine", linear="permutation")
        for kernel in (*kernels, *kernels)
    ]
    flow = randomise_(FlowSequence(steps)).eval()
    x = torch.randn(2, 12, 6, 11)
    fused = flow.fuse()
    assert len(fused.stages) == 1
    with torch.no_grad():
        torch.testing.assert_close(fused(x)[0], flow(x)[0], rtol=1e-4, atol=1e-4)
    assert fused.stages[0]._extension.complete
    torch.testing.assert_close(fused.inverse(fused(x)[0])[0], x, rtol=1e-3, atol=1e-3)


def test_convolutions_of_one_and_three_dimensions():
    for dims, conv, known in ((1, nn.Conv1d, True), (3, nn.Conv3d, False)):

        def subnet(c_in, c_out, conv=conv):
            return nn.Sequential(conv(c_in, 5, 3, padding=1), nn.ReLU(), conv(5, c_out, 3, padding="same"))

        flow = randomise_(FlowSequence([FlowStep(6, subnet=subnet) for _ in range(2)])).eval()
        x, fused = torch.randn(2, 6, *(4 + i for i in range(dims))), flow.fuse()
        with torch.no_grad():
            torch.testing.assert_close(fused(x)[0], flow(x)[0], rtol=1e-4, atol=1e-4)
        assert any(run._extension.complete for run in runs(fused)) == known


@pytest.mark.parametrize(
    "conv",
    [
        lambda c_in, c_out: nn.Conv2d(c_in, c_out, 3, padding=1, padding_mode="reflect"),
        lambda c_in, c_out: nn.Conv2d(c_in, c_out, 3, padding=2, dilation=2),
        lambda c_in, c_out: nn.Conv2d(c_in, c_out, 3, padding=1, groups=2),
        lambda c_in, c_out: nn.utils.parametrizations.weight_norm(nn.Conv2d(c_in, c_out, 3, padding=1)),
    ],
)
def test_other_convolutions_are_torchs(conv):
    def subnet(c_in, c_out):
        return nn.Sequential(conv(c_in, 8), nn.ReLU(), conv(8, c_out))

    flow = randomise_(FlowSequence([FlowStep(8, subnet=subnet) for _ in range(2)])).eval()
    x, fused = torch.randn(2, 8, 5, 6), flow.fuse()
    with torch.no_grad():
        torch.testing.assert_close(fused(x)[0], flow(x)[0], rtol=1e-4, atol=1e-4)
    assert not runs(fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_slices_and_transposed_inputs(form, dtype):
    fused = flow_of(form, 8, activation=nn.GELU).fuse(dtype)
    maps, vectors = torch.randn(1, 8, 12, 6).to(dtype), torch.randn(8, 5).to(dtype)
    for x in (maps[:, :, :7], maps[..., :1], vectors.T[..., None, None]):
        kept, dense = x.clone(), x.clone(memory_format=torch.contiguous_format)
        assert torch.equal(fused(x)[0], fused(dense)[0])
        assert torch.equal(fused.inverse(x)[0], fused.inverse(dense)[0])
        assert torch.equal(x, kept)


@pytest.mark.filterwarnings("ignore:.*(Tracer|trace|Converting|batching|script).*")
@pytest.mark.parametrize("form", ["affine, permutation", "additive, lu"])
def test_tracers_transforms_and_modes_see_torch_operations(form):
    fused, x = flow_of(form, 8).fuse(), torch.randn(2, 8, 4, 4)
    expected = fused(x)[0]

    def call(x):
        return fused(x)[0]

    for found in (
        torch.jit.trace(call, (x,))(x),
        make_fx(call)(x)(x),
        torch.func.vmap(lambda v: call(v[None])[0])(x),
        torch.func.jvp(call, (x,), (x,))[0],
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(x)).shape == x.shape


def test_a_clamp_beyond_its_own_is_torchs():
    def subnet(c_in, c_out):
        return nn.Sequential(nn.Linear(c_in, 4), nn.ReLU(), nn.Linear(4, c_out))

    flow = FlowSequence([FlowStep(4, subnet=subnet, coupling="affine", linear="permutation", clamp=100.0)])
    flow[0].coupling.subnet[-1].bias.data.fill_(100.0)
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = flow.eval()(x)[0]
    assert expected.isinf().any()
    assert torch.equal(flow.fuse()(x)[0].isinf(), expected.isinf())


def test_an_activation_that_it_does_not_know_is_torchs():
    fused = flow_of("additive, permutation", 8, activation=nn.GELU).fuse()
    x = torch.randn(2, 8, 3, 3)
    fused(x)
    assert not runs(fused)[0]._extension.complete


def test_other_dtypes_do_without_it():
    flow = flow_of("additive, permutation", 8)
    for dtype in (torch.float64, torch.float16):
        fused = flow.fuse(dtype)
        fused(torch.randn(2, 8, 3, 3))
        assert runs(fused)[0]._extension is None


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_errors_of_bfloat16_are_of_the_size_of_torchs(monkeypatch, form, kernel, inverse):
    flow = flow_of(form, 34, hidden=34, cond_channels=4, kernel=kernel)
    x, cond = torch.randn(96, 34, 3, 4).bfloat16(), torch.randn(1, 4, 3, 4).bfloat16()
    errors = {}
    for extension in (True, False):
        if not extension:
            monkeypatch.setattr(products, "MULTIPLIES_BFLOAT16", False)
        fused = flow.fuse(torch.bfloat16)
        truth = copy.deepcopy(fused).double()  # of the same rounded weights
        y, log_det = (fused.inverse if inverse else fused)(x, cond)
        expected, expected_log_det = (truth.inverse if inverse else truth)(x.double(), cond.double())
        assert y.dtype == torch.bfloat16
        assert log_det.dtype == torch.float32
        assert (runs(fused)[0]._extension is not None) == products.MULTIPLIES_BFLOAT16
        errors[extension] = [(y - expected).norm(), (log_det - expected_log_det).norm()]
    # Going to points rounds sums of numbers, which flows without a float32 state lose elsewhere, but for a
    # subnet as strong as this one.
    allowed = 1.1 if kernel == 1 else 2.0
    for found, torchs in zip(errors[True], errors[False], strict=True):
        assert found <= allowed * torchs + 1e-5


def test_weights_written_to_are_seen():
    flow, other = flow_of("affine, permutation", 8), flow_of("affine, permutation", 8)
    other.load_state_dict(flow.state_dict())  # the permutations, which decide what is fused how
    randomise_(other)
    x = torch.randn(2, 8, 4, 4)
    fused, expected = flow.fuse(), other.fuse()(x)[0]
    fused(x)
    fused.load_state_dict(other.fuse().state_dict())
    assert torch.equal(fused(x)[0], expected)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert (fused(x)[0] - expected).abs().max() > 1e-3


def test_weights_replaced_are_seen():
    flow, other = flow_of("affine, permutation", 8), flow_of("affine, permutation", 8)
    other.load_state_dict(flow.state_dict())
    randomise_(other)
    x, other = torch.randn(2, 8, 4, 4), other.fuse()
    expected = other(x)[0]

    def assign(fused):
        fused.load_state_dict(other.state_dict(), assign=True)

    def set_data(fused):
        for ours, theirs in zip(fused.parameters(), other.parameters(), strict=True):
            ours.data = theirs.data
        fused.load_state_dict(dict(other.named_buffers()), strict=False)

    @torch.inference_mode()
    def load(fused):
        fused.load_state_dict(other.state_dict())

    @torch.inference_mode()
    def load_into_tensors_without_versions(fused):
        fused.double().float()
        fused(x)
        fused.load_state_dict(other.state_dict())

    for replace in (assign, set_data, load, load_into_tensors_without_versions):
        fused = flow.fuse()
        before = fused(x)[0]
        values = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        assert torch.equal(torch.func.functional_call(fused, values, (x,))[0], expected)
        assert torch.equal(fused(x)[0], before)
        replace(fused)
        assert torch.equal(fused(x)[0], expected), replace


def test_conversion_copies_and_pickles():
    fused = flow_of("affine, permutation", 8).fuse()
    x = torch.randn(2, 8, 4, 4)
    expected = fused(x)[0]
    assert torch.equal(copy.deepcopy(fused)(x)[0], expected)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x)[0], expected)
    torch.testing.assert_close(fused.double()(x.double())[0].float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.float()(x)[0], expected)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        fused = flow_of("additive, lu", 8).fuse()
        x = torch.randn(2, 8, 4, 4)
        first = fused(x)[0]
        (run,), extension = runs(fused), runs(fused)[0]._extension
        assert torch.equal(fused(x)[0], first)
        assert run._extension is extension  # not made again at every call


def test_products_beside_pointwise_blocks_are_in_the_run():
    (run,) = flow_of("additive, lu", 8).fuse().stages
    assert isinstance(run, StageRun)
    product = FlowSequence([LUConv1x1(8), AffineCoupling(8, subnet=subnet_of(4), zero_init=False)])
    assert len(product.eval().fuse().stages) == 1


def test_shifts_beside_conjugated_blocks_are_in_the_run():
    (run,) = flow_of("conjugated", 20).fuse().stages
    assert [type(stage) for stage in run.stages] == [Shift, *3 * [ProjectedBlock]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_input_is_not_written_to(monkeypatch, form, dtype):
    fused = flow_of(form, 8).fuse(dtype)
    x = torch.randn(2, 8, 4, 4).to(dtype, memory_format=torch.channels_last)
    kept = x.clone()
    for in_the_extension in (True, False):
        if not in_the_extension:
            monkeypatch.setattr(StageExtension, "takes", lambda rows: False)
        fused(x)
        fused.inverse(x)
        assert torch.equal(x, kept)
