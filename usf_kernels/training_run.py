"""A training run: its loops and checkpoints; called by `training.fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from usf_kernels.checkpoint import (
    checkpoint_header,
    load_stored_state,
    read_checkpoint,
    stored_state,
    write_checkpoint,
)
from usf_kernels.files import make_folder, remove_leftovers, write_csv
from usf_kernels.nn import CapturedGradients
from usf_kernels.optimization import Settings, copy_values, parameter_groups, swapped
from usf_kernels.progress import training_progress
from usf_kernels.sampling import epoch_order, loader, seed_generators

if TYPE_CHECKING:
    from lightning.fabric import Fabric

LAST, BEST, HISTORY = "last.pt", "best.pt", "history.csv"
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
        folder: Path | None,
        checkpoint_every: int | None,
        extra: Mapping[str, Any] | None,
        *,
        capture: bool,
    ) -> None:
        self.fabric, self.model, self.settings, self.history = fabric, model, settings, history
        self.folder, self.every, self.capture = folder, checkpoint_every, capture
        self.header = None if folder is None else checkpoint_header(model, extra)
        self.epoch = self.step = self.bad_epochs = 0  # `step` counts within the epoch
        self.loss_sum = 0.0
        self.finished = False
        self.saved = time.monotonic()
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.lr)
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
        last, best = fabric.broadcast(self._open(resume) if fabric.is_global_zero else (None, None))
        if last is not None:
            load_stored_state(self.model, last, self.folder / LAST)
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
        position = {"seed": settings.seed, "rank": fabric.global_rank, "world_size": fabric.world_size}
        show = progress and fabric.is_global_zero
        with training_progress(show, settings.max_epochs, start=self.epoch, title=title) as report:
            while not self.finished:
                started = time.perf_counter()
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
        self.model.train()
        seed_generators(settings.seed, number, self.fabric.global_rank, 1)
        loss = self.gradients(batch).item()
        now = f"at epoch {self.epoch + 1}, step {self.step + 1}"
        self._require_finite("loss", loss, now)
        if settings.clip_norm is not None:
            norm = self.fabric.clip_gradients(
                self.module, self.stepper, max_norm=settings.clip_norm, error_if_nonfinite=False
            )
            if settings.precision != "16-mixed":  # the gradient scaler skips such a step
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
        best = self.folder is not None and self.history.best_loss is not None
        kept = f"; the best weights so far are in {self.folder / BEST}" if best else ""
        raise FloatingPointError(f"the {what} became {value} {when}: start again with a smaller lr{kept}")

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
        if self.folder is not None and self.fabric.is_global_zero:
            write_csv(self.folder / HISTORY, history.rows)
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
        if self.folder is not None and self.fabric.is_global_zero:
            write_checkpoint(self.folder / BEST, self.header | {"state": self.best})

    def _adopt_best(self) -> None:
        if self.best is not None:
            self.model.load_state_dict(self.best, strict=False)
        elif self.average is not None:
            copy_values(self.average, self.trainable)
        self.model.eval()

    def check(self, resume: bool) -> dict[str, Any] | None:
        """Raise unless the folder can hold this run; return the checkpoint to resume it from, if any."""
        if self.folder is None:
            return None
        make_folder(self.folder)
        path = self.folder / LAST
        if not (resume and path.exists()):
            return None
        saved = read_checkpoint(path)
        if "training" not in saved:
            raise ValueError(f"{path}: holds a model, but not a training run to resume")
        with _names_damage(path):
            held = _identity(saved, saved["training"]["settings"])
        wanted = _identity(self.header, asdict(self.settings))
        for key in wanted | held:
            if held.get(key) != wanted.get(key):
                raise ValueError(
                    f"{path}: holds a run with {key}={held.get(key)!r}, not {wanted.get(key)!r}; "
                    "continue it with its own settings, or start over without resume"
                )
        return saved

    def _open(self, resume: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Prepare the folder; return the checkpoint to resume from and the best weights so far, if any."""
        saved = self.check(resume)
        if self.folder is None:
            return None, None
        remove_leftovers(self.folder, (LAST, BEST, HISTORY))
        if not resume:
            for name in (LAST, BEST, HISTORY):
                (self.folder / name).unlink(missing_ok=True)
        if saved is None:
            return None, None
        with _names_damage(self.folder / LAST):
            best = saved["training"]["history"]["best_loss"] is not None
        return saved, read_checkpoint(self.folder / BEST)["state"] if best else None

    def _save(self) -> None:
        if self.folder is None or not self.fabric.is_global_zero:
            return
        training = {
            "settings": asdict(self.settings),
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
        content = self.header | {"state": stored_state(self.model), "training": training}
        write_checkpoint(self.folder / LAST, content, durable=self.finished)  # a sync per step costs too much
        self.saved = time.monotonic()

    def _restore(self, training: Mapping[str, Any], best: dict[str, Any] | None) -> None:
        with _names_damage(self.folder / LAST):
            for name in ("epoch", "step", "bad_epochs", "loss_sum", "finished"):
                setattr(self, name, training[name])
            vars(self.history).update(training["history"])
            self.optimizer.load_state_dict(training["optimizer"])
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


def _identity(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that must be equal for a run to continue another one."""
    extra = {f"extra {name}": value for name, value in content["extra"].items()}
    return extra | settings | {key: content[key] for key in ("architecture", "config")}


@contextmanager
def _names_damage(path: Path) -> Iterator[None]:
    """Turn whatever the entries of a damaged checkpoint raise into one error that names the file."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path}: damaged checkpoint, its training cannot be read ({error!r:.120})"
        ) from error
