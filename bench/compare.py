"""`python -m bench.compare OLD.csv NEW.csv`: what became slower, by its ratio to a peer in the same run.

Absolute times drift with the machine; the ratio to a peer that was timed in turn with ours does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bench import table
from bench.subject import LIMIT, OURS, PEER

SLOWER = 1.10
MOVED = 1.25  # change of the time of a parallel section, see `bench.machine.parallel_section`


@dataclass(frozen=True)
class Change:
    """A row of ours in two files, both times as multiples of the same peer's."""

    row: table.Row
    peer: str
    old: float
    new: float
    excuse: str

    @property
    def factor(self) -> float:
        """Ratio of new to old; above 1 if it became slower."""
        return self.new / self.old

    def __str__(self) -> str:
        row = self.row
        excuse = f", {self.excuse}" if self.excuse else ""
        return (
            f"{row['subject']}: {row['case']}: {row['provider']}, {row['dtype']}, {row['direction']}: "
            f"{self.old:.3g} -> {self.new:.3g} of {self.peer} ({self.factor:.2f}x{excuse})"
        )


def changes(old: Iterable[table.Row], new: Iterable[table.Row]) -> Iterator[Change]:
    """Compare every row of ours in both tables with a row of the same run that both have (`_partner`)."""
    before, after = ({table.identity(row): row for row in rows} for rows in (old, new))
    shared = [row for key, row in after.items() if key in before]
    for row in shared:
        peer = _partner(row, shared) if row["role"] == OURS else None
        if peer is None:
            continue
        old_row, was = before[table.identity(row)], before[table.identity(peer)]
        yield Change(
            row,
            peer["provider"],
            table.milliseconds(old_row) / table.milliseconds(was),
            table.milliseconds(row) / table.milliseconds(peer),
            _excuse(row, old_row, peer, was),
        )


def lost(old: Iterable[table.Row], new: Iterable[table.Row]) -> list[table.Row]:
    """Return rows of ours that are missing in `new` though it has their case: wrong results are not timed."""
    new = list(new)
    measured, runs = {table.identity(row) for row in new}, {table.run_of(row) for row in new}
    return [
        row
        for row in old
        if row["role"] == OURS and table.run_of(row) in runs and table.identity(row) not in measured
    ]


def _excuse(new: table.Row, old: table.Row, *peers: table.Row) -> str:
    """Return a reason other than the code for a change, if there is one."""
    if any(row["noisy"] == "1" for row in (new, old, *peers)):
        return "noisy"
    if new["threads"] != old["threads"]:
        return f"with {new['threads']} threads, not {old['threads']}"
    before, after = (float(row["section_us"] or "nan") for row in (old, new))
    return "the cores moved" if max(before, after) > MOVED * min(before, after) else ""


def _partner(row: table.Row, rows: Sequence[table.Row]) -> table.Row | None:
    """Return the fastest peer, else limit, that was timed in turn with a row: in the same precision and
    direction, else in any."""
    beside = [other for other in rows if table.run_of(other) == table.run_of(row)]
    same = [other for other in beside if all(other[name] == row[name] for name in ("dtype", "direction"))]
    for some, role in product((same, beside), (PEER, LIMIT)):
        found = [other for other in some if other["role"] == role]
        if found:
            return min(found, key=table.milliseconds)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what became slower or is no longer timed; return 1 unless there is an excuse for all of it."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD.csv")
    parser.add_argument("new", type=Path, metavar="NEW.csv")
    options = parser.parse_args(arguments)
    for path in (options.old, options.new):
        if not path.is_file():
            parser.error(f"no such file: {path}")
    try:
        old, new = table.read(options.old), table.read(options.new)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    found = sorted(changes(old, new), key=lambda c: -c.factor)
    gone = lost(old, new)
    if not found and not gone:
        parser.error("nothing to compare: no row of ours is in both files, of the same device")
    slower = [change for change in found if change.factor > SLOWER]
    for change in slower:
        print(change)
    for row in gone:
        print(f"{row['subject']}: {row['case']}: {row['provider']}, {row['dtype']}: no longer timed")
    faster = sum(change.factor < 1 / SLOWER for change in found)
    print(f"{len(found)} rows compared: {len(slower)} more than 10 % slower, {faster} more than 10 % faster")
    both = {table.identity(row) for row in old if row["role"] == OURS} & set(map(table.identity, new))
    if alone := len(both) - len(found):
        print(f"{alone} rows were timed without a peer or a limit to compare them with")
    return int(bool(gone) or any(not change.excuse for change in slower))


if __name__ == "__main__":
    raise SystemExit(main())
