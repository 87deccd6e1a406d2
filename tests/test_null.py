"""The null model and its calibration."""

import math

import numpy as np
import pytest
import torch

from usf_kernels.calibration import calibrate
from usf_kernels.null import Null
from usf_kernels.segmentation import regions


def test_calibrate_recovers_the_distribution():
    rng = np.random.default_rng(0)
    u = [torch.from_numpy(a * rng.chisquare(nu, (50, 20, 20))) for a, nu in ((2.0, 40.0), (0.8, 7.5))]
    null = calibrate(u)
    assert null.scale == pytest.approx((2.0, 0.8), rel=0.05)
    assert null.dof == pytest.approx((40.0, 7.5), rel=0.05)
    assert Null.from_list(null.to_list(), tail="exact", tests="per_size") == null
    assert "chi2" in repr(null)
    white = calibrate(torch.randn(20, 12, 16, 16))
    assert white.dof[0] == pytest.approx(12, rel=0.1)
    # Squared norms that are twice too large are no anomaly once that is known.
    assert sum(map(len, regions(u, channels=(40, 7), tests="per_size"))) > 50
    assert sum(map(len, regions(u, null=null, tests="per_size"))) <= 50


@pytest.mark.parametrize(("tail", "tests"), [("exact", "per_size"), ("chernoff", "total")])
def test_false_alarms_of_dependent_positions_are_bounded(tail, tests):
    noise = torch.randn(60, 8, 22, 22)
    smooth = torch.nn.functional.avg_pool2d(noise, 7, 1, divisor_override=7)  # white channels, few positions
    options = {"tail": tail, "tests": tests}
    plain, bounded = calibrate(smooth), calibrate(smooth, false_alarms=0.05, **options)
    assert bounded.dof == plain.dof
    alarms = [sum(map(len, regions(smooth, null=null, **options))) / 60 for null in (plain, bounded)]
    assert alarms[1] <= 0.05
    if tests == "per_size":
        assert alarms[0] > 0.5
    else:  # which is far from what it allows
        assert bounded.scale < plain.scale
    with pytest.raises(ValueError, match=r"false_alarms: expected a number in \(0, inf\], found 0"):
        calibrate(smooth, false_alarms=0)


def test_null_is_checked():
    for arguments in (((1.0,), (0.0,)), ((math.inf,), (1.0,)), ((1.0, 1.0), (1.0,)), ((), ())):
        with pytest.raises(ValueError, match=r"scale|dof"):
            Null(*arguments)
    with pytest.raises(ValueError, match=r"dof: expected 1e-06 to 1e\+09, found .*1e\+17"):
        Null((1.0, 1.0), (3.0, 1e17))
    for scale, dof in ((1e-305, 1e-5), (1e306, 1e3)):
        with pytest.raises(ValueError, match=r"scale: expected scale \* dof within"):
            Null((scale,), (dof,))
    for pairs in ([[1.0]], [1, 2], np.ones((1, 2)), []):
        with pytest.raises(ValueError, match="pairs"):
            Null.from_list(pairs)
    with pytest.raises(ValueError, match="dof: expected 1e-06"):
        Null((1.0,), (1e-16,))
    for wrong in (lambda: Null(1.0, (2.0,)), lambda: Null("12", (3.0, 4.0)), lambda: Null((1.0,), ("3",))):
        with pytest.raises(TypeError, match=r"scale|dof"):
            wrong()
    with pytest.raises(TypeError, match="channels"):
        Null.white(8)
    with pytest.raises(ValueError, match=r"latents\[0\].*vary"):
        calibrate(torch.ones(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"latents\[0\].*two positions"):
        calibrate(torch.ones(0, 3, 4, 4))


@pytest.mark.parametrize("unit", [1e-170, 1e200])
def test_calibrate_in_any_unit(unit):
    u = torch.rand(2, 4, 4, dtype=torch.float64)
    null, scaled = calibrate(u), calibrate(u * unit)
    assert scaled.dof[0] == pytest.approx(null.dof[0], rel=1e-12)
    assert scaled.scale[0] / unit == pytest.approx(null.scale[0], rel=1e-12)
