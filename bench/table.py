"""Rows of measurements: a long table, one row per provider of a case, kept as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.subject import OURS, PEER
from usf_kernels.files import atomic_write

Row = Mapping[str, str]

FIELDS = (
    *("subject", "case", "provider", "role", "dtype", "direction", "layout", "cache"),
    *("channels", "side", "kernel", "batch", "depth"),
    *("p20_ms", "p50_ms", "p80_ms", "repeats", "noisy", "section_us", "first_call_ms"),
    *("mpixel_per_s", "gb_per_s", "gflop_per_s", "of_limit", "peak_mb", "saved_mb"),
    *("device", "threads", "versions", "commit", "date"),
)
# Endings of providers' names.
FUSED, CAPTURED, REVERSIBLE = ", fused", ", CUDA graph", ", reversible"
ANOMALIB = ("anomalib", "anomalib, channels-last")  # anomalib's block in either memory format
VENDOR = "vendor's products"  # name of the provider of bare products
WHOLE = "from image to map"  # the part of a model whose rows name none
OPERATIONS = ("coupling", "lu_conv", "residual", "score")  # subjects


def read(path: Path) -> list[Row]:
    """Read the rows of a file; none if there is no such file.

    Raises:
        ValueError: when it is not such a table.
        OSError: when it cannot be read.
    """
    rows = read_columns(path, FIELDS)
    for number, row in enumerate(rows, 2):
        for name in ("p50_ms", "section_us"):
            if not _is_time(row[name]) and (row[name] or name == "p50_ms"):
                raise ValueError(f"{path}, row {number}: expected a time in {name}, found {row[name]!r}")
    return rows


def read_columns(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of a CSV file with exactly these columns; none if there is no such file.

    Raises:
        ValueError: naming the file and the row, when it has another form.
        OSError: when it cannot be read.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            found, rows = reader.fieldnames, list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV file ({error})") from error
    if tuple(found or ()) != tuple(columns):
        raise ValueError(f"{path}: expected the columns {', '.join(columns)}, found {found}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():  # DictReader's mark for too many or too few cells
            raise ValueError(f"{path}, row {number}: expected {len(columns)} cells")
    return rows


def _is_time(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows, or leave the file as it was."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, durable=False) as file:
        file.write(text.getvalue().encode())


def replace(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file's rows of one case, device and state of the cache by new ones.

    All of them are replaced together, because ratios hold between rows of one run only.
    """
    kept, place = [], None
    fresh = run_of(rows[0])
    for row in read(path):
        if run_of(row) == fresh:
            place = len(kept) if place is None else place
        else:
            kept.append(row)
    place = len(kept) if place is None else place
    write(path, [*kept[:place], *rows, *kept[place:]])


def forget(path: Path, subject: str, cases: Iterable[str]) -> None:
    """Drop the rows of a subject's cases that are not among `cases`, which are no longer measured."""
    rows, cases = read(path), set(cases)
    kept = [row for row in rows if row["subject"] != subject or row["case"] in cases]
    if len(kept) < len(rows):
        write(path, kept)


def run_of(row: Row) -> tuple[str, ...]:
    """Return what identifies the rows that were timed in turn."""
    return tuple(row[name] for name in ("subject", "case", "cache", "device"))


def best_peer(row: Row, rows: Iterable[Row]) -> Row | None:
    """Return the fastest peer of a row: same case, precision and direction, in a CUDA graph if the row is."""
    peers = (
        other
        for other in rows
        if other["role"] == PEER
        and run_of(other) == run_of(row)
        and all(other[name] == row[name] for name in ("dtype", "direction"))
        and other["provider"].endswith(CAPTURED) == row["provider"].endswith(CAPTURED)
    )
    return min(peers, key=milliseconds, default=None)


def merged(rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """Merge the providers of these names into one with the first name: for each case, device, precision and
    direction only the fastest of them is left."""
    rows = list(rows)
    fastest: dict[tuple[str, ...], Row] = {}
    for row in sorted((row for row in rows if row["provider"] in names), key=milliseconds):
        fastest.setdefault((*run_of(row), row["dtype"], row["direction"]), {**row, "provider": names[0]})
    return [*(row for row in rows if row["provider"] not in names), *fastest.values()]


def on_gpu(rows: Iterable[Row]) -> bool:
    """Whether the rows are of a device with CUDA graphs."""
    return any(row["provider"].endswith(CAPTURED) for row in rows)


def milliseconds(row: Row) -> float:
    """Return the median time."""
    return float(row["p50_ms"])


def identity(row: Row) -> tuple[str, ...]:
    """Return what identifies the same measurement in two files."""
    return tuple(
        row[name] for name in ("subject", "case", "provider", "dtype", "direction", "cache", "device")
    )


def ours_to_use(rows: Iterable[Row]) -> list[Row]:
    """Return our rows, without modules whose inference form, the one to use, has a row in the same case."""

    def place(row: Row) -> tuple[str, str, str]:
        return row["subject"], row["case"], row["provider"].removesuffix(CAPTURED).removesuffix(FUSED)

    ours = [row for row in rows if row["role"] == OURS]
    fused = {place(row) for row in ours if FUSED in row["provider"]}
    return [row for row in ours if FUSED in row["provider"] or place(row) not in fused]


def operation(row: Row) -> str:
    """Return what a row measures, without the shape."""
    if row["subject"] == "tree":
        return "component tree"
    if row["subject"] == "nfa":
        return "a-contrario test"
    if row["subject"] in ("models", "accelerate"):
        model, _, *part = row["case"].split(
            ", "
        )  # "FastFlow resnet18 256^2", "batch 1", and a part of the model or nothing
        whole = [WHOLE] if row["subject"] == "models" else []
        name = ", ".join([model.split()[0], *(part or whole)])
        return f"{name}, accelerated" if row["subject"] == "accelerate" else name
    parts = row["case"].split(", ")
    name = ", ".join(parts[: 2 if parts[0] == "anomaly map" else 1])
    return f"{name}, inverse" if row["direction"] == "inverse" else name


def by_device(rows: Iterable[Row]) -> list[list[Row]]:
    """Divide the rows of a file by the device that they are of, in order; those of a cold cache are left out,
    to which the others do not compare."""
    devices: dict[str, list[Row]] = {}
    for row in rows:
        if row["cache"] != "cold":
            devices.setdefault(row["device"], []).append(row)
    return list(devices.values())


def speedups(
    rows: Iterable[Row], ours: Mapping[str, str], peer: Mapping[str, str], *, column: str = "p50_ms"
) -> dict[str, float]:
    """Return how much longer the rows that match `peer` take than those that match `ours`, by case.

    Args:
        rows: rows of one or several subjects.
        ours, peer: values that columns must have.
        column: column to compare, by default the time.
    """

    def times(wanted: Mapping[str, str]) -> dict[str, float]:
        return {
            row["case"]: float(row[column])
            for row in rows
            if row[column] and all(row[name] == value for name, value in wanted.items())
        }

    rows = list(rows)
    mine, theirs = times(ours), times(peer)
    return {case: theirs[case] / taken for case, taken in mine.items() if case in theirs}


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers, at least one."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
