"""Halves of a map and of its inverse, from triangles: against the whole of both, and their gradients."""

import pytest
import torch
from helpers import assert_within_budget, max_error

from usf_kernels.nn import LUConv1x1
from usf_kernels.ops.conjugation import conjugation

SIZES = [(2, 1), (5, 3), (5, 1), (8, 4), (33, 17)]


def draw(channels, dtype, diagonal="free"):
    module = LUConv1x1(channels, init="orthogonal", diagonal=diagonal).to(dtype)
    return tuple(
        None if v is None else v.detach()
        for v in (module.lower, module.upper, module.signs, module.log_diagonal)
    )


def of_the_whole(lower, upper, signs, log_diagonal, split):
    diagonal = signs if log_diagonal is None else signs * log_diagonal.exp()
    eye = torch.eye(len(signs), dtype=signs.dtype)
    matrix = (torch.tril(lower, -1) + eye) @ (torch.triu(upper, 1) + torch.diag(diagonal))
    return matrix[:split], torch.linalg.inv(matrix)[:, split:]


@pytest.mark.parametrize("diagonal", ["free", "fixed"])
@pytest.mark.parametrize(("channels", "split"), SIZES)
def test_equals_parts_of_the_whole(channels, split, diagonal):
    given = draw(channels, torch.float64, diagonal)
    for ours, expected in zip(conjugation(*given, split), of_the_whole(*given, split), strict=True):
        assert max_error(ours, expected) < 1e-11


@pytest.mark.parametrize("diagonal", ["free", "fixed"])
@pytest.mark.parametrize(("channels", "split"), SIZES[:-1])
def test_gradients_of_both_orders(channels, split, diagonal):
    lower, upper, signs, log_diagonal = draw(channels, torch.float64, diagonal)
    trained = [v.requires_grad_() for v in (lower, upper, log_diagonal) if v is not None]

    def run(lower, upper, log_diagonal=None):
        return conjugation(lower, upper, signs, log_diagonal, split)

    assert torch.autograd.gradcheck(run, trained)
    assert torch.autograd.gradgradcheck(run, trained)


def test_float32_gradients_err_as_little_as_those_of_the_whole():
    given = draw(48, torch.float32)
    grads = torch.randn(24, 48), torch.randn(48, 24)

    def gradients(run, given, grads):
        trained = [v.clone().requires_grad_() for v in (given[0], given[1], given[3])]
        found = run(trained[0], trained[1], given[2], trained[2], 24)
        return torch.autograd.grad(found, trained, grads)

    wide = tuple(v.double() for v in given), tuple(g.double() for g in grads)
    all_three = (
        gradients(conjugation, given, grads),
        gradients(of_the_whole, given, grads),
        gradients(of_the_whole, *wide),
    )
    for ours, plain, truth in zip(*all_three, strict=True):
        assert_within_budget(ours, plain, truth)


def test_float32_is_rounded_once():
    given = draw(96, torch.float32)
    found = conjugation(*given, 48)
    truth = of_the_whole(*(v.double() for v in given), 48)
    for ours, expected in zip(found, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - expected).abs().max() <= 2**-24 * expected.abs().max()


def test_transforms_and_compilers():
    given = draw(6, torch.float64)
    tangent = torch.randn_like(given[1])
    forward = torch.func.jvp(
        lambda upper: conjugation(given[0], upper, *given[2:], 3), (given[1],), (tangent,)
    )
    expected = torch.func.jvp(
        lambda upper: of_the_whole(given[0], upper, *given[2:], 3), (given[1],), (tangent,)
    )
    for ours, truth in zip(forward[1], expected[1], strict=True):
        assert max_error(ours, truth) < 1e-10
    torch._dynamo.reset()
    compiled = torch.compile(conjugation, fullgraph=True, backend="aot_eager")
    for ours, truth in zip(compiled(*given, 3), of_the_whole(*given, 3), strict=True):
        assert max_error(ours, truth) < 1e-12
