"""The Gaussian-mixture experiment: its density, its rows, resuming, and the picture."""

import csv

import pytest
import torch
from helpers import max_error

from bench.accuracy import gaussian_mixture as experiment


def test_the_density_is_the_mixtures():
    x = experiment.mixture(50, 3)
    normals = torch.distributions.Normal(torch.tensor([[-1.0] * 3, [1.0] * 3], dtype=torch.float64), 1.0)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(2, dtype=torch.float64)),
        torch.distributions.Independent(normals, 1),
    )
    assert max_error(experiment.log_density(x), mixture.log_prob(x.double())) < 1e-9
    for draw, tolerance in ((experiment.mixture, 0.08), (experiment.even_mixture, 0.01)):
        many = draw(1 << 14, 2)
        assert many.mean(0).abs().max() < tolerance
        expected = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        assert max_error(torch.cov(many.T), expected) < tolerance
        assert not torch.equal(draw(8, 2), draw(8, 2))


def test_a_run_writes_rows_latents_and_a_picture_and_is_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "QUICK", {"steps": {2: 4}, "seeds": (0,)})
    monkeypatch.setattr(experiment, "TEST", 200)
    monkeypatch.setattr(experiment, "EPOCHS", 2)
    arguments = ["--quick", "--output", str(tmp_path)]
    assert experiment.main(arguments) == 0
    with open(tmp_path / "gaussian_mixture.csv", newline="") as file:
        rows = {(row["dimensions"], row["model"]): row for row in csv.DictReader(file)}
    assert len(rows) == 3
    for (_, model), row in rows.items():
        assert -1 <= float(row["spearman"]) <= 1
        assert abs(float(row["kendall"])) <= abs(float(row["spearman"])) + 0.05
        if model == "DeepSVDD":
            assert row["likelihood_spearman"] == row["divergence"] == ""
        else:
            assert float(row["divergence"]) > 0
    assert float(rows["2", "USFlow"]["likelihood_spearman"]) == pytest.approx(-1, abs=1e-5)
    assert float(rows["2", "USFlow"]["spearman"]) < -0.5
    latents = experiment.latents_in(tmp_path).read()
    assert {row["model"] for row in latents} == set(experiment.MODELS)
    picture = tmp_path / "gaussian_mixture.png"
    assert picture.stat().st_size > 10_000
    assert "| USFlow |" in capsys.readouterr().out

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(experiment, "measure", fail)
    assert experiment.main(arguments) == 0
