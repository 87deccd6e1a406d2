"""Progress of a training run on the terminal, with rich where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# epochs done (a fraction while one is under way), training loss, latest and best held-out loss
Report = Callable[[float, float, float | None, float | None], None]


@contextmanager
def training_progress(
    enabled: bool, max_epochs: int, *, start: float = 0.0, title: str = "training"
) -> Iterator[Report]:
    """Show a bar with both losses while the block runs; silent when not `enabled` or without rich."""
    if not enabled:
        yield _silent
        return
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        yield _silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("epoch {task.fields[epoch]}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("held-out {task.fields[held_out]} (best {task.fields[best]})"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(
            title, total=max_epochs, completed=start, epoch=int(start), loss="-", held_out="-", best="-"
        )

        def report(epochs: float, loss: float, held_out: float | None, best: float | None) -> None:
            bar.update(
                task,
                completed=epochs,
                epoch=min(int(epochs) + 1, max_epochs),
                loss=_number(loss),
                held_out=_number(held_out),
                best=_number(best),
            )

        yield report


def _silent(epochs: float, loss: float, held_out: float | None, best: float | None) -> None:
    pass


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"
