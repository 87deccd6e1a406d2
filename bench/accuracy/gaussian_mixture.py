"""`python -m bench.accuracy.gaussian_mixture`: does the norm of the latents rank samples as their density?

The papers' toy mixture, two equally likely standard normals around (1, ..., 1) and (-1, ..., -1), where the
density is known. Deep SVDD, an affine and a uniformly scaling flow are trained on it; the result is the rank
correlation of true density and latent norm (distance from the centre) on held-out samples. -1 is perfect.

Every sample of training is a fresh one, so no model can overfit. No continuous map of constant determinant
takes a density with two peaks exactly to one with a single peak, but one may come as near as it likes. The
last step is worth little likelihood: in two dimensions a flow that ranks with |rho| = 0.985 is within 0.001
nats of one that ranks without a fault. So the samples of a batch are spread evenly, or their noise would
hide it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine
from torch.utils.data import Dataset

from bench import machine
from bench.accuracy.page import publish
from bench.accuracy.rows import RESULTS, Job, Row, Rows, complete
from bench.drawing import FAINT, INK, OURS_COLOUR, PEER_COLOUR, SECOND, canvas, legend, title_of
from bench.markdown import count, prose
from bench.markdown import table as markdown_table
from usf_kernels.models import DeepSVDD, NonUSFlow, USFlow
from usf_kernels.training import fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "gaussian_mixture"
PICTURE = f"{NAME}.png"
QUICK_OUTPUT = Path("runs") / NAME
GOAL = 0.99  # |rank correlation| to reach
STEPS = {2: 3000, 8: 600, 32: 600, 128: 600}  # by the number of dimensions; two are the hardest
SEEDS = (0, 1, 2)
QUICK = {"steps": {2: 40, 8: 40}, "seeds": (0,)}
MODELS = ("DeepSVDD", "NonUSFlow", "USFlow")
COLOURS = dict(zip(MODELS, (PEER_COLOUR, SECOND, OURS_COLOUR), strict=True))
BATCH, TEST, SHOWN = 1024, 4000, 700
EPOCHS = 10  # held-out samples are evaluated after each
MACHINE = ("device", "threads", "versions", "commit", "date")


def mixture(count: int, dimensions: int) -> Tensor:
    """Draw samples (count, dimensions), from torch's global generator."""
    centres = 2.0 * torch.randint(0, 2, (count, 1)) - 1
    return centres + torch.randn(count, dimensions)


