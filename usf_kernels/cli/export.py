"""`usf-kernels export CHECKPOINT MODEL.onnx`: write a model for runtimes without PyTorch."""

from __future__ import annotations

import argparse
from typing import Any

from usf_kernels.cli.options import (
    add_checkpoint,
    check_output,
    image_size,
    load_detector,
    nonempty_path,
    progress,
    size_of_images,
)


def add_parser(commands: Any) -> None:
    """Declare `export`."""
    parser = commands.add_parser(
        "export",
        help="write a model as an ONNX file",
        description="Write a checkpoint as an ONNX file: images (batch, 3, height, width) in [0, 1] to an "
        "anomaly map and the squared norms that the automatic threshold is computed from. Where ONNX Runtime "
        "is installed, the results are compared first.",
    )
    add_checkpoint(parser)
    parser.add_argument("output", type=nonempty_path, help="such as model.onnx")
    parser.add_argument("--image-size", type=image_size, help="to trace it with; default: the training's")
    parser.add_argument(
        "--fixed-size", action="store_true", help="for this image size alone, as some backbones need it"
    )
    parser.set_defaults(run=export)


def export(options: argparse.Namespace) -> int:
    """Write the file; returns the exit code."""
    from usf_kernels.models import export_onnx

    check_output(options.output)
    if options.output.exists() and options.output.samefile(options.checkpoint):
        raise ValueError(f"{options.output}: is the checkpoint itself, which would be lost")
    model = load_detector(options)
    size = size_of_images(options, required=True)
    with progress(None, "tracing and checking"):
        export_onnx(model, options.output, image_size=size, dynamic_size=not options.fixed_size)
    sizes = "x".join(map(str, size)) if options.fixed_size else "any size"
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB, for images of {sizes}")
    return 0
