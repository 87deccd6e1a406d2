"""Products with matrices and sums of outer products, by the extension or PyTorch: against float64."""

import pytest
import torch
from helpers import assert_within_budget, layouts, shapes
from hypothesis import given
from hypothesis import strategies as st

from usf_kernels.nn import FlowStep
from usf_kernels.ops import matrices, native_lu_map, products
from usf_kernels.ops.matrices import accurate_inverse, apply_matrix, matrix_gradient

TRIANGLES = {-1: torch.tril, 0: torch.clone, 1: torch.triu}
needs_products = pytest.mark.skipif(not products.MULTIPLIES, reason="built without products")


@pytest.fixture(autouse=True)
def products_however_small(monkeypatch):
    monkeypatch.setattr(products, "WORTH_THREADS", 0)


def views(x):
    yield "contiguous", x
    yield from layouts(x)


def columns(x):
    return x.movedim(1, -1).reshape(-1, x.shape[1]).mT


def sum_of_outer(grad, x):
    return columns(grad) @ columns(x).mT


@given(shapes(max_channels=40), st.integers(1, 40), st.sampled_from([-1, 0, 1]), st.booleans())
def test_products(shape, outputs, triangle, with_bias):
    x, bias = torch.randn(shape), torch.randn(outputs) if with_bias else None
    matrix = TRIANGLES[triangle](torch.randn(outputs, shape[1]))
    wide = x.double(), matrix.double(), None if bias is None else bias.double()
    truth, eager = (
        torch.einsum("oc,bc...->bo...", m, v) + (0 if b is None else b.view(-1, *[1] * (x.ndim - 2)))
        for v, m, b in (wide, (x, matrix, bias))
    )
    for _, view in views(x):
        for other in (matrix, matrix.mT.contiguous().mT, torch.cat([matrix, matrix], 1)[:, : shape[1]]):
            with torch.no_grad():
                found = apply_matrix(other, view, bias, triangle=triangle)
            assert_within_budget(found, eager, truth, factor=4.0)


@given(shapes(max_channels=40), st.integers(1, 40), st.sampled_from([-1, 0, 1]))
def test_sums_of_outer_products(shape, outputs, triangle):
    x, grad = torch.randn(shape), torch.randn(shape[0], outputs, *shape[2:])
    wanted = TRIANGLES[triangle]
    truth = wanted(sum_of_outer(grad.double(), x.double()))
    eager = wanted(sum_of_outer(grad, x))
    for _, view in views(x):
        for _, grad_view in views(grad):
            with torch.no_grad():
                found = wanted(matrix_gradient(grad_view, view, triangle=triangle))
            assert_within_budget(found, eager, truth, factor=4.0)


@pytest.mark.parametrize("triangle", [-1, 0, 1])
@pytest.mark.parametrize("positions", [7, 700])
def test_many_channels(positions, triangle):
    """Threads share rows, panels and blocks of triangles."""
    matrix = TRIANGLES[triangle](torch.randn(230, 230))
    x, grad = torch.randn(2, 230, positions), torch.randn(2, 230, positions)
    wide, wanted = matrix.double(), TRIANGLES[triangle]
    with torch.no_grad():
        found = apply_matrix(matrix, x, None, triangle=triangle)
        for a, b in ((grad, x), (grad, columns(x).mT.view(2, positions, 230).movedim(-1, 1))):
            outer = wanted(matrix_gradient(a, b, triangle=triangle))
            truth = wanted(sum_of_outer(grad.double(), x.double()))
            assert_within_budget(outer, wanted(sum_of_outer(grad, x)), truth, factor=4.0)
    assert_within_budget(found, matrix @ x, wide @ x.double(), factor=4.0)


