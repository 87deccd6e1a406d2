"""`python -m bench.report`: write the README's section on speed from the rows in bench/results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import gpu_sections, table
from bench.machine import RESULTS
from bench.sections import section
from usf_kernels.files import atomic_write

README = Path(__file__).parents[1] / "README.md"
OTHER_TABLES = ("compile_", "tune-")
BEGIN, END = "<!-- speed: begin, written by `python -m bench.report` -->", "<!-- speed: end -->"


def sections(folder: Path) -> str:
    """One section per file of rows: that of the CPU first, then a shorter one for each other device."""
    texts = [section(table.read(folder / "cpu.csv"))]
    for path in sorted(folder.glob("*.csv")):
        if path.name != "cpu.csv" and not path.name.startswith(OTHER_TABLES):
            rows = table.read(path)
            on_gpu = any(row["provider"].endswith(table.CAPTURED) for row in rows)
            texts += gpu_sections.section(rows) if on_gpu else [section(rows, where=rows[0]["device"])]
    return "\n\n".join(texts)


def rewritten(readme: str, text: str) -> str:
    """The README with this text between the markers.

    Raises:
        ValueError: when it lacks them.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: expected the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the section; with --check only say whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the README differs")
    options = parser.parse_args(arguments)
    readme = README.read_text(encoding="utf-8")
    text = rewritten(readme, sections(RESULTS))
    if options.check:
        print("README.md is " + ("up to date" if text == readme else "out of date: python -m bench.report"))
        return int(text != readme)
    with atomic_write(README) as file:
        file.write(text.encode("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
