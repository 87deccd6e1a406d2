"""`python -m bench.report`: write docs/speed.md and the README's tables from bench/results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import demonstration, gpu_sections, summary, table
from bench.machine import RESULTS, result_files
from bench.markdown import DOCS
from bench.sections import losses, section
from usf_kernels.files import atomic_write

README = DOCS.parent / "README.md"
PAGE = DOCS / "speed.md"
OTHER_TABLES = ("compile_", "tune-")
TITLE = "# Speed\n\n<!-- written by `python -m bench.report` from bench/results -->"

LOST = "Against the fastest peer in the same precision and direction, torch.compile included:"


def files(folder: Path) -> list[list[table.Row]]:
    """Read the rows of each device, those of cpu.csv first."""
    paths = result_files(folder=folder)
    return [
        rows
        for path in paths
        if not path.name.startswith(OTHER_TABLES)
        for rows in table.by_device(table.read(path))
    ]


def page(devices: Sequence[Sequence[table.Row]]) -> str:
    """Return the content of docs/speed.md: everything, one device after the other, folded but the first."""
    parts = [TITLE, *summary.full(devices)]
    lost = [line for rows in devices for line in losses(rows)]
    if lost:
        parts += ["## Where we do not win", LOST, "\n".join(lost)]
    for i, rows in enumerate(devices):
        on_gpu = table.on_gpu(rows)
        found = list(gpu_sections.section(rows)) if on_gpu else [section(rows, pictures=i == 0)]
        parts += (
            found if i == 0 else [f"<details><summary>{rows[0]['device']}</summary>", *found, "</details>"]
        )
    return "\n\n".join(parts) + "\n"


def rewritten(readme: str, parts: Mapping[str, str]) -> str:
    """Return the README with each text put between the markers of its name.

    Raises:
        ValueError: when it lacks the markers.
    """
    for name, text in parts.items():
        first = f"<!-- {name}: begin, written by `python -m bench.report` -->"
        last = f"<!-- {name}: end -->"
        before, begin, rest = readme.partition(first)
        _, end, after = rest.partition(last)
        if not begin or not end:
            raise ValueError(f"README: expected the lines {first} and {last}")
        readme = f"{before}{first}\n{text}\n{last}{after}"
    return readme


def parts(devices: Sequence[Sequence[table.Row]]) -> dict[str, str]:
    """Return the parts of the README that are written from the results, by the name of their markers."""
    return {
        "headline": summary.headline(devices),
        "demo": demonstration.section(demonstration.read()),
        "speed": summary.section(devices),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the README and the page; with --check only say whether they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one of them differs")
    options = parser.parse_args(arguments)
    devices = files(RESULTS)
    readme = rewritten(README.read_text(encoding="utf-8"), parts(devices))
    stale = 0
    for path, text in ((README, readme), (PAGE, page(devices))):
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale = 1
        if options.check:
            print(f"{path.name} is out of date: python -m bench.report")
            continue
        with atomic_write(path) as file:
            file.write(text.encode("utf-8"))
    return stale if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
