"""`python -m bench.plot`: pictures of the rows in bench/results, into docs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import table
from bench.machine import RESULTS
from bench.markdown import DOCS
from bench.pictures import PICTURES


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw every picture that the rows suffice for, each of the file that has most rows of its subject; of
    several that have as many, the one with the latest."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument(
        "rows", nargs="*", type=Path, default=sorted(RESULTS.glob("cpu*.csv")), metavar="ROWS.csv"
    )
    parser.add_argument("--output", type=Path, default=DOCS, help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    files = [table.read(path) for path in options.rows]
    for name, (draw, subject) in PICTURES.items():
        figure = draw(max(files, key=partial(_rows_of, subject)))
        if figure is None:
            print(f"{name}: the rows do not suffice")
            continue
        figure.savefig(options.output / f"{name}.png", metadata={"Software": None})
        print(options.output / f"{name}.png")
    return 0


def _rows_of(subject: str, rows: Sequence[table.Row]) -> tuple[int, str]:
    """How many, and the latest date."""
    dates = [row["date"] for row in rows if row["subject"] == subject]
    return len(dates), max(dates, default="")


if __name__ == "__main__":
    raise SystemExit(main())
