import doctest
import math
import socket
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

pytest.importorskip("lightning")

from toy import NoisyImages, ToyFlow, equal_states, train, train_rank

import usf_kernels as usf
from usf_kernels import training
from usf_kernels.checkpoint import load_checkpoint, read_checkpoint
from usf_kernels.optimization import Settings, learning_rate
from usf_kernels.training import CachedFeatures, fit
from usf_kernels.training_run import Run


def test_training_lowers_the_held_out_loss_and_returns_the_best_weights(toy_run):
    model, history = toy_run
    losses = [row["validation_loss"] for row in history.rows]
    assert losses[-1] < losses[0] - 0.1
    assert history.best_loss == min(losses)
    assert losses[history.best_epoch - 1] == history.best_loss
    assert not model.training
    assert torch.equal(model.backbone.weight, ToyFlow(4).backbone.weight)


def test_same_seed_same_bits_other_seed_other_weights(toy_run):
    assert equal_states(toy_run[0], train()[0])
    assert not equal_states(toy_run[0], train(seed=1)[0])


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


def test_early_stopping_restores_the_best_weights():
    model, history = train(lr=3.0, max_epochs=60, patience=2, clip_norm=None, ema_decay=None)
    assert history.stopped_early
    assert len(history.rows) == history.best_epoch + 2
    check = fit(model, NoisyImages(22), NoisyImages(7, seed=1), max_epochs=1, lr=1e-30, batch_size=4,
                accelerator="cpu", progress=False)  # fmt: skip
    # the batch norm's running statistics move in that epoch, the weights do not
    assert check.rows[0]["validation_loss"] == pytest.approx(history.best_loss, abs=0.2)


def test_without_held_out_data_the_average_is_kept():
    options = {"max_epochs": 3, "batch_size": 4, "lr": 0.05, "accelerator": "cpu", "progress": False}
    moved, held = ToyFlow(3), ToyFlow(3)
    fit(moved, NoisyImages(8), **options)
    fit(held, NoisyImages(8), ema_decay=1 - 1e-6, **options)
    assert (moved.weight - torch.eye(3)).abs().max() > 0.01
    assert (held.weight - torch.eye(3)).abs().max() < 1e-4


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))

    def loss(self, batch):
        return batch.mean() + 0 * self.weight.sum()


def test_a_held_out_loss_is_the_mean_over_samples():
    held_out = torch.tensor([[0.0], [0.0], [0.0], [0.0], [5.0]])  # the last batch is of one
    options = {"batch_size": 4, "accelerator": "cpu", "progress": False}
    history = fit(Mean(), torch.zeros(4, 1), held_out, max_epochs=1, **options)
    assert history.rows[0]["validation_loss"] == pytest.approx(1.0)


def test_the_learning_rate_rises_and_falls():
    options = dict.fromkeys(("weight_decay", "seed", "validation_samples"), 0)
    options |= dict.fromkeys(("patience", "clip_norm", "ema_decay"))
    sizes = {"max_epochs": 10, "batch_size": 4, "world_size": 1, "train_samples": 40}
    settings = Settings(lr=0.5, warmup=0.25, precision="32-true", **sizes, **options)
    rates = [settings.learning_rate(step) for step in (0, 24, 25, 100)]
    assert rates == pytest.approx([0.5 / 26, 0.5 * 25 / 26, 0.5, 0.005])


@pytest.mark.parametrize("steps", [1, 2, 20, 30, 1000])
def test_the_learning_rate_rises_once_and_falls(steps):
    rates = [learning_rate(step, steps, lr=1.0, warmup=0.05) for step in range(steps + 2)]
    top = rates.index(max(rates))
    assert rates[top] == 1.0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_gradients_are_clipped():
    norms = []

    def note(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    hook = register_optimizer_step_pre_hook(note)
    try:
        train(max_epochs=1, clip_norm=0.01)
    finally:
        hook.remove()
    assert norms == pytest.approx([0.01] * 5, rel=1e-3)


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


def test_steps_replayed_as_a_graph_train_alike(tmp_path, toy_run, graphs):
    model, history = train(tmp_path, capture=True)
    assert len(graphs) == 1
    expected, plain = toy_run
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


def test_the_example_runs():
    assert doctest.testmod(training, extraglobs={"usf": usf, "torch": torch}) == (0, 4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_where_it_was_and_forgets_its_threshold(monkeypatch, fails):
    moves, forgotten, to, loss = [], [], ToyFlow.to, ToyFlow.loss

    def losing(self, batch):
        return loss(self, batch) * (math.nan if fails else 1)

    monkeypatch.setattr(ToyFlow, "to", lambda self, *place: moves.append(place) or to(self, *place))
    monkeypatch.setattr(ToyFlow, "forget_calibration", lambda self: forgotten.append(True), raising=False)
    monkeypatch.setattr(ToyFlow, "loss", losing)
    with pytest.raises(FloatingPointError) if fails else nullcontext():
        train(max_epochs=1)
    assert moves[-1] == (torch.device("cpu"),)
    assert forgotten == [True]
