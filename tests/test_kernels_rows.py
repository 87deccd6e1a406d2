"""Kernels on chosen columns of rows, against float64: selection, addition and affine coupling in place."""

import pytest
import torch
from helpers import DEVICE, DTYPES, assert_within_budget, conv_subnet, linear_subnet, max_error, randomise_
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from usf_kernels import ops
from usf_kernels.nn import FlowSequence, FlowStep, USFBlock, fused_blocks
from usf_kernels.nn.stage_extension import StageExtension
from usf_kernels.ops import row_kernels
from usf_kernels.ops import rows as dispatched
from usf_kernels.ops.row_kernels import add_rows, affine_rows, select_rows

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_memory")

CLAMP = 1.5
SIZES = [
    (0, 6, 3),
    (1, 8, 5),
    (5, 4, 0),
    (0, 3, 0),
    (7, 33, 17),
    (130, 24, 16),
    (61, 300, 272),
    (3, 1100, 1041),
]


def draw(count, channels, chosen, dtype=torch.float32):
    """rows, an index in no order, values to add, outputs of a conditioner, shift."""
    floats = (
        torch.randn(count, channels),
        torch.randn(count, chosen),
        2 * torch.randn(count, 2 * chosen),
        torch.randn(chosen),
    )
    rows, values, outputs, shift = (v.to(DEVICE, dtype) for v in floats)
    return rows, torch.randperm(channels)[:chosen].to(DEVICE), values, outputs, shift


def plain_affine(rows, index, outputs, shift, inverse):
    """(rows, log_det) as straightforward code in the dtype of its arguments has them."""
    raw, t = outputs.chunk(2, dim=1)
    s, y = CLAMP * raw.tanh(), rows[:, index]
    y = (y - t) * (-s).exp() - shift if inverse else (y + shift) * s.exp() + t
    rows = rows.clone()
    rows[:, index] = y.to(rows.dtype)
    total = s.sum(1, dtype=torch.promote_types(s.dtype, torch.float32))
    return rows, -total if inverse else total


def in_double(*tensors):
    return [v.double() if v.is_floating_point() else v for v in tensors]


def assert_right(rows, index, values, outputs, shift, factor=2.0):
    """All three operations, in both directions, against float64."""
    rest = torch.ones(rows.shape[1], dtype=torch.bool, device=DEVICE)
    rest[index] = False
    found = select_rows(rows, index)
    assert found.is_contiguous()
    assert torch.equal(found, rows[:, index])
    for sign in (1, -1, 3):
        found, plain = rows.clone(), rows.clone()
        assert add_rows(found, index, values, sign) is None
        plain[:, index] += (sign * values).to(rows.dtype)
        truth, added = in_double(rows, values)
        truth[:, index] += sign * added
        assert_within_budget(found, plain, truth, factor)
        assert torch.equal(found[:, rest], rows[:, rest])
    for inverse in (False, True):
        found = rows.clone()
        log_det = affine_rows(found, index, outputs, shift, CLAMP, inverse)
        assert log_det.dtype == torch.float32
        plain = plain_affine(rows, index, outputs, shift, inverse)
        truth = plain_affine(*in_double(rows, index, outputs, shift), inverse)
        for actual, eager, exact in zip((found, log_det), plain, truth, strict=True):
            assert_within_budget(actual, eager, exact, factor)
        assert torch.equal(found[:, rest], rows[:, rest])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_error_budget(sizes, dtype):
    assert_right(*draw(*sizes, dtype), factor=2.0 if sizes[0] > 1 else 8.0)


@settings(max_examples=20)
@given(st.integers(0, 40), st.integers(1, 40), st.data())
def test_at_any_size(count, channels, data):
    chosen, dtype = data.draw(st.integers(0, channels)), data.draw(st.sampled_from(DTYPES))
    # On a handful of values eager's own error can be nothing, so that its multiple is no budget.
    assert_right(*draw(count, channels, chosen, dtype), factor=8.0)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_mixed_dtypes(dtype):
    rows, index, values, outputs, shift = draw(9, 12, 5)
    assert_right(rows.to(dtype), index, values, outputs, shift)
    assert_right(rows, index, values.to(dtype), outputs.to(dtype), shift)


def strided(x):
    """The same values with columns between others, every other column, rows between others, and transposed;
    what is between is NaN."""
    count, channels = x.shape
    wide = x.new_full((count, channels + 5), torch.nan)
    wide[:, 3:-2] = x
    yield wide[:, 3:-2]
    wide = x.new_full((count, 2 * channels), torch.nan)
    wide[:, ::2] = x
    yield wide[:, ::2]
    wide = x.new_full((3 * count, channels), torch.nan)
    wide[::3] = x
    yield wide[::3]
    yield x.mT.contiguous().mT


