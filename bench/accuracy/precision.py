"""`python -m bench.accuracy.precision`: what a whole model in bfloat16 finds, beside float32.

Backbone, features, flow and latents are in bfloat16 (`model.fuse(torch.bfloat16)`); images are not, and
squared norms are sums in float32. Training and the null model of the threshold are those of float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch

from bench import machine
from bench.accuracy.nfa import FULL, QUICK, add_arguments
from bench.accuracy.page import publish
from bench.accuracy.protocol import (
    BASELINE,
    MACHINE,
    METRICS,
    MODELS,
    USF,
    Prepared,
    chosen,
    complete_with_features,
    describe,
    train,
)
from bench.accuracy.rows import Row, Rows
from bench.markdown import prose, table
from usf_kernels import metrics
from usf_kernels.models import create_backbone

NAME = "precision"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHOWN = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "miou_automatic": "mIoU",
}
ALARMS = "false_alarms_per_clean_image"
BATCH = 20  # images at a time


def rows_in(folder: Path) -> Rows:
    """Return the file of rows in a folder."""
    return Rows(
        folder / f"{NAME}.csv", ("texture", "model", "form"), ("recipe",), ("precision", *METRICS, *MACHINE)
    )


def measure(job: Mapping[str, str], prepared: Prepared) -> list[dict[str, object]]:
    """Train the model that a row names, and test its inference form in each precision."""
    data, recipe = prepared.data(job["texture"]), prepared.recipe
    model = train(job["model"], job["form"], data, recipe, seed=0)
    model.backbone = create_backbone(out_indices=recipe.stages)  # with real weights, to start from images
    shared = machine.environment(torch.device("cpu"))
    found = []
    for name, dtype in DTYPES.items():
        fused = model.fuse(dtype)
        predictions = [fused.predict(images) for images in data.test.images.split(BATCH)]
        values = metrics.evaluate(predictions, list(data.test.targets.split(BATCH)))
        found.append({"precision": name, **{key: values[key] for key in METRICS}, **shared})
    return found


def section(rows: Sequence[Row]) -> str:
    """Return a table of both precisions, and the largest change, as markdown."""
    lines = []
    for model, form in product(MODELS, (BASELINE, USF)):
        some = [row for row in rows if (row["model"], row["form"]) == (model, form)]
        if not some:
            continue
        pairs = {key: [_mean(some, name, key) for name in DTYPES] for key in (*SHOWN, ALARMS)}
        cells = [f"{before:.3f} / {after:.3f}" for before, after in (pairs[key] for key in SHOWN)]
        lines.append([model, form, *cells, "{:.2f} / {:.2f}".format(*pairs[ALARMS])])
    worst = {key: _largest_change(rows, key) for key in ("image_auroc", "pixel_auroc")}
    textures = ", ".join(dict.fromkeys(row["texture"] for row in rows))
    intro = (
        f"Means over {textures} ({'; '.join(sorted({row['recipe'] for row in rows}))}; one seed), float32 / "
        "bfloat16; false alarms per clean image. The largest change on one texture: "
        f"{worst['image_auroc']:.4f} of image AUROC, {worst['pixel_auroc']:.4f} of pixel AUROC."
    )
    return "\n\n".join([prose(intro), table(["model", "form", *SHOWN.values(), "false alarms"], lines)])


def _mean(rows: Sequence[Row], precision: str, key: str) -> float:
    return float(np.mean([float(row[key]) for row in rows if row["precision"] == precision]))


def _largest_change(rows: Sequence[Row], key: str) -> float:
    runs: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        run = runs.setdefault((row["texture"], row["model"], row["form"]), {})
        run[row["precision"]] = float(row[key])
    return max(abs(run["bfloat16"] - run["float32"]) for run in runs.values())


def text(folder: Path) -> str:
    """Return the page's section, from the rows in a folder."""
    rows = rows_in(folder).read()
    return section(rows) if rows else f"No rows yet: `python -m bench.accuracy.{NAME}` measures them."


def show(folder: Path) -> None:
    """Write and print the section from the rows in a folder."""
    publish(NAME, folder, text(folder))
    print(f"{text(folder)}\n\nrows in {rows_in(folder).path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.accuracy.{NAME}", description=(__doc__ or "").partition(":")[2]
    )
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    options = parser.parse_args(arguments)
    textures, recipe, folder = chosen(options, quick=QUICK, full=FULL)
    rows = rows_in(folder)
    work = [
        {"texture": texture, "model": model, "form": form, "recipe": describe(recipe)}
        for texture, model, form in product(textures, options.models, (BASELINE, USF))
    ]
    complete_with_features(rows, work, measure, recipe, title=NAME, workers=options.workers)
    show(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
