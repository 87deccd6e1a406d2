"""The pictures: each function takes all rows and returns a figure, or None if they do not suffice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from bench import table
from bench.accelerate import EXACT, REPLACED
from bench.drawing import (
    BOTTOM,
    FAINT,
    INK,
    OURS_COLOUR,
    PEER_COLOUR,
    SECOND,
    STRIP,
    TOP,
    canvas,
    legend,
    machine,
    name_strips,
    names_at_ends,
    round_ticks,
    strips,
    title_of,
)
from bench.machine import COPY
from bench.sections import TREE, comparisons
from bench.subject import OURS, PEER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[table.Row]
WAITED_FOR = (
    "component tree",
    "a-contrario test",
    table.WHOLE,
    "training step",
    "whole model, accelerated",
)
WINOGRAD = 36 / 9  # at best: FLOPs counted over FLOPs done
KERNELS = {"1": ("1 x 1 kernels", OURS_COLOUR), "3": ("3 x 3 kernels", SECOND)}


def overview(rows: Rows, *, brief: bool = False) -> Figure | None:
    """Draw how much longer the fastest peer takes, for everything but blocks; if `brief`, for what users wait
    for: the tree, the test, and whole models."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for ratio, row, _ in comparisons(rows):
        # For accelerated models only the corrected row is drawn: the others are in the README's table.
        if row["subject"] not in ("blocks", "training_step") and row["provider"] not in (REPLACED, EXACT):
            groups.setdefault(table.operation(row), []).append((ratio, OURS_COLOUR))
    if brief:
        groups = {name: group for name, group in groups.items() if name.endswith(WAITED_FOR)}
    if not groups:
        return None
    order = sorted(groups, key=lambda name: -table.geometric_mean(ratio for ratio, _ in groups[name]))
    figure, (axis,) = canvas(
        TOP + BOTTOM + STRIP * len(groups),
        ((3.1, 6.6),),
        "How many times longer the fastest peer takes, all shapes and batches",
        "One dot per shape, batch size or form, torch.compile among the peers; bars are geometric means. "
        f"{machine(rows)}.",
    )
    strips(axis, [groups[name] for name in order], base=10)
    name_strips(axis, order, [INK] * len(order))
    return figure


PANELS = {  # dtype: provider that our blocks are compared with, title
    "float32": ("anomalib", "float32, over anomalib's block"),
    "bfloat16": ("anomalib, autocast, channels-last", "bfloat16, over its autocast, channels-last"),
}


def _dtypes(rows: Rows) -> list[str]:
    """Return the dtypes of `PANELS` that were measured: some processors have no arithmetic for bfloat16."""
    return [dtype for dtype in PANELS if any(r["dtype"] == dtype for r in rows)]


def blocks(rows: Rows) -> Figure | None:
    """Draw speed-ups over anomalib: one dot per shape, a bar for their geometric mean."""
    rows = [r for r in rows if r["subject"] == "blocks" and r["direction"] == "forward"]
    rows = table.merged(rows, table.ANOMALIB)
    names = list(dict.fromkeys(r["provider"] for r in rows if r["role"] == OURS))
    names = [name for name in names if name.endswith(table.FUSED)] or names
    ours = len(names)
    others = [r["provider"] for r in rows if r["role"] == PEER and r["dtype"] == "float32"]
    names += [name for name in dict.fromkeys(others) if name != "anomalib"]
    if not ours or "anomalib" not in others:
        return None
    dtypes = _dtypes(rows)
    figure, axes = canvas(
        TOP + BOTTOM + STRIP * len(names),
        ((2.1, 3.3), (6.3, 3.3)) if len(dtypes) > 1 else ((2.1, 7.5),),
        "Coupling blocks, inference: over anomalib's",
        "One dot per shape, batch size and stack; bars are geometric means; anomalib's in its faster layout. "
        f"{machine(rows)}.",
    )
    legend(figure, dict(KERNELS.values()))
    kernels = {r["case"]: r["kernel"] for r in rows}
    for axis, dtype in zip(axes, dtypes, strict=True):
        peer, title = PANELS[dtype]
        groups = []
        for name in names:
            ratios = table.speedups(
                rows, {"provider": name, "dtype": dtype}, {"provider": peer, "dtype": dtype}
            )
            groups.append([(ratio, KERNELS[kernels[case]][1]) for case, ratio in ratios.items()])
        strips(axis, groups)
        title_of(axis, title)
    shown = [name.removesuffix(table.FUSED) for name in names]
    name_strips(axes[0], shown, [INK] * ours + [FAINT] * (len(names) - ours))
    return figure


