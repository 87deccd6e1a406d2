"""Triangles with a diagonal: in the extension and in torch, against torch's own."""

import pytest
import torch
from helpers import layouts, max_error

from usf_kernels.ops import products, triangles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 2, 33, 300])
def test_triangles_with_a_diagonal(channels, dtype):
    whole = torch.randn(channels + 3, channels + 3, dtype=dtype)
    diagonal = torch.randn(channels, dtype=dtype)
    for matrix in (whole[:channels, :channels].clone(), whole[:channels, :channels], whole.mT[3:, 3:]):
        before = matrix.clone()
        lower, upper = triangles.unit_lower(matrix), triangles.upper_with(matrix, diagonal)
        assert torch.equal(lower, matrix.tril(-1) + torch.eye(channels, dtype=dtype))
        assert torch.equal(upper, matrix.triu(1) + diagonal.diag())
        assert torch.equal(matrix, before)
    wide = whole[:channels]
    expected = wide.triu(1)
    expected.diagonal().copy_(diagonal)
    assert torch.equal(triangles.upper_with(wide, diagonal), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("upper", [False, True])
def test_a_strict_triangle_in_place(upper, dtype):
    for matrix in (torch.randn(50, 50, dtype=dtype), torch.randn(60, 60, dtype=dtype)[5:55, 5:55]):
        expected = matrix.triu(1) if upper else matrix.tril(-1)
        assert triangles.strict_(matrix, upper=upper) is matrix
        assert torch.equal(matrix, expected)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 3, 5), (1, 50, 6, 6), (3, 131), (0, 7, 2), (2, 7, 0)])
def test_a_factor_and_its_transpose(monkeypatch, shape, upper, transposed):
    """In every memory format; by the extension where channels or positions lie side by side."""
    channels, taken = shape[1], []
    run = products.factor_product
    monkeypatch.setattr(products, "factor_product", lambda *a, **k: (taken.append(1), run(*a, **k))[1])
    whole = torch.randn(channels, channels + 3, dtype=torch.float64) / channels**0.5
    matrix = whole[:, :channels]
    diagonal, bias = torch.randn(2, channels, dtype=torch.float64)
    truth = matrix.triu(1) if upper else matrix.tril(-1)
    x = torch.randn(shape, dtype=torch.float64)
    for own in (diagonal, None):
        factor = truth + (torch.eye(channels) if own is None else own.diag())
        expected = (x.movedim(1, -1) @ (factor if transposed else factor.mT)).movedim(-1, 1)
        for shift in (bias, None):
            y = expected if shift is None else expected + shift.view(-1, *[1] * (x.ndim - 2))
            for dtype in (torch.float32, torch.float64):
                given = [None if v is None else v.to(dtype) for v in (matrix, own, shift)]
                for name, v in [("plain", x.to(dtype)), *layouts(x.to(dtype))]:
                    taken.clear()
                    with torch.no_grad():
                        found = triangles.apply_factor(
                            *given[:2], v, given[2], upper=upper, transposed=transposed
                        )
                    assert max_error(found, y) < (2e-5 if dtype == torch.float32 else 1e-13)
                    assert (
                        bool(taken) == (dtype == torch.float32 and name not in ("strided", "reversed"))
                        or x.ndim < 4
                    )