def even_mixture(count: int, dimensions: int) -> Tensor:
    """Draw evenly spread samples, from Sobol points that are scrambled anew at every call."""
    seed = int(torch.randint(0, 2**31, ()))
    points = SobolEngine(dimensions + 1, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    tiny = torch.finfo(torch.float32).tiny
    normals = torch.special.ndtri(points[:, 1:].clamp(tiny, 1 - 1e-16))
    return ((points[:, :1] < 0.5) * 2.0 - 1 + normals).float()


def log_density(x: Tensor) -> Tensor:
    """Return the log density of the mixture, (count,), in float64."""
    distances = torch.stack([(x.double() - centre).square().sum(1) for centre in (-1, 1)])
    constant = math.log(2) + x.shape[1] / 2 * math.log(2 * math.pi)
    return torch.logsumexp(-0.5 * distances, 0) - constant


class Batches(Dataset[Tensor]):
    """`count` batches of fresh samples; `fit` seeds the generator for each of them."""

    def __init__(self, count: int, dimensions: int) -> None:
        self.count, self.dimensions = count, dimensions

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return even_mixture(BATCH, self.dimensions)


class InBatches(nn.Module):
    """A model whose samples come in batches already: (1, BATCH, D)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, batches: Tensor) -> Tensor:
        """Return the model's loss."""
        return self.model.loss(batches.flatten(0, 1))


def create(name: str, dimensions: int) -> tuple[nn.Module, float]:
    """Make an untrained model; also return the learning rate for it."""
    if name == "DeepSVDD":
        return DeepSVDD(dimensions, latent=dimensions, hidden=64, layers=2), 1e-3
    kind = {"USFlow": USFlow, "NonUSFlow": NonUSFlow}[name]
    flow = kind(dimensions, blocks=16, linear="householder", hidden=64, layers=2, memory="standard")
    return flow, 1e-2 * min(1.0, 8 / dimensions)


def measure(folder: Path, job: Job) -> list[dict[str, object]]:
    """Train one model and rank held-out samples by it; in two dimensions, keep some latents to draw."""
    from scipy.stats import kendalltau, spearmanr

    dimensions, steps, seed = (int(job[key]) for key in ("dimensions", "steps", "seed"))
    started = time.perf_counter()
    torch.manual_seed(seed)
    model, lr = create(job["model"], dimensions)
    model.initialize(mixture(4000, dimensions))
    data, held_out = Batches(steps // EPOCHS, dimensions), Batches(8, dimensions)
    fit(InBatches(model), data, held_out, max_epochs=EPOCHS, lr=lr, batch_size=1, seed=seed, progress=False)
    torch.manual_seed(10_000 + seed)
    x = mixture(TEST, dimensions)
    truth = log_density(x)
    with torch.no_grad():
        z = model(x) - model.centre if isinstance(model, DeepSVDD) else model(x)[0]
        norm = z.double().norm(dim=1)
    result: dict[str, object] = {
        "spearman": float(spearmanr(truth, norm).statistic),
        "kendall": float(kendalltau(truth, norm).statistic),
        "likelihood_spearman": "",
        "divergence": "",
        "seconds": round(time.perf_counter() - started, 1),
        **machine.environment(torch.device("cpu")),
    }
    if not isinstance(model, DeepSVDD):
        log_likelihood = model.double().log_prob(x.double()).detach()
        result["likelihood_spearman"] = float(spearmanr(log_likelihood, norm).statistic)
        result["divergence"] = float((truth - log_likelihood).mean())
    if dimensions == 2 and seed == 0:
        shown = zip(z[:SHOWN].tolist(), truth[:SHOWN].tolist(), strict=True)
        points = [{"first": a, "second": b, "log_density": p} for (a, b), p in shown]
        latents_in(folder).put({"model": job["model"], "steps": job["steps"]}, points)
    return [result]


def rows_in(folder: Path) -> Rows:
    """Return the file with one row per run: rank correlations of the norm with the true density and with the
    model's likelihood, and the Kullback-Leibler divergence of the model from the truth in nats."""
    values = ("spearman", "kendall", "likelihood_spearman", "divergence", "seconds", *MACHINE)
    return Rows(folder / f"{NAME}.csv", ("dimensions", "model", "seed"), ("steps",), values)


def latents_in(folder: Path) -> Rows:
    """Return the file of latents of held-out samples in two dimensions, one row per sample."""
    return Rows(folder / f"{NAME}_latents.csv", ("model",), ("steps",), ("first", "second", "log_density"))


def jobs(steps: Mapping[int, int], seeds: Sequence[int]) -> list[dict[str, str]]:
    """Return all jobs, seed by seed, so that a run cut short has some results of everything."""
    return [
        {"dimensions": str(d), "model": model, "seed": str(seed), "steps": str(count)}
        for seed in seeds
        for d, count in steps.items()
        for model in MODELS
    ]


def means(rows: Sequence[Row], column: str) -> dict[tuple[str, int], list[float]]:
    """Group the values of a column over the seeds, per model and number of dimensions."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row[column]:
            groups.setdefault((row["model"], int(row["dimensions"])), []).append(float(row[column]))
    return groups


def text(folder: Path) -> str:
    """Return the page's section, from the rows in a folder."""
    rows = rows_in(folder).read()
    if not rows:
        return f"No rows yet: `python -m bench.accuracy.{NAME}` measures them, in minutes."
    alt = "Rank correlations over the dimensions, and latents in two dimensions"
    return f"![{alt}]({PICTURE})\n\n{section(rows)}"


def section(rows: Sequence[Row]) -> str:
    """Return a table of means over the seeds, and conclusions, as markdown."""
    spearman, kendall = means(rows, "spearman"), means(rows, "kendall")
    sizes = sorted({d for _, d in spearman})
    lines = [
        [
            model,
            *(
                f"{_mean(spearman[model, d]):.3f} / {_mean(kendall[model, d]):.3f}"
                if (model, d) in spearman
                else ""
                for d in sizes
            ),
        ]
        for model in MODELS
    ]
    steps = {int(row["dimensions"]): row["steps"] for row in rows}
    budgets = ", ".join(dict.fromkeys(steps[d] for d in sizes))
    caption = (
        "Spearman / Kendall of true density and latent norm, means over "
        f"{count(str(len({row['seed'] for row in rows})), 'seed')} of {budgets} steps:"
    )
    return "\n\n".join(
        [prose(caption), markdown_table(["", *(f"d = {d}" for d in sizes)], lines), prose(_says(rows))]
    )


def _says(rows: Sequence[Row]) -> str:
    spearman, own = means(rows, "spearman"), means(rows, "likelihood_spearman")
    mean = {key: abs(_mean(values)) for key, values in spearman.items()}
    sizes = sorted(d for model, d in mean if model == "USFlow")
    reached = ", ".join(f"{d}" for d in sizes if mean["USFlow", d] >= GOAL) or "no size"
    first = sum(mean["USFlow", d] == max(mean.get((model, d), 0.0) for model in MODELS) for d in sizes)
    worst = {
        model: min((abs(value) for (name, _), values in own.items() if name == model for value in values))
        for model in MODELS
        if any(name == model for name, _ in own)
    }
    others = "; ".join(f"{model}: {value:.3f}" for model, value in worst.items())
    return (
        f"USFlow ranks best at {first} of {len(sizes)} sizes; its |rho| is at least {GOAL} at d = {reached}. "
        "What is missing is how well a flow fits: by its own likelihood the norm must rank samples without a "
        f"fault in a uniformly scaling flow, and need not in others (worst |rho| of all runs, {others})."
    )


def draw(rows: Sequence[Row], latents: Sequence[Row]) -> Figure:
    """Draw rank correlations over the dimensions, and latents in two dimensions coloured by true density."""
    left, width = 4.35, 1.85
    panels = [(0.75, 2.9), *[(left + i * (width + 0.15), width) for i in range(len(MODELS))]]
    figure, axes = canvas(
        3.55,
        panels,
        "Does the latent norm rank samples as their density does?",
        "A mixture of two normals; rank correlation on held-out samples, a dot per seed; latents for d = 2",
    )
    legend(figure, COLOURS)
    groups = means(rows, "spearman")
    sizes = sorted({d for _, d in groups})
    _correlations(axes[0], groups, sizes)
    for axis, model in zip(axes[1:], MODELS, strict=True):
        _latents(axis, [row for row in latents if row["model"] == model])
        title_of(axis, model)
    return figure


def _correlations(axis: Axes, groups: Mapping[tuple[str, int], list[float]], sizes: Sequence[int]) -> None:
    title_of(axis, "|Spearman's rho| over the dimensions")
    for model in MODELS:
        found = [d for d in sizes if (model, d) in groups]
        miss = {d: [1 - abs(value) for value in groups[model, d]] for d in found}
        axis.plot(found, [_mean(miss[d]) for d in found], "-", color=COLOURS[model], linewidth=1.8)
        for d in found:
            axis.plot([d] * len(miss[d]), miss[d], "o", color=COLOURS[model], markersize=4, mew=0, alpha=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{d}" for d in sizes])
    axis.set_yscale("log")
    axis.set_ylim(1.2, 5e-4)
    ticks = (0, 0.5, 0.9, 0.99, 0.999)
    axis.set_yticks([1 - tick for tick in ticks], [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.axhline(1 - GOAL, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))


def _latents(axis: Axes, rows: Sequence[Row]) -> None:
    points = [[float(row[name]) for name in ("first", "second", "log_density")] for row in rows]
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines["bottom"].set_visible(False)
    if points:
        x, y, density = zip(*points, strict=True)
        axis.scatter(x, y, c=density, s=7, cmap="viridis", linewidths=0)
        axis.plot(0, 0, "+", color=FAINT, markersize=9)
    axis.set_aspect("equal", adjustable="datalim")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show(folder: Path) -> None:
    """Write and print the section and the figure from the rows in a folder."""
    rows = rows_in(folder)
    publish(NAME, folder, text(folder), draw(rows.read(), latents_in(folder).read()), PICTURE)
    print(f"{text(folder)}\n\nrows in {rows.path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.accuracy.{NAME}", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, two sizes, one seed: under a minute")
    parser.add_argument(
        "--output", type=Path, help="folder of rows and picture (default: where they are kept)"
    )
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = QUICK if options.quick else {"steps": STEPS, "seeds": SEEDS}
    folder = options.output or (QUICK_OUTPUT if options.quick else RESULTS)
    rows = rows_in(folder)
    complete(rows, jobs(**settings), partial(measure, folder), title=NAME)
    show(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
