"""The machine: its name, what is installed, and how fast it copies and multiplies."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.measure import least_seconds
from bench.subject import LIMIT, Case, Provider, Subject
from usf_kernels.doctor import has_bfloat16
from usf_kernels.ops.products import has_amx

PACKAGES = ("torch", "triton", "numpy", "anomalib", "FrEIA", "timm", "higra", "scikit-image", "maxtree")
RESULTS = Path(__file__).parent / "results"
CPU_INFO = Path("/proc/cpuinfo")
COPY = "copy"
SIDE = {"cpu": 2048, "cuda": 8192}  # side of the matrices
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes


def environment(device: torch.device) -> dict[str, str]:
    """Return the columns that all rows of a run share."""
    versions = " ".join(f"{name}={_version(name)}" for name in PACKAGES if _version(name))
    try:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        commit = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "versions": f"python={platform.python_version()} {versions}",
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
    }


def result_files(pattern: str = "*.csv", folder: Path = RESULTS) -> list[Path]:
    """Return the files of results in the order in which they are shown: cpu.csv first."""
    return sorted(folder.glob(pattern), key=lambda path: (path.name != "cpu.csv", path.name))


def device_name(device: torch.device) -> str:
    """Return the maker's name of a device; for a processor also the vectors that torch uses, and AMX.

    Hypervisors hide the number of a processor's model: then its family and model are in the name.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        first = CPU_INFO.read_text().split("\n\n")[0]
        info = dict(re.findall(r"^(.+?)\s*: (.*)$", first, re.MULTILINE))
        name = info["model name"]
    except (OSError, KeyError):
        info, name = {}, platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)", "", name).strip()
    numbered = re.search(r"\d", re.sub(r"@.*|version.*", "", name))
    if {"cpu family", "model"} <= info.keys() and not numbered:
        name = f"{name} family {info['cpu family']} model {info['model']}"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{', AMX' if has_amx() else ''}"


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the dtypes to measure: bfloat16 only with arithmetic for it; nobody would use it without."""
    known = device.type != "cpu" or has_bfloat16()
    return (torch.float32, torch.bfloat16) if known else (torch.float32,)


def results_file(device: torch.device) -> Path:
    """Return the file for the rows of a device."""
    name = "cpu" if device.type == "cpu" else re.sub(r"\W+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{name}.csv"


def parallel_section(device: torch.device) -> Callable[[], object] | None:
    """Return an operation that does little more than wake the other cores and wait; None without other cores.

    Under a hypervisor that moves its guests, two cores share a cache at one moment and not at the next. When
    they do not, a section takes half as long again, and so do programs of many short sections, while a large
    copy is faster. Nothing else in the guest shows it.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return None
    return partial(torch.ones(40_000).mul_, 1.0)  # a little more than torch does on one thread


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _providers(device: torch.device) -> Sequence[Provider]:
    """Return a copy too large for caches, and a matrix product in each precision."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    providers = [
        Provider(COPY, partial(target.copy_, source), LIMIT, gigabytes=2e-9 * COPIED[device.type]),
    ]
    side = SIDE[device.type]
    for dtype in dtypes(device):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        word = str(dtype).removeprefix("torch.")
        product = partial(torch.mm, a, b)
        if device.type == "cpu":  # convolutions may use vectors that the library for products does not
            image = a.view(1, side, 1, side).movedim(-1, 1)
            product = min(product, partial(F.conv2d, image, b[:, :, None, None]), key=least_seconds)
        providers.append(Provider("matrix product", product, LIMIT, word, gigaflops=2e-9 * side**3))
    return providers


SUBJECT = Subject(
    name="machine",
    about="what bounds everything else: copying memory, multiplying matrices",
    cases=(Case("limits", _providers, seconds=3.0),),
)
