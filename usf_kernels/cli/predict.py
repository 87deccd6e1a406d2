"""`usf-kernels predict CHECKPOINT IMAGES...`: maps and masks as files."""

from __future__ import annotations

import argparse
import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usf_kernels.cli.options import (
    add_inference,
    image_size,
    load_for_inference,
    print_table,
    progress,
)

USUAL = 1 - math.exp(-0.5)  # of the anomaly map, where the latents are what they are on normal images

if TYPE_CHECKING:
    from torch import Tensor


def add_parser(commands: Any) -> None:
    """Declare `predict`."""
    parser = commands.add_parser(
        "predict",
        help="write anomaly maps and masks of images",
        description="For every image writes NAME_map.npy (float32 anomaly map), NAME_map.png (as a heat "
        "map), NAME_log_nfa.npy and NAME_mask.png, all in the image's own size, and predictions.json "
        "with scores and regions. All images are checked before anything is written.",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", type=Path, default=Path("runs/predict"), help="default: %(default)s")
    parser.add_argument("--image-size", type=image_size, help="size to predict at; default: the training's")
    add_inference(parser)
    parser.set_defaults(run=predict)


def predict(options: argparse.Namespace) -> int:
    """Predict images and write the results; returns the exit code."""
    from usf_kernels.checkpoint import read_checkpoint
    from usf_kernels.data import read_image
    from usf_kernels.files import write_json

    files = _expand(options.images)
    for path in files:
        read_image(path)
    size = options.image_size or read_checkpoint(options.checkpoint)["extra"].get("image_size")
    model, device = load_for_inference(options)
    options.output.mkdir(parents=True, exist_ok=True)
    results, rows = [], []
    with progress(len(files), "predicting") as advance:
        for name, path in _names(files).items():
            image = read_image(path)
            resized = image if size is None else read_image(path, tuple(size))
            prediction = model.predict(resized[None].to(device))
            own = tuple(image.shape[1:])
            _write(options.output, name, prediction, own)
            regions = [asdict(r) | {"image_box": r.image_box(own)} for r in prediction.regions[0]]
            results.append(
                {"image": str(path), "name": name, "score": prediction.score.item(), "regions": regions}
            )
            rows.append([str(path), prediction.score.item(), len(regions)])
            advance()
    write_json(options.output / "predictions.json", results)
    print_table(f"maps and masks in {options.output}", ("image", "score", "regions"), rows)
    return 0


def _expand(paths: list[Path]) -> list[Path]:
    from usf_kernels.data.folder import SUFFIXES

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f"{path}: holds no image")
            files += inside
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _names(files: list[Path]) -> dict[str, Path]:
    """A name for the outputs of each file: its stem, or with as many folders in front as tell files apart."""
    names: dict[str, Path] = {}
    for path in files:
        parts = path.absolute().with_suffix("").parts[1:]
        rivals = [other.absolute().with_suffix("").parts[1:] for other in files if other != path]
        length = next(
            (n for n in range(1, len(parts)) if all(r[-n:] != parts[-n:] for r in rivals)), len(parts)
        )
        name = "_".join(parts[-length:])
        names[f"{name}_{path.suffix[1:]}" if name in names else name] = path
    return names


def _write(folder: Path, name: str, prediction: Any, size: tuple[int, int]) -> None:
    import numpy as np
    from PIL import Image

    from usf_kernels.files import atomic_write
    from usf_kernels.plotting import heat_map

    anomaly, alarms = (_resized(maps, size) for maps in (prediction.anomaly_map, prediction.log_nfa))
    mask = _resized(prediction.mask, size, mode="nearest-exact") > 0.5
    pictures = {"map": heat_map(anomaly, low=USUAL), "mask": mask.astype(np.uint8) * 255}
    for label, values in (("map", anomaly), ("log_nfa", alarms)):
        with atomic_write(folder / f"{name}_{label}.npy", durable=False) as file:
            buffer = io.BytesIO()  # numpy's own writing reports a full disk without saying so
            np.save(buffer, values)
            file.write(buffer.getbuffer())
    for label, picture in pictures.items():
        with atomic_write(folder / f"{name}_{label}.png", durable=False) as file:
            Image.fromarray(picture).save(file, format="PNG")


def _resized(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Any:
    from torch.nn.functional import interpolate

    values = maps.detach().cpu().float()
    return interpolate(values, size, mode=mode)[0, 0].numpy()
