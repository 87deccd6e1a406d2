import math
import subprocess
import sys

import nfa_oracle as oracle
import numpy as np
import pytest
import torch

from usf_kernels import _core, calibrate
from usf_kernels.null import Null
from usf_kernels.segmentation import log_nfa, log_number_of_tests, regions, segment

SHAPES = [(1, 1), (1, 12), (12, 1), (2, 9), (9, 2), (7, 11), (12, 12)]
TAILS = {"chernoff": oracle.chernoff, "exact": oracle.exact}


def random_map(rng, shape, dof, kind):
    """A map of squared norms around `dof`, with blobs so that every outcome of prune and merge occurs."""
    u = rng.chisquare(dof, shape)
    if kind == "zero":
        return np.zeros(shape, np.float32)
    if kind == "constant":
        return np.full(shape, rng.choice([0.9, 1.0, 1.5]) * dof, np.float32)
    for _ in range(rng.integers(0, 4)):
        y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        u[max(0, y - 2) : y + 2, max(0, x - 2) : x + 3] *= rng.uniform(1, 4)
    if kind == "ties":
        u = np.round(u)
    if kind == "quiet":  # nothing above the mean, so all regions tie under the Chernoff bound
        u *= dof / u.max()
    if kind == "plateaus":
        u = np.round(u / dof) * dof
    return u.astype(np.float32)


def as_rows(found):
    return sorted((r.log_nfa, r.area, r.level, *r.box) for r in found)


def oracle_rows(found, shape):
    rows = []
    for n in found:
        y, x = np.nonzero(n.mask(shape))
        rows.append((n.value, n.area, float(n.level), y.min(), x.min(), y.max() + 1, x.max() + 1))
    return sorted(rows)


@pytest.mark.parametrize("tests", ["total", "per_size"])
@pytest.mark.parametrize("tail", ["chernoff", "exact"])
@pytest.mark.parametrize("kind", ["white", "ties", "plateaus", "quiet", "constant", "zero"])
def test_equals_the_oracle(kind, tail, tests):
    rng = np.random.default_rng(7)
    seen = 0
    for shape in SHAPES * (1 if kind in ("zero", "constant") or tail == "exact" else 10):
        dof = int(rng.choice([1, 5, 11]))
        u = random_map(rng, shape, dof, kind)
        options = {"tail": TAILS[tail], "tests": tests}
        found, _ = oracle.final_regions(u, dof, **options)
        energy = torch.from_numpy(u)[None]
        ours = regions(energy, channels=dof, log_epsilon=math.inf, tail=tail, tests=tests)[0]
        np.testing.assert_allclose(as_rows(ours), oracle_rows(found, shape), rtol=1e-9, atol=1e-9)
        got = log_nfa(energy, shape, channels=dof, tail=tail, tests=tests)
        np.testing.assert_allclose(got[0, 0], oracle.log_nfa_map(u, dof, **options), rtol=1e-6, atol=1e-6)
        seen += len(found) > 1
    assert seen or kind in ("quiet", "constant", "zero")  # the maps are not so simple that nothing was tested


@pytest.mark.parametrize("tests", ["total", "per_size"])
def test_several_scales_upsampled_to_the_minimum(tests):
    rng = np.random.default_rng(3)
    shapes, dofs, size = [(9, 6), (4, 3), (5, 5)], [8, 20, 3], (21, 16)
    for _ in range(10):
        maps = [random_map(rng, s, c, "white") for s, c in zip(shapes, dofs, strict=True)]
        sizes = [u.size for u in maps]
        parts = [oracle.log_nfa_map(u, c, tests=tests, sizes=sizes) for u, c in zip(maps, dofs, strict=True)]
        expected = np.minimum.reduce([oracle.bilinear(part, size) for part in parts])
        got = log_nfa([torch.from_numpy(u)[None] for u in maps], size, channels=dofs, tests=tests)
        np.testing.assert_allclose(got[0, 0], expected, rtol=1e-4, atol=1e-4)


