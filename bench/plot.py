"""`python -m bench.plot`: pictures of the rows in bench/results, into docs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import table
from bench.machine import result_files
from bench.markdown import DOCS
from bench.pictures import PICTURES


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw every picture, each from the first of the files whose rows suffice for it."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument(
        "rows",
        nargs="*",
        type=Path,
        default=result_files("cpu*.csv"),
        metavar="ROWS.csv",
        help="(default: those of CPUs, in the order of docs/speed.md, whose first part shows the pictures)",
    )
    parser.add_argument("--output", type=Path, default=DOCS, help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    files = [rows for path in options.rows for rows in table.by_device(table.read(path))]
    for name, draw in PICTURES.items():
        figure = next((figure for figure in map(draw, files) if figure is not None), None)
        if figure is None:
            print(f"{name}: the rows do not suffice")
            continue
        figure.savefig(options.output / f"{name}.png", metadata={"Software": None})
        print(options.output / f"{name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
