"""FrEIA's blocks with faster classes: the same numbers for every option, layout and dtype."""

import copy
import itertools

import pytest
import torch
from helpers import layouts
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import usf_kernels as usf

pytest.importorskip("FrEIA")
from FrEIA import framework, modules
from freia_toys import ALL_IN_ONE, CLAMPS, COUPLINGS, subnet_of, trained

from usf_kernels.integrations import freia


@pytest.mark.parametrize(("original", "fast"), COUPLINGS)
def test_couplings_are_the_originals(original, fast):
    clamps = [{}] if original is modules.NICECouplingBlock else [{"clamp_activation": f} for f in CLAMPS]
    for options, dtype in itertools.product(clamps, (torch.float32, torch.float64)):
        dims, dims_c = (7, 4, 3), [(2, 4, 3)]
        theirs = original([dims], dims_c, subnet_constructor=subnet_of(2), **options).to(dtype)
        ours = fast([dims], dims_c, subnet_constructor=subnet_of(2), **options).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        replaced = copy.deepcopy(theirs)
        assert usf.replace_blocks(replaced).count == 1
        assert type(replaced) is fast
        c = [torch.randn(2, 2, 4, 3, dtype=dtype)]
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        for rev, recorded in itertools.product((False, True), (True, False)):
            x = torch.randn(2, *dims, dtype=dtype)
            results = []
            for module in (theirs, ours, replaced):
                leaf = x.clone().requires_grad_(recorded)
                with torch.set_grad_enabled(recorded):
                    (y,), log_det = module((leaf,), c, rev=rev)
                log_det = log_det + torch.zeros(2, dtype=dtype)  # NICE's is a float in FrEIA
                results.append([y, log_det])
                if recorded:
                    module.zero_grad()
                    (y.square().sum() + log_det.sum()).backward()
                    results[-1] += [leaf.grad, *(p.grad for p in module.parameters())]
            for result in results[1:]:
                for found, expected in zip(result, results[0], strict=True):
                    atol = tolerance * max(expected.abs().max().item(), 0.01)
                    torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)
        attributes = set(theirs.__dict__)
        assert usf.restore_blocks(replaced) == 1
        assert type(replaced) is original
        assert set(replaced.__dict__) == attributes


@given(st.data())
def test_any_all_in_one_block_is_the_original(data):
    """Options, channels, spatial and condition sizes, memory layout and direction together."""
    draw = data.draw
    space = tuple(draw(st.lists(st.integers(1, 3), max_size=3), "space"))
    channels, conditions = draw(st.integers(2, 6), "C"), draw(st.integers(0, 2), "conditions")
    options = {
        "gin_block": draw(st.booleans(), "GIN"),
        "permute_soft": draw(st.booleans(), "soft"),
        "learned_householder_permutation": draw(st.integers(0, 2), "reflections"),
        "reverse_permutation": draw(st.booleans(), "reverse"),
        "global_affine_type": draw(st.sampled_from(["SIGMOID", "SOFTPLUS", "EXP"]), "scale"),
        "affine_clamping": draw(st.sampled_from([0.5, 2.0]), "clamp"),
    }
    theirs = modules.AllInOneBlock(
        [(channels, *space)], [(2, *space)] * conditions, subnet_constructor=subnet_of(len(space)), **options
    )
    theirs = trained(theirs)
    ours = copy.deepcopy(theirs)
    assert usf.replace_blocks(ours).count == 1
    values = torch.randn(2, channels, *space, dtype=torch.float64)
    x = draw(st.sampled_from([values, *(other for _, other in layouts(values))]), "layout")
    c = [torch.randn(2, 2, *space, dtype=torch.float64) for _ in range(conditions)]
    rev = draw(st.booleans(), "rev")
    with torch.set_grad_enabled(draw(st.booleans(), "recorded")):
        found, expected = ours((x,), c, rev=rev), theirs((x,), c, rev=rev)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(x, values)


@pytest.mark.parametrize("options", [o for o in ALL_IN_ONE if "gin_block" not in o], ids=str)
def test_rows_of_blocks_with_options_run_in_their_inference_form(options):
    net = framework.SequenceINN(5, 3, 2)
    for _ in range(2):
        net.append(modules.AllInOneBlock, subnet_constructor=subnet_of(2), **options)
    net = trained(net).eval()
    fast, x = copy.deepcopy(net), torch.randn(2, 5, 3, 2, dtype=torch.float64)
    usf.replace_blocks(fast)
    with torch.no_grad():
        for rev in (False, True):
            torch.testing.assert_close(fast(x, rev=rev), net(x, rev=rev), rtol=1e-10, atol=1e-10)
    assert fast._fused is not None


class ToDouble(nn.Module):
    def forward(self, x):
        return x.double()


@pytest.mark.parametrize("recorded", [False, True])
def test_under_autocast_and_with_a_subnet_in_another_dtype(recorded):
    def wide(c_in, c_out):
        return nn.Sequential(ToDouble(), nn.Conv2d(c_in, c_out, 1).double())

    cases = list(itertools.product(COUPLINGS, (subnet_of(2), wide)))
    cases.append(((modules.AllInOneBlock, freia.FastAllInOneBlock), subnet_of(2)))
    for (original, fast), subnet in cases:
        options = {"gin_block": True} if original is modules.AllInOneBlock else {}
        theirs = original([(6, 3, 3)], subnet_constructor=subnet, **options)
        ours = fast([(6, 3, 3)], subnet_constructor=subnet, **options)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 6, 3, 3)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=subnet is not wide)
        for rev in (False, True):
            with torch.set_grad_enabled(recorded), mixed:
                found, expected = ours((x,), rev=rev)[0][0], theirs((x,), rev=rev)[0][0]
            tolerance = 1e-6 if subnet is wide else 0.05
            assert found.dtype == torch.promote_types(expected.dtype, torch.float32)
            atol = tolerance * expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize("soft", [{"permute_soft": True}, {"learned_householder_permutation": 2}])
def test_inverse_of_a_soft_permutation_leaves_autocast(soft):
    theirs = modules.AllInOneBlock([(6, 3, 3)], subnet_constructor=subnet_of(2), **soft)
    ours = freia.FastAllInOneBlock([(6, 3, 3)], subnet_constructor=subnet_of(2), **soft)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours((x,), rev=True)[0][0], theirs((x,), rev=True)[0][0]
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())


class Repeat(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x):
        return x if self.times == 1 else torch.cat([x] * self.times, dim=1)


def test_a_subnet_may_return_its_input():
    """Nothing that a subnet returns is written to, whatever the clamp makes of it."""
    for original, fast in COUPLINGS:
        clamp = {} if original is modules.NICECouplingBlock else {"clamp_activation": lambda raw: raw[:]}
        theirs = original([(4, 3)], subnet_constructor=lambda i, o: Repeat(o // i), **clamp)
        ours = fast([(4, 3)], subnet_constructor=lambda i, o: Repeat(o // i), **clamp)
        x = torch.randn(2, 4, 3)
        with torch.no_grad():
            expected = theirs((x.clone(),))[0][0]
            torch.testing.assert_close(ours((x,))[0][0], expected)
            torch.testing.assert_close(theirs((x,))[0][0], expected)