# Drawn by hand, with the three situations of the paper's figure 3 but numbers of our own. For two channels
# log10 Pr(X >= t) is -t / (2 ln 10) exactly, so a region's significance is its pixels times its level.
#   left: nested, 9 in {>= 5} in {>= 2}: 1 * 9, 3 * 5, 6 * 2; the middle one is kept
#   middle: a bifurcation that merges, 6 and 7 in {>= 4}: 1 * 6, 1 * 7, 3 * 4
#   right: one that does not, 20 and 10 in {>= 2}: 1 * 20, 1 * 10, 3 * 2; so neither does the root, 33 * 1
WORKED = [
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [2, 5, 9, 1, 6, 4, 7, 1, 20, 2, 10],
    [2, 5, 2, 1, 1, 1, 1, 1, 1, 1, 1],
]
WORKED_SIGNIFICANCE = [
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 15, 15, 0, 12, 12, 12, 0, 20, 0, 10],
    [0, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0],
]


def test_worked_example():
    u = torch.tensor([WORKED], dtype=torch.float32)
    got = log_nfa(u, (3, 11), channels=2, tail="exact")[0, 0]
    total = log_number_of_tests([(3, 11)])
    expected = total - torch.tensor(WORKED_SIGNIFICANCE) / (2 * math.log(10))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)
    found = regions(u, channels=2, tail="exact", log_epsilon=math.inf)[0]
    assert [(r.box, r.area, r.level, r.centroid) for r in found] == [
        ((1, 8, 2, 9), 1, 20.0, (1.0, 8.0)),
        ((1, 1, 3, 3), 3, 5.0, (4 / 3, 4 / 3)),
        ((1, 4, 2, 7), 3, 4.0, (1.0, 5.0)),
        ((1, 10, 2, 11), 1, 10.0, (1.0, 10.0)),
    ]
    # Without the right part the root's 21 * 1 pixels outweigh 15 and 12, and take everything.
    (left,) = regions(u[:, :, :7].contiguous(), channels=2, tail="exact", log_epsilon=math.inf)[0]
    assert (left.box, left.area, left.level) == ((0, 0, 3, 7), 21, 1.0)


@pytest.mark.parametrize("tests", ["total", "per_size"])
def test_two_identical_blobs_both_survive(tests):
    u = torch.full((1, 9, 20), 8.0)
    u[0, 3:6, 3:6] = u[0, 3:6, 12:15] = 120.0
    first, second = regions(u, channels=8, tests=tests)[0]
    assert first.log_nfa == second.log_nfa
    assert {first.box, second.box} == {(3, 3, 6, 6), (3, 12, 6, 15)}
    assert segment(u, (9, 20), channels=8, tests=tests).sum() == 18


@pytest.mark.parametrize("tests", ["total", "per_size"])
@pytest.mark.parametrize("level", [0.0, 0.5, 0.91, 1.0])
def test_quiet_latents_are_not_flagged(level, tests):
    """The Chernoff formula below the mean would call these the most significant of all."""
    z = torch.full((2, 816, 14, 14), level**0.5)
    z[1, :, 3, 4] *= 0.9
    assert regions(z, tests=tests) == [[], []]
    assert not segment(z, 28, tests=tests).any()


