import csv
import doctest
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("lightning")

from toy import NoisyImages, ToyFlow, train, train_rank, train_slowly

import usf_kernels as usf
from usf_kernels import files, run_folder, sampling, training, training_run
from usf_kernels.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint, write_checkpoint
from usf_kernels.training import CachedFeatures, fit
from usf_kernels.training_run import Run

needs_fork_server = pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server and SIGKILL")


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history.rows]


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported lightning already, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy", "lightning.fabric", "lightning.pytorch.utilities.seed"])
    return context


@pytest.fixture(scope="module")
def reference():
    """What the default toy run gives when nothing disturbs it."""
    return train()


def test_training_lowers_the_held_out_loss_and_returns_the_best_weights(reference):
    model, history = reference
    losses = [row["validation_loss"] for row in history.rows]
    assert losses[-1] < losses[0] - 0.1
    assert history.best_loss == min(losses)
    assert losses[history.best_epoch - 1] == history.best_loss
    assert not model.training
    assert torch.equal(model.backbone.weight, ToyFlow(4).backbone.weight)


def test_same_seed_same_bits_other_seed_other_weights(reference):
    assert equal_states(reference[0], train()[0])
    assert not equal_states(reference[0], train(seed=1)[0])


def test_the_callers_random_numbers_are_untouched():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model = ToyFlow(4)
    torch.manual_seed(3)
    train(model=model, max_epochs=1)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    fit(model, NoisyImages(4), max_epochs=1, accelerator="cpu", progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.rand(4), expected)


def test_run_folder_holds_readable_results(tmp_path, reference):
    model, history = train(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "history.csv", "last.pt"]
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation_loss"]) for row in rows] == [r["validation_loss"] for r in history.rows]
    assert equal_states(load_checkpoint(tmp_path / "best.pt", model_class=ToyFlow), model)
    assert equal_states(reference[0], model)
    assert not any(key.startswith("backbone") for key in read_checkpoint(tmp_path / "best.pt")["state"])


def test_finished_run_resumes_to_its_result_without_training(tmp_path):
    model, history = train(tmp_path)
    stamp = (tmp_path / "last.pt").stat().st_mtime_ns
    again, same = train(tmp_path, resume=True)
    assert equal_states(model, again)
    assert same == history
    assert (tmp_path / "last.pt").stat().st_mtime_ns == stamp


@needs_fork_server
def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path, reference, processes):
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
    assert equal_states(reference[0], model)
    assert without_seconds(history) == without_seconds(reference[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "history.csv", "last.pt"]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["last.pt", "best.pt", "history.csv"])
def test_dying_around_every_write_loses_nothing(tmp_path, reference, monkeypatch, at):
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
    assert equal_states(reference[0], model)


def test_rare_checkpoints_and_loading_workers_change_nothing(tmp_path, reference, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ToyFlow, "loss", _dying_loss(17, ToyFlow.loss))
        with pytest.raises(_Killed):
            train(tmp_path, checkpoint_every=3)
    saved = read_checkpoint(tmp_path / "last.pt")["training"]
    assert (saved["epoch"], saved["step"]) == (2, 3)  # of 5 steps each, plus two validation batches an epoch
    model, _ = train(tmp_path, checkpoint_every=3, resume=True, workers=1)
    assert equal_states(reference[0], model)


def test_a_run_goes_on_with_this_devices_optimizer(tmp_path, reference, monkeypatch):
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
    assert equal_states(reference[0], model)


def _dying_loss(calls, loss):
    left = calls

    def dying(self, batch):
        nonlocal left
        left -= 1
        if left < 0:
            raise _Killed
        return loss(self, batch)

    return dying


def test_early_stopping_restores_the_best_weights():
    model, history = train(lr=3.0, max_epochs=60, patience=2, clip_norm=None, ema_decay=None)
    assert history.stopped_early
    assert len(history.rows) == history.best_epoch + 2
    check = fit(model, NoisyImages(22), NoisyImages(7, seed=1), max_epochs=1, lr=1e-30, batch_size=4,
                accelerator="cpu", progress=False)  # fmt: skip
    # the batch norm's running statistics move in that epoch, the weights do not
    assert check.rows[0]["validation_loss"] == pytest.approx(history.best_loss, abs=0.2)


