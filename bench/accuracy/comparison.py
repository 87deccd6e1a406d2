"""Affine against uniformly scaling: tables, sentences and a picture from rows of `protocol.measure`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from bench.accuracy.protocol import ADDITIVE, AFFINE_LU, BASELINE, FORMS, MODELS, USF
from bench.accuracy.rows import Row
from bench.drawing import FAINT, INK, OURS_COLOUR, PALE, PEER_COLOUR, SECOND, title_of
from bench.markdown import count, prose, table
from usf_kernels.cli.options import METRICS as NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST = ("image_auroc", "pixel_auroc")  # the metrics of the paper's table
COMPARED = (*FIRST, "aupro")
REST = ("aupro", "miou_automatic", "miou_oracle", "false_alarms_per_clean_image", "loss", "z2")
HEADINGS = NAMES | {"loss": "held-out loss", "z2": "mean z²"}
UNIFORM = (ADDITIVE, USF)
COLOURS = {BASELINE: PEER_COLOUR, AFFINE_LU: INK, ADDITIVE: SECOND, USF: OURS_COLOUR}


class Results:
    """The rows of one comparison, limited to those runs of a model that all of its forms have.

    Args:
        rows: rows with the columns model, form, seed, and `column`.
        column: column of the training data, "texture" or "category".
    """

    def __init__(self, rows: Iterable[Row], column: str) -> None:
        self.rows: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
        for row in rows:
            self.rows.setdefault((row["model"], row["form"]), {})[row[column], row["seed"]] = row
        self.models = [
            model
            for model in MODELS
            if all((model, form) in self.rows for form in FORMS) and self.runs(model)
        ]

    def runs(self, model: str) -> list[tuple[str, str]]:
        """Return the (texture, seed) of the runs that exist in all forms, sorted."""
        return sorted(set.intersection(*(set(self.rows[model, form]) for form in FORMS)))

    def values(self, model: str, form: str, metric: str) -> np.ndarray:
        """Return a metric as one number per run."""
        found = self.rows[model, form]
        return np.array([float(found[run][metric]) for run in self.runs(model)])

    def gain(self, model: str, form: str, metric: str, *, over: str = BASELINE) -> np.ndarray:
        """Return how far each run is above that of another form."""
        return self.values(model, form, metric) - self.values(model, over, metric)

    def narrowing(self, model: str, form: str, metric: str) -> float:
        """Return the spread in units of the affine form's; NaN with one seed."""
        before, _ = self.spread(model, BASELINE, metric)
        return self.spread(model, form, metric)[0] / before if before else math.nan

    def spread(self, model: str, form: str, metric: str) -> tuple[float, int]:
        """Return the standard deviation over seeds and its degrees of freedom; NaN and 0 with one seed.

        The variance is estimated within each texture and averaged over textures, so that differences between
        textures do not contribute.
        """
        values = self.values(model, form, metric)
        squares, degrees = 0.0, 0
        trained_on = np.array([name for name, _ in self.runs(model)])
        for name in set(trained_on):
            of_one = values[trained_on == name]
            squares += ((of_one - of_one.mean()) ** 2).sum()
            degrees += len(of_one) - 1
        return (math.sqrt(squares / degrees) if degrees else math.nan), degrees


def section(rows: Sequence[Row], column: str) -> str:
    """Return conclusions and tables as markdown; raise ValueError if no model was run in all forms."""
    results = Results(rows, column)
    if not results.models:
        raise ValueError(f"rows: expected a model in all of the forms {', '.join(FORMS)}, found none")
    runs = {model: results.runs(model) for model in results.models}
    names = list(dict.fromkeys(name for found in runs.values() for name, _ in found))
    seeds = {seed for found in runs.values() for _, seed in found}
    plural = {"texture": "textures", "category": "categories"}[column]
    what = f"{len(names)} {plural if len(names) > 1 else column} ({', '.join(names)})"
    recipes = sorted({row["recipe"] for row in rows})
    intro = (
        f"Mean over {what} and {count(str(len(seeds)), 'seed')}, ± the standard deviation over "
        f"seeds within a {column}. A seed decides initial weights, permutations, the order of the images and "
        f"the noise; the images are the same. All forms have one budget: {'; '.join(recipes)}. In bold: the "
        "best of a model."
    )
    parts = [prose(_answers(results)), prose(intro), _first_table(results), _second_table(results)]
    parts += [_differences(results, column), prose(_fit(results))]
    partial = [model for model in results.models if len(runs[model]) < len(names) * len(seeds)]
    if partial:
        parts.append(prose(f"Not all runs are there yet of {', '.join(partial)}."))
    return "\n\n".join(parts)


