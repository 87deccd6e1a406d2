"""Progress of a training run: a bar on a terminal if rich is installed, else a line now and then."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Called with epochs done (a fraction during an epoch), training loss, latest and best held-out loss.
Report = Callable[[float, float, float | None, float | None], None]


@contextmanager
def training_progress(
    enabled: bool, max_epochs: int, *, start: float = 0.0, title: str = "training"
) -> Iterator[Report]:
    """Show the epoch and both losses of a run while the block runs.

    Args:
        enabled: whether to show anything.
        max_epochs: largest number of epochs of the run.
        start: epochs done before.
        title: name of the run.

    Yields:
        A function to call after every step.
    """
    if not enabled:
        yield lambda epochs, loss, held_out, best: None
        return
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        yield _lines(max_epochs, start, title)
        return
    if not sys.stdout.isatty():
        yield _lines(max_epochs, start, title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=max_epochs, completed=start, state="")

        def report(epochs: float, loss: float, held_out: float | None, best: float | None) -> None:
            bar.update(task, completed=epochs, state=_state(epochs, max_epochs, loss, held_out, best))

        yield report


def _lines(max_epochs: int, start: float, title: str) -> Report:
    """Return a `Report` that prints a line after about every tenth of the epochs."""
    printed = int(10 * start / max_epochs)

    def report(epochs: float, loss: float, held_out: float | None, best: float | None) -> None:
        nonlocal printed
        if epochs == int(epochs) and int(10 * epochs / max_epochs) > printed:
            printed = int(10 * epochs / max_epochs)
            print(f"{title}: {_state(epochs, max_epochs, loss, held_out, best)}", flush=True)

    return report


def _state(epochs: float, max_epochs: int, loss: float, held_out: float | None, best: float | None) -> str:
    losses = f"loss {loss:.4f}, held-out {_number(held_out)} (best {_number(best)})"
    return f"epoch {math.ceil(epochs)}/{max_epochs}, {losses}"


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"
