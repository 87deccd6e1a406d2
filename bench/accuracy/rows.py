"""Rows of runs that take seconds to minutes each, saved one by one, so that work cut short can go on."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.measure import usable_cores
from bench.table import read_columns
from usf_kernels.cli.options import progress
from usf_kernels.files import atomic_write

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"

Row = dict[str, str]
Job = Mapping[str, str]
Measure = Callable[[Job], Sequence[Mapping[str, object]]]  # values of one or several rows


@dataclass(frozen=True)
class Rows:
    """A CSV file with the rows of finished jobs.

    A job has columns that identify it and columns of settings. It is finished when the file has rows that
    agree with all of them; rows of the same job with other settings are replaced by new ones.

    Attributes:
        path: the file; it and its folder need not exist.
        keys: columns that identify a job.
        settings: columns of settings that influence its result, for example the number of epochs.
        values: columns of the result.
    """

    path: Path
    keys: tuple[str, ...]
    settings: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all columns, in the order of the file."""
        return self.keys + self.settings + self.values

    def read(self) -> list[Row]:
        """Read all rows; none if there is no such file.

        Raises:
            ValueError, OSError: as `bench.table.read_columns`.
        """
        return read_columns(self.path, self.fields)

    def finished(self, job: Job) -> bool:
        """Whether the file has the rows of this job with these settings."""
        return any(all(row[name] == value for name, value in job.items()) for row in self.read())

    def put(self, job: Job, results: Sequence[Mapping[str, object]]) -> None:
        """Replace the rows of a job in the file by new ones; either the old file or the new one survives.

        Floats are written with six digits.
        """
        kept = [row for row in self.read() if any(row[key] != job[key] for key in self.keys)]
        fresh = [{**job, **{name: _cell(value) for name, value in result.items()}} for result in results]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *fresh])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path, durable=False) as file:
            file.write(text.getvalue().encode())


def complete(rows: Rows, jobs: Sequence[Job], measure: Measure, *, title: str, workers: int = 1) -> None:
    """Measure the jobs that are not finished, write each one's rows at once, and show the progress.

    Args:
        rows: file of the results.
        jobs: all jobs; finished ones are skipped.
        measure: returns the rows of a job; with several workers it must be picklable, a function of a module.
        title: title of the bar and of the lines that are printed.
        workers: number of processes, each with its share of the cores; 1 does everything in this process.

    Raises:
        RuntimeError: at the end, when a job raised, with its exception as the cause; all others have rows.
    """
    left = [job for job in jobs if not rows.finished(job)]
    if len(left) < len(jobs):
        print(f"{title}: {len(jobs) - len(left)} of {len(jobs)} are in {rows.path} already")
    failed: list[tuple[str, BaseException]] = []
    with progress(len(left), title) as advance:
        for done, (job, outcome) in enumerate(_outcomes(left, measure, workers), 1):
            name = ", ".join(job[key] for key in rows.keys)
            error = outcome.exception()
            if error is None:
                rows.put(job, outcome.result())
            else:
                failed.append((name, error))
            print(f"[{done}/{len(left)}] {title}: {name}" + (f": {error!r}" if error else ""), flush=True)
            advance()
    if failed:
        name, error = failed[0]
        raise RuntimeError(f"{len(failed)} of {len(left)} runs failed, first {name}: {error}") from error


def _outcomes(jobs: Sequence[Job], measure: Measure, workers: int) -> Iterator[tuple[Job, Future]]:
    """Yield each job with its result or exception, as they come."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            outcome: Future = Future()
            try:
                outcome.set_result(measure(job))
            except Exception as error:
                outcome.set_exception(error)
            yield job, outcome
        return
    threads = max(1, usable_cores() // workers)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # workers inherit it before they load PyTorch
    try:
        with ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
        ) as pool:
            running = {pool.submit(measure, job): job for job in jobs}
            try:
                for future in as_completed(running):
                    yield running[future], future
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # when interrupted, start nothing more
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
