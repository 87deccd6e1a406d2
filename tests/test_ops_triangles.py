"""Triangles with a diagonal: in the extension and in torch, against torch's own."""

import pytest
import torch

from usf_kernels.ops import triangles


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
