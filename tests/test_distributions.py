"""Base distributions: densities against numerical integrals, special cases and their own samples."""

import copy
import json
import math

import pytest
import torch
from helpers import max_error, randomise_
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from usf_kernels.models.distributions import create_base
from usf_kernels.models.radial import RadialBase
from usf_kernels.models.traceable import TraceableStudentT

SPECS = [
    {"name": "normal", "loc": 0.3, "scale": 0.7},
    {"name": "laplace", "trainable": True},
    {"name": "student_t", "df": 9.0, "trainable": True},
    {"name": "normal_mixture", "components": 3},
    *[
        {"name": "radial", "p": p, "norm": norm, "components": k, "loc": 0.2}
        for p in (1, 2, math.inf)
        for norm, k in (("gamma", 1), ("log_normal", 2))
    ],
]
IDS = ["-".join(str(v) for v in spec.values()) for spec in SPECS]


def make(spec, shape):
    return randomise_(create_base(spec, shape).double())


def narrowed(spec):
    """In two dimensions, and log-normal norms without their long tails."""
    base = make(spec, (2,)).requires_grad_(False)
    if spec.get("norm") == "log_normal":
        base.log_mean -= 0.5
        base.log_shape += 1.0
    return base


def integral(base, half_width=14.0, steps=1401):
    """Of the density over a square, by the rectangle rule on a grid that avoids the centre."""
    line = torch.linspace(-half_width, half_width, steps, dtype=torch.float64) + 0.0031
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(-1, 2)
    return (base.log_prob(grid).exp().sum() * (line[1] - line[0]) ** 2).item()


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_densities_integrate_to_one(spec):
    assert integral(narrowed(spec)) == pytest.approx(1, abs=4e-3)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_samples_follow_the_density(spec):
    """E[-log p] of samples is the entropy, which the integral of -p log p gives as well."""
    base = narrowed(spec)
    line = torch.linspace(-14, 14, 801, dtype=torch.float64) + 0.0031
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(-1, 2)
    log_prob = base.log_prob(grid)
    entropy = -(log_prob.exp() * log_prob).sum() * (line[1] - line[0]) ** 2
    samples = base.sample(40_000)
    assert samples.shape == (40_000, 2)
    assert samples.dtype == torch.float64
    assert -base.log_prob(samples).mean() == pytest.approx(entropy.item(), abs=0.04)
    weights = log_prob.exp() * (line[1] - line[0]) ** 2
    for value in (lambda z: z.clamp(-3, 3), lambda z: z.abs().clamp(max=3)):
        truth = (weights[:, None] * value(grid)).sum(0)
        assert max_error(value(samples).mean(0), truth) < 0.03


@pytest.mark.parametrize(("p", "plain"), [(1, "laplace"), (2, "normal")])
def test_a_fresh_radial_distribution_is_the_standard_one(p, plain):
    shape = (3, 2, 2)
    radial, expected = (create_base(s, shape).double() for s in ({"name": "radial", "p": p}, plain))
    z = 2 * torch.randn(50, *shape, dtype=torch.float64)
    assert max_error(radial.log_prob(z), expected.log_prob(z)) < 1e-5  # parameters were rounded to float32


def test_a_radial_density_is_the_norms_over_the_sphere():
    """In 5 dimensions, where a grid is out of reach: the share of samples in a ball is its volume times the
    density that is constant there."""
    base = RadialBase((5,), p=math.inf, norm="log_normal").double().requires_grad_(False)
    z = base.sample(20_000)
    r = base.norm(z)
    low, high = 1.5, 1.6
    share = ((r > low) & (r < high)).double().mean()
    middle = torch.full((1, 5), 0.1, dtype=torch.float64)
    middle[0, 2] = -1.55
    volume = (2 * high) ** 5 - (2 * low) ** 5
    assert share.item() == pytest.approx((base.log_prob(middle).exp() * volume).item(), rel=0.1)
    assert z.abs().argmax(1).bincount(minlength=5).min() > 3500


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    batch=st.integers(0, 3),
    spec=st.sampled_from(SPECS),
)
def test_shapes_dtypes_and_gradients(shape, batch, spec):
    base = make(spec, shape)
    z = base.sample(batch)
    log_prob = base.log_prob(z)
    assert z.shape == (batch, *shape)
    assert log_prob.shape == (batch,)
    assert not z.requires_grad
    assert log_prob.isfinite().all()
    narrow = copy.deepcopy(base).float()
    assert narrow.sample(batch).dtype == torch.float32
    assert narrow.log_prob(z.bfloat16()).dtype == torch.float32
    assert max_error(narrow.log_prob(z.float()), log_prob) < 1e-3 * (1 + log_prob.abs().sum())
    if batch and base.trainable:
        log_prob.sum().backward()
        assert all(p.grad.isfinite().all() for p in base.parameters())