def test_at_any_strides():
    rows, index, values, outputs, shift = draw(9, 24, 16)
    results = []
    for a, b, c in zip(
        (rows.clone(), *strided(rows)), (values, *strided(values)), (outputs, *strided(outputs)), strict=True
    ):
        scattered = torch.stack([index, -index], 1)[:, 0]
        found = [select_rows(a, scattered)]
        add_rows(a, scattered, b, -1)
        found += [a.clone(), affine_rows(a, scattered, c, torch.stack([shift, shift], 1)[:, 0], CLAMP, False)]
        results.append([*found, a])
    for found in results[1:]:
        for actual, truth in zip(found, results[0], strict=True):
            # Compiled for other strides, a sum may take the product in one rounding.
            torch.testing.assert_close(actual, truth, rtol=1e-6, atol=1e-6)


def test_inverse_undoes_it_and_reruns_give_the_same_bits():
    rows, index, _, outputs, shift = draw(37, 50, 23)
    found, again = rows.clone(), rows.clone()
    log_det = affine_rows(found, index, outputs, shift, CLAMP, False)
    assert torch.equal(affine_rows(again, index, outputs, shift, CLAMP, False), log_det)
    assert torch.equal(found, again)
    assert torch.equal(affine_rows(found, index, outputs, shift, CLAMP, True), -log_det)
    assert max_error(found, rows) < 1e-5


def test_nan_stays_in_its_row():
    rows, index, _, outputs, shift = draw(5, 7, 4)
    outputs[2, 1] = torch.nan
    log_det = affine_rows(rows, index, outputs, shift, CLAMP, False)
    assert log_det.isnan().tolist() == [False, False, True, False, False]
    assert rows.isnan().sum() == 1
    assert rows[2, index[1]].isnan()


@pytest.mark.parametrize("sizes", [(5, 6, 3), (0, 4, 2)])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_are_torch_ops(sizes, dtype):
    namespace = torch.ops.usf_kernels
    rows, index, values, outputs, shift = draw(*sizes, dtype)
    for layout in (rows, next(strided(rows))):
        torch.library.opcheck(namespace.select_rows, (layout, index))
        torch.library.opcheck(namespace.add_rows, (layout, index, values, -1))
        for inverse in (False, True):
            torch.library.opcheck(namespace.affine_rows, (layout, index, outputs, shift, CLAMP, inverse))


def test_compile_for_changing_numbers_of_rows():
    def run(rows, index, values, outputs, shift):
        rows = rows + 1
        add_rows(rows, index, values, -1)
        log_det = affine_rows(rows, index, outputs, shift, CLAMP, True)
        return select_rows(rows, index.flip(0)), rows, log_det

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (5, 12):
            inputs = draw(count, 6, 3)
            for actual, truth in zip(compiled(*inputs), run(*inputs), strict=True):
                assert torch.equal(actual, truth)


def pointwise(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, 5, 1), nn.ReLU(), nn.Conv2d(5, c_out, 1))


def vector_subnet(c_in, c_out):
    return nn.Sequential(nn.Linear(c_in, 5), nn.ReLU(), nn.Linear(5, c_out))


@pytest.fixture
def kernel_calls(monkeypatch):
    """Turns the dispatch to the kernels on and off, and lists the operations that they did; without the
    extension, which would run the flow in their place."""
    monkeypatch.setattr(StageExtension, "takes", lambda rows: False)
    monkeypatch.setattr(dispatched, "_in_extension", lambda rows: False)
    calls = []

    def noted(name):
        operation = getattr(row_kernels, name)

        def call(*arguments):
            calls.append(name)
            return operation(*arguments)

        return call

    for name in ("select_rows", "add_rows", "affine_rows"):
        monkeypatch.setattr(dispatched, name, noted(name))

    def switch(on):
        monkeypatch.setattr(dispatched, "runs_kernels", lambda rows: on and rows.dtype != torch.float64)
        calls.clear()
        return calls

    return switch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("subnet", [pointwise, conv_subnet, linear_subnet])
