"""`python -m bench.run [SUBJECT...]`: measure, print a table, append the rows to bench/results/cpu.csv."""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from bench.measure import alternate, peak_bytes
from bench.registry import SUBJECTS
from bench.subject import Case, Subject

RESULTS = Path(__file__).parent / "results" / "cpu.csv"
PACKAGES = ("torch", "numpy", "higra", "scikit-image", "maxtree")
FIELDS = [
    *("subject", "case", "provider", "dtype", "p20_ms", "p50_ms", "p80_ms", "repeats", "mpixel_per_s"),
    *("ours_faster_by", "peak_bytes_per_pixel", "noisy", "cpu", "versions", "commit", "date"),
]


def measure(subject: Subject, case: Case) -> Iterator[dict[str, object]]:
    """Check, then time, all providers of a case; one row for each."""
    providers = case.providers()
    wrong = case.check(providers)
    for name, what in wrong.items():
        print(f"  {name}: not timed, wrong: {what}")
    timings = alternate({n: c for n, c in providers.items() if n not in wrong}, seconds=case.seconds)
    ours = next(iter(timings.values()))
    for i, (name, timing) in enumerate(timings.items()):
        peak = peak_bytes(subject.name, case.name) if case.peak and i == 0 else None
        yield {
            "subject": subject.name,
            "case": case.name,
            "provider": name,
            "dtype": case.dtype,
            "p20_ms": f"{timing.p20 * 1e3:.4g}",
            "p50_ms": f"{timing.p50 * 1e3:.4g}",
            "p80_ms": f"{timing.p80 * 1e3:.4g}",
            "repeats": timing.repeats,
            "mpixel_per_s": f"{case.pixels / timing.p50 / 1e6:.3g}",
            "ours_faster_by": f"{timing.p50 / ours.p50:.2f}",
            "peak_bytes_per_pixel": "" if peak is None else f"{peak / case.pixels:.1f}",
            "noisy": int(timing.noisy),
        }


def environment() -> dict[str, str]:
    """The columns that all rows of a run share."""
    versions = " ".join(f"{name}={_version(name)}" for name in PACKAGES if _version(name))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": _cpu_name(),
        "versions": f"python={platform.python_version()} {versions}",
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def append(path: Path, row: dict[str, object]) -> None:
    """Add one row at once, so that an interrupted run keeps what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument(
        "subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)}; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="small inputs only")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="CSV to append to (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.subjects if name not in SUBJECTS]
    if unknown:
        parser.error(f"unknown subject {unknown[0]!r}; there are {', '.join(SUBJECTS)}")
    shared = environment()
    for name in options.subjects or SUBJECTS:
        subject = SUBJECTS[name]
        print(f"\n{subject.name}: {subject.about}")
        for module, how in subject.peers.items():
            if not find_spec(module):
                print(f"  {module} is not installed and left out; {how}")
        cases = [case for case in subject.cases if case.quick or not options.quick]
        for i, case in enumerate(cases, 1):
            print(f"[{i}/{len(cases)}] {case.name}", flush=True)
            for row in measure(subject, case):
                append(options.output, row | shared)
                peak = f"{row['peak_bytes_per_pixel']} B/pixel at most" if row["peak_bytes_per_pixel"] else ""
                print(
                    f"  {row['provider']:<20} {row['p50_ms']:>9} ms  {row['mpixel_per_s']:>6} Mpixel/s  "
                    f"x{row['ours_faster_by']:<7} {'noisy' if row['noisy'] else '':<6} {peak}",
                    flush=True,
                )
    print(f"\nrows in {options.output}; x: how much longer it takes than the first of its case")


if __name__ == "__main__":
    main()
