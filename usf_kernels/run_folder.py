"""Files of a training run: the state to resume it from, the best weights so far, and its history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from usf_kernels.checkpoint import checkpoint_header, read_checkpoint, write_checkpoint
from usf_kernels.files import make_folder, remove_leftovers, write_csv
from usf_kernels.optimization import Settings

if TYPE_CHECKING:
    from lightning.fabric import Fabric

LAST, BEST, HISTORY = "last.pt", "best.pt", "history.csv"


class RunFolder:
    """Where a run keeps its files, of which one process writes them.

    Args:
        fabric: says which process that is.
        path: None keeps nothing.
        model: the model to be trained.
        settings: what a run must have in common with the one that it continues.
        extra: facts kept in the checkpoints, which it must have in common too.
    """

    def __init__(
        self,
        fabric: Fabric,
        path: Path | None,
        model: nn.Module,
        settings: Settings,
        extra: Mapping[str, Any] | None,
    ) -> None:
        self.fabric, self.path, self.settings = fabric, path, settings
        self.header = None if path is None else checkpoint_header(model, extra)

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.path is not None and self.fabric.is_global_zero

    def check(self, resume: bool) -> dict[str, Any] | None:
        """Raise unless the folder can hold this run; return the checkpoint to resume it from, if any."""
        if self.path is None:
            return None
        make_folder(self.path)
        path = self.path / LAST
        if not (resume and path.exists()):
            return None
        saved = read_checkpoint(path)
        if "training" not in saved:
            raise ValueError(f"{path}: holds a model, but not a training run to resume")
        with self.names_damage():
            settings = saved["training"]["settings"]
        self._require_same_run(path, saved, settings)
        return saved

    def open(self, resume: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Prepare the folder; return the checkpoint to resume from and the best weights so far, if any."""
        saved = self.check(resume)
        if self.path is None:
            return None, None
        remove_leftovers(self.path, (LAST, BEST, HISTORY))
        if saved is None:
            for name in (LAST, BEST, HISTORY):
                (self.path / name).unlink(missing_ok=True)
            return None, None
        with self.names_damage():
            has_best = saved["training"]["history"]["best_loss"] is not None
        if not has_best:
            return saved, None
        best = read_checkpoint(self.path / BEST)
        self._require_same_run(self.path / BEST, best, best.get("settings", asdict(self.settings)))
        return saved, best["state"]

    def _require_same_run(self, path: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raise unless a checkpoint's model and settings are those of this run."""
        with self.names_damage(path):
            held = _identity(saved, settings)
        wanted = _identity(self.header, asdict(self.settings))
        for key in wanted | held:
            ours, theirs = wanted.get(key), held.get(key)
            if ours != theirs and not (ours != ours and theirs != theirs):  # two NaN are the same
                raise ValueError(
                    f"{path}: holds a run with {key}={theirs!r}, not {ours!r}; "
                    "continue it with its own settings, or start over without resume"
                )

    def save_best(self, state: Mapping[str, Any]) -> None:
        """Write the best weights so far."""
        if self.writes:
            write_checkpoint(
                self.path / BEST, self.header | {"state": state, "settings": asdict(self.settings)}
            )

    def save_last(self, state: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        """Write the weights, and the state of the training that goes on from them."""
        if self.writes:
            content = self.header | {
                "state": state,
                "training": {"settings": asdict(self.settings), **training},
            }
            durable = training["finished"]  # a sync per step costs too much
            write_checkpoint(self.path / LAST, content, durable=durable)

    def save_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write one line per epoch."""
        if self.writes:
            write_csv(self.path / HISTORY, rows)

    @contextmanager
    def names_damage(self, path: Path | None = None) -> Iterator[None]:
        """Context that turns errors from malformed entries of a checkpoint, by default `last.pt`, into a
        ValueError that names the file."""
        path = path or self.path / LAST
        try:
            yield
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{path}: damaged checkpoint, its training cannot be read ({error!r:.120})"
            ) from error


def _identity(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that must be equal for a run to continue another one."""
    parts = {f"{part} {name}": value for part in ("extra", "config") for name, value in content[part].items()}
    return {"architecture": content["architecture"]} | parts | settings
