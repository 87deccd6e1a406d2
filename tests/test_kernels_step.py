"""The fused step (coupling, permutation, scale and bias) and the affine coupling in it, against float64."""

import pytest
import torch
from helpers import DEVICE, DTYPES, assert_within_budget, layouts, max_error, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from usf_kernels.ops import affine_coupling
from usf_kernels.ops.step import coupling_step, undo_step

pytest.importorskip("triton")
from usf_kernels.kernels import coupling_backward

pytestmark = pytest.mark.usefixtures("nan_memory")


def draw(shape, *, affine=True, split=None, permuted=True, scaled=True):
    """Floating inputs by name, and the other arguments."""
    batch, channels, *spatial = shape
    split = channels - channels // 2 if split is None else split
    active = (channels - split) * (2 if affine else 1)
    inputs = {"x": torch.randn(shape), "params": 3 * torch.randn(batch, active, *spatial)}
    if scaled:
        inputs |= {"scale": torch.rand(channels) + 0.5, "bias": torch.randn(channels)}
    options = {"split": split, "clamp": 1.5 if affine else None}
    options["index"] = torch.randperm(channels).to(DEVICE) if permuted else None
    return {name: value.to(DEVICE) for name, value in inputs.items()}, options


def with_gradients(inputs, options, impl, dtype=None):
    """Results and gradients of a loss in which every element has a weight of its own."""
    leaves = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in inputs.items()}
    y, log_det = coupling_step(**leaves, **options, impl=impl)
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randint(-4, 5, v.shape, generator=generator).to(v) for v in (y, log_det))  # in any dtype
    loss = sum((v * w).sum() for v, w in zip((y, log_det), weights, strict=True))
    return [y, log_det, *torch.autograd.grad(loss, list(leaves.values()))]


def assert_right(inputs, options, factor=2.0):
    """Results and gradients of the kernel against float64, measured with the reference in the same dtypes."""
    dtypes = [v.dtype for v in inputs.values()]
    actual, eager, truth = (
        with_gradients(inputs, options, "triton"),
        with_gradients(inputs, options, "reference"),
        with_gradients(inputs, options, "reference", torch.float64),
    )
    for found, plain, exact in zip(actual, eager, truth, strict=True):
        assert found.dtype == plain.dtype
        assert_within_budget(found, plain, exact, factor)
    assert [v.dtype for v in actual[2:]] == dtypes


@settings(max_examples=20)
@given(shapes(), st.data())
def test_at_any_shape_and_split(shape, data):
    choice = {name: data.draw(st.booleans()) for name in ("affine", "permuted", "scaled")}
    inputs, options = draw(shape, split=data.draw(st.integers(0, shape[1])), **choice)
    # On a handful of values eager's own error can be nothing, so that its multiple is no budget.
    assert_right(inputs, options | {"inverse": data.draw(st.booleans())}, factor=8.0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [(4, 33, 7, 5), (64, 12)])
def test_error_budget(shape, fused, inverse):
    inputs, options = draw(shape, permuted=fused, scaled=fused)
    assert_right(inputs, options | {"inverse": inverse})


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_programs_that_run_over_several_tiles(monkeypatch, channels_last, inverse):
    monkeypatch.setattr(coupling_backward, "PROGRAMS", 1)
    runs = []
    largest = coupling_backward.largest_run
    monkeypatch.setattr(coupling_backward, "largest_run", lambda n: runs.append(largest(n)) or runs[-1])
    inputs, options = draw((1, 6, 31, 19))
    if channels_last:
        inputs |= {n: inputs[n].to(memory_format=torch.channels_last) for n in ("x", "params")}
    assert_right(inputs, options | {"inverse": inverse})
    assert runs
    assert min(runs) > 1


