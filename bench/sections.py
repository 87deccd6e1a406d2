"""Markdown sections written from the rows: one writer per subject."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from bench import markdown, model_sections, table
from bench.markdown import count, mean, number, picture, prose, times, versions
from bench.subject import OURS

PEERS = {  # for blocks: title -> our dtype, the peer's name and its dtype
    "anomalib": ("float32", "anomalib", "float32"),
    "its torch.compile": ("float32", "anomalib, torch.compile", "float32"),
    "bfloat16: anomalib in float32": ("bfloat16", "anomalib", "float32"),
    "bfloat16: its autocast, channels-last": ("bfloat16", "anomalib, autocast, channels-last", "bfloat16"),
}
TREE = {"white": "white noise, float32", "smooth": "smooth, float32", "smooth_8bit": "smooth, uint8"}


def section(rows: Sequence[table.Row], *, pictures: bool = True) -> str:
    """Return the whole section on a device, with the pictures or without."""
    by_subject: dict[str, list[table.Row]] = {}
    for row in rows:
        by_subject.setdefault(row["subject"], []).append(row)
    parts = [f"## {rows[0]['device']}", _introduction(rows)]
    parts += picture("speed.png", "How much longer the fastest peer takes, per operation")
    writers: dict[str, Callable[[list[table.Row]], Iterator[str]]] = {
        "blocks": _blocks,
        "training_step": _training,
        "models": model_sections.models,
        "accelerate": model_sections.accelerated,
        "tree": _tree,
        "nfa": _nfa,
    }
    for name, write in writers.items():
        if name in by_subject:
            parts += write(by_subject[name])
    operations = [row for name in table.OPERATIONS for row in by_subject.get(name, [])]
    if operations:
        parts += _operations(operations)
    return "\n\n".join(part for part in parts if pictures or "](speed" not in part)


def _introduction(rows: Sequence[table.Row]) -> str:
    devices = sorted({f"{row['device']}, {count(row['threads'], 'thread')}" for row in rows})
    noisy = sum(row["noisy"] == "1" for row in rows)
    noise = f" ({noisy} of {len(rows)} are marked as noisy)" if noisy else ""
    sections = sorted(float(row["section_us"]) for row in rows if row["section_us"])
    if sections:
        low, high = (sections[round(share * (len(sections) - 1))] for share in (0.05, 0.95))
        noise += f"; what a parallel section took is a column, in most of them {low:.1f} to {high:.1f} us"
    return prose(
        f"Measured on {' and '.join(devices)} ({versions(rows)}). "
        "Medians; all of a case are timed in turn in one process, after each was checked: values against "
        "float64, peers' trees and regions against ours. "
        f"**2x** means that the peer takes twice as long. Rows: `bench/results`{noise}; again: `make bench` "
        "(small inputs, minutes), `make bench-full`, and `python -m bench.compare OLD.csv NEW.csv`."
    )


def _blocks(rows: list[table.Row]) -> Iterator[str]:
    yield "### Blocks, inference"
    yield prose(
        "Coupling blocks of FastFlow (ResNet-18, 256 x 256) and U-Flow (MS-CaiT), kernels of 1 and 3, "
        "several batch sizes, conditioners as wide as their input. *Affine, permutation* has the "
        "mathematics and the weights of anomalib's block. *anomalib* is the faster of its block on "
        "contiguous and on channels-last maps; torch.compile was tried on contiguous ones only. Geometric "
        "mean over the shapes, the worst in brackets."
    )
    rows = table.merged(rows, table.ANOMALIB)
    yield from picture("speed_blocks.png", "Speed-up of blocks over anomalib, one dot per shape")
    names = _ours(rows, table.FUSED) or _ours(rows, "")
    lines = []
    for depth, title in (("1", ""), ("8", ", 8 in a row")):
        at_depth = [row for row in rows if row["depth"] == depth and row["direction"] == "forward"]
        for name in names:
            cells = [
                mean(
                    table.speedups(
                        at_depth,
                        {"provider": name, "dtype": dtype},
                        {"provider": peer, "dtype": peer_dtype},
                    )
                )
                for dtype, peer, peer_dtype in PEERS.values()
            ]
            if any(cells):
                bare = mean(_over_convolutions(at_depth, name), worst=max)
                back = mean(_inverse_over_forward([r for r in rows if r["depth"] == depth], name), worst=max)
                lines.append([name.removesuffix(table.FUSED) + title, *cells, bare, back])
    header = ["block", *(f"over {title}" for title in PEERS), "time / its convolutions", "inverse / forward"]
    yield markdown.table([h.replace("over bfloat16: ", "bfloat16 over ") for h in header], lines)
    yield from picture("speed_scaling.png", "Eight blocks over the batch size and over the channels")
    if roofline := picture("speed_roofline.png", "roofline"):
        yield prose(
            f"The same blocks and the limits of the machine: {roofline[0].removeprefix('!')}. It counts the "
            "FLOPs of each form as it is defined, so dots may lie above the roof: Winograd's filtering takes "
            "9 or 16 multiplications where a 3 x 3 kernel has 36, fused forms merge C x C products into what "
            "is next to them, and the product that draws the roof, of 2,048 x 2,048 matrices, is not the "
            "fastest one."
        )


def _over_convolutions(rows: list[table.Row], name: str) -> dict[str, float]:
    """Return a block's time over that of its convolutions and its C x C product, if it has one; float32."""
    coupling = "affine" if name.startswith("affine") else "additive"
    found = {}
    for row in rows:
        if row["provider"] != name or row["dtype"] != "float32":
            continue
        needed = [f"convolutions of {coupling} blocks"]
        if "permutation" not in name:
            needed.append("C x C products")
        bare = [
            table.milliseconds(other)
            for other in rows
            if (other["case"], other["dtype"]) == (row["case"], "float32") and other["provider"] in needed
        ]
        if len(bare) == len(needed):
            found[row["case"]] = table.milliseconds(row) / sum(bare)
    return found


