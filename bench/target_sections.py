"""The targets on GPUs and how far the rows reach them: one Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import markdown, table
from bench.markdown import prose, times
from bench.operations import LARGE
from bench.subject import OURS

DTYPES = ("float32", "bfloat16")
COPY, PRODUCTS, COMPILED, EAGER = 0.85, 0.80, 1.3, 5.0  # the targets
FREIA = "FrEIA 0.2"
COMPILERS = ("torch.compile", "anomalib, torch.compile")
COLUMNS = ("of the copy", "of cuBLAS", "over torch.compile", "over eager FrEIA")

Rows = Sequence[table.Row]


def section(rows: Rows) -> Iterator[str]:
    """Yield the table, if anything was measured for it."""
    by_place: dict[tuple[str, ...], table.Row] = {}
    for row in rows:
        key = (*_place(row), row["dtype"])
        slower = key in by_place and table.milliseconds(by_place[key]) <= table.milliseconds(row)
        if row["direction"] == "forward" and not slower:  # the vendor's products have two layouts
            by_place[key] = row
    ours = [row for row in by_place.values() if _counts(row)]
    if not any(_is_large(row) or row["batch"] == "1" for row in ours):
        return
    lines = []
    for place in dict.fromkeys(_place(row) for row in ours):
        cells = []
        for dtype in DTYPES:
            row = by_place.get((*place, dtype))
            cells += _cells(row, by_place) if row else [""] * len(COLUMNS)
        if any(cells):
            name = place[2].removesuffix(table.CAPTURED).removesuffix(table.FUSED)
            lines.append([*_words(place[1], name), *cells])
    yield prose(
        f"What was aimed at, ours in a CUDA graph: past the last-level cache {100 * COPY:.0f} % of the "
        f"bandwidth of a copy where only memory counts, and {100 * PRODUCTS:.0f} % of the speed of cuBLAS's "
        f"bare products; {COMPILED}x over torch.compile, in a graph as well; on one image {EAGER:.0f}x over "
        "FrEIA as it is called. Bold: reached."
    )
    header = [f"{dtype}: {column}" for dtype in DTYPES for column in COLUMNS]
    yield markdown.table(["what", "input", *header], lines)


def _place(row: table.Row) -> tuple[str, str, str]:
    return row["subject"], row["case"], row["provider"]


def _counts(row: table.Row) -> bool:
    """Whether a row is one of ours, captured: an operation beyond the cache, or eight fused blocks."""
    if row["role"] != OURS or not row["provider"].endswith(table.CAPTURED):
        return False
    fused = table.FUSED in row["provider"] and row["depth"] == "8"
    return _is_large(row) or (row["subject"] == "blocks" and fused)


def _is_large(row: table.Row) -> bool:
    return row["subject"] in table.OPERATIONS and row["batch"] == str(LARGE[0])


def _cells(row: table.Row, by_place: dict[tuple[str, ...], table.Row]) -> list[str]:
    def ratio(*providers: str) -> float | None:
        others = (by_place.get((row["subject"], row["case"], name, row["dtype"])) for name in providers)
        found = [table.milliseconds(other) for other in others if other]
        return min(found) / table.milliseconds(row) if found else None

    only_memory = _is_large(row) and row["of_limit"] and not row["gflop_per_s"]
    return [
        _cell(float(row["of_limit"]) if only_memory else None, COPY, percent=True),
        _cell(ratio(table.VENDOR + table.CAPTURED), PRODUCTS, percent=True),
        _cell(ratio(*(name + table.CAPTURED for name in COMPILERS)), COMPILED),
        _cell(ratio(FREIA) if row["batch"] == "1" else None, EAGER),
    ]


def _cell(value: float | None, aim: float, *, percent: bool = False) -> str:
    if value is None:
        return ""
    text = f"{100 * value:.0f} %" if percent else times(value)
    return f"**{text}**" if value >= aim else text


def _words(case: str, name: str) -> tuple[str, str]:
    shown = case.replace("^2", "²")
    if shown.endswith(", 8 blocks"):
        return f"8 blocks: {name}", shown.removesuffix(", 8 blocks")
    what, _, size = shown.removesuffix(", forward").rpartition(f", {LARGE[1]} @")
    return (what, f"{LARGE[1]} @{size}") if what else (shown, "")
