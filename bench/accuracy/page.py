"""`python -m bench.accuracy.page`: the sections of docs/accuracy.md and their pictures, from the rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.accuracy.rows import RESULTS
from bench.markdown import DOCS
from usf_kernels.files import atomic_write
from usf_kernels.plotting import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = DOCS / "accuracy.md"


def rewritten(page: str, name: str, text: str) -> str:
    """Return the page with this text put between the markers of a section.

    Raises:
        ValueError: when it lacks the markers.
    """
    begin, end = markers(name)
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"accuracy.md: expected the lines {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def markers(name: str) -> tuple[str, str]:
    """Return the lines around a section that is written from rows."""
    return (
        f"<!-- {name}: begin, written by `python -m bench.accuracy.page` -->",
        f"<!-- {name}: end -->",
    )


def publish(name: str, folder: Path, text: str, figure: Figure | None = None, picture: str = "") -> None:
    """Write a text and a figure: into docs for rows in bench/results, else beside the rows.

    Args:
        name: name of the section, or of the file of the text.
        folder: folder of the rows.
        text: markdown that refers to the figure.
        figure: figure to write under the name `picture`, if there is one.
    """
    if figure is not None:
        save_figure(figure, (DOCS if folder == RESULTS else folder) / picture)
    if folder == RESULTS:
        page = rewritten(PAGE.read_text(encoding="utf-8"), name, text)
        with atomic_write(PAGE) as file:
            file.write(page.encode("utf-8"))
    else:
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write pictures and sections; with --check only say whether the sections are up to date."""
    # Imported here, since these modules import this one.
    from bench.accuracy import gaussian_mixture, nfa, precision, substitution

    modules = (gaussian_mixture, substitution, nfa, precision)
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the page differs")
    options = parser.parse_args(arguments)
    if options.check:
        page = before = PAGE.read_text(encoding="utf-8")
        for module in modules:
            page = rewritten(page, module.NAME, module.text(RESULTS))
        print("docs/accuracy.md is " + ("up to date" if page == before else "out of date"))
        return int(page != before)
    for module in modules:
        if module.rows_in(RESULTS).path.exists():
            module.show(RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
