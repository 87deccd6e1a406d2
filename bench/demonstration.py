"""`python -m bench.demonstration`: keep the last run of `make demo` for the README, as table and picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bench.machine import RESULTS
from bench.markdown import DOCS, table

RUN = Path("runs") / "demo"
KEPT = RESULTS / "demo.json"
PICTURE = "brick.png"


def read(path: Path = KEPT) -> dict[str, Any]:
    """Read the results of the run: the metrics of each `textures`, and the `seconds` it took."""
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
    return f"{table(header, lines)}\n\nThat run took {results['seconds']:.0f} seconds."


def main() -> None:
    """Copy results and picture of the run."""
    for source, kept in ((RUN / "results.json", KEPT), (RUN / PICTURE, DOCS / "demo.png")):
        shutil.copyfile(source, kept)
        print(f"{source} -> {kept}")
    print("now: python -m bench.report")


if __name__ == "__main__":
    main()
