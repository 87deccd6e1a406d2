"""Markdown tables of the rows of a GPU: as called from Python and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import markdown, table, target_sections
from bench.markdown import number, prose, times, versions
from bench.models import TRAINING
from bench.subject import OURS

DTYPES = ("float32", "bfloat16")


def section(rows: Sequence[table.Row]) -> Iterator[str]:
    """Yield all parts of a GPU's section."""
    yield f"## {rows[0]['device']}"
    cases = len({(row["subject"], row["case"]) for row in rows})
    yield prose(
        f"{cases} cases ({versions(rows)}), float32 without TF32. Two ratios to the fastest peer (eager, "
        "torch.compile; for blocks anomalib and FrEIA) in the same precision: *as called* from Python, where "
        "such small maps wait for the processor, and *in a CUDA graph* (`FusedFlow.capture`, or any graph of "
        "yours), peers captured as well, which is what the GPU itself takes. Again: `make bench-gpu`; each "
        "kernel's configurations: `python -m bench.tune`."
    )
    yield from target_sections.section(rows)
    blocks = [row for row in rows if row["subject"] == "blocks" and row["direction"] == "forward"]
    if blocks:
        yield markdown.table(*_compared(blocks, "ms", table.FUSED, "8 blocks"))
    operations = [row for row in rows if row["subject"] in table.OPERATIONS]
    if operations:
        yield markdown.table(*_compared(operations, "us", "", "operation"))
    steps = [row for row in rows if row["subject"] == "training_step"]
    if steps:
        yield markdown.table(*_training(steps))
    models = [row for row in rows if row["subject"] == "models"]
    for ending, title in ((table.FUSED, "model"), ("", TRAINING)):
        some = [row for row in models if (row["direction"] == TRAINING) == (title == TRAINING)]
        if some:
            yield markdown.table(*_compared(some, "ms", ending, title))


def _compared(
    rows: Sequence[table.Row], unit: str, ending: str, first: str
) -> tuple[list[str], list[list[str]]]:
    """Make a table with, per case and provider of ours, time in a graph and both ratios in each precision."""
    scale = 1e3 if unit == "us" else 1.0
    header = [first, "input"]
    for dtype in DTYPES:
        header += [f"{dtype}, {unit}", "as called", "in a graph"]
    lines = []
    for row in rows:
        name = row["provider"]
        if row["role"] != OURS or row["dtype"] != DTYPES[0] or not name.endswith(ending):
            continue
        if name.endswith(table.CAPTURED):  # shown in the line of the one it was captured from
            continue
        line = [*_words(row, name.removesuffix(ending))]
        for dtype in DTYPES:
            alone, captured = (
                _find(rows, row, provider=name + more, dtype=dtype) for more in ("", table.CAPTURED)
            )
            time = number(scale * table.milliseconds(captured)) if captured else ""
            line += [time, _ratio(alone, rows), _ratio(captured, rows)]
        lines.append(line)
    return header, lines


def _words(row: table.Row, name: str) -> tuple[str, str]:
    """Return what was measured, and on which input."""
    shown = row["case"].replace("^2", "²")
    if row["subject"] == "models":
        return name, shown.removesuffix(f", {TRAINING}")
    if row["subject"] == "blocks":
        return name, shown.removesuffix(", 8 blocks")
    what, _, size = shown.partition(", ")
    way = ", inverse" if row["direction"] == "inverse" else ""
    return what + way, size.removesuffix(", forward").removesuffix(", inverse")


def _find(rows: Sequence[table.Row], like: table.Row, **values: str) -> table.Row | None:
    wanted = {name: like[name] for name in ("subject", "case", "direction")} | values
    return next((row for row in rows if all(row[k] == v for k, v in wanted.items())), None)


def _ratio(row: table.Row | None, rows: Sequence[table.Row]) -> str:
    peer = table.best_peer(row, rows) if row else None
    if peer is None:
        return ""
    ratio = times(table.milliseconds(peer) / table.milliseconds(row))
    return f"**{ratio}**" if row["provider"].endswith(table.CAPTURED) else ratio


def _training(rows: Sequence[table.Row]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in rows:
        if row["role"] == OURS and not row["provider"].endswith(table.CAPTURED):
            anomalib = _find(rows, row, provider="anomalib")
            graph = _find(rows, row, provider=row["provider"] + table.CAPTURED)
            saved = ""
            if anomalib and row["saved_mb"]:
                saved = f"{float(row['saved_mb']) / float(anomalib['saved_mb']):.2f}"
            size = row["case"].replace("^2", "²").removesuffix(", 8 blocks")
            ratios = _ratio(row, rows), _ratio(graph, rows)
            lines.append([row["provider"], size, number(table.milliseconds(row)), *ratios, saved])
    header = ["training step, 8 blocks", "input", "ms", "as called", "in a graph", "memory / anomalib's"]
    return header, lines
