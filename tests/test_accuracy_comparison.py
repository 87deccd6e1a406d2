"""What the tables and sentences say, on rows whose answers are known; and one small comparison, run."""

import dataclasses
import math
from itertools import product

import numpy as np
import pytest

from bench.accuracy import comparison, page, substitution
from bench.accuracy.protocol import FORMS, METRICS
from usf_kernels.demo import Recipe

TINY = Recipe(train=32, validation=16, test=10, epochs=1)


def rows(models=("FastFlow", "UFlow"), seeds=3, gain=0.1, shrink=0.5):
    """Affine: 0.5 in brick, 0.7 in grass, seeds 0.02 apart; others the same; USF `gain` more, narrower."""
    found = []
    for model, form, texture, seed in product(models, FORMS, ("brick", "grass"), range(seeds)):
        level = {"brick": 0.5, "grass": 0.7}[texture] + (gain if form == "additive + LU" else 0)
        value = level + (seed - 1) * 0.02 * (shrink if form == "additive + LU" else 1)
        row = {"texture": texture, "model": model, "form": form, "seed": str(seed), "recipe": "short"}
        found.append(row | dict.fromkeys([*METRICS, "loss", "z2", "seconds"], str(value)))
    return found


def test_the_spread_is_within_textures():
    results = comparison.Results(rows(), "texture")
    spread, degrees = results.spread("FastFlow", "affine", "aupro")
    assert (spread, degrees) == (pytest.approx(0.02), 4)  # that textures are 0.2 apart is no part of it
    assert results.values("FastFlow", "affine", "aupro").mean() == pytest.approx(0.6)
    alone = comparison.Results(rows(seeds=1), "texture")
    assert math.isnan(alone.spread("UFlow", "affine", "aupro")[0])


def test_the_tables_say_what_the_rows_say():
    text = " ".join(comparison.section(rows(), "texture").split())
    assert "Mean over 2 textures (brick, grass) and 3 seeds" in text
    best = "**0.700 ± 0.010**"
    assert f"| FastFlow | 0.600 ± 0.020 | 0.600 ± 0.020 | 0.600 ± 0.020 | {best} |" in text
    assert "| UFlow | affine + LU | +0.000, 0 of 6; spread 1.00x |" in text  # and is not counted below
    assert "| UFlow | additive + LU | +0.100, 6 of 6; spread 0.50x |" in text
    assert (
        "at least the mean of the affine one in 12 of 12 comparisons. Is the spread smaller? In 6 of 12."
        in text
    )
    assert "0 of the ratios lie outside" in text  # half of it, with 4 degrees of freedom, is nothing


def test_losses_and_narrow_spreads_are_named():
    text = " ".join(comparison.section(rows(["UFlow"], gain=-0.1, shrink=0.05), "texture").split())
    assert "in 3 of 6 comparisons; not in these: UFlow additive + LU, image AUROC (-0.100);" in text
    assert "3 of the ratios lie outside" in text


def test_what_is_detected_beside_how_well_it_fits():
    """All numbers of these rows are the same one, the loss too: less of it is a better fit."""
    text = " ".join(comparison.section(rows(["UFlow"], gain=-0.1), "texture").split())
    assert "of affine ones with permutations in 0 of 6 runs, and in 0 of these" in text
    assert "; with LU maps in 6 of 6 runs, and in 6 of these its image AUROC is below as well." in text
    text = " ".join(comparison.section(rows(["UFlow"]), "texture").split())
    assert "; with LU maps in 0 of 6 runs, and in 0 of these its image AUROC is below as well." in text


def test_one_seed_says_nothing_on_the_spread():
    text = " ".join(comparison.section(rows(seeds=1), "texture").split())
    assert "One seed says nothing on the spread." in text
    assert "nan" not in text


def test_only_runs_that_all_forms_have_are_compared():
    found = [row for row in rows() if (row["model"], row["form"], row["seed"]) != ("UFlow", "affine", "2")]
    text = comparison.section(found, "texture")
    assert "Not all runs are there yet of UFlow." in text
    assert "+0.105, 4 of 4" in text
    with pytest.raises(ValueError, match="in all of the forms"):
        comparison.section([row for row in rows() if row["form"] != "affine"], "texture")


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_figure_has_every_dot(seeds):
    picture = comparison.figure(rows(seeds=seeds), "texture", "title")
    dots = sum(
        len(line.get_xdata()) for axis in picture.axes for line in axis.lines if line.get_marker() == "o"
    )
    assert dots == 2 * 2 * 2 * 4 * seeds  # metrics, textures, models, forms, seeds


def test_what_the_expected_chance_is():
    low, high = comparison._chance(6)
    rng = np.random.default_rng(0)
    ratios = np.sqrt(rng.chisquare(6, 20000) / rng.chisquare(6, 20000))
    assert np.quantile(ratios, [0.025, 0.975]) == pytest.approx([low, high], rel=0.05)


@pytest.mark.slow
def test_the_command_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(substitution, "QUICK", TINY)
    arguments = ["--quick", "--models", "FastFlow", "CFlow", "--workers", "1", "--output", str(tmp_path)]
    assert substitution.main(arguments) == 0
    found = substitution.rows_in(tmp_path).read()
    assert [(row["model"], row["form"]) for row in found] == list(product(("FastFlow", "CFlow"), FORMS))
    assert all(0 <= float(row[metric]) <= 1 for row in found for metric in METRICS[:5])
    assert all(0.1 < float(row["z2"]) < 10 for row in found)
    assert "| CFlow |" in (tmp_path / "substitution.md").read_text()
    assert (tmp_path / "substitution.png").stat().st_size > 1000
    capsys.readouterr()
    assert substitution.main(arguments) == 0
    assert "8 of 8 are in" in capsys.readouterr().out
    assert substitution.rows_in(tmp_path).read() == found


def test_the_page_says_what_the_rows_say(capsys):
    assert page.main(["--check"]) == 0, "run: python -m bench.accuracy.page"
    assert "up to date" in capsys.readouterr().out


def test_a_page_without_markers():
    with pytest.raises(ValueError, match="nfa: begin"):
        page.rewritten("# Title", "nfa", "")


def test_other_settings_are_other_runs():
    job, other = (
        substitution.jobs(["UFlow"], ["brick"], [0], recipe)[0]
        for recipe in (TINY, dataclasses.replace(TINY, epochs=2))
    )
    assert job["recipe"] != other["recipe"]
