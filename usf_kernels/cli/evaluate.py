"""`usf-kernels evaluate CHECKPOINT FOLDER`: metrics of a model on the test images of a folder."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from usf_kernels.cli.options import (
    METRICS,
    add_checkpoint,
    add_inference,
    add_log_epsilon,
    image_size,
    load_for_inference,
    nonempty_path,
    positive,
    print_table,
    progress,
    size_of_images,
    warn,
)

Image = dict[str, Any]  # a row of images.csv


def add_parser(commands: Any) -> None:
    """Declare `evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a trained model on the test images of a folder",
        description="Measure a checkpoint on FOLDER/test/<kind>, where good is normal, with masks in "
        "FOLDER/ground_truth/<kind>. Without a folder ground_truth only images are ranked and counted.",
    )
    add_checkpoint(parser)
    parser.add_argument("folder", type=nonempty_path, help="holds test, and ground_truth")
    parser.add_argument(
        "--output",
        type=nonempty_path,
        help="folder for results.json, images.csv (a row for each image) and panel.png; default: only print",
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--image-size", type=image_size, help="256 or HxW; default: the training's")
    add_log_epsilon(parser)
    add_inference(parser)
    parser.set_defaults(run=evaluate)


def evaluate(options: argparse.Namespace) -> int:
    """Print the metrics of a model on a folder; returns the exit code."""
    from torch.utils.data import DataLoader

    from usf_kernels import metrics
    from usf_kernels.data import FolderDataset
    from usf_kernels.files import make_folder

    model, device = load_for_inference(options)
    size = size_of_images(options, required=True)
    masks = (options.folder / "ground_truth").is_dir()
    data = FolderDataset(options.folder, "test", size=size, masks=masks)
    if options.output is not None:
        make_folder(options.output)
    samples, predictions = [], []
    with progress(len(data), "predicting") as advance:
        for batch in DataLoader(data, batch_size=options.batch_size):
            predictions.append(model.predict(batch.image.to(device), log_epsilon=options.log_epsilon))
            samples.append(batch)
            for _ in batch.image:
                advance()
    targets = [batch.mask if masks else batch.label.bool() for batch in samples]
    found = metrics.evaluate(predictions, targets)
    images = [
        {
            "image": name,
            "kind": kind,
            "score": score.item(),
            "anomalous": len(regions) > 0,
            "regions": len(regions),
        }
        for batch, prediction in zip(samples, predictions, strict=True)
        for name, kind, score, regions in zip(
            batch.name, batch.kind, prediction.score, prediction.regions, strict=True
        )
    ]
    if options.output is not None:  # before anything is printed, which nobody may read
        _write(options, found, images, samples, predictions, masks=masks)
    title = f"{options.checkpoint} on {options.folder}"
    print_table(title, METRICS.values(), [[found[key] for key in METRICS]])
    print_table("by kind", ("kind", "images", "called anomalous", "mean score"), _by_kind(images))
    _comment(options.folder, masks, found)
    if options.output is not None:
        print(f"results.json, images.csv and panel.png in {options.output}")
    return 0


def _by_kind(images: Sequence[Image]) -> list[list[object]]:
    rows = []
    for kind in dict.fromkeys(image["kind"] for image in images):
        some = [image for image in images if image["kind"] == kind]
        called = sum(image["anomalous"] for image in some)
        share = f"{called} ({called / len(some):.0%})"
        rows.append([kind, len(some), share, sum(image["score"] for image in some) / len(some)])
    return rows


def _comment(folder: Path, masks: bool, found: dict[str, float]) -> None:
    """Explain metrics that are NaN, and warn of too many false alarms."""
    if not masks:
        print(f"nan: needs masks, in {folder / 'ground_truth'}")
    if math.isnan(found["image_auroc"]):
        print(f"nan: needs clean and defective images, in {folder / 'test'}/good and beside it")
    alarms = found["false_alarms_per_clean_image"]
    if alarms > 1:
        warn(
            f"{alarms:.1f} false alarms per clean image are more than the threshold promises: the images it "
            "was calibrated on are not like these; `usf-kernels calibrate` takes others"
        )


def _write(
    options: argparse.Namespace,
    found: dict[str, float],
    images: Sequence[Image],
    samples: Sequence[Any],
    predictions: Sequence[Any],
    *,
    masks: bool,
) -> None:
    import torch

    from usf_kernels.data.folder import NORMAL
    from usf_kernels.files import write_csv, write_json
    from usf_kernels.plotting import CLEAN, Shown, panel, save_figure

    write_json(options.output / "results.json", found)
    write_csv(options.output / "images.csv", images)
    figure = panel(
        torch.cat([batch.image for batch in samples]),
        torch.cat([batch.mask for batch in samples]) if masks else None,
        Shown.of(predictions),
        kinds=[CLEAN if image["kind"] in NORMAL else image["kind"] for image in images],
        title=options.folder.name,
        subtitle=f"image AUROC {found['image_auroc']:.3f}, pixel AUROC {found['pixel_auroc']:.3f}, "
        f"automatic mIoU {found['miou_automatic']:.3f}",
        log_epsilon=options.log_epsilon,
    )
    save_figure(figure, options.output / "panel.png")
