"""The recommended threshold, on rows whose answer is known; and the command, on few crops."""

from dataclasses import replace

import pytest

from bench.accuracy import nfa


def rows(points, model="UFlow", texture="brick"):
    """(tests, null, log_epsilon): (mIoU, false alarms)."""
    return [
        {
            "texture": texture,
            "model": model,
            "recipe": "short",
            **{"tests": tests, "null": null, "log_epsilon": f"{threshold:g}"},
            **{"miou": str(miou), "false_alarms": str(alarms)},
        }
        for (tests, null, threshold), (miou, alarms) in points.items()
    ]


def test_the_best_that_keeps_its_promise():
    points = {
        ("per_size", "calibrated", 0): (0.30, 0.4),
        ("per_size", "calibrated", -1): (0.28, 0.05),
        ("per_size", "calibrated", 1): (0.50, 2.0),  # promises 10, which nobody wants
        ("per_size", "white", 0): (0.40, 3.0),  # breaks its promise
        ("total", "white", 0): (0.10, 0.0),
    }
    assert nfa.recommended(rows(points)) == ("per_size", "calibrated", 0.0)
    # A second texture in which the threshold 0 does not keep it, though the mean over both does.
    worse = points | {("per_size", "calibrated", 0): (0.30, 1.2)}
    both = rows(points) + rows(worse, texture="grass")
    assert nfa.averages(both)["per_size", "calibrated", 0.0] == pytest.approx((0.30, 0.8, 1.2))
    assert nfa.recommended(both) == ("per_size", "calibrated", -1.0)
    assert nfa.recommended(rows({("per_size", "white", 0): (0.4, 3.0)})) is None


def everything(**changes):
    """All points: 0.1 mIoU and no false alarms, but for the changes."""
    points = {(*form, float(t)): (0.1, 0.0) for form in nfa.TESTED for t in nfa.THRESHOLDS}
    for name, value in changes.items():
        tests, null, threshold = name.split("__")
        points[tests, null, float(threshold.replace("m", "-"))] = value
    return rows(points)


def test_the_text_follows_the_rows():
    default = " ".join(nfa.section(everything(per_size__calibrated__0=(0.3, 0.25))).split())
    assert "| `per_size` | calibrated | 0.300 | 0.25 | 0.25 | 0.300 at 0, 0.25 |" in default
    assert "It is the default of the models' `predict`" in default
    other = " ".join(nfa.section(everything(total__white__m3=(0.4, 0.0))).split())
    assert 'Recommended from these rows: `tests="total"`, white, log_epsilon = -3.' in other
    assert "has an mIoU of 0.100" in other
    bad = [row | {"false_alarms": "2000"} for row in everything()]
    assert "No form of the test keeps its promise" in nfa.section(bad)


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nfa, "QUICK", replace(nfa.QUICK, train=32, validation=16, test=10, epochs=1))
    arguments = ["--quick", "--workers", "1", "--output", str(tmp_path)]
    assert nfa.main(arguments) == 0
    found = nfa.rows_in(tmp_path).read()
    assert len(found) == len(nfa.FLOWS) * len(nfa.TESTED) * len(nfa.THRESHOLDS)
    for tests, null in nfa.TESTED:  # a higher threshold never has fewer false alarms
        alarms = [
            float(row["false_alarms"])
            for row in found
            if (row["model"], row["tests"], row["null"]) == ("UFlow", tests, null)
        ]
        assert alarms == sorted(alarms)
    assert (tmp_path / nfa.PICTURE).stat().st_size > 1000
    assert "mIoU" in (tmp_path / "nfa.md").read_text()
    capsys.readouterr()
    assert nfa.main(arguments) == 0
    assert "2 of 2 are in" in capsys.readouterr().out
