"""Scores as modules."""

import pytest
import torch
from helpers import linear_subnet

from usf_kernels import ops
from usf_kernels.nn import AdditiveCoupling, AnomalyMap, SquaredNorm

pytestmark = pytest.mark.usefixtures("nan_memory")


def test_score_modules():
    z = [torch.randn(2, 5, 4, 6), torch.randn(2, 3, 2, 3)]
    assert torch.equal(SquaredNorm()(z[0]), ops.squared_norm(z[0]))
    for how in ("likelihood", "latent"):
        module = AnomalyMap((8, 12), interpolate=how)
        assert torch.equal(module(z), ops.anomaly_map(z, (8, 12), interpolate=how))
        assert module(z[0], 5).shape == (2, 1, 5, 5)
    with pytest.raises(TypeError, match="size: expected an int or a pair"):
        AnomalyMap()(z)
    with pytest.raises(ValueError, match="interpolate: expected one of"):
        AnomalyMap(interpolate="bicubic")
    assert "split" not in repr(AdditiveCoupling(4, subnet=linear_subnet))
