"""`python -m bench.accuracy.page`: write the sections of docs/accuracy.md from the rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.markdown import DOCS
from usf_kernels.files import atomic_write

PAGE = DOCS / "accuracy.md"


def rewritten(page: str, name: str, text: str) -> str:
    """The page with this text between the markers of a section.

    Raises:
        ValueError: when it lacks them.
    """
    begin, end = markers(name)
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"accuracy.md: expected the lines {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def markers(name: str) -> tuple[str, str]:
    """The lines around a section that is written from rows."""
    return (
        f"<!-- {name}: begin, written by `python -m bench.accuracy.page` -->",
        f"<!-- {name}: end -->",
    )


def write_section(name: str, text: str, path: Path = PAGE) -> None:
    """Put a section into the page."""
    page = rewritten(path.read_text(encoding="utf-8"), name, text)
    with atomic_write(path) as file:
        file.write(page.encode("utf-8"))


def writers() -> Mapping[str, Callable[[], str]]:
    """The text of each section, from the rows in bench/results/accuracy."""
    from bench.accuracy import nfa, substitution

    return {"substitution": substitution.text, "nfa": nfa.text}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the sections; with --check only say whether they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the page differs")
    options = parser.parse_args(arguments)
    before = page = PAGE.read_text(encoding="utf-8")
    for name, text in writers().items():
        page = rewritten(page, name, text())
    if options.check:
        print("docs/accuracy.md is " + ("up to date" if page == before else "out of date"))
        return int(page != before)
    with atomic_write(PAGE) as file:
        file.write(page.encode("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