def _inverse_over_forward(rows: list[table.Row], name: str) -> dict[str, float]:
    inverse, forward = (
        {"provider": name, "dtype": "float32", "direction": d} for d in ("inverse", "forward")
    )
    return table.speedups(rows, forward, inverse)


def _training(rows: list[table.Row]) -> Iterator[str]:
    yield "### Blocks, training step"
    yield prose(
        "Forward and backward at the same shapes, over anomalib's; the memory is what is saved for the "
        "backward."
    )
    yield from picture("speed_depth.png", "Memory and time of a training step over the number of blocks")
    lines = []
    eight = [row for row in rows if row["depth"] == "8"]
    for name in sorted(_ours(rows, ""), key=lambda name: name.removesuffix(table.REVERSIBLE)):
        anomalib, standard = {"provider": "anomalib"}, {"provider": name.removesuffix(table.REVERSIBLE)}
        one = [row for row in rows if row["depth"] == "1"]
        saved = table.speedups(eight, anomalib, {"provider": name}, column="saved_mb")
        slower = (
            table.speedups(eight, standard, {"provider": name}) if name.endswith(table.REVERSIBLE) else {}
        )
        cells = [
            mean(table.speedups(one, {"provider": name}, anomalib)),
            mean(table.speedups(eight, {"provider": name}, anomalib)),
            mean(slower, worst=max),
            mean(saved, worst=max),
        ]
        if any(cells):
            lines.append([name, *cells])
    header = ["1 block", "8 blocks", "time / not reversible", "memory of 8 / anomalib's"]
    yield markdown.table(["block", *header], lines)


def _tree(rows: list[table.Row]) -> Iterator[str]:
    yield "### Component tree"
    yield prose(
        "Milliseconds per map on one thread, ours / the fastest of Higra (implicit and "
        "explicit graph), scikit-image and maxtree (which takes the float maps rounded to 16 bits)."
    )
    yield from picture("speed_tree.png", "Throughput of component trees over the side of the map")
    ours = {row["case"]: row for row in rows if row["role"] == OURS}
    sides = sorted({int(row["side"]) for row in rows})
    lines = []
    for side in sides:
        cells = []
        for kind in TREE:
            row = ours.get(f"{kind} {side}^2")
            peer = table.best_peer(row, rows) if row else None
            if peer:
                mine, theirs = table.milliseconds(row), table.milliseconds(peer)
                cells.append(
                    f"{number(mine)} / {number(theirs)} ({_short(peer)}), **{times(theirs / mine)}**"
                )
            else:
                cells.append("")
        if any(cells):
            lines.append([f"{side}²", *cells])
    yield markdown.table(["map", *TREE.values()], lines)
    threads = []
    for row in rows:
        if row["case"].startswith("two threads") and row["provider"] == "usf_kernels x2":
            one = table.speedups(rows, {"provider": row["provider"]}, {"provider": "usf_kernels x1"})
            what = row["case"].removeprefix("two threads, ").replace("^2", "²")
            threads.append(f"{one[row['case']]:.1f}x on {what}")
    if threads:
        yield f"Two threads: {', '.join(threads)}, with the same bits."


