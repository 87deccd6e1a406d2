"""Kernels that form the matrix of an LU map and its inverse, and the map made of them, against float64."""

import pytest
import torch
from helpers import DEVICE, DTYPES, SHAPES, assert_within_budget, layouts, max_error, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from usf_kernels.ops import linear_squared_norm, lu_conv1x1, lu_log_det

pytest.importorskip("triton")
from usf_kernels.kernels import lu_conv

pytestmark = pytest.mark.usefixtures("nan_memory")
lu_matrix = torch.ops.usf_kernels.lu_matrix


def triangles(channels, spread=0.5):
    """Full matrices with NaN wherever they must not be read."""
    lower, upper = spread * torch.randn(2, channels, channels, device=DEVICE)
    upper.diagonal().copy_(torch.randn(channels).sign() * torch.empty(channels).uniform_(0.5, 2))
    read = torch.ones(channels, channels, device=DEVICE).tril(-1).bool()
    return lower.masked_fill(~read, torch.nan), upper.masked_fill(read, torch.nan)


def draw(shape):
    """x, well-conditioned triangles, and a bias."""
    return (
        torch.randn(shape, device=DEVICE),
        *triangles(shape[1], 1 / shape[1]),
        torch.randn(shape[1], device=DEVICE),
    )


def naive_matrix(lower, upper, inverse):
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    if not inverse:
        return (lower.tril(-1) + eye) @ upper.triu()
    matrix = torch.linalg.solve_triangular(lower.tril(-1), eye, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper.triu(), matrix, upper=True)


def triton(x, lower, upper, bias, inverse=False):
    return lu_conv1x1(x, lower, upper, bias, inverse=inverse, impl="triton")


@settings(max_examples=8)
@given(st.integers(1, 20), st.booleans())
def test_matrix_and_inverse_at_any_size(channels, transposed):
    lower, upper = triangles(channels)
    if transposed:
        lower, upper = lower.mT.contiguous().mT, upper.mT.contiguous().mT
    for inverse in (False, True):
        matrix = lu_matrix(lower, upper, inverse, torch.float32)
        eager, truth = (
            naive_matrix(lower.to(d), upper.to(d), inverse) for d in (torch.float32, torch.float64)
        )
        assert_within_budget(matrix, eager, truth, factor=4)


@pytest.mark.parametrize("channels", [33, 71])
def test_inverse_from_joined_blocks(channels, monkeypatch):
    """Diagonal blocks of 16 rows, so that there are rounds of joining; condition numbers past 1e6."""
    monkeypatch.setattr(lu_conv, "DIAGONAL", 16)
    lower, upper = triangles(channels, 0.3)
    eager, truth = (naive_matrix(lower.to(d), upper.to(d), True) for d in (torch.float32, torch.float64))
    assert_within_budget(lu_matrix(lower, upper, True, torch.float32), eager, truth, factor=4)
    matrix = lu_matrix(lower, upper, False, torch.float32)
    assert max_error(matrix, naive_matrix(lower.double(), upper.double(), False)) < 1e-5


