"""`python -m bench.accuracy.nfa`: false alarms and masks against the threshold on the number of false alarms.

U-Flow's figure 7 (arXiv:2211.12353) for the embedded textures, in five forms of the test: one count of tests
for regions of all sizes or a count for each size, and squared norms taken as those of white latents, with the
distribution fitted to positions of held-out images, or calibrated (fitted to their regions, too).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bench import machine
from bench.accuracy.page import publish
from bench.accuracy.protocol import (
    MACHINE,
    USF,
    Prepared,
    chosen,
    complete_with_features,
    describe,
    train,
)
from bench.accuracy.rows import Row, Rows
from bench.drawing import FAINT, INK, OURS_COLOUR, PALE, PEER_COLOUR, SECOND, title_of
from bench.markdown import prose, table
from usf_kernels import calibrate, log_nfa, metrics, regions
from usf_kernels.calibration import TAIL, TESTS
from usf_kernels.cli.options import positive
from usf_kernels.data import TEXTURES
from usf_kernels.demo import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "nfa"
PICTURE = "nfa_threshold.png"
FULL = Recipe(train=480, validation=64, test=120, epochs=6)
QUICK = replace(FULL, train=96, validation=32, test=40, epochs=2)
FLOWS = ("FastFlow", "UFlow")
THRESHOLDS = (
    *(-100, -50, -30, -20, -10, -7, -5, -4, -3, -2, -1, 0),
    *(1, 2, 3, 5, 7, 10, 20, 50, 70, 90, 110, 130, 150),
)
WHITE, FITTED, CALIBRATED = "white", "fitted", "calibrated"
TESTED = {  # tests, null: colour in the figure
    ("total", WHITE): PEER_COLOUR,
    ("total", CALIBRATED): INK,
    ("per_size", WHITE): OURS_COLOUR,
    ("per_size", FITTED): "#7a5cc2",
    ("per_size", CALIBRATED): SECOND,
}
POINT = ("tests", "null", "log_epsilon")
VALUES = (*POINT, "false_alarms", "miou", *MACHINE)


def rows_in(folder: Path) -> Rows:
    """Return the file of rows in a folder."""
    return Rows(folder / f"{NAME}.csv", ("texture", "model"), ("recipe",), VALUES)


def measure(job: Mapping[str, str], prepared: Prepared) -> list[dict[str, object]]:
    """Train the model that a row names, and go through all forms of the test and all thresholds."""
    data = prepared.data(job["texture"])
    flow = train(job["model"], USF, data, prepared.recipe, seed=0)
    with torch.no_grad():
        latents, _ = flow.latents(data.test.features)
    size, targets = tuple(data.test.images.shape[-2:]), data.test.targets
    clean = ~targets.flatten(1).any(1)
    shared = machine.environment(torch.device("cpu"))
    with torch.no_grad():
        held_out, _ = flow.latents(data.validation)
    nulls = {WHITE: None, FITTED: calibrate(held_out), CALIBRATED: flow.null}
    found = []
    for tests, null in TESTED:
        options = {"tests": tests, "null": nulls[null], "tail": TAIL}
        maps = log_nfa(latents, size, upsample="nearest", **options)
        every = regions([z[clean] for z in latents], log_epsilon=max(THRESHOLDS), **options)
        values = np.array([region.log_nfa for image in every for region in image])
        for threshold in THRESHOLDS:
            found.append(
                {
                    "tests": tests,
                    "null": null,
                    "log_epsilon": threshold,
                    "false_alarms": float((values <= threshold).sum() / clean.sum().item()),
                    "miou": metrics.mean_iou(maps <= threshold, targets),
                    **shared,
                }
            )
    return found


Point = tuple[str, str, float]  # tests, null, log_epsilon


def averages(rows: Sequence[Row]) -> dict[Point, tuple[float, float, float]]:
    """Average mIoU and false alarms per clean image over textures and models; also return the most of one."""
    grouped: dict[Point, list[tuple[float, float]]] = {}
    for row in rows:
        point = row["tests"], row["null"], float(row["log_epsilon"])
        grouped.setdefault(point, []).append((float(row["miou"]), float(row["false_alarms"])))
    return {
        point: (
            float(np.mean([miou for miou, _ in found])),
            float(np.mean([alarms for _, alarms in found])),
            max(alarms for _, alarms in found),
        )
        for point, found in grouped.items()
    }


def recommended(rows: Sequence[Row]) -> Point | None:
    """Return the point of best mean IoU that keeps its promise for every texture and model, None without any.

    The promise of a threshold e is at most 10^e false alarms per clean image. Thresholds above 0, whose
    promises are of no use, are left out.
    """
    kept = {
        point: miou
        for point, (miou, _, most) in averages(rows).items()
        if point[2] <= 0 and most <= 10 ** point[2]
    }
    return max(kept, key=lambda point: (kept[point], point[2])) if kept else None


def section(rows: Sequence[Row]) -> str:
    """Return the table at log NFA <= 0 and the recommendation, as markdown."""
    mean = averages(rows)
    lines = []
    for tests, null in TESTED:
        miou, alarms, most = mean[tests, null, 0.0]
        best = max(THRESHOLDS, key=lambda value: mean[tests, null, float(value)][0])
        best_miou, best_alarms, _ = mean[tests, null, float(best)]
        at_best = f"{best_miou:.3f} at {best}, {best_alarms:.2f}"
        lines.append([f"`{tests}`", null, f"{miou:.3f}", f"{alarms:.2f}", f"{most:.2f}", at_best])
    header = [
        *("tests", "null", "mIoU", "false alarms per clean image", "the most of a texture and model"),
        "best mIoU of all thresholds, and its false alarms",
    ]
    textures = ", ".join(dict.fromkeys(row["texture"] for row in rows))
    models = " and ".join(dict.fromkeys(row["model"] for row in rows))
    intro = (
        f"{models}, {USF}, on {textures} ({'; '.join(sorted({row['recipe'] for row in rows}))}; one seed). "
        "The table is for log10 NFA <= 0, which promises at most one false alarm per clean image; mIoU is "
        "the mean over images with a defect."
    )
    return "\n\n".join([prose(intro), table(header, lines), prose(_advice(rows))])


def _advice(rows: Sequence[Row]) -> str:
    mean, choice = averages(rows), recommended(rows)
    if choice is None:
        return "No form of the test keeps its promise for every texture and model at any of these thresholds."
    tests, null, threshold = choice
    miou, alarms, most = mean[choice]
    text = (
        f'Recommended from these rows: `tests="{tests}"`, {null}, log_epsilon = {threshold:g}. Among the '
        "forms and thresholds up to 0 that keep their promise (at most 10^log_epsilon false alarms per clean "
        f"image) for every texture and model, it has the best mIoU: {miou:.3f}, with {alarms:.2f} false "
        f"alarms per clean image and {most:.2f} where there are most. "
    )
    default = (TESTS, CALIBRATED, 0.0)
    if choice == default:
        return text + "It is the default of the models' `predict` after `calibrate`."
    default_miou, default_alarms, default_most = mean[default]
    return text + (
        f'The default of `predict` after `calibrate`, `tests="{TESTS}"`, {CALIBRATED}, at 0, has an mIoU of '
        f"{default_miou:.3f}, {default_alarms:.2f} false alarms and {default_most:.2f} where there are most."
    )


def figure(rows: Sequence[Row]) -> Figure:
    """Draw false alarms above, mIoU below, over the threshold; a column per model, a line per form."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    picture = Figure(figsize=(10.5, 6.4), dpi=150, facecolor="white")
    grid = picture.subplots(2, len(models), sharex=True, sharey="row", squeeze=False)
    picture.subplots_adjust(left=0.07, right=0.985, top=0.83, bottom=0.09, hspace=0.2, wspace=0.06)
    title = "The threshold on the number of false alarms"
    picture.text(0.012, 0.953, title, fontsize=14, weight="bold", color=INK, va="center")
    about = (
        "Means over textures. Dashed: the false alarms that the threshold promises. Dotted: its default, 0."
    )
    picture.text(0.012, 0.913, about, fontsize=9, color=FAINT, va="center")
    for column, model in enumerate(models):
        mean = averages([row for row in rows if row["model"] == model])
        above, below = grid[:, column]
        for (tests, null), colour in TESTED.items():
            points = [mean[tests, null, float(threshold)] for threshold in THRESHOLDS]
            style = {"color": colour, "linewidth": 1.6, "marker": "o", "markersize": 2.5}
            label = f"{tests}, {null}"
            above.plot(THRESHOLDS, [alarms for _, alarms, _ in points], label=label, **style)
            below.plot(THRESHOLDS, [miou for miou, _, _ in points], label=label, **style)
        low = [value for value in THRESHOLDS if value <= 3]
        above.plot(low, [10.0**value for value in low], "--", color=FAINT, linewidth=1)
        above.set_yscale("symlog", linthresh=0.01)
        above.set_ylim(0, 300)
        above.set_yticks([0, 0.01, 0.1, 1, 10, 100], ["0", "0.01", "0.1", "1", "10", "100"])
        below.set_ylim(bottom=0)
        below.set_xlabel("threshold: log10 of the number of false alarms", fontsize=8, color=FAINT)
        title_of(above, f"{model}: false alarms per clean image")
        title_of(below, f"{model}: mIoU")
        for axis in (above, below):
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xticks([-100, -10, -1, 0, 1, 10, 100], ["-100", "-10", "-1", "0", "1", "10", "100"])
            axis.minorticks_off()
            axis.axvline(0, color=FAINT, linewidth=0.9, linestyle=":")
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.spines["bottom"].set_color(FAINT)
            axis.tick_params(which="both", colors=FAINT, labelsize=8, length=0)
            axis.grid(color=PALE, linewidth=0.8)
            axis.set_axisbelow(True)
    picture.legend(
        *grid[0, 0].get_legend_handles_labels(),
        ncols=3,
        loc="upper right",
        bbox_to_anchor=(0.985, 0.99),
        fontsize=8.5,
        frameon=False,
        labelcolor="linecolor",
    )
    return picture


