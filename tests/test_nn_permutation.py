"""Fixed permutations."""

import pytest
import torch

from usf_kernels.nn import Permutation

pytestmark = pytest.mark.usefixtures("nan_memory")


def test_permutation():
    x = torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True)
    module = Permutation(9, seed=3)
    y, log_det = module(x)
    assert torch.equal(y, x[:, module.index])
    assert torch.equal(module.index.sort().values, torch.arange(9))
    assert log_det == 0
    assert torch.equal(module.inverse(y)[0], x)
    assert torch.equal(Permutation(9, seed=3).index, module.index)
    assert not torch.equal(Permutation(9).index, Permutation(9).index)
    with torch.device("meta"):
        assert Permutation(9, seed=3).index.is_meta
    assert torch.autograd.gradcheck(lambda v: module(v)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda v: module.inverse(v)[0] ** 2, (x[:1, :, :1, :2],))
    assert all(not b.is_floating_point() and b.numel() == 9 for b in module.state_dict().values())


def test_a_wrong_seed_is_named():
    with pytest.raises(TypeError, match="seed: expected an int, found str"):
        Permutation(4, seed="a")
