"""Commands that are interrupted, or whose output nobody reads: what they say, and what they leave."""

import os
import sys
from contextlib import contextmanager

import pytest

pytest.importorskip("PIL")

import cli_toys
from cli_toys import fails, without_warnings
from toy import ToyDetector

from usf_kernels.cli import main

toy_models, checkpoint, folder = cli_toys.toy_models, cli_toys.checkpoint, cli_toys.folder  # fixtures
train_words = cli_toys.train_words


def test_an_interrupted_training_says_how_to_go_on(train_words, monkeypatch, capsys):
    loss, calls = ToyDetector.loss, []

    def interrupted(self, batch):
        calls.append(1)
        if len(calls) > 2:  # a step and the held-out loss of the first epoch
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(ToyDetector, "loss", interrupted)
    assert main([*train_words, "--epochs", "2"]) == 130
    said = capsys.readouterr()
    assert without_warnings(said.err) == "usf-kernels: interrupted: continue with --resume\n"
    assert "5 images to train on, 1 held out; cpu" in said.out
    assert "a threshold calibrated on 1 images is a guess" in said.err
    assert main([*train_words, "--epochs", "2"]) == 130  # at the first step: there is nothing to resume
    assert without_warnings(capsys.readouterr().err) == "usf-kernels: interrupted\n"


def test_a_training_interrupted_before_its_model_is_written_says_how_to_go_on(
    train_words, monkeypatch, capsys
):
    def interrupted(self, *arguments, **options):
        if options:  # the threshold that is kept
            raise KeyboardInterrupt
        return self

    monkeypatch.setattr(ToyDetector, "calibrate", interrupted)
    assert main(train_words) == 130
    assert without_warnings(capsys.readouterr().err) == "usf-kernels: interrupted: continue with --resume\n"


@contextmanager
def stdout_into_a_pipe(monkeypatch):
    """Yield the end of a reader, to be closed. (Not a fixture: pytest sets stdout after these.)"""
    reader, writer = os.pipe()
    with open(writer, "w", buffering=1) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        yield reader


def test_a_training_whose_output_nobody_reads_any_more_says_how_to_go_on(train_words, monkeypatch, capsys):
    loss, calls = ToyDetector.loss, []

    def closing(self, batch):
        calls.append(1)
        if len(calls) == 3:
            os.close(pipe)
        return loss(self, batch)

    monkeypatch.setattr(ToyDetector, "loss", closing)
    with stdout_into_a_pipe(monkeypatch) as pipe:
        assert main([*train_words, "--epochs", "2"]) == 2
    assert without_warnings(capsys.readouterr().err) == (
        "usf-kernels: error: nobody reads the output any more: continue with --resume\n"
    )


def test_an_evaluation_whose_output_nobody_reads_keeps_its_results(
    checkpoint, folder, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "found"
    with stdout_into_a_pipe(monkeypatch) as pipe:
        os.close(pipe)
        error = fails(capsys, "evaluate", checkpoint, folder, "--output", output)
    assert "nobody reads the output any more" in error
    assert {path.name for path in output.iterdir()} == {"results.json", "images.csv", "panel.png"}
