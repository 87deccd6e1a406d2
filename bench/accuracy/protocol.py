"""Common protocol of the comparisons: forms, one training budget, features computed once, metrics."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bench import machine
from bench.accuracy.rows import RESULTS, Job, Rows, complete
from usf_kernels import metrics
from usf_kernels.data import TEXTURES, Sample, TextureDataset
from usf_kernels.demo import Recipe, Split, extract
from usf_kernels.models import CFlow, FastFlow, UFlow, create_backbone
from usf_kernels.models.feature_flow import FeatureFlow
from usf_kernels.training import CachedFeatures, fit

QUICK_OUTPUT = Path("runs") / "accuracy"
BASELINE, AFFINE_LU, ADDITIVE, USF = "affine", "affine + LU", "additive", "additive + LU"
FORMS = {
    BASELINE: {"coupling": "affine", "linear": "permutation"},
    AFFINE_LU: {"coupling": "affine", "linear": "lu"},
    ADDITIVE: {"coupling": "additive", "linear": "permutation"},
    USF: {"coupling": "additive", "linear": "lu"},
}
# The papers' depths, but the demonstration's for FastFlow. CFlow looks at a quarter of the positions in each
# step, so that a step costs about as much as the others'.
MODELS: dict[str, tuple[type[FeatureFlow], dict[str, Any]]] = {
    "FastFlow": (FastFlow, {"steps": 4, "hidden_ratio": 2.0}),
    "CFlow": (CFlow, {"steps": 8, "position_share": 0.25}),
    "UFlow": (UFlow, {"steps": 4}),
}
METRICS = (
    *("image_auroc", "pixel_auroc", "aupro", "miou_automatic", "miou_oracle"),
    "false_alarms_per_clean_image",
)
MACHINE = ("device", "threads", "versions", "commit", "date")
VALUES = (*METRICS, "loss", "z2", "seconds", *MACHINE)


class Data(NamedTuple):
    """The crops of a texture, or the images of a category, with their features."""

    train: list[Tensor]  # features
    validation: list[Tensor]
    test: Split


@dataclass(frozen=True)
class Prepared:
    """Data computed once and shared by all runs and worker processes, as files that they map into memory.

    Attributes:
        folder: folder of the files.
        recipe: recipe that they were made with.
    """

    folder: Path
    recipe: Recipe

    def data(self, name: str) -> Data:
        """Return the data prepared under this name."""
        return _load(self.folder / f"{name}.pt")


@lru_cache(maxsize=1)
def _load(path: Path) -> Data:
    train, validation, test = torch.load(path, mmap=True, weights_only=True)
    return Data(train, validation, Split(*test))


def textures(name: str, recipe: Recipe) -> tuple[Dataset[Sample], ...]:
    """Return training, held-out and test crops of a texture, the same for all seeds of the training."""
    counts = {"train": recipe.train, "validation": recipe.validation, "test": recipe.test}
    return tuple(
        TextureDataset(name, split, count=count, crop=recipe.side, size=recipe.side)
        for split, count in counts.items()
    )


@contextmanager
def prepared(
    names: list[str],
    recipe: Recipe,
    datasets: Callable[[str, Recipe], tuple[Dataset[Sample], ...]] = textures,
) -> Iterator[Prepared]:
    """Compute the features of each named texture or category; they exist for the duration of the block.

    Args:
        names: names that `datasets` knows.
        recipe: determines stages and sizes.
        datasets: returns the training, held-out and test sets of a name.
    """
    with tempfile.TemporaryDirectory(prefix="usf-accuracy-") as folder:
        backbone = create_backbone(out_indices=recipe.stages) if names else None
        for name in names:
            print(f"features of {name}", flush=True)
            train, validation, test = (extract(backbone, data) for data in datasets(name, recipe))
            torch.save((train.features, validation.features, tuple(test)), Path(folder) / f"{name}.pt")
        yield Prepared(Path(folder), recipe)


def train(model: str, form: str, data: Data, recipe: Recipe, *, seed: int) -> FeatureFlow:
    """Return a trained and calibrated model, in evaluation mode.

    Args:
        model: one of `MODELS`.
        form: one of `FORMS`.
        data: data; the test part is not used.
        recipe: the budget, the same for all models and forms.
        seed: seed of the initial weights, the permutations, the order of the images and the noise.
    """
    kind, options = MODELS[model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = kind(
            create_backbone(
                out_indices=recipe.stages, weights=None
            ),  # only its shapes matter: the features are computed already
            **FORMS[form],
            **options,
            noise=recipe.noise,
            memory="standard",
        ).initialize(data.train)
    fit(
        flow,
        CachedFeatures(data.train),
        CachedFeatures(data.validation),
        max_epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        seed=seed,
        accelerator="cpu",
        progress=False,
    )
    flow.calibrate(data.validation)
    return flow


def measure(job: Mapping[str, str], prepared: Prepared, column: str) -> list[dict[str, object]]:
    """Train and test the model that a row names, with its form and seed, on the data named in `column`.

    Returns:
        One row of `VALUES`; on held-out images, `loss` is the negative log-likelihood per dimension without
        its constant, and `z2` the mean of z^2, averaged over the scales; `seconds` is the time of training.
    """
    data = prepared.data(job[column])
    started = time.perf_counter()
    flow = train(job["model"], job["form"], data, prepared.recipe, seed=int(job["seed"]))
    seconds = time.perf_counter() - started
    z2 = flow.mean_square(data.validation)
    with torch.no_grad():
        loss = flow.loss(data.validation).item()
    found = metrics.evaluate(flow.predict(data.test.images, data.test.features), data.test.targets)
    shared = machine.environment(torch.device("cpu"))
    values = {name: found[name] for name in METRICS}
    return [values | {"loss": loss, "z2": sum(z2) / len(z2), "seconds": seconds} | shared]


def complete_with_features(
    rows: Rows,
    jobs: Sequence[Job],
    measure: Callable[..., Sequence[Mapping[str, object]]],
    recipe: Recipe,
    *,
    title: str,
    workers: int,
    column: str = "texture",
    datasets: Callable[[str, Recipe], tuple[Dataset[Sample], ...]] = textures,
) -> None:
    """Run `bench.accuracy.rows.complete` for `measure(job, prepared=...)`, with features for unfinished jobs.

    Args:
        rows, jobs, title, workers: see `complete`.
        measure: takes a job and a `Prepared`; a function of a module, to be pickled, with several workers.
        recipe, datasets: see `prepared`.
        column: column of the jobs with names that `datasets` knows.
    """
    names = list(dict.fromkeys(job[column] for job in jobs if not rows.finished(job)))
    with prepared(names, recipe, datasets) as data:
        complete(rows, jobs, partial(measure, prepared=data), title=title, workers=workers)


def chosen(options: argparse.Namespace, *, quick: Recipe, full: Recipe) -> tuple[Sequence[str], Recipe, Path]:
    """Return the textures, recipe and folder of rows for `--textures`, `--quick` and `--output`."""
    if options.quick:
        return options.textures or TEXTURES[:1], quick, options.output or QUICK_OUTPUT
    return options.textures or TEXTURES, full, options.output or RESULTS


def describe(recipe: Recipe, images: str | None = None) -> str:
    """Describe what determines a result besides the columns that name a run.

    Args:
        recipe: the budget.
        images: description of the images, if the recipe does not give their numbers.
    """
    images = images or f"{recipe.train}+{recipe.validation}+{recipe.test} images"
    return (
        f"{images} of {recipe.side}, {recipe.epochs} epochs of batches of {recipe.batch_size}, "
        f"lr {recipe.lr:g}, noise {recipe.noise:g}"
    )
