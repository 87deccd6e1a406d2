"""Numbers, text, pictures and tables in the form that the README uses."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bench.table import Row, geometric_mean

DOCS = Path(__file__).parents[1] / "docs"
WIDTH = 120  # columns of the README's lines


def count(number: str, noun: str) -> str:
    """Format a number and a noun, in the plural if necessary."""
    return f"{number} {noun}" if number == "1" else f"{number} {noun}s"


def times(ratio: float) -> str:
    """Format a ratio of times."""
    return f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def number(value: float) -> str:
    """Format a number with three digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def versions(rows: Sequence[Row]) -> str:
    """List the versions of packages and the commits."""
    found = sorted({version for row in rows for version in row["versions"].split()}, key=str.lower)
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"{', '.join(found).replace('=', ' ')}; commits {commits}"


def mean(ratios: Mapping[object, float], worst: Callable[[Iterable[float]], float] = min) -> str:
    """Format the geometric mean and, in brackets, the worst ratio; speed-ups in bold, no ratios as ""."""
    if not ratios:
        return ""
    average, extreme = geometric_mean(ratios.values()), worst(ratios.values())
    return f"**{average:.2f}x** ({extreme:.2f}x)" if worst is min else f"{average:.2f} ({extreme:.2f})"


def picture(name: str, text: str, *, folder: str = "") -> list[str]:
    """Return a picture in docs, [] if it has not been drawn; `folder` is the path from the page to docs."""
    return [f"![{text}]({folder}{name})"] if (DOCS / name).exists() else []


def prose(text: str) -> str:
    """Wrap text to the width of the README's lines."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table without empty columns."""
    filled = [i for i in range(len(header)) if any(line[i] for line in lines)]
    rows = [[cells[i] for i in filled] for cells in (header, ["---"] * len(header), *lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