def test_gradients_match_numerical_ones():
    for spec in SPECS:
        base = make(spec | {"trainable": True}, (3,))
        z = base.sample(2).requires_grad_()
        assert torch.autograd.gradcheck(base.log_prob, z), spec
        names = [name for name, _ in base.named_parameters()]
        values = [p.detach().clone().requires_grad_() for p in base.parameters()]

        def output(*values, base=base, names=names, z=z):
            parameters = dict(zip(names, values, strict=True))
            return torch.func.functional_call(base, parameters, (z.detach(),))

        assert torch.autograd.gradcheck(output, values), spec


def test_the_centre_of_a_radial_distribution_has_a_finite_density():
    for p in (1, 2, math.inf):
        base = RadialBase((4,), p=p)
        z = torch.zeros(1, 4, requires_grad=True)
        log_prob = base.log_prob(z)
        log_prob.sum().backward()
        assert log_prob.isfinite().all()
        assert z.grad.isfinite().all()


def test_states_and_specs_survive():
    for spec in SPECS:
        base = make(spec, (2, 3))
        again = create_base(json.loads(json.dumps(spec)), (2, 3)).double()
        again.load_state_dict(base.state_dict())
        z = torch.randn(4, 2, 3, dtype=torch.float64)
        assert torch.equal(again.log_prob(z), base.log_prob(z))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("cauchy", ValueError, "base: expected one of 'normal'.*found 'cauchy'"),
        ({"p": 2}, ValueError, "base: expected one of.*found None"),
        ({"name": "radial", "p": 3}, ValueError, "p: expected 1, 2 or math.inf, found 3"),
        ({"name": "radial", "norm": "chi"}, ValueError, "norm: expected one of.*'chi'"),
        ({"name": "radial", "components": 0}, ValueError, "components: expected an int at least 1"),
        ({"name": "normal", "scale": 0.0}, ValueError, "scale: expected a positive finite number, found 0.0"),
        ({"name": "student_t", "df": -1}, ValueError, "df: expected a positive finite number, found -1"),
        (
            {"name": "normal", "loc": [0.0, 1.0]},
            ValueError,
            r"loc: .*broadcast to \(3,\), found shape \(2,\)",
        ),
        ({"name": "normal", "df": 2}, TypeError, "df"),
        ({"name": "normal", "loc": [0.0, math.nan, 0.0]}, ValueError, "loc: expected finite numbers"),
        ({"name": "laplace", "trainable": "no"}, TypeError, "trainable: expected True or False, found 'no'"),
    ],
)
def test_bad_specs_are_named(spec, error, message):
    with pytest.raises(error, match=message):
        create_base(spec, (3,))


def test_bad_inputs_are_named():
    base = create_base("normal", (3,))
    with pytest.raises(ValueError, match=r"z: expected shape \(B, 3\), found \(2, 4\)"):
        base.log_prob(torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"z: expected float32.*found torch.int64"):
        base.log_prob(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="n: expected an int at least 0, found -1"):
        base.sample(-1)


@pytest.mark.parametrize("df", [1.0, 50.0, 59.9, 60.1, 1e3, 1e5, 1e7])
def test_student_t_of_any_degrees_of_freedom(df):
    """The difference of two large logarithms of gamma would be rounding errors."""
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        values = (torch.tensor(v, dtype=dtype) for v in (df, 0.0, 1.0))
        found = TraceableStudentT(*values).log_prob(torch.tensor(0.3, dtype=dtype)).item()
        expected = stats.t.logpdf(torch.tensor(0.3, dtype=dtype).item(), df)
        assert abs(found - expected) < tolerance


HALVES = [
    "normal",
    "laplace",
    "student_t",
    "normal_mixture",
    {"name": "radial", "components": 2},
    {"name": "radial", "p": 1, "norm": "log_normal"},
]


@pytest.mark.parametrize("spec", HALVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(spec, dtype):
    """Only their storage is rounded: log densities of 784 dimensions are large."""
    base, z = create_base(spec, (784,)), torch.randn(5, 784)
    for parameter in (*base.parameters(), *base.buffers()):
        parameter.detach().add_(0.05 * torch.randn_like(parameter))
    base = base.to(dtype)
    expected = copy.deepcopy(base).double().log_prob(z.double())
    found = base.log_prob(z)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-3
    assert base.sample(3).dtype == dtype


@pytest.mark.parametrize("norm", ["gamma", "log_normal"])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_samples_at_infinity_are_the_least_likely(p, norm):
    """Their norm has no square in float32; a NaN would have no rank among scores."""
    base = create_base({"name": "radial", "p": p, "norm": norm}, (3,))
    far = base.log_prob(torch.tensor([1e3, 1e17, 2e19, math.inf]).expand(3, 4).T)
    assert far.diff().le(0).all()
    assert far[1] < far[0]
    assert base.log_prob(torch.full((1, 3), math.nan)).isnan()