@pytest.mark.parametrize(
    ("coupling", "expected"),
    [("additive", {"select_rows", "add_rows"}), ("affine", {"select_rows", "affine_rows"})],
)
def test_a_fused_flow_is_the_same_with_kernels(kernel_calls, coupling, expected, subnet, dtype):
    options = {"coupling": coupling, "linear": "permutation", "zero_init": False}
    flow = randomise_(FlowSequence([FlowStep(9, subnet=subnet, **options) for _ in range(3)])).eval()
    fused = flow.to(DEVICE).fuse(dtype)
    x = torch.randn((2, 9) if subnet is linear_subnet else (2, 9, 4, 5), device=DEVICE)

    def results(model):
        z, log_det = model(x)
        return [z, log_det, *model.squared_norm_and_log_det(x), *model.inverse(x)]

    kernel_calls(False)
    eager, truth = results(fused), results(flow.double().fuse())
    calls = kernel_calls(True)
    found = results(fused)
    assert set(calls) == expected
    for actual, plain, exact in zip(found, eager, truth, strict=True):
        assert actual.dtype == plain.dtype
        # Roundings differ by chance, and of two sums eager's may be lucky both times.
        assert_within_budget(actual, plain, exact, factor=4.0 if actual.numel() > 9 else 16.0)
    assert torch.equal(fused(x[:0])[0], x[:0].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cond_channels", [0, 3])
@pytest.mark.parametrize("subnet", [pointwise, vector_subnet])
def test_a_fused_residual_block_is_the_same_as_one_kernel(
    kernel_calls, monkeypatch, subnet, cond_channels, dtype
):
    options = {"subnet": subnet, "zero_init": False, "cond_channels": cond_channels}
    flow = randomise_(FlowSequence([USFBlock(9, **options) for _ in range(2)])).eval()
    fused = flow.to(DEVICE).fuse(dtype)
    sizes = (2,) if subnet is vector_subnet else (2, 4, 5)
    x = torch.randn(sizes[0], 9, *sizes[1:], device=DEVICE)
    cond = torch.randn(sizes[0], 3, *sizes[1:], device=DEVICE) if cond_channels else None
    calls = []

    def residual_mlp(*arguments, **options):
        calls.append(options["bias_map"])
        return ops.residual_mlp(*arguments, impl="triton", **options)

    def results(model):
        return [model(x, cond)[0], model.inverse(x, cond)[0]]

    kernel_calls(False)
    monkeypatch.setattr(fused_blocks, "multiplies_in_kernels", lambda rows: False)
    eager, truth = results(fused), results(flow.double().fuse())
    monkeypatch.setattr(fused_blocks, "multiplies_in_kernels", lambda rows: True)
    monkeypatch.setattr(fused_blocks, "residual_mlp", residual_mlp)
    for actual, plain, exact in zip(results(fused), eager, truth, strict=True):
        assert_within_budget(actual, plain, exact, factor=4.0)
    assert len(calls) == 4
    assert all((call is None) == (cond is None) for call in calls)
    assert fused(x[:0], None if cond is None else cond[:0])[0].shape == x[:0].shape


def test_exports_see_torch_operations(kernel_calls, monkeypatch):
    options = {"coupling": "affine", "linear": "permutation", "zero_init": False}
    fused = FlowSequence([FlowStep(6, subnet=conv_subnet, **options) for _ in range(2)]).to(DEVICE).fuse()
    x = torch.randn(2, 6, 3, 4, device=DEVICE)
    kernel_calls(False)
    expected = fused(x)
    # The predicate as it is on a GPU, asked on any device.
    on_gpu = lambda rows: row_kernels.HAS_TRITON and not torch.compiler.is_exporting()  # noqa: E731
    monkeypatch.setattr(dispatched, "runs_kernels", on_gpu)
    program = torch.export.export(fused, (x,))
    assert "usf_kernels" not in str(program.graph)
    for actual, truth in zip(program.module()(x), expected, strict=True):
        torch.testing.assert_close(actual, truth)


def test_kernels_are_for_gpus_only_and_not_for_float64():
    for dtype in (*DTYPES, torch.float64):
        assert not row_kernels.runs_kernels(torch.empty(1, 1, dtype=dtype))
        on_gpu = torch.empty(1, 1, dtype=dtype, device=DEVICE)
        assert row_kernels.runs_kernels(on_gpu) == (DEVICE == "cuda" and dtype != torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.ones(2)}, ValueError, r"rows: expected shape \(N, C\), found \(2,\)"),
        ({"rows": torch.ones(2, 4).double()}, TypeError, "rows: expected float32, bfloat16 or float16"),
        (
            {"index": torch.ones(2)},
            ValueError,
            r"index: expected int64 of shape \(M,\), found torch.float32 of shape \(2,\)",
        ),
        ({"index": torch.arange(2)[None]}, ValueError, "index: expected int64 of shape"),
        (
            {"index": torch.arange(2, device="meta")},
            ValueError,
            "index: expected a tensor on .* found .* meta",
        ),
        ({"outputs": torch.ones(2, 2)}, ValueError, r"outputs: expected shape \(2, 4\), found \(2, 2\)"),
        ({"outputs": torch.ones(2, 4).int()}, TypeError, "outputs: .* found torch.int32"),
        ({"shift": torch.ones(1)}, ValueError, r"shift: expected shape \(2,\), found \(1,\)"),
        ({"shift": torch.ones(2, device="meta")}, ValueError, "shift: expected a tensor on cpu like rows"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "rows": torch.ones(2, 4),
        "index": torch.arange(2),
        "outputs": torch.ones(2, 4),
        "shift": torch.ones(2),
    }
    with pytest.raises(error, match=message):
        affine_rows(**arguments | change, clamp=CLAMP, inverse=False)
    with pytest.raises(ValueError, match=r"values: expected shape \(2, 2\), found \(2, 3\)"):
        add_rows(arguments["rows"], arguments["index"], torch.ones(2, 3), 1)
