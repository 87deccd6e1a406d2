"""`python -m bench.accuracy.substitution`: affine against uniformly scaling flows on the embedded textures.

Every model in every form, with one training budget, several seeds: does the substitution cost accuracy, and
does it narrow the spread? The question and the layout of the table are those of "On Uniformly Scaling Flows"
(arXiv:2510.09452), Table 1; the data, backbone and budgets are not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from bench.accuracy import comparison
from bench.accuracy.page import publish
from bench.accuracy.protocol import (
    FORMS,
    MODELS,
    VALUES,
    chosen,
    complete_with_features,
    describe,
    measure,
)
from bench.accuracy.rows import Rows
from usf_kernels.cli.options import positive
from usf_kernels.data import TEXTURES
from usf_kernels.demo import QUICK as QUICK_DEMO
from usf_kernels.demo import Recipe

NAME = "substitution"
FULL = Recipe(epochs=10)
QUICK = replace(QUICK_DEMO, epochs=2)
KEYS = ("texture", "model", "form", "seed")


def rows_in(folder: Path) -> Rows:
    """Return the file of rows in a folder."""
    return Rows(folder / f"{NAME}.csv", KEYS, ("recipe",), VALUES)


def jobs(
    models: Sequence[str], textures: Sequence[str], seeds: Sequence[int], recipe: Recipe
) -> list[dict[str, str]]:
    """Return all runs, one seed of everything before the next."""
    return [
        {"texture": texture, "model": model, "form": form, "seed": str(seed), "recipe": describe(recipe)}
        for seed, texture, model, form in product(seeds, textures, models, FORMS)
    ]


def text(folder: Path) -> str:
    """Return the page's section, from the rows in a folder."""
    rows = rows_in(folder).read()
    if not rows:
        return "No rows yet: `make accuracy` measures them, in about half an hour."
    picture = "![Image and pixel AUROC of each model in each form, a dot per seed](substitution.png)"
    return f"{picture}\n\n{comparison.section(rows, 'texture')}"


def show(folder: Path) -> None:
    """Write and print the section and the figure from the rows in a folder."""
    title = "Affine couplings against uniformly scaling ones"
    rows = rows_in(folder)
    figure = comparison.figure(rows.read(), "texture", title)
    publish(NAME, folder, text(folder), figure, f"{NAME}.png")
    print(f"{text(folder)}\n\nrows in {rows.path}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that this comparison shares with the one on datasets."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 1 2; quick: 0")
    parser.add_argument("--quick", action="store_true", help="one seed, few images and epochs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the rows, the table and the figure")
    parser.add_argument(
        "--workers", type=positive, default=2, help="processes that share the cores (default: %(default)s)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.accuracy.{NAME}", description=(__doc__ or "").partition(":")[2]
    )
    parser.add_argument("--textures", nargs="+", choices=TEXTURES, metavar="TEXTURE", help="default: all")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    textures, recipe, folder = chosen(options, quick=QUICK, full=FULL)
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    rows = rows_in(folder)
    work = jobs(options.models, textures, seeds, recipe)
    measured = partial(measure, column="texture")
    complete_with_features(rows, work, measured, recipe, title=NAME, workers=options.workers)
    show(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
