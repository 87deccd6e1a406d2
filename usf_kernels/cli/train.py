"""`usf-kernels train FOLDER`: train a model on the normal images of a folder in MVTec layout."""

from __future__ import annotations

import argparse
import os
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usf_kernels.cli.options import (
    add_weights,
    features_of,
    image_size,
    nonempty_path,
    pick_device,
    positive,
    positive_number,
    seed,
    warn,
    weights_of,
)
from usf_kernels.optimization import PRECISIONS

if TYPE_CHECKING:
    from usf_kernels.data import FolderDataset

FEW = 10  # a threshold calibrated on fewer held-out images is a guess
MODELS = {"fastflow": "FastFlow", "uflow": "UFlow", "cflow": "CFlow"}  # -> classes of usf_kernels.models


def add_parser(commands: Any) -> None:
    """Declare `train`."""
    parser = commands.add_parser(
        "train",
        help="train a flow on the normal images of a folder",
        description="Train a flow on FOLDER/train/good. A part is held out: its likelihood stops "
        "the training and calibrates the threshold. Writes model.pt, history.csv and a state to resume from. "
        "A run that is in OUTPUT already is replaced, unless it is resumed; its model is kept as "
        "model.replaced.pt until the new one is written.",
    )
    parser.add_argument("folder", type=nonempty_path, help="holds train/good")
    parser.add_argument(
        "--output", type=nonempty_path, default=Path("runs/train"), help="default: %(default)s"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT")
    parser.add_argument(
        "--backbone", default="tf_efficientnet_lite0", help="a timm name; default: %(default)s"
    )
    add_weights(parser, "the ImageNet weights")
    parser.add_argument("--model", choices=tuple(MODELS), default="fastflow", help="default: %(default)s")
    parser.add_argument(
        "--coupling",
        choices=("additive", "affine"),
        default="additive",
        help="additive is uniformly scaling; default: %(default)s",
    )
    parser.add_argument(
        "--linear",
        choices=("lu", "permutation"),
        default="lu",
        help="what mixes the channels between two couplings; default: %(default)s",
    )
    parser.add_argument("--image-size", type=image_size, default=(256, 256), help="256 or HxW; default: 256")
    parser.add_argument("--epochs", type=positive, default=60, help="default: %(default)s")
    parser.add_argument("--patience", type=positive, default=10, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--weight-decay", type=float, default=1e-5, help="default: %(default)s")
    parser.add_argument(
        "--held-out", type=float, default=0.2, help="share of the images; default: %(default)s"
    )
    parser.add_argument(
        "--false-alarms",
        type=positive_number,
        default=0.1,
        help="regions that a normal image may show on average, which the threshold is calibrated to; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=positive,
        help="steps between checkpoints to resume from; default: one a minute. Every epoch also writes one",
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true", help="default: %(default)s")
    parser.add_argument(
        "--accelerator",
        choices=("auto", "cpu", "gpu", "cuda", "mps"),
        default="auto",
        help="gpu is cuda or mps; default: the fastest there is",
    )
    parser.add_argument("--devices", type=positive, default=1, help="default: %(default)s")
    parser.add_argument(
        "--capture",
        action="store_true",
        help="replay steps as a CUDA graph: faster where the GPU waits for launches, takes more memory",
    )
    parser.set_defaults(run=train)


def train(options: argparse.Namespace) -> int:
    """Train and save a model; returns the exit code."""
    import torch

    from usf_kernels import models
    from usf_kernels.checkpoint import save_checkpoint
    from usf_kernels.data import FolderDataset
    from usf_kernels.training import CachedFeatures, fit

    data = FolderDataset(options.folder, "train", size=options.image_size)
    held_out = _held_out(options, data)
    device = pick_device(options.accelerator, "--accelerator")
    torch.manual_seed(options.seed)  # for the initial weights
    backbone = models.create_backbone(options.backbone, weights=weights_of(options) or "auto")
    model_class = getattr(models, MODELS[options.model])
    model = model_class(backbone, coupling=options.coupling, linear=options.linear)
    extra = {"image_size": list(options.image_size), "images_crc32": data.checksum()}
    run = {
        "max_epochs": options.epochs,
        "patience": options.patience,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "checkpoint_every": options.checkpoint_every,
        "seed": options.seed,
        "run_dir": options.output,
        "resume": options.resume,
        "precision": options.precision,
        "accelerator": options.accelerator,
        "devices": options.devices,
        "capture": options.capture,
        "extra": extra,
    }
    fit(model, range(len(data) - held_out), range(held_out), dry_run=True, **run)
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    if rank_zero_only.rank == 0:
        print(f"{options.folder}: {len(data) - held_out} images to train on, {held_out} held out; {device}")
        if held_out < FEW:
            warn(f"a threshold calibrated on {held_out} images is a guess: {FEW} or more should be held out")
    features = features_of(model, data, device, options.batch_size)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed))
    held, rest = ([maps[part] for maps in features] for part in (order[:held_out], order[held_out:]))
    model.initialize(rest)
    # Find errors in the held-out images before training. It uses a copy: checkpoints have no threshold yet.
    deepcopy(model).calibrate([maps[:8] for maps in held])
    state, result = options.output / "last.pt", options.output / "model.pt"
    before = options.output / "model.replaced.pt"
    if rank_zero_only.rank == 0 and not (options.resume and state.exists()):
        if options.resume:
            print(f"{state}: no such file, so there is nothing to resume; the run starts anew")
        elif state.exists():
            print(f"{options.output}: the run there is replaced; --resume would have continued it")
        if result.exists():  # it is of another run, so it must not pass for a result of this one
            os.replace(result, before)
            print(f"{before}: its model, until there is a new one")
    try:
        history = fit(model, CachedFeatures(rest), CachedFeatures(held), **run)
        if rank_zero_only.rank != 0:  # only one of several processes writes
            return 0
        model.calibrate(held, false_alarms=options.false_alarms)
        save_checkpoint(result, model, extra=extra | {"folder": str(options.folder)})
        before.unlink(missing_ok=True)
    except (KeyboardInterrupt, BrokenPipeError) as stopped:
        if state.exists():
            stopped.add_note("continue with --resume")
        raise
    print(
        f"{result}: epoch {history.best_epoch} of {len(history.rows)}, held-out loss {history.best_loss:.4f}"
    )
    return 0


def _held_out(options: argparse.Namespace, data: FolderDataset) -> int:
    """Return the number of images to hold out; raise if too few are left."""
    if not 0 < options.held_out < 1:
        raise ValueError(f"--held-out: expected a number between 0 and 1, found {options.held_out}")
    held_out = max(1, round(options.held_out * len(data)))
    if len(data) - held_out < 2:
        raise ValueError(
            f"{options.folder}: {len(data)} normal images, {held_out} of them held out, are too few: "
            "at least 2 must be left to train on"
        )
    return held_out
