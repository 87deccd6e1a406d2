"""What a run folder holds, and what it keeps when the run dies."""

import csv
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from toy import NoisyImages, ToyFlow, equal_states, train, train_slowly

from usf_kernels import files, run_folder, training_run
from usf_kernels.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint, write_checkpoint
from usf_kernels.training import fit


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history.rows]


def test_run_folder_holds_readable_results(tmp_path, toy_run):
    model, history = train(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "history.csv", "last.pt"]
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation_loss"]) for row in rows] == [r["validation_loss"] for r in history.rows]
    assert equal_states(load_checkpoint(tmp_path / "best.pt", model_class=ToyFlow), model)
    assert equal_states(toy_run[0], model)
    assert not any(key.startswith("backbone") for key in read_checkpoint(tmp_path / "best.pt")["state"])


def test_finished_run_resumes_to_its_result_without_training(tmp_path):
    model, history = train(tmp_path)
    stamp = (tmp_path / "last.pt").stat().st_mtime_ns
    again, same = train(tmp_path, resume=True)
    assert equal_states(model, again)
    assert same == history
    assert (tmp_path / "last.pt").stat().st_mtime_ns == stamp


def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path, toy_run, processes):
    moments, kills, child, steps = random.Random(0), 0, None, []
    for _ in range(40):
        child = processes.Process(target=train_slowly, args=(tmp_path,))
        child.start()
        begun = time.monotonic()
        before = (tmp_path / "last.pt").stat().st_mtime_ns if (tmp_path / "last.pt").exists() else 0
        while child.is_alive() and time.monotonic() < begun + 60:  # until it has done some work of its own
            if (tmp_path / "last.pt").exists() and (tmp_path / "last.pt").stat().st_mtime_ns > before:
                break
            time.sleep(0.001)
        child.join(moments.uniform(0, 0.4))
        if not child.is_alive():
            break
        try:
            os.kill(child.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has just ended by itself
            child.join()
            break
        child.join()
        kills += 1
        saved = read_checkpoint(tmp_path / "last.pt")["training"]  # whole, whenever the kill came
        steps.append(saved["epoch"] * 5 + saved["step"])
    assert child.exitcode == 0
    assert kills >= 3
    assert steps == sorted(steps)
    model, history = train(tmp_path, resume=True)  # finished: only reads the result
    assert equal_states(toy_run[0], model)
    assert without_seconds(history) == without_seconds(toy_run[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "history.csv", "last.pt"]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["last.pt", "best.pt", "history.csv"])
def test_dying_around_every_write_loses_nothing(tmp_path, toy_run, monkeypatch, at):
    """Dies right after the third writing of each file, then just before the next, and still ends equal."""
    replace = os.replace
    count = 0

    def dying(source, target):
        nonlocal count
        if Path(target).name == at:
            count += 1
            if count == 6:
                raise _Killed
        replace(source, target)
        if Path(target).name == at and count == 3:
            raise _Killed

    monkeypatch.setattr(files.os, "replace", dying)
    for _ in range(2):
        with pytest.raises(_Killed):
            train(tmp_path, resume=True)
    model, _ = train(tmp_path, resume=True)
    assert equal_states(toy_run[0], model)


def test_rare_checkpoints_and_loading_workers_change_nothing(tmp_path, toy_run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ToyFlow, "loss", _dying_loss(17, ToyFlow.loss))
        with pytest.raises(_Killed):
            train(tmp_path, checkpoint_every=3)
    saved = read_checkpoint(tmp_path / "last.pt")["training"]
    assert (saved["epoch"], saved["step"]) == (2, 3)  # of 5 steps each, plus two validation batches an epoch
    model, _ = train(tmp_path, checkpoint_every=3, resume=True, workers=1)
    assert equal_states(toy_run[0], model)


def test_a_run_goes_on_with_this_devices_optimizer(tmp_path, toy_run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ToyFlow, "loss", _dying_loss(17, ToyFlow.loss))
        with pytest.raises(_Killed):
            train(tmp_path)
    saved = read_checkpoint(tmp_path / "last.pt")
    groups = saved["training"]["optimizer"]["param_groups"]
    assert [group["fused"] for group in groups] == [True, True]
    for group in groups:
        group["fused"] = None  # as on a GPU
    write_checkpoint(tmp_path / "last.pt", saved)
    model, _ = train(tmp_path, resume=True)
    assert equal_states(toy_run[0], model)


def _dying_loss(calls, loss):
    left = calls

    def dying(self, batch):
        nonlocal left
        left -= 1
        if left < 0:
            raise _Killed
        return loss(self, batch)

    return dying


def test_checkpoints_come_at_intervals_unless_steps_are_counted(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(run_folder, "write_checkpoint", lambda path, *_, **__: written.append(path.name))
    train(tmp_path, max_epochs=2, checkpoint_every=None)
    assert written.count("last.pt") == 2
    monkeypatch.setattr(training_run, "INTERVAL", 0.0)
    train(tmp_path, max_epochs=2, checkpoint_every=None)
    assert written.count("last.pt") == 2 + 2 * 6  # five steps an epoch


def test_a_dry_run_finds_what_is_wrong_before_there_are_data(tmp_path):
    train(tmp_path, max_epochs=1)
    before = (tmp_path / "last.pt").read_bytes()
    plan = {"max_epochs": 1, "accelerator": "cpu", "run_dir": tmp_path, "dry_run": True}
    assert fit(ToyFlow(4), range(22), range(7), **plan).rows == []
    assert (tmp_path / "last.pt").read_bytes() == before
    with pytest.raises(ValueError, match=r"last\.pt: holds a run with train_samples=22, not 23"):
        fit(ToyFlow(4), range(23), range(7), lr=0.05, batch_size=4, ema_decay=0.9, resume=True, **plan)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        fit(ToyFlow(4), range(22), **plan | {"run_dir": tmp_path / "file"})


def test_no_space_names_the_file_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):

    def full(descriptor):
        raise OSError(28, "No space left on device")

    train(tmp_path, max_epochs=1)
    before = (tmp_path / "best.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device.*best\.pt") as caught:
            save_checkpoint(tmp_path / "best.pt", ToyFlow(4))
    assert caught.value.errno == 28
    assert (tmp_path / "best.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "damage",
    [
        {"training": None},
        {"training": {}},
        {"training": {"settings": 3, "history": {"best_loss": 1.0}}},
        {"history": None},
        {"optimizer": {"state": 3}},
        {"average": None},
        {"step": ...},
    ],
)
def test_a_damaged_run_is_named(tmp_path, damage):
    train(tmp_path, max_epochs=1)
    path = tmp_path / "last.pt"
    content = torch.load(path, weights_only=True)
    if "training" in damage:
        content |= damage
    else:
        content["training"] |= damage
        content["training"] = {k: v for k, v in content["training"].items() if v is not ...}
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"last\.pt: damaged checkpoint, its training cannot be read"):
        train(tmp_path, max_epochs=1, resume=True)