def test_latents_and_their_squared_norms_agree():
    torch.manual_seed(0)
    z = [torch.randn(3, 8, 6, 5, dtype=torch.float64), torch.randn(3, 4, 3, 3, dtype=torch.float64)]
    u = [(x**2).sum(1) for x in z]
    for options in ({}, {"null": Null((1.0, 1.0), (8.0, 4.0))}):
        expected = log_nfa(z, 12, **options)
        for channels in ((8, 4), np.array([8, 4])):
            torch.testing.assert_close(log_nfa(u, 12, channels=channels, **options), expected)
    torch.testing.assert_close(log_nfa(z[0], 12), log_nfa([z[0]], (12, 12)))
    strided = z[0].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(log_nfa(strided, 12), log_nfa(z[0], 12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_gradients(dtype):
    torch.manual_seed(1)
    z = torch.randn(2, 16, 5, 7).to(dtype)
    expected = log_nfa(z.double(), 10)
    got = log_nfa(z.clone().requires_grad_(), 10)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert segment(z, 10).dtype == torch.bool


def test_nothing_in_nothing_out():
    z = [torch.zeros(0, 4, 6, 5), torch.zeros(0, 8, 3, 3)]
    assert log_nfa(z, (7, 8)).shape == (0, 1, 7, 8)
    assert segment(z, (7, 8)).shape == (0, 1, 7, 8)
    assert regions(z) == []


def test_threads_do_not_show():
    u = torch.from_numpy(np.random.default_rng(2).chisquare(64, (17, 40, 33)).astype(np.float32))
    u[:, 5:9, 5:9] *= 2
    for tests in ("total", "per_size"):
        options = {"channels": 64, "tests": tests, "tail": "exact"}
        one, found = log_nfa(u, 80, threads=1, **options), regions(u, threads=1, **options)
        for threads in (2, 3, 64):
            assert torch.equal(one, log_nfa(u, 80, threads=threads, **options))
            assert found == regions(u, threads=threads, **options)
    single = log_nfa(u[:1], 80, channels=64, threads=1)
    assert torch.equal(single, log_nfa(u[:1], 80, channels=64, threads=4))
    assert torch.equal(single, log_nfa(u, 80, channels=64)[:1])  # an image's result is its own


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_what_the_cpu_gives():
    z = [torch.randn(2, 8, 6, 5), torch.randn(2, 4, 3, 3)]
    z[0][0, :, 2:4, 2:4] *= 6
    on_gpu = [x.cuda() for x in z]
    got = log_nfa(on_gpu, 12)
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), log_nfa(z, 12), rtol=1e-4, atol=1e-3)
    assert segment(on_gpu, 12).is_cuda
    assert [len(r) for r in regions(on_gpu)] == [len(r) for r in regions(z)]


def test_nearest_keeps_every_pixel_of_a_region():
    u = torch.full((1, 6, 6), 16.0)
    u[0, 2, 3] = 120.0
    options = {"channels": 16, "tests": "per_size"}
    (region,) = regions(u, **options)[0]
    assert region.box == (2, 3, 3, 4)
    assert region.map_size == (6, 6)
    assert region.image_box(24) == (8, 12, 12, 16)
    assert region.image_box((3, 7)) == (1, 3, 2, 5)
    mask = segment(u, 24, upsample="nearest", **options)
    assert mask.sum() == 16
    assert mask[0, 0, 8:12, 12:16].all()


@pytest.mark.parametrize("tail", ["chernoff", "exact"])
@pytest.mark.parametrize("scale", [1.0, 1e-300])
def test_the_most_extreme_levels_are_found(tail, scale):
    u = torch.zeros(1, 6, 6, dtype=torch.float64)
    u[0, 1:4, 1:4] = 1e300
    null, options = Null((scale,), (16.0,)), {"tail": tail, "tests": "per_size"}
    assert segment(u, 6, null=null, **options).equal(u[None] > 0)
    assert log_nfa(u, 24, null=null, **options).isfinite().all()
    assert [r.area for r in regions(u, null=null, **options)[0]] == [9]


