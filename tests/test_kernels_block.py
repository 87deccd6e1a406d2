"""Residual networks against float64: the blocks they stand for, shapes, strides, dtypes, gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, assert_within_budget, layouts, max_error, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from usf_kernels.ops import additive_coupling, lu_conv1x1, residual_mlp

pytest.importorskip("triton")
from usf_kernels.kernels import block

pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.fixture(params=["fused", "two products"])
def path(request, monkeypatch):
    """Both ways that the launcher has, whatever the number of channels."""
    limit = 256 if request.param == "fused" else 0
    monkeypatch.setattr(block, "fused_channels", lambda dtype, many: limit)
    return request.param


def draw(shape, hidden=7, batch=None):
    """x, two layers with their biases, and a bias map for `batch` images (None for no map)."""
    sizes = [shape, (hidden, shape[1]), (hidden,), (shape[1], hidden), (shape[1],)]
    tensors = [torch.randn(size, device=DEVICE) for size in sizes]
    return *tensors, None if batch is None else torch.randn(batch, hidden, *shape[2:], device=DEVICE)


def call(x, first, first_bias, last, last_bias, bias_map, impl="triton", **options):
    return residual_mlp(x, first, first_bias, last, last_bias, bias_map=bias_map, impl=impl, **options)


def naive(x, first, first_bias, last, last_bias, bias_map, *, inverse=False, activation="relu"):
    hidden = F.linear(x.movedim(1, -1), first, first_bias)
    if bias_map is not None:
        hidden = hidden + bias_map.movedim(1, -1)
    hidden = hidden.relu() if activation == "relu" else hidden
    residual = F.linear(hidden, last, last_bias).movedim(-1, 1)
    return x - residual if inverse else x + residual


def check(arguments, **options):
    """The kernel, and the reference in float64 and float32, against straightforward code."""
    eager, truth = (
        naive(*(None if a is None else a.to(d) for a in arguments), **options)
        for d in (torch.float32, torch.float64)
    )
    exact = call(*(None if a is None else a.double() for a in arguments), impl=None, **options)
    assert max_error(exact, truth) <= 1e-12 * (1 + truth.abs().amax().item() if truth.numel() else 1)
    y = call(*arguments, **options)
    assert_within_budget(y, eager.to(y.dtype), truth, factor=4)
    return y


@settings(max_examples=8)
@given(shapes(), st.integers(1, 20), st.sampled_from([None, 1, "batch"]))
def test_any_shape(shape, hidden, batch):
    arguments = draw(shape, hidden, shape[0] if batch == "batch" else batch)
    check(arguments, inverse=False)
    check(arguments, inverse=True, activation="none")


def test_both_ways_of_computing_it(path):
    for shape, hidden, batch in (((2, 20, 5, 3), 37, 1), ((3, 33), 40, None)):
        check(draw(shape, hidden, batch), inverse=True)
        x, first, _, last, _, bias_map = draw(shape, hidden, batch)
        check((x, first, None, last, None, bias_map))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, path):
    """Of one dtype the hidden units are rounded to it, as they are in eager code; mixed dtypes promote."""
    arguments = [t.to(dtype) for t in draw((2, 9, 5), 21, 1)]
    truth = naive(*(t.double() for t in arguments))
    eager = naive(*arguments)
    y = call(*arguments)
    assert y.dtype == dtype
    assert_within_budget(y, eager, truth)
    arguments[2] = arguments[2].float()
    assert check(arguments).dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 6), (2, 5, 3, 4)])
def test_any_strides(shape, path):
    x, first, first_bias, last, last_bias, bias_map = draw(shape, 4, 1)
    layers = first.mT.contiguous().mT, first_bias, last.mT.contiguous().mT, last_bias
    truth = naive(*(t.double() for t in (x, first, first_bias, last, last_bias, bias_map)))
    cases = [(name, strided, bias_map) for name, strided in layouts(x)]
    cases += [(f"map: {name}", x, strided) for name, strided in layouts(bias_map)]
    for name, strided, other in cases:
        y = call(strided, *layers, other)
        assert max_error(y, truth) < 1e-4, name
        last_format = strided.ndim > 2 and strided.stride(1) == 1
        assert (y.movedim(1, -1) if last_format else y).is_contiguous(), name


def test_is_the_conjugated_block_and_its_inverse(path):
    """A^-1 . C . A with an additive coupling C, its matrices folded: the form and its inverse are exact."""
    channels, hidden = 6, 9
    lower, upper = 0.2 * torch.randn(2, channels, channels, dtype=torch.float64)
    upper = upper + torch.eye(channels)
    bias = torch.randn(channels, dtype=torch.float64)
    first, last = torch.randn(hidden, 3, dtype=torch.float64), torch.randn(3, hidden, dtype=torch.float64)
    first_bias, last_bias = torch.randn(hidden, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x = torch.randn(2, channels, 4, 3, dtype=torch.float64)

    z = lu_conv1x1(x, lower, upper, bias)
    shift = F.linear(F.linear(z[:, :3].movedim(1, -1), first, first_bias).relu(), last, last_bias).movedim(
        -1, 1
    )
    expected = lu_conv1x1(additive_coupling(z, shift, split=3), lower, upper, bias, inverse=True)

    matrix = (lower.tril(-1) + torch.eye(channels)) @ upper.triu()
    rows, columns = matrix[:3], torch.linalg.inv(matrix)[:, 3:]
    folded = first @ rows, first @ bias[:3] + first_bias, columns @ last, columns @ last_bias
    assert max_error(residual_mlp(x, *folded), expected) < 1e-12
    assert max_error(residual_mlp(expected, *folded, inverse=True), x) < 1e-12
    folded = [t.float().to(DEVICE) for t in folded]
    y = residual_mlp(x.float().to(DEVICE), *folded, impl="triton")
    assert max_error(y.cpu(), expected) < 1e-5
    assert max_error(residual_mlp(y, *folded, inverse=True, impl="triton").cpu(), x) < 1e-5


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("batch", "activation"), [(None, "none"), (1, "relu"), (2, "relu")])
def test_gradients_to_second_order(inverse, batch, activation):
    arguments = draw((2, 4, 3, 2), 6, batch)
    weight = torch.randn(2, 4, 3, 2, device=DEVICE)

    def derivatives(impl, dtype):
        leaves = [a.to(dtype).requires_grad_() for a in arguments if a is not None]
        given = [*leaves, None] if batch is None else leaves
        y = call(*given, impl=impl, inverse=inverse, activation=activation)
        first = torch.autograd.grad((weight.to(dtype) * y * y).sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    for actual, eager, truth in zip(
        derivatives("triton", torch.float32),
        derivatives("reference", torch.float32),
        derivatives("reference", torch.float64),
        strict=True,
    ):
        assert_within_budget(actual, eager, truth, factor=8)


def test_autocast_changes_nothing():
    arguments = [t.requires_grad_() for t in draw((2, 5, 3), 6, 1)]
    for impl in ("triton", "reference"):
        results = []
        for enabled in (False, True):
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
                y = call(*arguments, impl=impl)
            results.append([y, *torch.autograd.grad(y.square().sum(), arguments)])
        for plain, autocast in zip(*results, strict=True):
            assert torch.equal(plain, autocast)


def test_is_a_torch_op(path):
    op = torch.ops.usf_kernels.residual_mlp.default
    for shape, batch in (((2, 5), 1), ((2, 5, 3, 4), None), ((0, 4, 3), 1)):
        x, *rest = draw(shape, 6, batch)
        for strided in (x, *(v for name, v in layouts(x) if name in ("reversed", "channels-last slice"))):
            torch.library.opcheck(op, (strided, *rest, "relu", True))


def test_compiles_for_any_shape_and_exports():
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 4, 5, 7), (3, 4, 8, 9)):
            arguments = [t.requires_grad_() for t in draw(shape, 6, 1)]
            results = []
            for function in (compiled, call):
                y = function(*arguments)
                results.append([y, *torch.autograd.grad(y.square().sum(), arguments)])
            for actual, expected in zip(*results, strict=True):
                assert max_error(actual, expected.double()) < 1e-4

    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return call(*arguments)

    arguments = draw((2, 4, 5), 6, 1)
    dims = ({0: torch.export.Dim("batch", min=2, max=64)}, *[None] * 5)
    exported = torch.export.export(Module(), arguments, dynamic_shapes={"arguments": dims}).module()
    arguments = (torch.cat([arguments[0], arguments[0]]), *arguments[1:])
    assert max_error(exported(*arguments), call(*arguments).double()) == 0


def test_errors():
    x, first, last = torch.ones(2, 3, 4), torch.ones(5, 3), torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"first: expected shape \(N, C\) = \(N, 3\), found \(5, 4\)"):
        residual_mlp(x, torch.ones(5, 4), None, last, None)
    with pytest.raises(ValueError, match=r"last: expected shape \(3, 5\) = \(C, N\), found \(5, 3\)"):
        residual_mlp(x, first, None, first, None)
    with pytest.raises(ValueError, match=r"first_bias: expected shape \(5,\) = \(N,\), found \(3,\)"):
        residual_mlp(x, first, torch.ones(3), last, None)
    with pytest.raises(ValueError, match=r"last_bias: expected shape \(3,\) = \(C,\), found \(5,\)"):
        residual_mlp(x, first, None, last, torch.ones(5))
    for size in ((2, 5), (3, 5, 4), (1, 3, 4)):
        with pytest.raises(ValueError, match=r"bias_map: expected shape \([12], 5, 4\) = \(B or 1, N"):
            residual_mlp(x, first, None, last, None, bias_map=torch.ones(size))
    with pytest.raises(ValueError, match="activation: expected one of 'relu', 'none', found 'gelu'"):
        residual_mlp(x, first, None, last, None, activation="gelu")
    with pytest.raises(TypeError, match=r"first: expected a torch.Tensor, found NoneType"):
        residual_mlp(x, None, None, last, None)
