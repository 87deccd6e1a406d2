"""`python -m bench.run [SUBJECT...]`: measure, print, and put the rows into bench/results."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec

import torch

from bench import compilation, machine, priorities, summary, table
from bench.measure import BUSY, Neighbours, Timing, alternate, captured, first_call, usable_cores
from bench.memory import peak_bytes, saved_bytes
from bench.registry import SUBJECTS
from bench.subject import OURS, Case, Provider, Subject
from usf_kernels.cli import bench as options_of
from usf_kernels.cli import one_line
from usf_kernels.cli.options import pick_device, progress
from usf_kernels.files import check_writable, make_folder

SECTION = "section"
FIRST_CALL = 180  # seconds that a compilation may take
GRAPH = "graph "
GPU_SHARE = 0.15  # share of a case's seconds used on a GPU, where calls are short
QUICK_SHARE = 0.5  # share used in the quick run


def run(options: argparse.Namespace) -> int:
    """Measure what the options (of `usf_kernels.cli.bench`) ask for; return 1 if a case failed, else 0.

    Raises:
        ValueError: for a subject that does not exist, or if the device can run none.
    """
    torch.set_num_threads(options.threads or usable_cores())
    device = pick_device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, for all providers
    work = _work(options, device)
    # A run of some providers (quick: without those that compile) would replace all rows of its cases.
    part = options.providers or options.quick
    output = options.output or (None if part else machine.results_file(device))
    if output is not None:
        make_folder(output.parent)
        check_writable(output)
        table.read(output)  # raises now, not after measuring, if something is wrong with the file
    for subject in dict.fromkeys(subject.name for subject, _ in work):
        _say_what_is_missing(SUBJECTS[subject])
        if output is not None:
            table.forget(output, subject, (case.name for case in SUBJECTS[subject].cases))
    shared = machine.environment(device)
    print(f"{shared['device']}, {shared['threads']} threads; {shared['versions']}")
    if torch.bfloat16 not in machine.dtypes(device):
        print("this processor has no arithmetic for bfloat16: nothing is measured in it")
    limits = _limits(device)
    end = time.perf_counter() + 60 * options.minutes if options.minutes else float("inf")
    failed = measured = 0
    with progress(len(work), "benchmark") as advance:
        for i, (subject, case) in enumerate(work, 1):
            if time.perf_counter() > end:
                print(f"\n{options.minutes:g} minutes are over: {len(work) - i + 1} cases left out")
                break
            print(f"\n[{i}/{len(work)}] {subject.name}: {case.name}", flush=True)
            begin = time.perf_counter()
            try:
                rows = [row | shared for row in measure(subject, case, device, options, limits)]
            except Exception as error:  # the other cases are measured nevertheless
                print(f"  not measured: {_first_line(error)}")
                rows, failed = [], 1
            for row in rows:
                print(describe(row, rows))
            print(f"  {time.perf_counter() - begin:.1f} s", flush=True)
            if rows and output is not None:
                table.replace(output, rows)
            measured += len(rows)
            gc.collect()
            advance()
    if options.providers and not measured:
        print(f"nothing was measured: no provider has {' or '.join(options.providers)} in its name")
        return 1
    print("\nx: how much longer the fastest peer takes, in the same precision and direction; %: of the limit")
    if output is not None and output.exists():
        print(f"rows in {output}")
        rows = [row for row in table.read(output) if row["device"] == shared["device"]]
        if rows and (page := summary.page([rows])):
            print(f"\n{page}")
    return failed


def _work(options: argparse.Namespace, device: torch.device) -> list[tuple[Subject, Case]]:
    """Return the cases to measure, in order."""
    unknown = [name for name in options.subjects if name not in SUBJECTS]
    if unknown:
        raise ValueError(f"unknown subject {unknown[0]!r}; there are {', '.join(SUBJECTS)}")
    ranked = []
    for name in options.subjects or SUBJECTS:
        subject = SUBJECTS[name]
        cases = [
            case
            for case in subject.cases
            if (case.quick or not options.quick)
            and options.cases in case.name
            and device.type in case.devices
            and device.type in subject.devices
        ]
        cases.sort(key=lambda case: not (case.first if options.minutes else case.quick))
        ranked += [(_place(subject, case, device), i, subject, case) for i, case in enumerate(cases)]
    if not ranked:
        raise ValueError("nothing to measure: no case of these subjects fits the options and the device")
    if options.minutes:  # take the most valuable case of every subject first, then every subject's next
        ranked.sort(key=lambda entry: entry[:2])
    return [(subject, case) for _, _, subject, case in ranked]


def _place(subject: Subject, case: Case, device: torch.device) -> int:
    """Return the rank of a case if time is limited; on a GPU those of `priorities` come first."""
    last = len(priorities.ORDER)
    place = priorities.ORDER.get((subject.name, case.name), last) if device.type == "cuda" else last
    return place if place < last else last + (not case.first)


def _say_what_is_missing(subject: Subject) -> None:
    for module, how in subject.peers.items():
        if not find_spec(module):
            print(f"{subject.name}: {module} is not installed and left out; {how}")


def _limits(device: torch.device) -> dict[str, float]:
    """Measure GB/s of a copy and, per precision, GFLOP/s of a matrix product."""
    (case,) = machine.SUBJECT.cases
    providers = case.providers(device)
    timings = alternate({p.name + p.dtype: p.call for p in providers}, seconds=1.0, device=device)
    rates = {}
    for provider in providers:
        seconds = timings[provider.name + provider.dtype].p20
        name = machine.COPY if provider.name == machine.COPY else provider.dtype
        rates[name] = (provider.gigabytes or provider.gigaflops) / seconds
    return rates


def measure(
    subject: Subject,
    case: Case,
    device: torch.device,
    options: argparse.Namespace,
    limits: dict[str, float],
) -> Iterator[dict[str, str]]:
    """Check, then time the providers of a case; yield a row for each whose result is right."""
    started = list(_started(case, device, options))
    calls = {str(i): provider.call for i, (provider, _) in enumerate(started)}
    known = {str(i): seconds for i, (provider, seconds) in enumerate(started) if not provider.compiles}
    section = machine.parallel_section(device)
    if section is not None:
        calls[SECTION] = section
    share = QUICK_SHARE if options.quick else 1.0
    if device.type == "cuda":
        calls |= _graphs([provider for provider, _ in started])
        share = GPU_SHARE
    neighbours = Neighbours()
    timings = alternate(calls, seconds=share * case.seconds, device=device, cold=options.cold, known=known)
    busy = device.type == "cpu" and neighbours.share() > BUSY
    if busy:
        print("  other processes took part of the cores meanwhile: these rows are marked as noisy")
    section = timings.pop(SECTION, None)
    for key, timing in timings.items():
        provider, seconds = started[int(key.removeprefix(GRAPH))]
        row = _row(subject, case, provider, timing, limits)
        row["cache"] = "cold" if options.cold else "warm"
        row["noisy"] = str(int(timing.noisy or busy))
        row["section_us"] = f"{section.p50 * 1e6:.3g}" if section else ""
        if key.startswith(GRAPH):
            row["provider"] += table.CAPTURED
        else:
            row["first_call_ms"] = f"{seconds * 1e3:.4g}"
            row |= _memory(provider, device)
        yield row


def _started(
    case: Case, device: torch.device, options: argparse.Namespace
) -> Iterator[tuple[Provider, float]]:
    """Yield the providers to time, after a first call with the right result, and that call's seconds."""
    providers = [p for p in case.providers(device) if _is_wanted(p, case, device, options)]
    if any(provider.compiles for provider in providers):
        compilation.forget()
    for provider in providers:
        name = f"  {provider.name}, {provider.dtype}, {provider.direction}"
        limit, compiling = (FIRST_CALL, compilation.first()) if provider.compiles else (0, nullcontext())
        try:
            with compiling:
                result, seconds = first_call(provider.call, device, limit=limit)
            wrong = provider.check(result) if provider.check else None
            del result
        except Exception as error:  # any kind of it: the others are timed nevertheless
            print(f"{name}: not timed: {_first_line(error)}")
            continue
        if wrong:
            print(f"{name}: not timed, wrong: {wrong}")
        else:
            yield provider, seconds


