"""`python -m bench.accuracy.datasets`: the comparison of `substitution` on MVTec AD, VisA or BTAD.

The images are read through anomalib's data modules, from a folder that has them already.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import Dataset, Subset

from bench.accuracy import comparison
from bench.accuracy.page import publish
from bench.accuracy.protocol import FORMS, QUICK_OUTPUT, VALUES, complete_with_features, describe, measure
from bench.accuracy.rows import Rows
from bench.accuracy.substitution import add_arguments
from usf_kernels.cli.options import positive
from usf_kernels.data import Sample
from usf_kernels.demo import Recipe

MODULES = {"mvtec": "MVTecAD", "visa": "Visa", "btad": "BTech"}  # classes of anomalib.data
PREPARED = {"visa": "visa_pytorch"}  # folder of the categories after anomalib has split them
HELD_OUT = 0.1  # share of the normal training images
FULL = Recipe(side=256, epochs=32)
QUICK = replace(FULL, side=128, epochs=2)


@dataclass(frozen=True)
class Images(Dataset[Sample]):
    """A dataset of anomalib in the form of this package's: square images and masks of one size.

    Attributes:
        source: dataset of anomalib.
        side: side of the images, in pixels.
    """

    source: Any
    side: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        item = self.source[index]
        size = (self.side, self.side)
        image = functional.interpolate(item.image[None].float(), size, mode="bicubic", antialias=True)[0]
        label = int(item.gt_label)
        mask = torch.zeros(1, *size, dtype=torch.bool)
        if label and item.gt_mask is not None:
            # A pixel is defective if any pixel that it covers is, so that no thin defect is lost.
            drawn = (item.gt_mask.reshape(1, *item.gt_mask.shape[-2:]) > 0).float()
            mask = functional.adaptive_max_pool2d(drawn, size) > 0
        kind = Path(item.image_path).parent.name if label else "good"
        return Sample(image.clamp(0, 1), mask, label, str(item.image_path), kind)


def categories(root: Path, dataset: str) -> list[str]:
    """Return the categories of a data set that a folder has.

    Raises:
        ValueError: naming the folder, when it has none of that data set.
    """
    if not root.is_dir():
        raise ValueError(f"--root: no such folder: {root}")
    found = {
        folder.name
        for parent in (root, root / PREPARED.get(dataset, "."))
        if parent.is_dir()
        for folder in parent.iterdir()
        if (folder / "train").is_dir() or (dataset == "visa" and (folder / "Data" / "Images").is_dir())
    }
    if not found:
        raise ValueError(f"--root: {root} holds no category of {dataset}, a folder with train and test in it")
    return sorted(found)


def splits(category: str, recipe: Recipe, *, root: Path, dataset: str) -> tuple[Dataset[Sample], ...]:
    """Return training, held-out and test images of a category; the held-out ones are the same for all seeds.

    Raises:
        ImportError: without anomalib.
        ValueError: when there are fewer than two normal training images.
    """
    try:
        from anomalib import data
    except ImportError as error:
        raise ImportError("data sets are read by anomalib: pip install 'usf-kernels[anomalib]'") from error
    module = getattr(data, MODULES[dataset])(root=root, category=category, num_workers=0)
    module.prepare_data()  # VisA: copies the images into its split
    module.setup()
    normal, test = (Images(source, recipe.side) for source in (module.train_data, module.test_data))
    if len(normal) < 2:
        raise ValueError(
            f"{root / category}: expected two normal training images or more, found {len(normal)}"
        )
    order = torch.randperm(len(normal), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = max(1, round(HELD_OUT * len(normal)))
    return Subset(normal, order[held_out:]), Subset(normal, order[:held_out]), test


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.datasets", description=(__doc__ or "").partition(":")[2]
    )
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the categories")
    parser.add_argument("--dataset", choices=MODULES, required=True)
    parser.add_argument("--category", nargs="+", metavar="CATEGORY", help="default: all in the folder")
    parser.add_argument("--side", type=positive, help="of the images (default: 256; quick: 128)")
    parser.add_argument("--epochs", type=positive, help="default: 32; quick: 2")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        there = categories(options.root, options.dataset)
        unknown = sorted(set(options.category or ()) - set(there))
        if unknown:
            raise ValueError(f"--category: no {unknown[0]!r} in {options.root}; it has {', '.join(there)}")
    except ValueError as error:
        parser.error(str(error))
    recipe = QUICK if options.quick else FULL
    recipe = replace(recipe, side=options.side or recipe.side, epochs=options.epochs or recipe.epochs)
    names = options.category or there
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    folder = options.output or QUICK_OUTPUT
    rows = Rows(folder / f"{options.dataset}.csv", ("category", "model", "form", "seed"), ("recipe",), VALUES)
    work = [
        {
            "category": category,
            "model": model,
            "form": form,
            "seed": str(seed),
            "recipe": describe(recipe, "all images"),
        }
        for category, seed, model, form in product(names, seeds, options.models, FORMS)
    ]
    complete_with_features(
        rows,
        work,
        partial(measure, column="category"),
        recipe,
        title=options.dataset,
        workers=options.workers,
        column="category",
        datasets=partial(splits, root=options.root, dataset=options.dataset),
    )
    recipes = {job["recipe"] for job in work}
    found = [row for row in rows.read() if row["recipe"] in recipes]  # of one budget
    text = comparison.section(found, "category")
    title = f"Affine couplings against uniformly scaling ones, {options.dataset}"
    figure = comparison.figure(found, "category", title)
    publish(options.dataset, folder, text, figure, f"{options.dataset}.png")
    print(f"{text}\n\nrows in {rows.path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
