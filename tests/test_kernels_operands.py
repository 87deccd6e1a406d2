"""What kernels are given: vectors at any strides, infinite values, NumPy's numbers, no outputs at all."""

import numpy as np
import pytest
import torch
from helpers import DEVICE

from usf_kernels import ops
from usf_kernels.ops import dispatch
from usf_kernels.ops.row_kernels import multiplies_in_kernels
from usf_kernels.ops.step import coupling_step

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_memory")


def draw(*shape):
    return torch.randn(shape, device=DEVICE)


def vectors(length):
    """The same vector as its values lie side by side, and not."""
    values = draw(2 * length)[::2]
    yield values.contiguous(), values
    one = draw(1).expand(length)
    yield one.contiguous(), one


@pytest.mark.parametrize("channels", [6, 19])
def test_vectors_of_any_stride(channels):
    x, matrix = draw(2, channels, 3, 4), draw(channels, channels)
    lower, upper = 0.1 * draw(channels, channels), torch.eye(channels, device=DEVICE)
    for plain, strided in vectors(channels):
        runs = (
            lambda b: ops.lu_conv1x1(x, lower, upper, b, impl="triton"),
            lambda b: ops.linear_squared_norm(x, matrix, b, impl="triton"),
            lambda b: ops.residual_mlp(x, matrix, b, matrix, b, impl="triton"),
        )
        for run in runs:
            assert torch.equal(run(strided), run(plain))


@pytest.mark.parametrize("outputs", [5, 16])
def test_an_infinite_value_is_what_it_is_in_the_reference(outputs):
    x, matrix = draw(2, 6, 3, 4), draw(outputs, 6)
    x[1, 2, 0, 3] = torch.inf
    last, bias = draw(6, outputs), draw(outputs)
    for run in (
        lambda impl: ops.linear_squared_norm(x, matrix, bias, impl=impl),
        lambda impl: ops.residual_mlp(x, matrix, bias, last, None, impl=impl),
    ):
        actual, truth = run("triton"), run("reference")
        assert torch.equal(actual.isnan(), truth.isnan())
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_no_outputs_have_no_norm():
    x, matrix = draw(2, 6, 3, 4), draw(0, 6)
    assert ops.linear_squared_norm(x, matrix, impl="triton").eq(0).all()


def test_numbers_of_numpy():
    x, params = draw(2, 6, 3), draw(2, 6, 3)
    given = {"split": np.int64(3), "clamp": np.float32(2)}
    y, log_det = ops.affine_coupling(x, params, impl="triton", **given)
    expected = ops.affine_coupling(x, params, split=3, clamp=2.0, impl="triton")
    assert torch.equal(y, expected[0])
    assert torch.equal(log_det, expected[1])
    assert torch.equal(coupling_step(x, params, impl="triton", **given)[0], y)


def test_an_index_elsewhere():
    x, shift = draw(2, 6, 3), draw(2, 3, 3)
    index = torch.arange(6, device="meta")
    with pytest.raises(ValueError, match=r"index: expected a tensor on .* as x, found one on meta"):
        coupling_step(x, shift, split=3, index=index, impl="triton")


def test_only_memory_runs_past_the_dispatcher(monkeypatch):
    """As on a GPU: of a negated view or of many gradients at once, a kernel would read something else."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x, complex_ = torch.randn(2, 6), torch.randn(2, 6, dtype=torch.complex64)
    with torch.no_grad():
        assert dispatch._may_bypass((x, None, 3, [x], (x,)))
        assert not dispatch._may_bypass((x, complex_.conj().imag))
        assert not dispatch._may_bypass((x, (complex_.conj().imag,)))
        assert not dispatch._may_bypass((x.to_sparse(),))


def test_graphs_do_not_ask_how_products_are_rounded(monkeypatch):
    monkeypatch.setattr("usf_kernels.ops.row_kernels.runs_kernels", lambda rows: True)

    def run(x):
        return x + 1 if multiplies_in_kernels(x) else x - 1

    x = torch.zeros(2, 3)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert compiled(x).eq(-1).all()
    assert compiled(x.bfloat16()).eq(1).all()