def _number(results: Results, model: str, form: str, metric: str) -> str:
    mean = results.values(model, form, metric).mean()
    spread, _ = results.spread(model, form, metric)
    digits = 2 if metric in ("z2", "false_alarms_per_clean_image") else 3
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def _first_table(results: Results) -> str:
    header = ["model", *(f"{HEADINGS[metric]}, {form}" for metric, form in product(FIRST, FORMS))]
    lines = []
    for model in results.models:
        cells = [model]
        for metric in FIRST:
            means = {form: results.values(model, form, metric).mean() for form in FORMS}
            for form, mean in means.items():
                cell = _number(results, model, form, metric)
                cells.append(f"**{cell}**" if mean == max(means.values()) else cell)
        lines.append(cells)
    return table(header, lines)


def _second_table(results: Results) -> str:
    lines = [
        [model, form, *(_number(results, model, form, metric) for metric in REST)]
        for model, form in product(results.models, FORMS)
    ]
    return table(["model", "form", *(HEADINGS[metric] for metric in REST)], lines)


def _differences(results: Results, column: str) -> str:
    others = [form for form in FORMS if form != BASELINE]
    lines = []
    for model, form in product(results.models, others):
        cells = [model, form]
        for metric in COMPARED:
            difference, ratio = results.gain(model, form, metric), results.narrowing(model, form, metric)
            cell = f"{difference.mean():+.3f}, {(difference > 0).sum()} of {len(difference)}"
            cells.append(cell + ("" if math.isnan(ratio) else f"; spread {ratio:.2f}x"))
        lines.append(cells)
    caption = (
        f"Difference from the affine form, in how many runs (one {column}, one seed) the form is better than "
        "it, and the ratio of the spreads:"
    )
    return (
        f"{prose(caption)}\n\n{table(['model', 'form', *(HEADINGS[metric] for metric in COMPARED)], lines)}"
    )


def _answers(results: Results) -> str:
    """Say whether the uniformly scaling forms are no worse than the affine one, and their spread smaller."""
    compared = list(product(results.models, UNIFORM, COMPARED))
    means = {what: results.gain(*what).mean() for what in compared}
    worse = [f"{m} {f}, {HEADINGS[x]} ({mean:+.3f})" for (m, f, x), mean in means.items() if mean < 0]
    text = (
        "Is the mean no worse? The uniformly scaling forms have at least the mean of the affine one in "
        f"{len(compared) - len(worse)} of {len(compared)} comparisons"
    )
    if 0 < len(worse) <= 3:  # the table has them all
        text += f"; not in these: {'; '.join(worse)}"
    ratios = [ratio for what in compared if not math.isnan(ratio := results.narrowing(*what))]
    if not ratios:
        return f"{text}. One seed says nothing on the spread."
    degrees = max(results.spread(model, BASELINE, COMPARED[0])[1] for model in results.models)
    low, high = _chance(degrees)
    return (
        f"{text}. Is the spread smaller? In {sum(ratio < 1 for ratio in ratios)} of {len(ratios)}. With "
        f"{count(str(degrees), 'degree')} of freedom, ratios between {low:.2f} and {high:.2f} are what "
        f"chance alone gives (F test, 5 %); {sum(not low <= ratio <= high for ratio in ratios)} of the "
        "ratios lie outside."
    )


