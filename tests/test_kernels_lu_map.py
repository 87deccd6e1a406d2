"""Kernels of an LU map from its parameters and of its gradients, against float64."""

import itertools

import pytest
import torch
from helpers import DEVICE, assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from usf_kernels.ops import lu_map as module
from usf_kernels.ops import native_lu_map

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nan_memory")

CHOICES = list(itertools.product((True, False), repeat=3))  # log_diagonal, bias, ActNorm
ops = torch.ops.usf_kernels


def launching(patch):
    """The operations take the kernels from now on; those that did are named in the list returned."""
    names = []
    patch.setattr(module, "runs_triton", lambda op, *tensors: True)
    patch.setattr(native_lu_map, "accepts", lambda given: False)
    for name in ("_map_op", "_gradients_op"):
        run = getattr(module, name)
        patch.setattr(module, name, lambda *a, n=name, r=run: (names.append(n), r(*a))[1])
    return names


@pytest.fixture
def launched(monkeypatch):
    return launching(monkeypatch)


def draw(channels, choice, transposed=False):
    """The arguments in float32, those of `choice` given, the others None; NaN where nothing may be read."""
    lower, upper = torch.randn(2, channels, channels, device=DEVICE) / channels**0.5
    read = torch.ones(channels, channels, device=DEVICE).tril(-1).bool()
    lower, upper = lower.masked_fill(~read, torch.nan), upper.masked_fill(~read.mT, torch.nan)
    if transposed:
        lower, upper = lower.mT.contiguous().mT, upper.mT.contiguous().mT
    signs = torch.randn(channels, device=DEVICE).sign()
    free, biased, act_norm = choice
    given = free, biased, act_norm, act_norm
    return lower, upper, signs, *(torch.randn(channels, device=DEVICE) / 2 if g else None for g in given)


def both_ways(function, arguments, dtype, transposed=False):
    """Results and gradients, but for a log-determinant that depends on nothing."""
    leaves = [
        None if v is None else v.detach().to(dtype).requires_grad_(i != 2) for i, v in enumerate(arguments)
    ]
    results = [r for r in function(*leaves) if r is not None]
    if leaves[3] is None and leaves[5] is None and len(results) > 1:
        results.pop()
    weights = [torch.linspace(0.3, 2, r.numel(), device=DEVICE).to(dtype).view_as(r) for r in results]
    weights[0] = weights[0].mT if transposed else weights[0]
    inputs = [v for v in leaves if v is not None and v.requires_grad]
    return [*results, *torch.autograd.grad(results, inputs, weights, materialize_grads=True)]


def written_out(*given):
    """Without autograd by hand, and without kernels."""
    lower, upper, signs, log_diagonal, bias, log_scale, offset = given
    zeros, ones = torch.zeros_like(signs), torch.ones_like(signs)
    log_diagonal = zeros if log_diagonal is None else log_diagonal
    matrix = (lower.tril(-1) + torch.diag(ones)) @ (upper.triu(1) + torch.diag(signs * log_diagonal.exp()))
    log_det = log_diagonal.sum()
    if log_scale is None:
        return matrix, bias, log_det
    moved = torch.mv(matrix, offset)
    return matrix * log_scale.exp(), moved if bias is None else bias + moved, log_det + log_scale.sum()


def check(channels, choice, transposed, launched):
    arguments = draw(channels, choice, transposed)
    actual = both_ways(module.lu_map, arguments, torch.float32, transposed)
    assert launched == ["_map_op", "_gradients_op"]
    launched.clear()
    eager, truth = (both_ways(written_out, arguments, d, transposed) for d in (torch.float32, torch.float64))
    logs = torch.cat([torch.zeros(1), *(v.cpu() for v in arguments[3::2] if v is not None)])
    for a, e, t in zip(actual, eager, truth, strict=True):
        # The log-determinant's summands cancel; it passes through sums as large as their norm.
        assert_within_budget(a, e, t, factor=4, scale=0.0 if t.ndim else logs.norm().item())
    of_lower, of_upper = actual[-len([v for v in arguments if v is not None]) + 1 :][:2]
    assert not of_lower.triu().any()
    assert not of_upper.tril().any()


@pytest.mark.parametrize("choice", CHOICES)
def test_errs_as_the_operations_written_out(choice, launched):
    for channels, transposed in ((1, False), (7, True), (33, False)):
        check(channels, choice, transposed, launched)


@settings(max_examples=8)
@given(st.integers(1, 70), st.booleans())
def test_any_size(channels, transposed):
    with pytest.MonkeyPatch.context() as patch:
        check(channels, CHOICES[0], transposed, launching(patch))


def test_gradients_of_one_result_alone(launched):
    arguments = draw(5, CHOICES[0])
    for i in range(3):

        def one(function, *given, place=i):
            return (function(*given)[place].square(),)

        actual = both_ways(lambda *given: one(module.lu_map, *given), arguments, torch.float32)
        eager, truth = (
            both_ways(lambda *given: one(written_out, *given), arguments, d)
            for d in (torch.float32, torch.float64)
        )
        for a, e, t in zip(actual, eager, truth, strict=True):
            assert_within_budget(a, e, t, factor=4)


def test_second_derivatives_are_those_of_the_operations(launched):
    arguments = draw(4, CHOICES[0])

    def second(function):
        leaves = [v.double().float().requires_grad_(i != 2) for i, v in enumerate(arguments)]
        inputs = [v for v in leaves if v.requires_grad]
        first = torch.autograd.grad(
            sum(r.square().sum() for r in function(*leaves)), inputs, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for actual, expected in zip(second(module.lu_map), second(written_out), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_compiled_code_has_the_gradients(launched):
    arguments = draw(5, CHOICES[0])
    compiled = torch.compile(module.lu_map, fullgraph=True, dynamic=True, backend="aot_eager")
    actual, eager, truth = (
        both_ways(function, arguments, dtype)
        for function, dtype in (
            (compiled, torch.float32),
            (written_out, torch.float32),
            (written_out, torch.float64),
        )
    )
    for a, e, t in zip(actual, eager, truth, strict=True):
        assert_within_budget(a, e, t, factor=4)


@pytest.mark.parametrize("choice", [CHOICES[0], CHOICES[-1]])
def test_are_torch_ops(choice):
    arguments = [None if v is None else v.nan_to_num() for v in draw(5, choice)]
    torch.library.opcheck(ops.lu_map.default, tuple(arguments))
    matrix, shift, log_det = ops.lu_map(*arguments)
    lower, upper, signs, log_diagonal, _, log_scale, offset = arguments
    of_results = matrix, torch.randn_like(matrix), torch.randn_like(shift), torch.randn_like(log_det)
    given = lower, upper, signs, log_diagonal, log_scale, offset, *of_results
    torch.library.opcheck(ops.lu_map_gradients.default, given)