@pytest.mark.parametrize("dof", [1, 2, 3, 16, 17, 100.5, 192, 816, 2000.25, 4096])
def test_exact_tail_against_mpmath(dof):
    ratios = np.concatenate(
        [[0.2, 0.7, 0.9, 0.97, 0.999], np.linspace(1, 1.2, 9), np.geomspace(1.25, 50, 15)]
    )
    expected = [oracle.exact(dof * r, dof) for r in ratios]
    direct = [_core.log_upper_gamma(dof / 2, r) / math.log(10) for r in ratios]
    np.testing.assert_allclose(direct, expected, rtol=1e-11, atol=1e-300)
    scaled = _core.Tail(dof, 3.0, True)(3 * dof * ratios)  # the tabulated one, of 3 * chi2
    np.testing.assert_allclose(scaled, expected, rtol=1e-9, atol=2e-12)
    bound = _core.Tail(dof, 3.0, False)(3 * dof * ratios)
    np.testing.assert_allclose(bound, [oracle.chernoff(dof * r, dof) for r in ratios], rtol=1e-9, atol=1e-12)
    assert (bound >= scaled).all()


def poisoned(value):
    z = torch.ones(2, 3, 4, 4)
    z[1, 2, 3, 1] = value
    return z


@pytest.mark.parametrize(
    ("latents", "error", "message"),
    [
        (poisoned(math.nan), ValueError, r"latents\[0\]: .*NaN"),
        (poisoned(-math.inf), ValueError, r"latents\[0\]: .*infinity"),
        (poisoned(1e30), ValueError, r"latents\[0\]: .*overflow"),
        ([torch.ones(2, 3, 4, 4), poisoned(math.nan)], ValueError, r"latents\[1\]: .*NaN"),
        (torch.ones(2, 3), ValueError, r"latents\[0\]: .*\(2, 3\)"),
        (torch.ones(2, 3, 0, 4), ValueError, r"latents\[0\]: .*\(2, 3, 0, 4\)"),
        (torch.ones(2, 4, 4), ValueError, r"latents\[0\]: .*channels"),
        (torch.ones(2, 3, 4, 4, dtype=torch.int32), TypeError, r"latents\[0\]: .*int32"),
        (torch.ones(2, 3, 4, 4).to_sparse(), TypeError, r"latents\[0\]: .*sparse"),
        (np.ones((2, 3, 4, 4), dtype=np.int32), TypeError, r"latents\[0\]: .*int32"),
        (np.ma.masked_greater(np.ones((2, 4, 4)), 0.5), TypeError, r"latents\[0\]: .*without a mask"),
        ("latents", TypeError, "latents: .*str"),
        ([], ValueError, "latents: .*empty"),
        ([torch.ones(2, 3, 4, 4), torch.ones(1, 3, 4, 4)], ValueError, r"latents\[1\]: .*batch size 2"),
        (
            [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4, device="meta")],
            ValueError,
            r"latents\[1\]: .*meta",
        ),
    ],
)
def test_bad_latents(latents, error, message):
    for call in (lambda: log_nfa(latents, 8), lambda: segment(latents, 8), lambda: regions(latents)):
        with pytest.raises(error, match=message):
            call()