def _is_wanted(provider: Provider, case: Case, device: torch.device, options: argparse.Namespace) -> bool:
    if provider.dtype == "bfloat16" and torch.bfloat16 not in machine.dtypes(device):
        return False
    if provider.compiles and (options.quick or (options.minutes and not case.first)):
        return False
    return any(part in provider.name for part in options.providers or [""])


def _graphs(providers: Sequence[Provider]) -> dict[str, Callable[[], object]]:
    """Return CUDA graphs of the providers that can be captured, under `GRAPH` and their index."""
    graphs = {}
    for i, provider in enumerate(providers):
        if provider.capture:
            try:
                graphs[f"{GRAPH}{i}"] = captured(provider.graphed or provider.call)
            except Exception as error:  # whatever its kind: the provider is still timed without a graph
                print(f"  {provider.name}, {provider.dtype}: no CUDA graph: {_first_line(error)}")
    return graphs


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _memory(provider: Provider, device: torch.device) -> dict[str, str]:
    found = {}
    if provider.peak and (peak := peak_bytes(provider.call, device)) is not None:
        found["peak_mb"] = f"{peak / 1e6:.4g}"
    if provider.saves:
        found["saved_mb"] = f"{saved_bytes(provider.saves, ignore=provider.live) / 1e6:.4g}"
    elif provider.checkpoint:
        found["saved_mb"] = f"{provider.checkpoint / 1e6:.4g}"
    return found


