"""The loops of a training run, and the state to resume it from; called by `training.fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from usf_kernels.checkpoint import load_stored_state, stored_state, uncompiled
from usf_kernels.nn import CapturedGradients
from usf_kernels.optimization import Settings, copy_values, parameter_groups, swapped
from usf_kernels.progress import training_progress
from usf_kernels.run_folder import BEST, LAST, RunFolder
from usf_kernels.sampling import epoch_order, loader, seed_generators

if TYPE_CHECKING:
    from lightning.fabric import Fabric

INTERVAL = 60.0  # seconds between two checkpoints within an epoch, unless the caller counts steps


@dataclass
class History:
    """Record of a run.

    Attributes:
        rows: one per epoch, in order: epoch, step, train_loss, validation_loss, lr, seconds. Losses are means
            of `model.loss`; `validation_loss` is NaN without held-out data.
        best_epoch: the epoch whose weights the model has at the end.
        best_loss: its held-out loss, None without held-out data.
        stopped_early: whether the held-out loss had stopped improving before `max_epochs`.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_loss: float | None = None
    stopped_early: bool = False


class Run:
    """A model, its optimiser, and the state of their training."""

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        settings: Settings,
        history: History,
        files: RunFolder,
        checkpoint_every: int | None,
        *,
        capture: bool,
    ) -> None:
        model = uncompiled(model)  # torch.compile wraps `forward` only, and changes the names of parameters
        self.fabric, self.model, self.settings, self.history = fabric, model, settings, history
        self.files, self.every, self.capture = files, checkpoint_every, capture
        self.epoch = self.step = self.bad_epochs = 0  # `step` counts within the epoch
        self.loss_sum = 0.0
        self.finished = False
        self.saved = time.monotonic()
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # One pass over memory on the CPU. On a GPU, a gradient scaler then leaves no gradients to clip.
        self.fused = True if fabric.device.type == "cpu" else None
        groups = parameter_groups(model, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=self.fused)
        self.average: dict[str, Tensor] | None = None
        self.best: dict[str, Any] | None = None

    def fit(
        self,
        train_data: Dataset[Any],
        validation_data: Dataset[Any] | None,
        *,
        resume: bool,
        workers: int,
        progress: bool,
        title: str,
    ) -> History:
        """Train to the end, from the start or from the last checkpoint."""
        settings, fabric = self.settings, self.fabric
        last, best = fabric.broadcast(self.files.open(resume) if fabric.is_global_zero else (None, None))
        if last is not None:
            load_stored_state(self.model, last, self.files.path / LAST)
        self.module, self.stepper = fabric.setup(self.model, self.optimizer)
        self.module.mark_forward_method("loss")  # so that DDP sees the call
        loss = partial(_loss, fabric, self.module)
        if self.capture:
            self.gradients = CapturedGradients(self.model, loss, backward=fabric.backward)
        else:
            self.gradients = partial(_gradients, fabric, loss)
        if settings.ema_decay is not None:
            self.average = {name: p.detach().clone() for name, p in self.trainable.items()}
        if last is not None:
            self._restore(last["training"], best)
        if not self.finished and hasattr(self.model, "forget_calibration"):
            self.model.forget_calibration()  # its latents are about to change
        position = {"seed": settings.seed, "rank": fabric.global_rank, "world_size": fabric.world_size}
        show = progress and fabric.is_global_zero
        with training_progress(show, settings.max_epochs, start=self.epoch, title=title) as report:
            while not self.finished:
                started = time.perf_counter()
                self.model.train()
                order = epoch_order(len(train_data), settings.batch_size, epoch=self.epoch, **position)
                for batch in loader(
                    train_data, order[self.step :], seed=settings.seed, epoch=self.epoch + 1, workers=workers
                ):
                    self._train_step(fabric.to_device(batch))
                    if self._due():
                        self._save()
                    if self.step < settings.steps:
                        held_out = self.history.rows[-1]["validation_loss"] if self.history.rows else None
                        done = self.epoch + self.step / settings.steps
                        report(done, self.loss_sum / self.step, held_out, self.history.best_loss)
                row = self._end_epoch(validation_data, workers, time.perf_counter() - started)
                report(self.epoch, row["train_loss"], row["validation_loss"], self.history.best_loss)
        self._adopt_best()
        return self.history

    def _train_step(self, batch: Any) -> None:
        settings = self.settings
        number = self.epoch * settings.steps + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate(number)
        seed_generators(settings.seed, number, self.fabric.global_rank, 1)
        loss = self.gradients(batch).item()
        now = f"at epoch {self.epoch + 1}, step {self.step + 1}"
        self._require_finite("loss", loss, now)
        scales = getattr(self.fabric.strategy.precision, "scaler", None) is not None
        if settings.clip_norm is not None or not scales:
            largest = math.inf if settings.clip_norm is None else settings.clip_norm
            norm = self.fabric.clip_gradients(
                self.module, self.stepper, max_norm=largest, error_if_nonfinite=False
            )
            if not scales:  # a gradient scaler skips such a step
                self._require_finite("norm of the gradient", norm.item(), now)
        self.stepper.step()
        self.stepper.zero_grad()
        if self.average is not None:
            for name, mean in self.average.items():
                mean.lerp_(self.trainable[name].detach(), 1 - settings.ema_decay)
        self.loss_sum += loss
        self.step += 1

    def _due(self) -> bool:
        """Whether to write a checkpoint after this step; the answer has no effect on results."""
        if self.every is None:
            return time.monotonic() - self.saved > INTERVAL
        return self.step % self.every == 0

    def _require_finite(self, what: str, value: float, when: str) -> None:
        if math.isfinite(value):
            return
        best = self.files.path is not None and self.history.best_loss is not None
        kept = f"; the best weights so far are in {self.files.path / BEST}" if best else ""
        raise FloatingPointError(
            f"the {what} became {value} {when}: look for NaN in the data, or start again with a "
            f"smaller lr{kept}"
        )

    def _end_epoch(
        self, validation_data: Dataset[Any] | None, workers: int, seconds: float
    ) -> dict[str, float]:
        """Validate, write the history and the checkpoint; return the history's new row."""
        history, held_out = self.history, math.nan
        self.epoch += 1
        if validation_data is None:
            history.best_epoch = self.epoch
        else:
            with swapped(self.average, self.trainable):
                held_out = self._validate(validation_data, workers)
                self._require_finite("held-out loss", held_out, f"after epoch {self.epoch}")
                if history.best_loss is None or held_out < history.best_loss:
                    history.best_loss, history.best_epoch, self.bad_epochs = held_out, self.epoch, 0
                    self._keep_best()
                else:
                    self.bad_epochs += 1
        mean = torch.tensor(self.loss_sum / self.settings.steps)
        history.rows.append(
            {
                "epoch": self.epoch,
                "step": self.epoch * self.settings.steps,
                "train_loss": self.fabric.all_reduce(mean).item(),
                "validation_loss": held_out,
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": round(seconds, 3),
            }
        )
        self.step, self.loss_sum = 0, 0.0
        history.stopped_early = (
            self.settings.patience is not None and self.bad_epochs >= self.settings.patience
        )
        self.finished = history.stopped_early or self.epoch >= self.settings.max_epochs
        if self.finished and validation_data is None:  # no epoch is better than the last
            with swapped(self.average, self.trainable):
                self._keep_best()
        self.files.save_history(history.rows)
        self._save()
        return history.rows[-1]

    @torch.no_grad()
    def _validate(self, data: Dataset[Any], workers: int) -> float:
        """Return the mean held-out loss over all samples, with the same noise in every epoch."""
        self.model.eval()
        rank, world, size = self.fabric.global_rank, self.fabric.world_size, self.settings.batch_size
        mine = list(range(rank, len(data), world))
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        sums = torch.zeros(2, dtype=torch.float32)
        # Call the model itself, not Fabric's wrapper: DDP would wait for processes that have no batch left.
        for indices, batch in zip(
            batches, loader(data, batches, seed=self.settings.seed, epoch=0, workers=workers), strict=True
        ):
            seed_generators(self.settings.seed, indices[0], rank, 2)
            with self.fabric.autocast():
                loss = self.model.loss(self.fabric.to_device(batch))
            sums += torch.tensor([loss.item() * len(indices), len(indices)])
        total, count = self.fabric.all_reduce(sums, reduce_op="sum").tolist()
        return total / count

    def _keep_best(self) -> None:
        self.best = {
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in stored_state(self.model).items()
        }
        self.files.save_best(self.best)

    def _adopt_best(self) -> None:
        if self.best is not None:
            self.model.load_state_dict(self.best, strict=False)
        elif self.average is not None:
            copy_values(self.average, self.trainable)
        self.model.eval()

    def _save(self) -> None:
        if not self.files.writes:
            return
        training = {
            "epoch": self.epoch,
            "step": self.step,
            "bad_epochs": self.bad_epochs,
            "loss_sum": self.loss_sum,
            "finished": self.finished,
            "history": asdict(self.history),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "average": self.average,
        }
        self.files.save_last(stored_state(self.model), training)
        self.saved = time.monotonic()

    def _restore(self, training: Mapping[str, Any], best: dict[str, Any] | None) -> None:
        with self.files.names_damage():
            for name in ("epoch", "step", "bad_epochs", "loss_sum", "finished"):
                setattr(self, name, training[name])
            vars(self.history).update(training["history"])
            self.optimizer.load_state_dict(training["optimizer"])
            for group in self.optimizer.param_groups:
                group["fused"] = self.fused  # the run may have been on another device
            self.fabric.strategy.precision.load_state_dict(training["precision"])
            if self.average is not None:
                copy_values(training["average"], self.average)
        self.best = best


def _loss(fabric: Fabric, module: nn.Module, batch: Any) -> Tensor:
    """Return the loss under autocast, which Fabric enters only where it wraps for several processes."""
    with fabric.autocast():
        return module.loss(batch)


def _gradients(fabric: Fabric, loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """Return the loss, and leave its gradients in the parameters."""
    value = loss(batch)
    fabric.backward(value)
    return value.detach()
