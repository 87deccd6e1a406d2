"""What the options of `usf-kernels train` reach."""

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("lightning")

import cli_toys
from cli_toys import fails
from toy import ToyDetector

from usf_kernels import models, training
from usf_kernels.checkpoint import load_checkpoint
from usf_kernels.cli import main

toy_models, folder, train_words = cli_toys.toy_models, cli_toys.folder, cli_toys.train_words  # fixtures


def test_the_threshold_is_of_the_held_out_images(train_words, monkeypatch):
    fitted, calibrated = [], []
    start, calibrate = ToyDetector.initialize, ToyDetector.calibrate

    def seen(self, features, *, false_alarms=0.1):
        calibrated.append((len(features[0]), false_alarms))
        calibrate(self, features)

    monkeypatch.setattr(ToyDetector, "initialize", lambda self, f: fitted.append(len(f[0])) or start(self, f))
    monkeypatch.setattr(ToyDetector, "calibrate", seen)
    assert main([*train_words, "--held-out", "0.34", "--false-alarms", "0.5"]) == 0
    assert fitted == [4]
    assert calibrated[-1] == (2, 0.5)


def test_options_reach_the_training(train_words, monkeypatch):
    seen, fit = [], training.fit
    monkeypatch.setattr(
        training, "fit", lambda *data, **options: seen.append(options) or fit(*data, **options)
    )
    asked = {"patience": 3, "lr": 0.002, "weight_decay": 0.01, "seed": 5, "batch_size": 2}
    assert (
        main([*train_words, *(f"--{name.replace('_', '-')}={value}" for name, value in asked.items())]) == 0
    )
    assert len(seen) == 2  # a dry run first
    for options in seen:
        assert {name: options[name] for name in asked} == asked


def test_another_seed_starts_from_other_weights(train_words, tmp_path):
    biases = []
    for seed in ("0", "1"):
        assert main([*train_words, "--lr", "1e-30", "--seed", seed]) == 0
        biases.append(load_checkpoint(tmp_path / "run" / "model.pt").norm.bias)
    assert not torch.allclose(*biases)


def test_weights_are_given_once_for_each_network(train_words, monkeypatch, capsys):
    given = []

    def create(name, weights):
        given.append(weights)
        raise ValueError("enough")

    monkeypatch.setattr(models, "create_backbone", create)
    for files in ([], ["a.pt"], ["a.pt", "b.pt"]):
        assert "enough" in fails(capsys, *train_words, *(f"--weights={file}" for file in files))
    assert given == ["auto", "a.pt", ["a.pt", "b.pt"]]
