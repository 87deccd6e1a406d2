"""The rows in one table: a line for each thing that users wait for, a column per device and precision. In
full for docs/speed.md, and brief, with forms and parts of models together, for the README."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import markdown, table
from bench.accelerate import ACCELERATED
from bench.flows import FORMS
from bench.markdown import picture, prose, times
from bench.model_peers import AT_ONCE, PEERS
from bench.models import FLOW, TRAINING
from bench.registry import SUBJECTS
from bench.sections import comparisons, described
from bench.subject import PEER

Rows = Sequence[table.Row]
COMPILED = "torch.compile"
PARTS = {"": table.WHOLE, FLOW: "flow alone", TRAINING: "training step"}
LIBRARIES = "anomalib, FrEIA"
HEADER = ("", "over the fastest of")
Line = tuple[str, str]
CHANGED = f"anomalib{AT_ONCE}"  # changed like this for the comparison
LEGEND = (
    "How many times longer the fastest peer takes: geometric mean over shapes and forms, in brackets the "
    "worst. *Reversible* training, the default, keeps only the output of a flow. anomalib's CFlow processes "
    "64 feature positions at a time; it is also compared as changed to take all of them at once."
)
ON_CPUS = (
    "On a CPU with 2 threads, over the small cases of `make bench` (models: one image, ResNet-18), against "
    "peers without torch.compile. `make bench` prints {what} for any machine:"
)
IN_PICTURE = (
    "Compiled peers, larger batches and larger networks are in the picture: over all cases the fastest form "
    "of a peer is nearer."
)


def headline(files: Sequence[Rows]) -> str:
    """Return the README's first words on speed: whole models on the first CPU, against all forms of peers."""
    cpus, _ = _cpus_and_gpus(files)
    ratios: dict[str, list[float]] = {f"{model}, {table.WHOLE}": [] for model in PEERS}
    for ratio, row, _ in comparisons(cpus[0]):
        if _wide(row) and _line(row) in ratios:
            ratios[_line(row)].append(ratio)
    found = [
        f"{times(table.geometric_mean(some)).removesuffix('x')} ({line.split(',')[0]})"
        for line, some in ratios.items()
    ]
    return prose(
        "**Fast:** from image to map in float32 on a CPU, the fastest form of anomalib's models, "
        f"torch.compile included, takes {', '.join(found[:-1])} and {found[-1]} times as long, on average "
        "over networks and batches ([Speed](#speed))."
    )


def section(files: Sequence[Rows]) -> str:
    """Return the README's section on speed, from the rows of the first CPU and the last GPU."""
    cpus, gpus = _cpus_and_gpus(files)
    files = [*cpus[:1], *gpus[-1:]]
    parts = [prose(LEGEND), *_tables(files, brief=True)]
    parts += [
        prose(f"{IN_PICTURE} {_losses(files)}"),
        *picture("speed_models.png", "How many times longer the fastest peer takes", folder="docs/"),
        *picture(
            "speed_depth.png", "Memory and time of a training step over the number of blocks", folder="docs/"
        ),
    ]
    return "\n\n".join(parts)


def full(files: Sequence[Rows]) -> list[str]:
    """Return all lines, for docs/speed.md."""
    tables = _tables(files)
    return [prose(LEGEND), *tables] if tables else []


def _cpus_and_gpus(files: Sequence[Rows]) -> tuple[list[Rows], list[Rows]]:
    cpus, gpus = ([rows for rows in files if table.on_gpu(rows) is on_gpu] for on_gpu in (False, True))
    return cpus, gpus


def _tables(files: Sequence[Rows], *, brief: bool = False) -> list[str]:
    """Return a table of CPUs and a table of GPUs, as far as there are rows."""
    parts = []
    cpus, gpus = _cpus_and_gpus(files)
    what = "the same in more lines" if brief else "this table"
    for some, title in ((cpus, ON_CPUS.format(what=what)), (gpus, _on_gpus(gpus))):
        if lines := page(some, brief=brief):
            parts += [prose(title), lines]
    return parts


def _on_gpus(files: Sequence[Rows]) -> str:
    captured = any(
        row["role"] == PEER and row["direction"] == TRAINING and row["provider"].endswith(table.CAPTURED)
        for rows in files
        for row in rows
    )
    reversible = ", reversible training as it is called" if captured else ""
    return f"On a GPU, in CUDA graphs, peers captured as well{reversible}:"


def _losses(files: Sequence[Rows]) -> str:
    """Say how often a peer is faster on each device, and where most."""
    found, counts = [], []
    for rows in files:
        pairs = list(comparisons(rows))
        lost = [entry for entry in pairs if entry[0] < 1]
        found += lost
        counts.append(f"{len(lost)} of {len(pairs)} comparisons on {rows[0]['device']}")
    worst = ""
    if found:
        entry = min(found, key=lambda comparison: comparison[0])
        worst = f" (worst, in `{entry[1]['subject']}`, {described(entry)})"
    return (
        f"A peer is faster than ours in {', '.join(counts)}{worst}; "
        "[docs/speed.md](docs/speed.md) has more devices, every form and part, bfloat16 on CPUs, "
        "milliseconds, versions and the commits that were measured."
    )


