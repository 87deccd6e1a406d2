"""Types of command-line options, and helpers that several commands share."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from usf_kernels.data import Sample
    from usf_kernels.models.feature_flow import FeatureFlow

LARGEST = 1 << 15  # side of an image
METRICS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "miou_automatic": "mIoU auto",
    "miou_oracle": "mIoU oracle",
    "false_alarms_per_clean_image": "false alarms",
}


def nonempty_path(text: str) -> Path:
    """Parse a path; an empty one, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or not 1 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 2^63 - 1, not {text}")
    return int(text)


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return value


def seed(text: str) -> int:
    """Parse a seed that PyTorch and NumPy take."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, not {text}")
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """Parse `256` or `256x320` (height x width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 1 <= int(part) <= LARGEST for part in parts):
        raise argparse.ArgumentTypeError(
            f"must be like 256 or 256x320 (height x width), each at most {LARGEST}, not {text!r}"
        )
    return int(parts[0]), int(parts[-1])


def size_of_images(
    options: argparse.Namespace, *, required: bool, calibrates: bool = False
) -> tuple[int, int] | None:
    """Return (height, width) from `--image-size`, or else the size at which the model in `checkpoint` was
    trained. Warn if the two differ; a command that `calibrates` adapts the threshold to the new size.

    Raises:
        ValueError, OSError: as `read_checkpoint`; also if a size is required and neither gives one.
    """
    from usf_kernels.checkpoint import read_checkpoint

    trained = read_checkpoint(options.checkpoint)["extra"].get("image_size")
    size = options.image_size or trained
    if size is None and required:
        raise ValueError(f"{options.checkpoint}: does not say its images' size, pass --image-size")
    if trained is not None and tuple(size) != tuple(trained):
        before = f"{trained[0]}x{trained[1]}"
        if calibrates:
            about = f"the model was trained at {before}, only its threshold will be of this size"
        else:
            about = (
                f"the model was trained and its threshold calibrated at {before}, scores and masks of "
                "another size mean something else"
            )
        warn(f"--image-size {size[0]}x{size[1]}: {about}")
    return None if size is None else tuple(size)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Declare `checkpoint` and `--weights`, for commands that load a model."""
    parser.add_argument("checkpoint", type=nonempty_path, help="model.pt of a training run")
    add_weights(parser, "from where training had them")


def add_weights(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare `--weights`, whose default is described so; `weights_of` returns it."""
    about = f"file of backbone weights; repeat it for several networks; default: {default}"
    parser.add_argument("--weights", action="append", metavar="FILE", help=about)


def weights_of(options: argparse.Namespace) -> str | list[str] | None:
    """Return the files of `--weights` as `create_backbone` takes them: one, several, or None."""
    files = options.weights
    return files[0] if files is not None and len(files) == 1 else files


def check_output(output: Path) -> None:
    """Raise before the work is done if a file cannot be written, or is a training run to be resumed.

    Raises:
        ValueError, OSError: naming the file; also for a checkpoint that cannot be read.
    """
    from usf_kernels.checkpoint import read_checkpoint
    from usf_kernels.files import check_writable

    check_writable(output)
    if is_zipfile(output) and "training" in read_checkpoint(output):  # as torch.save writes it
        raise ValueError(f"{output}: holds a run to be resumed, which would be lost; name another output")


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Declare `--device` and `--precision`, for commands that only predict."""
    parser.add_argument(
        "--device", default="auto", help="cpu, gpu, cuda, cuda:1, mps; default: the fastest there is"
    )
    parser.add_argument(
        "--precision",
        choices=("32-true", "bf16-true"),
        default="32-true",
        help="bf16-true: all of the model in bfloat16, faster where the device has units for it; "
        "default: %(default)s",
    )


def add_log_epsilon(parser: argparse.ArgumentParser) -> None:
    """Declare `--log-epsilon`, for commands that segment."""
    parser.add_argument(
        "--log-epsilon",
        type=float,
        default=0.0,
        help="report regions with a log10(number of false alarms) up to this: -2 reports fewer, 1 more; "
        "default: %(default)g",
    )


def pick_device(name: str, option: str = "--device") -> torch.device:
    """Return the device that an option names; "gpu" is mps or cuda, as for Lightning.

    Raises:
        ValueError: if there is no device of that name here.
    """
    import torch

    if name != "auto":
        gpu = "mps" if torch.backends.mps.is_available() else "cuda"
        try:
            device = torch.empty(0, device=gpu if name == "gpu" else name).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # it depends on the backend
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{option} {name}: not available here ({reason:.120})") from error
        if device.type == "meta":
            raise ValueError(f"{option} {name}: computes nothing")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_detector(options: argparse.Namespace, device: str | torch.device = "cpu") -> FeatureFlow:
    """Load the image model in `checkpoint`, with the weights of `--weights` for its backbone.

    Raises:
        ValueError, OSError: as `load_checkpoint`; also for a model that is not one of images.
    """
    from usf_kernels.checkpoint import load_checkpoint

    model = load_checkpoint(options.checkpoint, device=device, weights=weights_of(options))
    if not hasattr(model, "calibrate"):  # a density of vectors, for example, which has no masks
        raise ValueError(
            f"{options.checkpoint}: expected a FastFlow, CFlow or UFlow, found a {type(model).__name__}"
        )
    return model


def load_for_inference(options: argparse.Namespace) -> tuple[FeatureFlow, torch.device]:
    """Load the inference form of the model in `checkpoint`, in the `--precision` and on the `--device` given.

    Raises:
        ValueError, OSError: as `load_detector`.
    """
    import torch

    from usf_kernels.ops.products import MULTIPLIES_BFLOAT16

    device = pick_device(options.device)
    model = load_detector(options, device)
    if options.precision == "bf16-true" and device.type == "cpu" and not MULTIPLIES_BFLOAT16:
        warn("--precision bf16-true: this processor has no units for bfloat16, it is slower here")
    return model.fuse(torch.bfloat16 if options.precision == "bf16-true" else None), device


def features_of(
    model: nn.Module, data: Dataset[Sample], device: torch.device, batch_size: int
) -> list[Tensor]:
    """Compute the frozen backbone's maps of all images once, so that training costs the flow alone."""
    import torch
    from torch.utils.data import DataLoader

    model.to(device)
    parts = []
    with torch.no_grad(), progress(len(data), "features") as advance:
        for batch in DataLoader(data, batch_size=batch_size):
            parts.append([maps.cpu() for maps in model.features(batch.image.to(device))])
            for _ in batch.image:
                advance()
    model.cpu()
    return [torch.cat(maps) for maps in zip(*parts, strict=True)]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, on a terminal with rich where it is installed; numbers with three decimals.

    A terminal's width folds long cells. In a pipe or a file, every row is one line whatever its length.
    """
    cells = [
        [f"{cell:.3f}" if isinstance(cell, float) else printable(str(cell)) for cell in row] for row in rows
    ]
    if not sys.stdout.isatty() or find_spec("rich") is None:
        _print_plainly(title, [list(columns), *cells])
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(escape, row))
    Console().print(table)


def printable(text: str) -> str:
    """Return text on one line: names of files may have line breaks."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _print_plainly(title: str, rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(title)
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())


@contextmanager
def progress(total: int | None, title: str) -> Iterator[Callable[[], Any]]:
    """Show a bar on stderr that advances by one with every call; it only pulses if `total` is None. Without
    rich or a terminal, nothing is shown."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:  # a disabled bar ends with an empty line before rich 14.3
        yield lambda: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def warn(message: str) -> None:
    """Print a warning to stderr."""
    print(f"usf-kernels: warning: {message}", file=sys.stderr)