@pytest.mark.parametrize("narrow", DTYPES[1:])
@pytest.mark.parametrize("names", [("x", "params"), ("x",), ("params", "scale")])
def test_dtypes(narrow, names):
    inputs, options = draw((3, 9, 4, 4))
    inputs |= {name: inputs[name].to(narrow) for name in names}
    assert_right(inputs, options)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_at_any_strides(affine, inverse):
    for shape in ((2, 6, 3, 4), (3, 5)):
        inputs, options = draw(shape, affine=affine)
        options |= {"inverse": inverse}
        expected = with_gradients(inputs, options, "triton")
        strided = [("contiguous", inputs["params"]), *layouts(inputs["params"])]
        for (name, x), (other, params) in list(zip(layouts(inputs["x"]), strided[::-1], strict=False))[-3:]:
            found = with_gradients(inputs | {"x": x, "params": params}, options, "triton")
            for actual, truth in zip(found, expected, strict=True):
                assert max_error(actual, truth) < 1e-5, (name, other)


def test_a_gradient_may_have_any_strides():
    inputs, options = draw((2, 4, 3, 5))
    grads = torch.randn(2, 4, 3, 5, device=DEVICE), torch.randn(2, device=DEVICE)
    expected = None
    for _, grad in layouts(grads[0]):
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        outputs = coupling_step(**leaves, **options, impl="triton")
        found = torch.autograd.grad(outputs, list(leaves.values()), (grad, grads[1]))
        expected = expected or found
        for actual, truth in zip(found, expected, strict=True):
            assert max_error(actual, truth) < 1e-6
    one = torch.ones((), device=DEVICE).expand(2, 4, 3, 5)  # as sum() gives
    outputs = coupling_step(**leaves, **options, impl="triton")
    found = torch.autograd.grad(outputs, list(leaves.values()), (one, grads[1]), retain_graph=True)
    for actual, truth in zip(
        found, torch.autograd.grad(outputs, list(leaves.values()), (one.clone(), grads[1])), strict=True
    ):
        assert torch.equal(actual, truth)


@pytest.mark.parametrize("affine", [False, True])
def test_inverse_undoes_it_and_reruns_give_the_same_bits(affine):
    inputs, options = draw((3, 7, 5, 3), affine=affine)
    y, log_det = coupling_step(**inputs, **options, impl="triton")
    back, inverse_log_det = coupling_step(**inputs | {"x": y}, **options, inverse=True, impl="triton")
    assert max_error(back, inputs["x"]) < 2e-6
    assert max_error(inverse_log_det, -log_det) < 1e-6
    again = coupling_step(**inputs, **options, impl="triton")
    assert torch.equal(y, again[0])
    assert torch.equal(log_det, again[1])


@pytest.mark.parametrize("inverse", [False, True])
def test_affine_coupling_is_the_step_alone(inverse):
    inputs, options = draw((2, 5, 3, 3), permuted=False, scaled=False)
    options.pop("index")
    for impl in ("triton", "reference"):
        expected = coupling_step(**inputs, **options, inverse=inverse, impl=impl)
        for actual, truth in zip(
            affine_coupling(**inputs, **options, inverse=inverse, impl=impl), expected, strict=True
        ):
            assert torch.equal(actual, truth)


@pytest.mark.parametrize("affine", [False, True])
def test_double_backward_is_the_references(affine):
    inputs, options = draw((2, 5, 3), affine=affine)

    def second_derivatives(impl):
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        y, log_det = coupling_step(**leaves, **options, impl=impl)
        loss = y.pow(3).sum() + log_det.square().sum()
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))

    for actual, truth in zip(second_derivatives("triton"), second_derivatives("reference"), strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("affine", "fused"), [(False, False), (True, True)])
def test_is_a_torch_op(affine, fused):
    namespace = torch.ops.usf_kernels
    for shape in ((2, 4, 3, 3), (0, 5)):
        inputs, options = draw(shape, affine=affine, permuted=fused, scaled=fused)
        for _, x in list(layouts(inputs["x"]))[-2:]:
            arguments = (x, inputs["params"], options["index"], inputs.get("scale"), inputs.get("bias"))
            arguments += (options["split"], options["clamp"], False)
            torch.library.opcheck(namespace.coupling_step, arguments)
            grads = x.clone(), torch.ones(shape[0] if affine else 0, device=DEVICE)
            torch.library.opcheck(namespace.coupling_step_backward, (*grads, *arguments))