def _fit(results: Results) -> str:
    """Say whether detection follows from the quality of the fit, judged by the held-out losses of forms that
    differ in their couplings alone."""
    said = []
    for maps, form, affine in (("permutations", ADDITIVE, BASELINE), ("LU maps", USF, AFFINE_LU)):
        loss, auroc = (
            np.concatenate([results.gain(model, form, metric, over=affine) for model in results.models])
            for metric in ("loss", "image_auroc")
        )
        lower, both = (loss < 0).sum(), ((loss < 0) & (auroc < 0)).sum()
        said.append(
            f"with {maps} in {lower} of {len(loss)} runs, and in {both} of these its image AUROC is below as "
            "well"
        )
    return (
        "Is it the fit? The held-out loss (negative log-likelihood per dimension, without its constant) of "
        f"additive couplings is below that of affine ones {'; '.join(said)}."
    )


def _chance(degrees: int) -> tuple[float, float]:
    """Return the bounds of 95 % of the ratios of standard deviations of two equally wide distributions."""
    from scipy.stats import f

    low, high = f.ppf([0.025, 0.975], degrees, degrees)
    return math.sqrt(low), math.sqrt(high)


def figure(rows: Sequence[Row], column: str, title: str) -> Figure:
    """Draw a dot for each seed, a line for the mean, and a bar for the standard deviation around it."""
    from matplotlib.figure import Figure

    results = Results(rows, column)
    names = list(dict.fromkeys(name for model in results.models for name, _ in results.runs(model)))
    labels = list(product(results.models, FORMS))
    picture = Figure(
        figsize=(max(8.0, 1.9 + 2.9 * len(names)), 1.5 + len(FIRST) * (0.7 + 0.24 * len(labels))),
        dpi=150,
        facecolor="white",
    )
    height = picture.get_figheight()
    grid = picture.subplots(len(FIRST), len(names), squeeze=False)
    picture.subplots_adjust(
        left=1.6 / picture.get_figwidth(),
        right=0.985,
        top=1 - 1.0 / height,
        bottom=0.4 / height,
        hspace=0.28,
        wspace=0.08,
    )
    picture.text(0.012, 1 - 0.3 / height, title, fontsize=13, weight="bold", color=INK, va="center")
    about = "Higher is better. A dot is one seed; the line is their mean, the bar ± one standard deviation."
    picture.text(0.012, 1 - 0.56 / height, about, fontsize=9, color=FAINT, va="center")
    for (metric, name), axis in zip(product(FIRST, names), grid.flat, strict=True):
        for y, (model, form) in enumerate(labels):
            found = results.rows[model, form]
            values = [float(found[run][metric]) for run in results.runs(model) if run[0] == name]
            if values:
                _strip(axis, y, values, COLOURS[form])
        for y in range(len(FORMS), len(labels), len(FORMS)):
            axis.axhline(y - 0.5, color=PALE, linewidth=0.8)
        first = name == names[0]
        axis.set_yticks(
            range(len(labels)),
            [f"{model}, {form}" for model, form in labels] if first else [""] * len(labels),
        )
        for label, (_, form) in zip(axis.get_yticklabels(), labels, strict=True):
            label.set(color=COLOURS[form], fontsize=8)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.use_sticky_edges = False  # bars would end at the edge
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(FAINT)
        axis.tick_params(axis="x", colors=FAINT, labelsize=7.5, length=0)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", color=PALE, linewidth=0.8)
        axis.set_axisbelow(True)
        title_of(axis, f"{name}, {HEADINGS[metric]}")
    return picture


def _strip(axis: object, y: int, values: Sequence[float], colour: str) -> None:
    mean = float(np.mean(values))
    if len(values) > 1:
        spread = float(np.std(values, ddof=1))
        axis.barh(y, 2 * spread, left=mean - spread, height=0.62, color=colour, alpha=0.25, linewidth=0)
    axis.plot([mean, mean], [y - 0.31, y + 0.31], color=colour, linewidth=1.6)
    axis.plot(values, [y] * len(values), "o", color=colour, markersize=3.6, markeredgewidth=0)