def text(folder: Path) -> str:
    """Return the page's section, from the rows in a folder."""
    rows = rows_in(folder).read()
    if not rows:
        return f"No rows yet: `python -m bench.accuracy.{NAME}` measures them, in minutes."
    alt = "False alarms per clean image and mIoU against the threshold, for five forms of the test"
    return f"![{alt}]({PICTURE})\n\n{section(rows)}"


def show(folder: Path) -> None:
    """Write and print the section and the figure from the rows in a folder."""
    rows = rows_in(folder)
    publish(NAME, folder, text(folder), figure(rows.read()), PICTURE)
    print(f"{text(folder)}\n\nrows in {rows.path}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that this study shares with the one on precision."""
    parser.add_argument("--textures", nargs="+", choices=TEXTURES, metavar="TEXTURE", help="default: all")
    parser.add_argument("--quick", action="store_true", help="one texture, few images and epochs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the rows, the text and the figure")
    parser.add_argument("--workers", type=positive, default=2, help="processes (default: %(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.accuracy.{NAME}", description=(__doc__ or "").partition(":")[2]
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    textures, recipe, folder = chosen(options, quick=QUICK, full=FULL)
    rows = rows_in(folder)
    work = [
        {"texture": texture, "model": model, "recipe": describe(recipe)}
        for texture, model in product(textures, FLOWS)
    ]
    complete_with_features(rows, work, measure, recipe, title=NAME, workers=options.workers)
    show(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