def _short(row: table.Row) -> str:
    return row["provider"].removesuffix(" (uint16)")


def _nfa(rows: list[table.Row]) -> Iterator[str]:
    yield "### A-contrario test"
    yield prose(
        "Tree, probabilities, prune and merge on one thread; at U-Flow's two scales "
        "(28² + 14²) and on single maps. *Plain Python* is the authors' algorithm on scikit-image's max-tree."
    )
    lines = []
    for row in rows:
        if row["role"] == OURS and row["direction"] == "chernoff":
            peer = table.best_peer(row, rows)
            theirs = number(table.milliseconds(peer)) if peer else ""
            case = row["case"].replace("^2", "²")
            lines.append([case, number(table.milliseconds(row)), theirs, _ratio(row, rows)])
    yield markdown.table(["maps", "ms", "plain Python, ms", "ratio"], lines)


def _operations(rows: list[table.Row]) -> Iterator[str]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        peer = table.best_peer(row, rows) if row["role"] == OURS else None
        if peer:
            ratio = table.milliseconds(peer) / table.milliseconds(row)
            groups.setdefault(table.operation(row), []).append(ratio)
    lines = [[name, mean(dict(enumerate(ratios)))] for name, ratios in groups.items()]
    yield "### Operations"
    yield "Each by itself, over the faster of eager PyTorch and torch.compile."
    yield markdown.table(["operation", "ratio"], lines)


Comparison = tuple[float, table.Row, table.Row]  # ratio, a row of ours, the fastest peer's row


def comparisons(rows: Sequence[table.Row]) -> Iterator[Comparison]:
    """Compare each of our rows to use with the fastest peer in the same precision and direction, one subject
    after the other."""
    for subject in dict.fromkeys(row["subject"] for row in rows):
        some = [row for row in rows if row["subject"] == subject]
        for row in table.ours_to_use(some):
            peer = table.best_peer(row, some)
            if peer:
                yield table.milliseconds(peer) / table.milliseconds(row), row, peer


def losses(rows: Sequence[table.Row]) -> Iterator[str]:
    """Yield a line for each subject in which a peer is faster."""
    for subject, group in groupby(comparisons(rows), key=lambda entry: entry[1]["subject"]):
        pairs = list(group)
        lost = [entry for entry in pairs if entry[0] < 1]
        if lost:
            worst = described(min(lost, key=lambda entry: entry[0]))
            share = f"{len(lost)} of {len(pairs)} comparisons"
            yield f"- `{subject}`, {rows[0]['device']}: {share}; worst {worst}"


def described(comparison: Comparison) -> str:
    """Describe a comparison: ratio, provider, case, peer."""
    ratio, row, peer = comparison
    way = f", {row['direction']}" if row["direction"] == "inverse" else ""
    noisy = ", on a noisy machine" if "1" in (row["noisy"], peer["noisy"]) else ""
    return (
        f"{ratio:.2f}x: {row['provider']} at {row['case'].replace('^2', '²')}, {row['dtype']}{way}, "
        f"against {peer['provider']}{noisy}"
    )


def _ours(rows: Iterable[table.Row], ending: str) -> list[str]:
    """Return the names of our providers with that ending, in order."""
    return list(
        dict.fromkeys(r["provider"] for r in rows if r["role"] == OURS and r["provider"].endswith(ending))
    )


def _ratio(row: table.Row, rows: Iterable[table.Row]) -> str:
    peer = table.best_peer(row, rows) if row["role"] == OURS else None
    return f"**{times(table.milliseconds(peer) / table.milliseconds(row))}**" if peer else ""
