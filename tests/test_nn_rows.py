"""Rows of maps: the extension's transposition against torch's, whatever the shape, layout and dtype."""

import pytest
import torch
from helpers import DTYPES
from hypothesis import given
from hypothesis import strategies as st

from usf_kernels.nn.rows import rows_of

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


def test_rounding_to_bfloat16_is_torchs():
    x = torch.cat([torch.randn(1000) * 1e30, torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])])
    x = x.view(1, 3, -1)
    found, wanted = rows_of(x, torch.bfloat16, copy=False), expected(x, torch.bfloat16)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
