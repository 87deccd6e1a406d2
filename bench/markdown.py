"""Numbers, text, pictures and tables as the README has them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bench.table import Row, geometric_mean

DOCS = Path(__file__).parents[1] / "docs"
WIDTH = 120  # of the README's lines


def count(number: str, noun: str) -> str:
    """With an s where that is due."""
    return f"{number} {noun}" if number == "1" else f"{number} {noun}s"


def times(ratio: float) -> str:
    """A ratio of times."""
    return f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def versions(rows: Sequence[Row]) -> str:
    """What was installed, and the commits."""
    found = sorted({version for row in rows for version in row["versions"].split()}, key=str.lower)
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"{', '.join(found).replace('=', ' ')}; commits {commits}"


def mean(ratios: Mapping[object, float], worst: Callable[[Iterable[float]], float] = min) -> str:
    """Geometric mean, and the worst in brackets: speed-ups in bold; nothing of nothing."""
    if not ratios:
        return ""
    average, extreme = geometric_mean(ratios.values()), worst(ratios.values())
    return f"**{average:.2f}x** ({extreme:.2f}x)" if worst is min else f"{average:.2f} ({extreme:.2f})"


def picture(name: str, text: str, *, folder: str = "") -> list[str]:
    """One of docs, seen from there or from where `folder` is docs; nothing where it has not been drawn."""
    return [f"![{text}]({folder}{name})"] if (DOCS / name).exists() else []


def prose(text: str) -> str:
    """Lines as wide as the README's."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Without the columns in which nothing is."""
    filled = [i for i in range(len(header)) if any(line[i] for line in lines)]
    rows = [[cells[i] for i in filled] for cells in (header, ["---"] * len(header), *lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