def test_bad_options():
    z, u = torch.ones(1, 3, 4, 4), torch.ones(1, 4, 4)
    u[0, 0, 0] = -1
    cases = [
        (lambda: log_nfa(u, 8, channels=3), "negative value, -1"),
        (lambda: log_nfa(z, 8, channels=4), r"channels\[0\]: .* found 4"),
        (lambda: log_nfa(u.abs(), 8, channels=(3, 3)), "channels: expected 1"),
        (lambda: log_nfa(u.abs(), 8, channels=0), r"channels\[0\]"),
        (lambda: log_nfa(z, 8, tail="gauss"), "tail: .*gauss"),
        (lambda: log_nfa(z, 8, tests="all"), "tests: .*all"),
        (lambda: log_nfa(z, 8, upsample="cubic"), "upsample: .*cubic"),
        (lambda: log_nfa(z, 8, null=(1.0, 3.0)), "null: .*tuple"),
        (lambda: log_nfa(z, 8, null=Null((1.0, 1.0), (3.0, 3.0))), "null: expected 1"),
        (lambda: log_nfa(z, (8, 0)), "size"),
        (lambda: log_nfa(z, 8, threads=0), "threads"),
        (lambda: segment(z, 8, log_epsilon=math.nan), "log_epsilon"),
        (lambda: regions(z, log_epsilon="0"), "log_epsilon: .*str"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_numbers_of_numpy():
    u = torch.rand(2, 5, 6)
    plain = segment(u, 8, channels=3, log_epsilon=2, threads=1)
    theirs = segment(u, np.int64(8), channels=np.int32(3), log_epsilon=np.float32(2), threads=np.int64(1))
    assert torch.equal(plain, theirs)


IMMORTAL = """
import ctypes, torch
from usf_kernels.segmentation import segment
segment([torch.ones(1, 2, 3, 3)], 3)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(segment))
"""


def test_nothing_is_left_at_exit():
    done = subprocess.run([sys.executable, "-c", IMMORTAL], capture_output=True, text=True, check=True)
    assert "leaked" not in done.stderr


def test_significances_that_overflow_replace_no_child_that_is_stuck():
    energies = np.ones((1, 20, 20))
    energies[0, 2:18, 2:18] = 9e306  # 256 times that is beyond the range of doubles
    energies[0, 4, 4:14] = 1e307
    for place in ((4, 4), (4, 13), (10, 10)):
        energies[0][place] = 1.7e308
    (found,) = regions([energies], null=Null.white([2]), log_epsilon=math.inf)
    assert [region.area for region in found] == [1, 1, 1]


def test_the_lowest_numbers_stay_finite_between_pixels():
    latents = 1e150 * torch.randn(1, 4, 9, 9, dtype=torch.float64)
    found = log_nfa(latents, (37, 41), upsample="bilinear")
    assert found.min() == torch.finfo(torch.float32).min


@pytest.mark.parametrize("dtype", [np.int32, object, ">f4", np.longdouble])
def test_arrays_of_other_dtypes_are_named(dtype):
    with pytest.raises(TypeError, match=r"latents\[0\]: expected float32, float64 or float16, found"):
        log_nfa(np.zeros((1, 2, 2, 2), dtype), 2)


@pytest.mark.filterwarnings("error")
def test_arrays_may_be_read_only():
    z = np.random.default_rng(0).standard_normal((1, 8, 4, 4), np.float32)
    expected = log_nfa(z, 4)
    z.flags.writeable = False
    assert torch.equal(log_nfa(z, 4), expected)


def test_a_fitted_null_brings_its_form_of_the_test():
    """What was fitted for one form says nothing of another."""
    generator = torch.Generator().manual_seed(0)
    held_out, fresh = (1.1 * torch.randn(24, 8, 20, 20, generator=generator) for _ in range(2))
    null = calibrate(held_out, false_alarms=0.5)
    assert (null.tail, null.tests) == ("exact", "per_size")
    found = regions(fresh, null=null)
    assert found == regions(fresh, null=null, tail="exact", tests="per_size")
    assert found != regions(fresh, null=null, tests="total")
    assert 0.1 < sum(map(len, found)) / len(found) < 1.2
    form = {"tail": "chernoff", "tests": "total"}
    paper = calibrate(held_out, **form)
    assert torch.equal(log_nfa(fresh, 20, null=paper), log_nfa(fresh, 20, null=paper, **form))
    assert torch.equal(log_nfa(fresh, 20), log_nfa(fresh, 20, **form))
    with pytest.raises(ValueError, match="tests: expected one of"):
        Null((1.0,), (8.0,), tests="all")


def test_nearest_rounds_positions_at_their_centres():
    u = torch.rand(1, 3, 3) * 60
    maps = log_nfa(u, 3, channels=4, tests="per_size")
    index = torch.tensor([0, 0, 1, 2, 2])  # the position that a pixel's centre lies in
    found = log_nfa(u, 5, channels=4, tests="per_size", upsample="nearest")
    assert maps.unique().numel() > 1
    assert torch.equal(found, maps[..., index, :][..., index])
