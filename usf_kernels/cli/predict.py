"""`usf-kernels predict CHECKPOINT IMAGES...`: write maps and masks of images as files."""

from __future__ import annotations

import argparse
import io
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usf_kernels.cli.options import (
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
)

USUAL = 1 - math.exp(-0.5)  # value of the anomaly map where latents have mean square 1, as on normal images
LONGEST = 230  # bytes of an output's name, before its ending; file systems take 255 with it

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn


def add_parser(commands: Any) -> None:
    """Declare `predict`."""
    parser = commands.add_parser(
        "predict",
        help="write anomaly maps and masks of images",
        description="For every image writes NAME_map.npy (float32 anomaly map), NAME_map.png (as a heat "
        "map), NAME_log_nfa.npy, NAME_mask.png and NAME_overlay.png (the image with the mask in it), all "
        "in the image's own size. predictions.json has for every image: image (the file), name (NAME), score "
        "(in [0, 1]), anomalous (whether there is a region), and regions, the most significant first: "
        "log_nfa, image_box (top, left, bottom, right in pixels of the image, half open), and box, area, "
        "level and centroid on the map of map_size, which is that of scale. All files are opened before "
        "anything is written. Images that then cannot be decoded are skipped; the command ends with an error "
        "that names them.",
    )
    add_checkpoint(parser)
    parser.add_argument("images", type=nonempty_path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--recursive", action="store_true", help="search subfolders too, except hidden ones")
    parser.add_argument(
        "--output", type=nonempty_path, default=Path("runs/predict"), help="default: %(default)s"
    )
    parser.add_argument("--image-size", type=image_size, help="size to predict at; default: the training's")
    parser.add_argument("--batch-size", type=positive, default=8, help="default: %(default)s")
    add_log_epsilon(parser)
    add_inference(parser)
    parser.set_defaults(run=predict)


def predict(options: argparse.Namespace) -> int:
    """Predict images and write the results; returns the exit code.

    Raises:
        ValueError: at the end, naming the images that could not be read; all others have results.
    """
    from usf_kernels.data import open_image
    from usf_kernels.files import make_folder, write_json

    files = _expand(options.images, options.output, options.recursive)
    for path in files:
        open_image(path, decode=False)
    model, device = load_for_inference(options)
    size = size_of_images(options, required=False)
    make_folder(options.output)
    results: list[dict[str, Any]] = []
    unread: list[str] = []
    try:
        with progress(len(files), "predicting") as advance:
            for facts in _predictions(files, model, device, size, options, unread):
                results.append(facts)
                advance()
    finally:  # when interrupted, too
        if results:
            write_json(options.output / "predictions.json", results)
    rows = [[r["image"], r["score"], "yes" if r["anomalous"] else "no", len(r["regions"])] for r in results]
    if rows:
        print_table(f"maps and masks in {options.output}", ("image", "score", "anomalous", "regions"), rows)
    if unread:
        raise ValueError(f"{len(unread)} of {len(files)} images are left out: {'; '.join(unread)}")
    return 0


def _predictions(
    files: list[Path],
    model: nn.Module,
    device: torch.device,
    size: tuple[int, int] | None,
    options: argparse.Namespace,
    unread: list[str],
) -> Iterator[dict[str, Any]]:
    """Yield each image's entry of predictions.json, after writing its other files. Errors of images that
    cannot be read are appended to `unread`."""
    import torch

    from usf_kernels.data import read_image, resize_image

    named = list(_names(files).items())
    step = 1 if size is None else options.batch_size  # images of several sizes do not stack
    for start in range(0, len(named), step):
        batch, images = [], []
        for name, path in named[start : start + step]:
            try:
                images.append(read_image(path))
                batch.append((name, path))
            except ValueError as error:
                unread.append(str(error))
        if not batch:
            continue
        resized = images if size is None else [resize_image(image, size) for image in images]
        predictions = model.predict(torch.stack(resized).to(device), log_epsilon=options.log_epsilon)
        for i, (name, path) in enumerate(batch):
            prediction = type(predictions)(*(values[i : i + 1] for values in predictions))
            picture = (255 * images[i]).round().byte().permute(1, 2, 0).numpy()
            _write(options.output, name, prediction, picture)
            found = prediction.regions[0]
            yield {
                "image": str(path),
                "name": name,
                "score": prediction.score.item(),
                "anomalous": bool(found),
                "regions": [asdict(r) | {"image_box": r.image_box(picture.shape[:2])} for r in found],
            }


def _expand(paths: list[Path], output: Path, recursive: bool) -> list[Path]:
    """Return all image files that the paths name or contain, once each."""
    from usf_kernels.data.folder import images_below, images_in

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = images_below(path) if recursive else images_in(path.iterdir())
            if not inside:
                below = next((file.parent for file in images_below(path)), None)
                hint = "" if below is None else f"; there are some in {below}, which --recursive takes"
                raise ValueError(f"{path}: holds no image{hint}")
            files += inside
        else:
            files.append(path)
    if any(output.resolve() in file.resolve().parents for file in files):
        raise ValueError(f"--output {output}: holds the images; what is written there would be among them")
    once: dict[Path, Path] = {}
    for path in files:
        once.setdefault(_normal(path), path)
    return list(once.values())


def _normal(path: Path) -> Path:
    """Return the absolute path without `..`."""
    return Path(os.path.normpath(path.absolute()))


def _names(files: list[Path]) -> dict[str, Path]:
    """Name the outputs of each file: the first of its `_forms` that no other file has, on file systems that
    do not tell capital letters from small ones, too."""
    forms = {path: _forms(path) for path in files}
    owners = Counter(key for own in forms.values() for key in set(map(_folded, own)))
    names: dict[str, Path] = {}
    for path, own in forms.items():
        name = next((form for form in own if owners[_folded(form)] == 1), f"{own[-1]}_{len(names)}")
        names[name] = path
    return names


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _forms(path: Path) -> list[str]:
    """Return possible names of a file: its stem, stem and suffix, and both with more and more folders; of one
    with a name so long that its outputs could not be written, the beginning of its stem."""
    parts, suffix = _normal(path).with_suffix("").parts[1:], path.suffix[1:]
    stems = ["_".join(parts[-length:]) for length in range(1, len(parts) + 1)]
    forms = dict.fromkeys(form for stem in stems for form in (stem, f"{stem}_{suffix}"))
    fits = [form for form in forms if len(os.fsencode(form)) <= LONGEST]
    return fits or [os.fsencode(path.stem)[:LONGEST].decode(errors="ignore")]


def _write(folder: Path, name: str, prediction: Any, picture: np.ndarray) -> None:
    import numpy as np
    from PIL import Image

    from usf_kernels.files import atomic_write
    from usf_kernels.plotting import heat_map, outlined

    size = picture.shape[:2]
    anomaly, alarms = (_resized(maps, size) for maps in (prediction.anomaly_map, prediction.log_nfa))
    mask = _resized(prediction.mask, size, mode="nearest-exact") > 0.5
    pictures = {
        "map": heat_map(anomaly, low=USUAL),
        "mask": mask.astype(np.uint8) * 255,
        "overlay": outlined(picture, mask),
    }
    for label, values in (("map", anomaly), ("log_nfa", alarms)):
        with atomic_write(folder / f"{name}_{label}.npy", durable=False) as file:
            buffer = io.BytesIO()  # NumPy's own writing does not say that the disk is full
            np.save(buffer, values)
            file.write(buffer.getbuffer())
    for label, picture in pictures.items():
        with atomic_write(folder / f"{name}_{label}.png", durable=False) as file:
            Image.fromarray(picture).save(file, format="PNG", compress_level=1)  # higher levels are slow


def _resized(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Any:
    from torch.nn.functional import interpolate

    values = maps.detach().cpu().float()
    return interpolate(values, size, mode=mode)[0, 0].numpy()