def _row(
    subject: Subject, case: Case, provider: Provider, timing: Timing, limits: dict[str, float]
) -> dict[str, str]:
    row = {
        "subject": subject.name,
        "case": case.name,
        "provider": provider.name,
        "role": provider.role,
        "dtype": provider.dtype,
        "direction": provider.direction,
        "layout": provider.layout,
        "p20_ms": f"{timing.p20 * 1e3:.4g}",
        "p50_ms": f"{timing.p50 * 1e3:.4g}",
        "p80_ms": f"{timing.p80 * 1e3:.4g}",
        "repeats": str(timing.repeats),
    }
    row |= {name: str(value) for name, value in case.shape.items()}
    if case.pixels:
        row["mpixel_per_s"] = f"{case.pixels / timing.p50 / 1e6:.3g}"
    if provider.gigabytes:
        row["gb_per_s"] = f"{provider.gigabytes / timing.p50:.3g}"
    if provider.gigaflops:
        row["gflop_per_s"] = f"{provider.gigaflops / timing.p50:.3g}"
    least = provider.gigabytes / limits[machine.COPY]
    if provider.gigaflops and provider.dtype in limits:
        least = max(least, provider.gigaflops / limits[provider.dtype])
    if least:
        row["of_limit"] = f"{least / timing.p50:.3g}"
    return row


def describe(row: table.Row, rows: Sequence[table.Row]) -> str:
    """Return a line of the printed table."""
    peer = table.best_peer(row, rows) if row["role"] == OURS else None
    ratio = f"x{table.milliseconds(peer) / table.milliseconds(row):.2f}" if peer else ""
    limit = f"{100 * float(row['of_limit']):.0f} %" if row.get("of_limit") else ""
    notes = [
        f"{row[key]} MB {word}"
        for key, word in (("peak_mb", "at most"), ("saved_mb", "saved"))
        if row.get(key)
    ]
    if row["noisy"] == "1":
        notes.append("noisy")
    return (
        f"  {row['provider']:<42} {row['dtype']:<9} {row['direction']:<13} {float(row['p50_ms']):>10.4g} ms "
        f"{ratio:>8} {limit:>6}  {', '.join(notes)}"
    ).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    options_of.add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("interrupted: the rows of what was measured are kept", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    raise SystemExit(main())
