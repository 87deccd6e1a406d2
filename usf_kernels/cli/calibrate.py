"""`usf-kernels calibrate CHECKPOINT FOLDER`: fit a trained model's threshold to other normal images."""

from __future__ import annotations

import argparse
from typing import Any

from usf_kernels.cli.options import (
    add_checkpoint,
    check_output,
    features_of,
    image_size,
    load_detector,
    nonempty_path,
    pick_device,
    positive,
    positive_number,
    size_of_images,
)


def add_parser(commands: Any) -> None:
    """Declare `calibrate`."""
    parser = commands.add_parser(
        "calibrate",
        help="fit the threshold of a model to other normal images",
        description="Fit the null model, and so the threshold, to the normal images in FOLDER. Use images "
        "that the model was not trained on, taken as those that it will judge. The flow is not changed.",
    )
    add_checkpoint(parser)
    parser.add_argument("folder", type=nonempty_path, help="of normal images")
    parser.add_argument(
        "--output", type=nonempty_path, help="the new checkpoint; default: in place of the old one"
    )
    parser.add_argument(
        "--false-alarms",
        type=positive_number,
        default=0.1,
        help="regions that each of them may show on average; default: %(default)s",
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--image-size", type=image_size, help="256 or HxW; default: the training's")
    parser.add_argument("--device", default="auto", help="default: the fastest there is")
    parser.set_defaults(run=calibrate)


def calibrate(options: argparse.Namespace) -> int:
    """Write the checkpoint with its new threshold; returns the exit code."""
    from usf_kernels.checkpoint import read_checkpoint, save_checkpoint
    from usf_kernels.data import ImageFiles

    output = options.output or options.checkpoint
    content = read_checkpoint(options.checkpoint)
    check_output(output)
    device = pick_device(options.device)
    model, size = load_detector(options), size_of_images(options, required=True, calibrates=True)
    data = ImageFiles(options.folder, size=size)
    features = features_of(model, data, device, options.batch_size)
    model.calibrate(features, false_alarms=options.false_alarms)
    save_checkpoint(output, model, extra=content["extra"] | {"image_size": list(size)})
    print(f"{output}: calibrated on {len(data)} images, {options.false_alarms:g} false alarms in each")
    return 0
