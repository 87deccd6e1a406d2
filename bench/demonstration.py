"""`python -m bench.demonstration`: keep the last run of `make demo` for the README, as table and picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from bench.machine import RESULTS, device_name
from bench.markdown import DOCS, table
from usf_kernels.files import write_json

RUN = Path("runs") / "demo"
KEPT = RESULTS / "demo.json"
PICTURE = "brick.png"


def read(path: Path = KEPT) -> dict[str, Any]:
    """Read the results of the run: the metrics of each `textures`, the `seconds` it took, and on which
    `device`."""
    return json.loads(path.read_text(encoding="utf-8"))


def section(results: dict[str, Any]) -> str:
    """Return a table with one line per texture, the baseline in brackets, and how long the run took."""
    header = (
        "texture",
        "pixel AUROC",
        "image AUROC",
        "AUPRO",
        "mIoU automatic / oracle",
        "false alarms per clean image",
    )
    lines = [
        (
            name,
            f"{found['pixel_auroc']:.3f} ({found['baseline_pixel_auroc']:.3f})",
            f"{found['image_auroc']:.3f} ({found['baseline_image_auroc']:.3f})",
            f"{found['aupro']:.3f}",
            f"{found['miou_automatic']:.3f} / {found['miou_oracle']:.3f}",
            f"{found['false_alarms_per_clean_image']:.2f}",
        )
        for name, found in results["textures"].items()
    ]
    took = f"That run took {results['seconds']:.0f} seconds on {results['device']}."
    return f"{table(header, lines)}\n\n{took}"


def main() -> None:
    """Copy results and picture of the run, which was on this machine."""
    results = read(RUN / "results.json") | {"device": device_name(torch.device("cpu"))}
    write_json(KEPT, results)
    shutil.copyfile(RUN / PICTURE, DOCS / "demo.png")
    print("now: python -m bench.report")


if __name__ == "__main__":
    main()