def depth(rows: Rows) -> Figure | None:
    """Draw saved memory, peak memory and time of a training step over the number of blocks."""
    rows = [r for r in rows if r["subject"] == "training_step"]
    deepest = max(rows, key=lambda r: int(r["depth"]), default=None)
    if deepest is None or int(deepest["depth"]) < 8:
        return None
    same = ("channels", "side", "kernel", "batch")
    curve = [r for r in rows if all(r[name] == deepest[name] for name in same)]
    if len({r["depth"] for r in curve}) < 2:
        return None
    lines = {
        "anomalib": ("anomalib", PEER_COLOUR),
        "additive, LU": ("ours", SECOND),
        "additive, LU, reversible": ("ours, reversible", OURS_COLOUR),
    }
    shape = (
        f"{deepest['channels']} channels at {deepest['side']} x {deepest['side']}, batch {deepest['batch']}"
    )
    figure, axes = canvas(
        4.0,
        ((0.6, 1.95), (4.0, 1.95), (7.4, 1.95)),
        "What training keeps does not have to grow with depth",
        f"A training step of additive blocks with LU maps beside anomalib's; {shape}. {machine(curve)}.",
    )
    columns = {"saved_mb": "Saved for the backward, MB", "peak_mb": "Peak memory, MB", "p50_ms": "Time, ms"}
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        ends = []
        for provider, (name, colour) in lines.items():
            some = [r for r in curve if r["provider"] == provider and r[column]]
            points = sorted((int(r["depth"]), float(r[column])) for r in some)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=2, markersize=4)
                peer = provider == "anomalib"
                ends.append((points[-1][1], name, INK if peer else colour, not peer))
        axis.set_xlim(0, 1.03 * int(deepest["depth"]))
        axis.set_ylim(0)
        axis.set_xticks(sorted({int(r["depth"]) for r in curve} - {4}))
        axis.set_xlabel("blocks", fontsize=8.5, color=FAINT)
        axis.yaxis.set_major_formatter("{x:,.0f}")
        title_of(axis, title)
        names_at_ends(axis, ends)
    return figure


TREES = {
    "usf_kernels": OURS_COLOUR,
    "higra implicit": "#4f7cac",
    "higra explicit": "#9dbbd8",
    "scikit-image": "#b08d57",
    "maxtree (uint16)": "#8f7aa8",
}


def tree(rows: Rows) -> Figure | None:
    """Draw megapixels per second of max-trees over the side of the map."""
    rows = [r for r in rows if r["subject"] == "tree" and r["batch"] == "1" and r["provider"] in TREES]
    if not rows:
        return None
    figure, axes = canvas(
        4.0,
        tuple((0.6 + 3.4 * i, 2.2) for i in range(3)),
        "Component tree: megapixels per second",
        f"One map on one thread. {machine(rows)}.",
    )
    sides = sorted({int(r["side"]) for r in rows})
    speeds = [float(r["mpixel_per_s"]) for r in rows]
    for axis, (kind, title) in zip(axes, TREE.items(), strict=True):
        round_ticks(axis, 0.8 * min(speeds), 1.3 * max(speeds))
        ends = []
        for provider, colour in TREES.items():
            some = [r for r in rows if r["provider"] == provider and r["case"].startswith(f"{kind} ")]
            points = sorted((int(r["side"]), float(r["mpixel_per_s"])) for r in some)
            if points:
                ours = provider == "usf_kernels"
                axis.plot(*zip(*points, strict=True), "o-", color=colour, zorder=3 if ours else 2,
                          linewidth=2.4 if ours else 1.4, markersize=4 if ours else 2.5)  # fmt: skip
                ends.append((points[-1][1], provider.removesuffix(" (uint16)"), colour, ours))
        axis.set_xscale("log")
        axis.set_xticks([s for s in sides if s in (sides[0], 112, 448, sides[-1])])
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.set_xlabel("side of the map, pixels", fontsize=8.5, color=FAINT)
        title_of(axis, title[0].upper() + title[1:])
        names_at_ends(axis, ends)
    return figure


SCALED = {  # provider and dtype: name, colour, line width
    ("anomalib", "float32"): ("anomalib", FAINT, 1.4),
    ("anomalib, torch.compile", "float32"): ("anomalib, compiled", "#4f7cac", 1.4),
    ("anomalib, autocast, channels-last", "bfloat16"): ("anomalib, bfloat16", "#b08d57", 1.4),
    ("additive, LU" + table.FUSED, "float32"): ("ours", OURS_COLOUR, 2.4),
    ("additive, LU" + table.FUSED, "bfloat16"): ("ours, bfloat16", SECOND, 2.4),
}