@needs_products
@pytest.mark.parametrize("stride", [0, 1, 13, 63, 64, 65])
@pytest.mark.parametrize("triangle", [-1, 0, 1])
def test_rows_that_overlap(stride, triangle):
    """A sum over a batch of vectors has a gradient whose rows are one."""
    grad = torch.randn(stride * 299 + 64).as_strided((300, 64), (stride, 1))
    x, wanted = torch.randn(300, 64), TRIANGLES[triangle]
    with torch.no_grad():
        found = wanted(matrix_gradient(grad, x, triangle=triangle))
        truth = wanted(sum_of_outer(grad.double(), x.double()))
        assert_within_budget(found, wanted(sum_of_outer(grad, x)), truth, factor=4.0)
        turned = wanted(matrix_gradient(x, grad, triangle=triangle))
        truth = wanted(sum_of_outer(x.double(), grad.double()))
        assert_within_budget(turned, wanted(sum_of_outer(x, grad)), truth, factor=4.0)
        product = apply_matrix(wanted(torch.eye(64) + 1), grad, None, triangle=triangle)
        torch.testing.assert_close(product, grad @ wanted(torch.eye(64) + 1).mT)


@needs_products
def test_what_lies_beyond_a_triangle_is_not_multiplied():
    matrix, x = torch.randn(200, 200).triu(), torch.randn(1, 200, 60)
    matrix[-1, 0] = torch.nan
    with torch.no_grad():
        assert not apply_matrix(matrix, x, None, triangle=1).isnan().any()
        assert apply_matrix(matrix, x, None).isnan().any()


@needs_products
def test_row_strides():
    maps = torch.randn(2, 6, 3, 4)
    rows = maps.to(memory_format=torch.channels_last)
    wide = torch.randn(2, 9, 3, 4).to(memory_format=torch.channels_last)
    assert products.row_stride(maps) is None
    assert products.walks_maps(maps)
    assert products.row_stride(rows) == 6
    assert not products.walks_maps(rows)
    assert products.row_stride(wide[:, 2:8]) == 9
    assert products.row_stride(wide[:, 2:8, :, ::2]) == 18
    assert products.row_stride(wide[:, 2:8, ::2]) is None
    assert products.row_stride(wide[:, 2:8, :, :3]) is None
    assert products.row_stride(torch.randn(5, 7)) == 7
    assert products.row_stride(torch.randn(5, 7)[::2]) == 14
    assert products.row_stride(torch.randn(7, 5).mT) is None


@needs_products
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_takes_the_extension(monkeypatch, memory_format):
    """A step with an LU map multiplies nothing in PyTorch, in either memory format."""
    step = FlowStep(32, subnet=lambda c_in, c_out: torch.nn.Conv2d(c_in, c_out, 1))
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=memory_format)
    taken = []
    for name in ("map_product", "row_product", "outer_product"):
        run = getattr(products, name)
        monkeypatch.setattr(
            matrices.products, name, lambda *a, n=name, r=run, **k: (taken.append(n), r(*a, **k))[1]
        )
    for name in ("lu_map", "gradients"):
        run = getattr(native_lu_map, name)
        monkeypatch.setattr(native_lu_map, name, lambda *a, n=name, r=run: (taken.append(n), r(*a))[1])
    for name in ("bmm", "mm", "mv", "addmv"):
        monkeypatch.setattr(torch, name, None)
    step(x)[0].square().sum().backward()
    assert [taken.count(name) for name in ("outer_product", "lu_map", "gradients")] == [1, 1, 1]
    assert ("row_product" in taken) == (memory_format == torch.channels_last)


@needs_products
@given(st.integers(1, 80))
def test_inverses_are_rounded_once(channels):
    scale = channels**-0.5
    lower = torch.tril(scale * torch.randn(channels, channels), -1) + torch.eye(channels)
    upper = torch.triu(scale * torch.randn(channels, channels), 1) + torch.diag(torch.rand(channels) + 0.5)
    matrix = (lower @ upper).mT.contiguous().mT  # in either memory order
    found, truth = products.inverse(matrix), torch.linalg.inv(matrix.double())
    assert torch.equal(found, accurate_inverse(matrix))
    assert (found - truth).abs().max() <= 2**-24 * truth.abs().max()


def test_inverses_that_need_rows_exchanged_are_pytorchs():
    matrix = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    assert products.inverse(matrix) is None
    assert torch.equal(accurate_inverse(matrix), torch.tensor([[0.0, 1.0], [0.5, 0.0]]))
    assert accurate_inverse(torch.zeros(0, 0)).shape == (0, 0)
    leaf = torch.eye(3).requires_grad_()
    accurate_inverse(leaf).sum().backward()
    assert torch.equal(leaf.grad, -torch.ones(3, 3))
