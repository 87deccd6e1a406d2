"""Markdown tables of the rows of whole models: this package's, and anomalib's, accelerated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from bench import markdown, table
from bench.accelerate import ACCELERATED, EXACT, ORIGINAL, REPLACED
from bench.markdown import number, prose, times
from bench.models import FLOW, TRAINING
from bench.subject import LIMIT, OURS, PEER

Rows = Sequence[table.Row]
DTYPES = ("float32", "bfloat16")
PARTS = {
    "": "Image to anomaly map, the backbone included:",
    FLOW: "The flow alone, on given features:",
    TRAINING: "Forward and backward of a training step, without the optimiser. *Reversible* is the default, "
    "which keeps no activations where a batch has more positions than channels:",
}


def models(rows: Rows) -> Iterator[str]:
    """Yield a table for each part of the models, with a line for each model and batch size."""
    yield "### Whole models"
    yield prose(
        "Random weights. The ratios say how much longer the fastest of anomalib's model, its torch.compile "
        "and (of CFlow) all rows at once takes than each form of ours, which is in its inference form except "
        "in training. After the slash: in bfloat16, anomalib's under autocast with channels last."
    )
    for part, title in PARTS.items():
        lines = []
        ours = [row for _, case in _cases(rows, part) for row in case if row["role"] == OURS]
        forms = list(dict.fromkeys(map(_form, ours)))
        for (model, batch, _), case in _cases(rows, part):
            limits = [number(table.milliseconds(row)) for row in case if row["role"] == LIMIT]
            peers = [_fastest(case, role=PEER, dtype=dtype) for dtype in DTYPES]
            best = [
                [_fastest(_of_form(case, form), role=OURS, dtype=dtype) for dtype in DTYPES] for form in forms
            ]
            cells = [_either(map(_speedup, ours, peers)) for ours in best]
            milliseconds = _either(number(table.milliseconds(row)) if row else "" for row in peers)
            if any(cells):
                lines.append([model, batch, (*limits, "")[0], milliseconds, *cells])
        if lines:
            header = ["model", "batch", "backbone, ms", "fastest peer, ms", *forms]
            yield from _titled(title, header, lines)


def accelerated(rows: Rows) -> Iterator[str]:
    """Yield tables of times before and after, and of the sizes of checkpoints."""
    yield "### An anomalib model, accelerated"
    yield prose(
        "anomalib's models with random weights, on images of 256 x 256 where no size is named, before and "
        "after `usf.accelerate`, and how much longer anomalib takes: also over `replace_blocks` alone, and "
        "over `accelerate` where it keeps all values (by itself it corrects CFlow's scores and adds U-Flow's "
        "mask). Results were checked against anomalib's in float64, the corrected ones against their "
        "formulas."
    )
    lines, sizes = [], {}
    for (model, batch, part), case in _cases(rows):
        found = {row["provider"]: row for row in case}
        before = found.get(ORIGINAL)
        cells = [
            number(table.milliseconds(found[name])) if name in found else ""
            for name in (ORIGINAL, ACCELERATED)
        ]
        ratios = [_speedup(found.get(name), before) for name in (ACCELERATED, REPLACED, EXACT)]
        lines.append([model, batch, part, *cells, *ratios])
        dense, compact = (found[n]["saved_mb"] if n in found else "" for n in (ORIGINAL, REPLACED))
        if dense and compact:
            share = f"{1 - float(compact) / float(dense):.0%}".replace("%", " %")
            sizes.setdefault(model, [model, number(float(dense)), number(float(compact)), share])
    header = [
        "model",
        "batch",
        "part",
        "before, ms",
        "after, ms",
        "ratio",
        "`replace_blocks` alone",
        "`exact=True`",
    ]
    yield markdown.table(header, lines)
    if sizes:
        header = ["model", "MB", "`compact=True`, MB", "less"]
        yield from _titled(
            "The checkpoint of the flow alone, as it is saved after training on a GPU (until then, "
            "permutations share memory with their inverses), and after `replace_blocks(model, compact=True)` "
            "with an index for every permutation matrix:",
            header,
            list(sizes.values()),
        )


def _titled(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield prose(title)
    yield markdown.table(header, lines)


def _cases(rows: Rows, part: str | None = None) -> Iterator[tuple[tuple[str, str, str], list[table.Row]]]:
    """Yield model, batch size and part of each case with its rows; all cases, or those of one part."""
    for case, some in groupby(sorted(rows, key=_place), key=_place):
        if part in (None, case[2]):
            model, batch = case[0].replace("^2", "²"), case[1].removeprefix("batch ")
            yield (model, batch, case[2]), list(some)


def _place(row: table.Row) -> tuple[str, str, str]:
    model, batch, *part = row["case"].split(", ")
    return model, batch, ", ".join(part)


def _form(row: table.Row) -> str:
    """Form of our model: coupling and linear map, and whether it is reversible."""
    return row["provider"].removesuffix(table.FUSED)


def _of_form(rows: Rows, form: str) -> list[table.Row]:
    """Return the rows of a form of ours; if there are rows of its inference form, only these."""
    ours = [row for row in rows if row["role"] == OURS and _form(row) == form]
    return [row for row in ours if table.FUSED in row["provider"]] or ours


def _fastest(rows: Rows, **wanted: str) -> table.Row | None:
    found = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return min(found, key=table.milliseconds, default=None)


def _speedup(ours: table.Row | None, peer: table.Row | None) -> str:
    return f"**{times(table.milliseconds(peer) / table.milliseconds(ours))}**" if ours and peer else ""


def _either(cells: Iterable[str]) -> str:
    """Join the cells of float32 and bfloat16; either may be empty."""
    wide, narrow = cells
    return f"{wide} / {narrow}" if wide and narrow else wide or (f"/ {narrow}" if narrow else "")