@settings(max_examples=6)
@given(shapes())
def test_map_and_inverse_at_any_shape(shape):
    x, lower, upper, bias = draw(shape)
    for inverse in (False, True):
        for b in (bias, None):
            arguments = [None if t is None else t.double() for t in (x, lower, upper, b)]
            truth = lu_conv1x1(*arguments, inverse=inverse)
            eager = lu_conv1x1(x, lower, upper, b, inverse=inverse, impl="reference")
            assert_within_budget(triton(x, lower, upper, b, inverse), eager, truth, factor=4)
    assert max_error(triton(triton(x, lower, upper, bias), lower, upper, bias, True), x) < 1e-4


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 6), (2, 5, 3, 4)])
def test_any_strides_and_memory_format(shape):
    x, lower, upper, bias = draw(shape)
    for inverse in (False, True):
        expected = triton(x, lower, upper, bias, inverse)
        for name, strided in layouts(x):
            before = strided.clone()
            y = triton(strided, lower.mT.contiguous().mT, upper, bias, inverse)
            assert max_error(y, expected.double()) < 1e-5, name
            assert torch.equal(strided, before)
            last = strided.ndim > 2 and strided.stride(1) == 1
            assert (y.movedim(1, -1) if last else y).is_contiguous(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_dtypes(dtype, inverse):
    """All of one dtype: the matrix is rounded to it once, as it is in eager code. Mixed: all in float32."""
    x, lower, upper, bias = (t.to(dtype) for t in draw((2, 19, 7)))
    y = triton(x, lower, upper, bias, inverse)
    truth = lu_conv1x1(x.double(), lower.double(), upper.double(), bias.double(), inverse=inverse)
    matrix = naive_matrix(lower.float(), upper.float(), inverse).to(dtype).float()
    offset = bias.float()[:, None]
    eager = matrix @ (x.float() - offset) if inverse else matrix @ x.float() + offset
    assert y.dtype == dtype
    assert_within_budget(y, eager.to(dtype), truth)
    lower, upper = lower.float(), upper.float()
    y = triton(x, lower, upper, bias, inverse)
    assert y.dtype == torch.float32
    assert_within_budget(
        y, lu_conv1x1(x, lower, upper, bias, inverse=inverse, impl="reference"), truth, factor=4
    )


def test_autocast_changes_nothing():
    arguments = [t.nan_to_num().requires_grad_() for t in draw((2, 5, 3))]
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            y = triton(*arguments, inverse=True)
            results.append([y, *torch.autograd.grad(y.square().sum(), arguments)])
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_to_second_order(inverse):
    arguments = draw((2, 5, 3, 2))
    weight = torch.randn(2, 5, 3, 2, device=DEVICE)

    def derivatives(impl, dtype):
        leaves = [a.to(dtype).requires_grad_() for a in arguments]
        y = lu_conv1x1(*leaves, inverse=inverse, impl=impl)
        first = torch.autograd.grad((weight.to(dtype) * y * y).sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    for actual, eager, truth in zip(
        derivatives("triton", torch.float32),
        derivatives("reference", torch.float32),
        derivatives("reference", torch.float64),
        strict=True,
    ):
        assert_within_budget(actual, eager, truth, factor=8)
    lower, upper = derivatives("triton", torch.float32)[1:3]
    assert lower.triu().abs().max() == 0 == upper.tril(-1).abs().max()
    assert lower.tril(-1).abs().max() > 0 < upper.diagonal().abs().min()


def test_is_a_torch_op():
    for channels in (1, 5):
        for inverse in (False, True):
            arguments = (*(t.nan_to_num() for t in triangles(channels)), inverse, torch.bfloat16)
            torch.library.opcheck(lu_matrix.default, arguments)


def test_compiles_for_any_shape():
    def both(x, lower, upper, bias):
        y = triton(x, lower, upper, bias)
        norm = linear_squared_norm(y, lower, impl="triton")
        return triton(y.flatten(2), lower, upper, bias, True) + 0 * norm.flatten(1)[:, None]

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 4, 5, 7), (3, 4, 8, 9)):
            arguments = [t.nan_to_num().requires_grad_() for t in draw(shape)]
            y = compiled(*arguments)
            assert max_error(y, arguments[0].flatten(2).double()) < 1e-4
            for grad in torch.autograd.grad(y.sum(), arguments[:2]):
                assert not grad.isnan().any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_jacobian_under_functorch():
    x, lower, upper, bias = draw((1, 4))
    jacobian = torch.func.jacrev(lambda v: triton(v, lower, upper, bias))(x).reshape(4, 4)
    assert max_error(torch.linalg.slogdet(jacobian)[1], lu_log_det(upper.double(), 1)) < 1e-5


def test_empty_batches_have_zero_gradients():
    for shape in SHAPES:
        if 0 in shape:
            arguments = [t.nan_to_num().requires_grad_() for t in draw(shape)]
            grads = torch.autograd.grad(triton(*arguments).sum(), arguments)
            assert all(g.shape == a.shape and not g.any() for g, a in zip(grads, arguments, strict=True))