def test_a_run_that_starts_anew_keeps_nothing_of_another(tmp_path):
    train(tmp_path, max_epochs=1)
    (tmp_path / "last.pt").unlink()
    options = {"max_epochs": 1, "accelerator": "cpu", "progress": False}
    model = ToyFlow(4)
    fit(model, NoisyImages(22), run_dir=tmp_path, resume=True, **options)
    for name in ("last.pt", "best.pt"):
        assert equal_states(load_checkpoint(tmp_path / name, model_class=ToyFlow), model)


def test_without_held_out_data_the_result_is_kept_too(tmp_path):
    options = {"max_epochs": 2, "accelerator": "cpu", "progress": False, "ema_decay": 0.9}
    model = ToyFlow(4)
    fit(model, NoisyImages(22), run_dir=tmp_path, lr=0.1, **options)
    assert equal_states(load_checkpoint(tmp_path / "best.pt", model_class=ToyFlow), model)
    assert not equal_states(load_checkpoint(tmp_path / "last.pt", model_class=ToyFlow), model)
    again = ToyFlow(4)
    fit(again, NoisyImages(22), run_dir=tmp_path, lr=0.1, resume=True, **options)
    assert equal_states(again, model)


def test_facts_that_are_no_numbers_are_equal(tmp_path):
    for resume in (False, True):
        train(tmp_path, max_epochs=1, resume=resume, extra={"unknown": float("nan")})


def test_a_folder_with_another_run_is_refused(tmp_path):
    train(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"last\.pt.*max_epochs=1, not 2.*without resume"):
        train(tmp_path, max_epochs=2, resume=True)
    with pytest.raises(ValueError, match=r"config channels=4, not 3"):
        train(tmp_path, max_epochs=1, resume=True, model=ToyFlow(3))
    with pytest.raises(ValueError, match=r"data=None, not 'other'"):
        train(tmp_path, max_epochs=1, resume=True, extra={"data": "other"})
    with pytest.raises(ValueError, match=r"extra seed=None, not 7"):
        train(tmp_path, max_epochs=1, resume=True, extra={"seed": 7})
    _, history = train(tmp_path, max_epochs=2)
    assert len(history.rows) == 2


def test_the_best_weights_of_another_run_are_refused(tmp_path):
    train(tmp_path / "one", max_epochs=1)
    train(tmp_path / "other", max_epochs=1, lr=0.01)
    shutil.copy(tmp_path / "other" / "best.pt", tmp_path / "one")
    with pytest.raises(ValueError, match=r"best\.pt: holds a run with lr=0\.01, not 0\.05"):
        train(tmp_path / "one", max_epochs=1, resume=True)


def test_a_compiled_model_ends_with_its_best_weights(tmp_path):
    """Which are not those of the last epoch."""
    options = {"lr": 3.0, "max_epochs": 60, "patience": 2, "clip_norm": None, "ema_decay": None}
    plain, history = train(tmp_path / "plain", **options)
    assert history.best_epoch < len(history.rows)
    model = ToyFlow(4)
    train(tmp_path / "compiled", model=torch.compile(model, backend="eager"), **options)
    assert equal_states(plain, model)