def test_without_held_out_data_the_last_average_is_kept():
    model = ToyFlow(3)
    history = fit(model, NoisyImages(8), max_epochs=3, batch_size=4, ema_decay=0.5, accelerator="cpu",
                  progress=False)  # fmt: skip
    assert history.best_loss is None
    assert history.best_epoch == 3
    assert not torch.equal(model.weight, torch.eye(3))


def test_cached_features_train_like_the_images_they_came_from():
    images = torch.rand(8, 3, 4, 4)
    model = ToyFlow(4, dropout=0.0)
    with torch.no_grad():
        features = model.backbone(images)
    options = {"max_epochs": 2, "batch_size": 4, "accelerator": "cpu", "progress": False}
    fit(model, CachedFeatures([features]), **options)
    other = ToyFlow(4, dropout=0.0)
    fit(other, list(images), **options)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="expected as many images at each scale"):
        CachedFeatures([features, features[:3]])


def test_mixed_precision_trains(monkeypatch):
    seen = set()

    def loss(self, batch, plain=ToyFlow.loss):
        seen.add((self.training, torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")))
        return plain(self, batch)

    monkeypatch.setattr(ToyFlow, "loss", loss)
    _, history = train(precision="bf16-mixed", max_epochs=4)
    assert history.rows[-1]["validation_loss"] < history.rows[0]["validation_loss"]
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


class ScaledToNothing(ToyFlow):
    """No gradient but the decay's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.extra = nn.Parameter(torch.ones(2, 2))

    def no_weight_decay(self):
        return {"extra"}

    def loss(self, batch):
        return 0 * (super().loss(batch) + self.extra.sum())


def test_steps_replayed_as_a_graph_train_alike(tmp_path, reference, graphs):
    model, history = train(tmp_path, capture=True)
    assert len(graphs) == 1
    expected, plain = reference
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for row, other in zip(history.rows, plain.rows, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    resumed, _ = train(tmp_path, resume=True)  # how gradients come about makes no other run
    assert equal_states(resumed, model)


def test_weight_decay_spares_vectors_and_named_parameters():
    model = ScaledToNothing(3)
    with torch.no_grad():
        model.bias.fill_(1.0)
    fit(model, NoisyImages(8), max_epochs=1, batch_size=4, lr=0.1, weight_decay=0.5, accelerator="cpu",
        progress=False)  # fmt: skip
    assert torch.equal(model.extra, torch.ones(2, 2))
    assert torch.equal(model.bias, torch.ones(3))
    assert model.weight[0, 0] < 1


@needs_fork_server
def test_two_processes_train_as_one(tmp_path, processes):
    """DDP over gloo on one machine: each process sees its share of the batches, and they end as one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"batch_size": 2, "max_epochs": 2, "ema_decay": None}
    ranks = [processes.Process(target=train_rank, args=(r, port, tmp_path), kwargs=options) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    model = load_checkpoint(tmp_path / "best.pt", model_class=ToyFlow)
    saved = read_checkpoint(tmp_path / "last.pt")["training"]
    assert saved["finished"]
    assert saved["settings"]["world_size"] == 2
    losses = [row["validation_loss"] for row in saved["history"]["rows"]]
    assert losses[1] < losses[0]
    assert not torch.equal(model.weight, torch.eye(4))


@pytest.mark.parametrize(("count", "world"), [(22, 1), (22, 2), (3, 1), (3, 2), (5, 4)])
def test_every_process_gets_equal_and_disjoint_batches(count, world):
    epochs = [
        [sampling.epoch_order(count, 4, seed=0, epoch=e, rank=r, world_size=world) for r in range(world)]
        for e in range(6)
    ]
    assert any(epoch != epochs[0] for epoch in epochs)
    for ranks in epochs:
        assert len({tuple(map(len, batches)) for batches in ranks}) == 1
        seen = [index for batches in ranks for batch in batches for index in batch]
        if count >= 4 * world:
            assert len(seen) == len(set(seen)) == count // (4 * world) * 4 * world
        else:
            assert set(seen) == set(range(count))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best_weights(tmp_path, monkeypatch):
    calls = 0
    loss = ToyFlow.loss

    def failing(self, batch):
        nonlocal calls
        calls += 1
        return loss(self, batch) * (float("nan") if calls == 9 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(ToyFlow, "loss", failing)
        with pytest.raises(
            FloatingPointError, match=r"loss became nan at epoch 2, step 2: .* smaller lr; .*best\.pt"
        ):
            train(tmp_path)
    for name in ("best.pt", "last.pt"):
        assert load_checkpoint(tmp_path / name, model_class=ToyFlow).weight.isfinite().all()
    model, history = train(tmp_path, resume=True)
    assert len(history.rows) == 6
    assert model.weight.isfinite().all()


class Cusp(nn.Module):
    """A finite loss, of which the gradient at 0 is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def loss(self, batch):
        return self.weight.abs().sqrt().sum() + 0 * batch.mean()


@pytest.mark.parametrize("options", [{"clip_norm": None}, {"precision": "16-mixed"}, {}])
def test_a_gradient_that_is_not_finite_stops(options):
    model = Cusp()  # on a CPU, 16-mixed has no gradient scaler that would skip the step
    with pytest.raises(FloatingPointError, match="norm of the gradient became nan at epoch 1, step 1"):
        fit(model, torch.ones(16, 2), max_epochs=1, accelerator="cpu", progress=False, **options)
    assert torch.equal(model.weight, torch.zeros(3))


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(tmp_path, monkeypatch):
    losses = [float("nan"), 1.7]
    monkeypatch.setattr(Run, "_validate", lambda *_: losses.pop(0))
    with pytest.raises(FloatingPointError, match=r"held-out loss became nan after epoch 1: .* smaller lr$"):
        train(tmp_path)
    assert not (tmp_path / "best.pt").exists()


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
    fit(ToyFlow(4), NoisyImages(22), run_dir=tmp_path, resume=True, **options)
    assert (tmp_path / "last.pt").exists()
    assert not (tmp_path / "best.pt").exists()


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "max_epochs: expected an int at least 1, found 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"lr": 0.0}, "lr: expected a positive finite number, found 0"),
        ({"lr": float("inf")}, "lr: expected a positive finite number, found inf"),
        ({"weight_decay": -1.0}, r"weight_decay: expected a number in \[0, inf\), found -1"),
        (
            {"precision": "64-true"},
            "precision: expected one of '32-true', 'bf16-mixed', '16-mixed', found '64-true'",
        ),
        ({"seed": -1}, "seed"),
        ({"warmup": 1.0}, "warmup"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"clip_norm": -1.0}, r"clip_norm: expected a number in \(0, inf\], found -1"),
        ({"patience": 0}, "patience: expected an int at least 1, found 0"),
        ({"capture": True}, r"capture: expected tensors on one CUDA device, found \['cpu'\]"),
        (
            {"capture": True, "devices": 2},
            "capture: expected one device and no 16-mixed, found 2 with 32-true",
        ),
        (
            {"capture": True, "precision": "16-mixed"},
            "capture: expected one device and no 16-mixed, found 1 wi",
        ),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


@pytest.mark.parametrize("name", ["max_epochs", "batch_size", "patience"])
def test_counts_are_whole(name):
    with pytest.raises(TypeError, match=f"{name}: expected an int, found float"):
        train(**{name: 2.5})


def test_numbers_of_numpy_are_numbers(tmp_path):
    options = {"max_epochs": np.int64(2), "lr": np.float64(1e-3), "seed": np.int64(3)}
    train(tmp_path, **options)
    _, history = train(tmp_path, resume=True, **options)
    assert len(history.rows) == 2


def test_data_that_cannot_be_indexed_are_refused():
    images = NoisyImages(4)
    streams = DataLoader(images), (image for image in range(4)), Streamed()
    for wrong in streams:
        with pytest.raises(TypeError, match=f"train_data: .*samples by index, found {type(wrong).__name__}"):
            fit(ToyFlow(2), wrong, max_epochs=1)
    with pytest.raises(TypeError, match=r"validation_data: .*found DataLoader"):
        fit(ToyFlow(2), images, DataLoader(images), max_epochs=1)


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(NoisyImages(4))

    def __len__(self):
        return 4


def test_empty_data_and_frozen_models_are_refused():
    with pytest.raises(ValueError, match="validation_data: expected at least one sample, found none"):
        fit(ToyFlow(2), NoisyImages(4), NoisyImages(0), max_epochs=1)
    with pytest.raises(ValueError, match="model: expected parameters that require a gradient, found none"):
        fit(ToyFlow(2).requires_grad_(False), NoisyImages(4), max_epochs=1, accelerator="cpu")


def test_the_example_runs():
    assert doctest.testmod(training, extraglobs={"usf": usf, "torch": torch}) == (0, 4)
