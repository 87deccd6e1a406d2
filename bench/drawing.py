"""Helpers of the pictures: a figure with a headline, names beside curves, strips of ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench import table
from bench.markdown import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PALE = "#20262e", "#7b8794", "#e7ebef"
OURS_COLOUR, SECOND, PEER_COLOUR = "#f0541e", "#00a99d", "#9aa5b1"
WIDTH, LEFT, TOP, BOTTOM = 10.5, 0.3, 0.95, 0.55  # inches
STRIP = 0.4  # inches


def canvas(
    height: float, panels: Sequence[tuple[float, float]], title: str, subtitle: str
) -> tuple[Figure, list[Axes]]:
    """Make a figure with a headline and panels at (left edge, width), in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
    figure.text(LEFT / WIDTH, 1 - 0.33 / height, title, fontsize=14, weight="bold", color=INK, va="center")
    below = figure.text(LEFT / WIDTH, 1 - 0.58 / height, subtitle, fontsize=9, color=FAINT, va="center")
    room = (WIDTH - 2 * LEFT) * figure.dpi  # names of processors may be long
    below.set_fontsize(9 * min(1, room / below.get_window_extent().width))
    axes = [
        figure.add_axes((left / WIDTH, BOTTOM / height, span / WIDTH, 1 - (TOP + BOTTOM) / height))
        for left, span in panels
    ]
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(FAINT)
        axis.tick_params(which="both", colors=FAINT, labelsize=8, length=0)
        axis.grid(axis="y", color=PALE, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def title_of(axis: Axes, text: str) -> None:
    """Put a title over a panel."""
    axis.set_title(text, fontsize=9.5, color=INK, loc="left", pad=6)


def legend(figure: Figure, entries: Mapping[str, str]) -> None:
    """Explain the colours, at the right of the headline."""
    width, height = figure.get_size_inches()
    x = 1 - 0.2 / width
    for name, colour in reversed(entries.items()):
        figure.text(x, 1 - 0.33 / height, f"● {name}", fontsize=8.5, color=colour, ha="right", va="center")
        x -= (0.3 + 0.072 * len(name)) / width


def round_ticks(axis: Axes, low: float, high: float) -> None:
    """Make the y axis logarithmic, with ticks at 1, 2 and 5 times powers of ten."""
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    ticks = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axis.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.minorticks_off()


def names_at_ends(axis: Axes, ends: Sequence[tuple[float, str, str, bool]]) -> None:
    """Write names of curves at the right of a panel, at the height of their last points (y, name, colour,
    bold), moved apart where they would overlap."""
    points = 72 / axis.figure.dpi
    placed: list[float] = []
    for y, name, colour, bold in sorted(ends):
        height = axis.transData.transform((1, y))[1] * points
        placed.append(max(height, placed[-1] + 11) if placed else height)
        axis.annotate(
            name,
            (1, y),
            xycoords=axis.get_yaxis_transform(),
            xytext=(5, placed[-1] - height),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            weight="bold" if bold else "normal",
            va="center",
            annotation_clip=False,
        )


def strips(axis: Axes, groups: Sequence[Sequence[tuple[float, str]]], *, base: int = 2) -> None:
    """Draw one strip per group of (ratio, colour): a dot for each, and a bar for the geometric mean."""
    for y, group in enumerate(groups):
        if not group:
            continue
        mean = table.geometric_mean(ratio for ratio, _ in group)
        axis.barh(y, mean - 1, left=1, height=0.62, color=PALE, zorder=1)
        for i, (ratio, colour) in enumerate(group):
            spread = 0.36 * (i / max(1, len(group) - 1) - 0.5)
            axis.plot(ratio, y + spread, "o", color=colour, markersize=3.2, alpha=0.75, zorder=3, mew=0)
        place = axis.get_yaxis_transform()
        text = f"  {mean:.0f}x" if mean >= 9.95 else f"  {mean:.1f}x"
        axis.text(1, y, text, fontsize=9.5, weight="bold", color=INK, va="center", transform=place)
    axis.axvline(1, color=INK, linewidth=0.9, zorder=2)
    axis.set_xscale("log", base=base)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.7), max(high, 2.8))
    low, high = axis.get_xlim()
    ticks = [float(base) ** e for e in range(-6, 12) if low <= float(base) ** e <= high]
    axis.set_xticks(ticks, [f"{tick:,g}x" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(len(groups) - 0.45, -0.55)
    axis.set_yticks(range(len(groups)), [""] * len(groups))
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color=PALE, linewidth=0.8)


def name_strips(axis: Axes, names: Sequence[str], colours: Sequence[str]) -> None:
    """Write names at the left of the strips."""
    axis.set_yticks(range(len(names)), names)
    for label, colour in zip(axis.get_yticklabels(), colours, strict=True):
        label.set(color=colour, fontsize=9)


def machine(rows: Sequence[table.Row]) -> str:
    """Describe the machine on which the rows were measured."""
    row = rows[0]
    torch = [v.replace("=", " ") for v in row["versions"].split() if v.startswith("torch=")]
    return ", ".join([row["device"], count(row["threads"], "thread"), *torch])