def scaling(rows: Rows) -> Figure | None:
    """Draw milliseconds per image over the batch, and GFLOP/s over the channels."""
    rows = [r for r in rows if r["subject"] == "blocks" and r["depth"] == "8" and r["direction"] == "forward"]
    rows = [r for r in table.merged(rows, table.ANOMALIB) if (r["provider"], r["dtype"]) in SCALED]
    panels: tuple[tuple[str, str, dict[str, str], Callable[[table.Row], float]], ...] = (
        ("Milliseconds per image over the batch: 256 @ 16 x 16, k = 1", "batch",
         {"channels": "256", "kernel": "1"}, lambda r: table.milliseconds(r) / int(r["batch"])),
        ("GFLOP/s over the channels: k = 3, batch 8", "channels",
         {"batch": "8", "kernel": "3"}, lambda r: float(r["gflop_per_s"])),
    )  # fmt: skip
    chosen = [
        [r for r in rows if all(r[name] == v for name, v in wanted.items())] for _, _, wanted, _ in panels
    ]
    if not all(any(r["provider"].endswith(table.FUSED) for r in some) for some in chosen):
        return None
    figure, axes = canvas(
        4.2,
        ((0.6, 3.0), (5.75, 3.0)),
        "Eight coupling blocks: over the batch and over the channels",
        f"Additive couplings with LU maps, fused, beside anomalib's affine blocks. {machine(rows)}.",
    )
    for axis, some, (title, over, _, value) in zip(axes, chosen, panels, strict=True):
        values = [value(r) for r in some]
        round_ticks(axis, 0.8 * min(values), 1.25 * max(values))
        ends = []
        for key, (name, colour, width) in SCALED.items():
            points = sorted((int(r[over]), value(r)) for r in some if (r["provider"], r["dtype"]) == key)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=width, markersize=4)
                ends.append((points[-1][1], name, colour, width > 2))
        axis.set_xscale("log", base=2)
        ticks = sorted({int(r[over]) for r in some})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(
            {"batch": "images per batch", "channels": "channels"}[over], fontsize=8.5, color=FAINT
        )
        title_of(axis, title)
        names_at_ends(axis, ends)
    return figure


def roofline(rows: Rows) -> Figure | None:
    """Draw GFLOP/s over the FLOPs per byte that has to move, under the limits of the machine."""
    limits = {r["provider"] + r["dtype"]: r for r in rows if r["subject"] == "machine"}
    dots = [r for r in rows if r["subject"] == "blocks" and r["role"] in (OURS, PEER)]
    dots = [r for r in dots if r["direction"] == "forward" and r["gb_per_s"] and r["gflop_per_s"]]
    if any(r["provider"].endswith(table.FUSED) for r in dots):
        dots = [r for r in dots if r["role"] == PEER or r["provider"].endswith(table.FUSED)]
    if not limits or not dots:
        return None
    dtypes = [dtype for dtype in _dtypes(dots) if "matrix product" + dtype in limits]
    figure, axes = canvas(
        4.3,
        ((0.65, 4.3), (5.85, 4.3)) if len(dtypes) > 1 else ((0.65, 9.5),),
        "Coupling blocks and the roof of the machine",
        "FLOPs as defined; line: torch's copy and product, dashed: 3 x 3 kernels by Winograd (36 / 9). "
        f"{machine(dots)}.",
    )
    legend(figure, {"ours": OURS_COLOUR, "FrEIA, anomalib": PEER_COLOUR})
    bandwidth = float(limits[COPY + "float32"]["gb_per_s"])
    for axis, dtype in zip(axes, dtypes, strict=True):
        peak = float(limits["matrix product" + dtype]["gflop_per_s"])
        points = {
            role: [
                (float(r["gflop_per_s"]) / float(r["gb_per_s"]), float(r["gflop_per_s"]))
                for r in dots
                if r["dtype"] == dtype and r["role"] == role
            ]
            for role in (PEER, OURS)
        }
        for role, colour in ((PEER, PEER_COLOUR), (OURS, OURS_COLOUR)):
            if points[role]:
                axis.plot(*zip(*points[role], strict=True), "o", color=colour, markersize=4, alpha=0.6, mew=0)
        everything = [*points[PEER], *points[OURS], (peak / bandwidth, peak)]
        xs = [0.7 * min(x for x, _ in everything), peak / bandwidth, 1.5 * max(x for x, _ in everything)]
        axis.plot(xs, [min(peak, bandwidth * x) for x in xs], color=INK, linewidth=1.3)
        top = 1.5 * max(y for _, y in everything)
        if dtype == "float32":  # ours uses Winograd's filtering there
            axis.plot(xs[1:], [WINOGRAD * peak] * 2, color=INK, linewidth=1.0, linestyle="--")
            top = max(top, 1.2 * WINOGRAD * peak)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        round_ticks(axis, 0.7 * min(y for _, y in everything), top)
        axis.set_xlabel("FLOP per byte that has to move", fontsize=8.5, color=FAINT)
        title_of(axis, f"GFLOP/s, {dtype}")
    return figure


PICTURES: dict[str, Callable[[Rows], Figure | None]] = {
    "speed": overview,
    "speed_models": partial(overview, brief=True),
    "speed_blocks": blocks,
    "speed_depth": depth,
    "speed_tree": tree,
    "speed_scaling": scaling,
    "speed_roofline": roofline,
}
