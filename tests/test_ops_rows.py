"""Rows of maps, and couplings on some of their channels: the extension against torch."""

import pytest
import torch
from helpers import DTYPES
from hypothesis import given
from hypothesis import strategies as st

from usf_kernels.ops.rows import add_, affine_, rows_of

SHAPES = [
    (2, 3),
    (0, 3, 4),
    (2, 1, 5),
    (2, 3, 1),
    (1, 17, 33),
    (2, 16, 4, 8),
    (1, 5, 2, 3, 4),
    (3, 70, 9, 11),
]


def expected(x, dtype):
    return x.movedim(1, -1).reshape(-1, x.shape[1]).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float64])
def test_any_shape_and_dtype(shape, dtype, to):
    x = torch.randn(shape).to(dtype)
    found = rows_of(x, to, copy=True)
    assert found.dtype == to
    assert torch.equal(found, expected(x, to))
    assert found.numel() == 0 or found.data_ptr() != x.data_ptr()


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 150))
def test_odd_sizes(images, channels, positions):
    x = torch.randn(images, channels, positions)
    assert torch.equal(rows_of(x, torch.float32, copy=False), expected(x, torch.float32))


def test_layouts_and_what_requires_a_gradient():
    x = torch.randn(2, 6, 5, 4, requires_grad=True)
    with torch.no_grad():
        for layout in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2], x[:, 1:4], x.mT):
            assert torch.equal(rows_of(layout, torch.float32, copy=False), expected(layout, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_contiguous_where_others_cannot_be_written_to(dtype):
    index = torch.tensor([0, 2])
    for x in (torch.randn(5, 3).mT, torch.randn(1, 3, 4, 5)[..., :3], torch.randn(1, 3, 4, 6)[:, :, :3]):
        x = x.to(dtype)
        for copy in (False, True):
            rows = rows_of(x, dtype, copy=copy)
            assert rows.is_contiguous()
            add_(rows, index, torch.ones(len(rows), 2, dtype=dtype), 1)
    rows = torch.randn(3, 5).to(dtype).mT
    with pytest.raises(
        ValueError, match=r"rows: expected contiguous rows to write to, found strides \(1, 5\)"
    ):
        add_(rows, index, torch.ones(5, 2, dtype=dtype), 1)
    with pytest.raises(ValueError, match="rows: expected contiguous rows"):
        affine_(rows, index, torch.ones(5, 4, dtype=dtype), torch.zeros(2), 1.0, False)


def test_clamps_beyond_those_of_the_extension_overflow():
    for clamp, infinite in ((80.0, False), (100.0, True)):
        rows = torch.ones(3, 2)
        log_det = affine_(rows, torch.tensor([1]), torch.full((3, 2), 10.0), torch.zeros(1), clamp, False)
        assert rows[:, 1].isinf().all() == infinite
        torch.testing.assert_close(log_det, torch.full((3,), clamp))


def test_rounding_to_bfloat16_is_torchs():
    x = torch.cat([torch.randn(1000) * 1e30, torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])])
    x = x.view(1, 3, -1)
    found, wanted = rows_of(x, torch.bfloat16, copy=False), expected(x, torch.bfloat16)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