def test_compiles_for_changing_shapes_and_exports():
    inputs, options = draw((3, 4, 5, 6))

    def steps(x, params, scale, bias):
        y, log_det = coupling_step(x, params, scale=scale, bias=bias, **options, impl="triton")
        back, _ = coupling_step(
            y, params.sin(), scale=scale, bias=bias, inverse=True, **options, impl="triton"
        )
        return back, log_det

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, height, width in ((3, 5, 6), (7, 9, 8)):
            maps = (torch.randn(batch, 4, height, width, device=DEVICE) for _ in range(2))
            leaves = [*maps, inputs["scale"], inputs["bias"]]
            grads = []
            for call in (compiled, steps):
                leaves = [v.detach().requires_grad_() for v in leaves]
                y, log_det = call(*leaves)
                loss = y.square().sum() + log_det.sum()
                grads.append([y, log_det, *torch.autograd.grad(loss, leaves)])
            for actual, truth in zip(*grads, strict=True):
                assert max_error(actual, truth) < 1e-4

    torch._dynamo.reset()
    leaves = [v.detach() for v in leaves]  # without gradients Dynamo treats autograd Functions in another way
    for actual, truth in zip(compiled(*leaves), steps(*leaves), strict=True):
        assert max_error(actual, truth) < 1e-4

    class Steps(torch.nn.Module):
        def forward(self, *arguments):
            return steps(*arguments)

    batch, width = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    dims = {0: batch, 3: width}
    program = torch.export.export(
        Steps(), tuple(inputs.values()), dynamic_shapes={"arguments": (dims, dims, None, None)}
    )
    leaves = [torch.randn(6, 4, 5, 9, device=DEVICE) for _ in range(2)] + [inputs["scale"], inputs["bias"]]
    for actual, truth in zip(program.module()(*leaves), steps(*leaves), strict=True):
        assert torch.equal(actual, truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": torch.ones(2, 2)}, r"params: expected shape \(2, 4\) = .* found \(2, 2\)"),
        ({"clamp": None}, r"params: expected shape \(2, 2\) = .* found \(2, 4\)"),
        ({"clamp": -1.0}, "clamp: expected a positive finite number"),
        (
            {"index": torch.arange(3)},
            r"index: expected int64 of shape \(4,\), found torch.int64 of shape \(3,\)",
        ),
        ({"index": torch.arange(4.0)}, r"index: expected int64 .* found torch.float32"),
        ({"bias": None}, "bias: expected a tensor exactly where scale is one"),
        ({"scale": torch.ones(3)}, r"scale: expected shape \(4,\) = \(C,\), found \(3,\)"),
    ],
)
def test_errors(change, message):
    arguments = {"x": torch.ones(2, 4), "params": torch.ones(2, 4), "split": 2, "clamp": 2.0}
    arguments |= {"scale": torch.ones(4), "bias": torch.ones(4)} | change
    with pytest.raises(ValueError, match=message):
        coupling_step(**arguments)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("permuted", "scaled"), [(False, False), (True, False), (True, True)])
def test_undone_with_its_gradients(affine, permuted, scaled):
    """As a reversible backward pass does it: the input again, and what autograd makes of it."""
    inputs, options = draw((3, 5, 4, 3), affine=affine, permuted=permuted, scaled=scaled)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y, log_det = coupling_step(**leaves, **options, impl="triton")
    grad, of_log_det = torch.randn_like(y), torch.randn(3, device=DEVICE)
    loss = (y * grad).sum() + ((log_det * of_log_det).sum() if affine else 0)
    expected = torch.autograd.grad(loss, list(leaves.values()))
    exits = (options["index"], *(leaves[name].detach() if scaled else None for name in ("scale", "bias")))
    given = (
        y.detach(),
        grad,
        of_log_det,
        leaves["params"].detach(),
        *exits,
        options["split"],
        options["clamp"],
    )
    with torch.no_grad():
        x, *found = undo_step(*given, impl="triton")
    assert max_error(x, leaves["x"]) < 1e-5
    assert [value is None for value in found[2:]] == [not scaled] * 2
    for actual, truth in zip((value for value in found if value is not None), expected, strict=True):
        assert max_error(actual, truth) < 1e-4