def page(files: Sequence[Rows], *, brief: bool = False) -> str:
    """Return the table from the rows of each device; empty if no row belongs to a line."""
    columns = {}
    for rows in files:
        title = rows[0]["device"]
        for dtype in ("float32", "bfloat16"):
            if brief and dtype == "bfloat16" and not table.on_gpu(rows):
                continue
            found = _means([row for row in _comparable(rows) if _wide(row) == (dtype == "float32")], brief)
            if found:
                columns[f"{title}, {dtype}"] = found
    every = _lines([row for rows in files for row in rows])
    lines = [
        [*line, *(column.get(line, "") for column in columns.values())]
        for line in dict.fromkeys(map(_shortened, every) if brief else every)
        if any(line in column for column in columns.values())
    ]
    return markdown.table([*HEADER, *columns], lines) if lines else ""


def _shortened(line: Line) -> Line:
    """Return the README's line for one of the full table; ("", "") if it has none."""
    name, peers = line
    if name.endswith(table.REVERSIBLE) and peers != CHANGED:
        return f"training steps{table.REVERSIBLE}", LIBRARIES
    if name.endswith((table.REVERSIBLE, PARTS[FLOW])):
        return "", ""
    if peers == "itself":
        return "anomalib's models, accelerated", "themselves"
    return name.split(":")[0], peers  # all forms of blocks together


def _wide(row: table.Row) -> bool:
    return row["dtype"] != "bfloat16"


def _comparable(rows: Rows) -> list[table.Row]:
    """Return the rows to compare. CPUs: cases of `make bench`, without compiled peers. GPUs: all, but our
    captured providers only in their CUDA graphs."""
    graphs = {(*_case(row), row["provider"]) for row in rows if row["provider"].endswith(table.CAPTURED)}
    if graphs:  # `best_peer` pairs captured rows with captured peers
        return [
            row
            for row in rows
            if (*_case(row), row["provider"] + table.CAPTURED) not in graphs or row["role"] == PEER
        ]
    quick = {(s.name, case.name) for s in SUBJECTS.values() for case in s.cases if case.quick}
    return [row for row in rows if _case(row) in quick and COMPILED not in row["provider"]]


def _case(row: table.Row) -> tuple[str, str]:
    return row["subject"], row["case"]


def _means(rows: Rows, brief: bool) -> dict[Line, str]:
    """Return the geometric mean and the worst of the speed-ups that belong to each line."""
    groups: dict[Line, list[float]] = {}
    peers = [row for row in rows if row["role"] == PEER]
    changed = [row for row in peers if row["provider"].endswith(AT_ONCE)]
    shipped = [row for row in peers if not row["provider"].endswith(AT_ONCE)]
    labels = {name: label for name, label in _lines(rows) if label != CHANGED}
    for row in table.ours_to_use(rows):
        name = _line(row)
        for label, given in ((labels.get(name), shipped), (CHANGED, changed)):
            peer = table.best_peer(row, given) if name else None
            if peer:
                ratio = table.milliseconds(peer) / table.milliseconds(row)
                line = _shortened((name, label)) if brief else (name, label)
                groups.setdefault(line, []).append(ratio)
    groups.pop(("", ""), None)
    return {line: _cell(ratios) for line, ratios in groups.items()}


def _cell(ratios: Sequence[float]) -> str:
    """Format the mean, bold if ours is faster, and the worst."""
    mean = table.geometric_mean(ratios)
    worst = f" ({times(min(ratios))})" if len(ratios) > 1 else ""
    return f"{f'**{times(mean)}**' if mean > 1 else times(mean)}{worst}"


def _line(row: table.Row) -> str:
    """Return the line that a row counts for; empty for rows that only the whole report has."""
    subject, provider = row["subject"], row["provider"].removesuffix(table.CAPTURED)
    form = provider.removesuffix(table.FUSED).removesuffix(table.REVERSIBLE)
    if subject == "blocks" and form in FORMS and row["direction"] == "forward":
        return f"coupling blocks: {form}"
    if subject == "training_step" and form in FORMS:
        reversible = provider.endswith(table.REVERSIBLE)
        return f"training step of blocks{table.REVERSIBLE if reversible else f': {form}'}"
    if subject == "models":
        model, _, *part = row["case"].split(", ")
        reversible = table.REVERSIBLE if provider.endswith(table.REVERSIBLE) else ""
        return f"{model.split()[0]}, {PARTS[', '.join(part)]}{reversible}"
    if subject == "accelerate" and provider == ACCELERATED and row["case"].endswith("whole model"):
        return f"anomalib's {row['case'].split()[0]}, accelerated"
    if subject in ("tree", "nfa"):
        return {"tree": "component tree", "nfa": "a-contrario test"}[subject]
    return ""


def _lines(rows: Rows) -> Iterator[Line]:
    """Yield all possible lines in order: what is measured, and the peers it is compared with."""
    yield "component tree", "Higra, scikit-image, maxtree"
    yield "a-contrario test", "the authors' algorithm in Python"
    for form in FORMS:
        yield f"coupling blocks: {form}", LIBRARIES
    for form in FORMS:
        yield f"training step of blocks: {form}", LIBRARIES
    models = dict.fromkeys(
        row["case"].split()[0] for row in rows if row["subject"] in ("models", "accelerate")
    )
    for part in PARTS.values():
        for mode in ("", table.REVERSIBLE) if part == PARTS[TRAINING] else ("",):
            for model in models:
                yield f"{model}, {part}{mode}", "anomalib"
                yield f"{model}, {part}{mode}", CHANGED
    yield f"training step of blocks{table.REVERSIBLE}", LIBRARIES
    for model in models:
        yield f"anomalib's {model}, accelerated", "itself"
