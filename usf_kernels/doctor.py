"""Report of what is installed on this machine, and which code each operation runs here."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from usf_kernels import _core

DISTRIBUTION = "usf-kernels"
CONDITIONERS = "conditioners"  # convolutional ones
INFERENCE = "fuse"
NATIVE_OPERATIONS = ("component_tree", "log_nfa", "segment", "regions")


def diagnose() -> dict[str, Any]:
    """Look at the machine without changing it, importing no extra.

    Returns:
        JSON-able: `package`, `python`, `platform`, `torch` (versions), `devices` (names), `triton`
        (`available`, `detail`), `extension` (its file), `extras` (per extra `available` and `packages`, the
        version of each or None), `operations` (which code runs, by name of the operation).
    """
    import torch

    return {
        "package": _version(DISTRIBUTION),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "devices": _devices(torch),
        "triton": _triton(torch),
        "extension": _core.__file__,
        "extras": _extras(),
        "operations": _operations(torch),
    }


def format_report(report: dict[str, Any]) -> str:
    """Format the report as aligned lines."""
    lines = [
        f"usf-kernels  {report['package'] or 'not installed, run from source'}",
        f"Python       {report['python']} on {report['platform']}",
        f"PyTorch      {report['torch']}",
        *(f"device       {name}" for name in report["devices"]),
        f"Triton       {_state(report['triton'])}",
        f"extension    {report['extension']}",
        "",
        "extras",
    ]
    for name, extra in report["extras"].items():
        lacking = [package for package, version in extra["packages"].items() if version is None]
        state = "present" if extra["available"] else f"lacks {', '.join(lacking)}"
        lines.append(f"  {name:<9}  {state}")
    if not report["extras"]:
        lines.append("  unknown: the package is not installed")
    lines += ["", "operations"]
    width = max(map(len, report["operations"]))
    lines += [f"  {name:<{width}}  {code}" for name, code in report["operations"].items()]
    return "\n".join(lines)


def _state(part: dict[str, Any]) -> str:
    return part["detail"] if part["available"] else f"absent: {part['detail']}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def has_bfloat16() -> bool:
    """Whether this processor has arithmetic for bfloat16."""
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _devices(torch: Any) -> list[str]:
    names = []
    for index in range(torch.cuda.device_count()):
        gib = torch.cuda.get_device_properties(index).total_memory / 2**30
        names.append(f"cuda:{index}, {torch.cuda.get_device_name(index)}, {gib:.0f} GiB")
    if torch.backends.mps.is_available():
        names.append("mps")
    units = "with" if has_bfloat16() else "without"
    return [*names, f"cpu, {torch.get_num_threads()} threads, {units} arithmetic for bfloat16"]


def _triton(torch: Any) -> dict[str, Any]:
    if find_spec("triton") is None:
        return {"available": False, "detail": "not installed"}
    packages = metadata.packages_distributions().get("triton", ["triton"])  # it has several names
    version = _version(packages[0]) or "a version that does not say which"
    if not torch.cuda.is_available():
        return {"available": False, "detail": f"{version} is installed, but there is no GPU for it"}
    return {"available": True, "detail": version}


def _extras() -> dict[str, Any]:
    """Return every extra that the installed package declares, with the versions of the packages it needs."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    wanted: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if extra is not None:
            wanted.setdefault(extra[1], []).append(requirement.split(";")[0].strip())

    def packages(extra: str) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for requirement in wanted.get(extra, []):
            name = re.match(r"[\w.-]+", requirement)[0]
            nested = re.match(r"[\w.-]+\[([\w,\s-]+)\]", requirement)
            if name.lower().replace("_", "-") == DISTRIBUTION:
                for inner in nested[1].split(",") if nested else []:
                    found |= packages(inner.strip())
            else:
                found[name] = _version(name)
        return found

    listed = {extra: packages(extra) for extra in wanted}
    return {
        extra: {"available": None not in found.values(), "packages": found} for extra, found in listed.items()
    }


def _operations(torch: Any) -> dict[str, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    from usf_kernels.ops import dispatch, products, row_kernels

    probe = torch.empty(1, device=device)
    operations = {}
    for name in dispatch.operations():
        code = "PyTorch reference"
        if dispatch.runs_triton(name, probe):
            code = "Triton kernel"
        elif device == "cpu" and dispatch.runs_loops(name, probe):
            code = "C++ for float32"
        operations[name] = f"{code} on {device}"
    in_extension = device == "cpu" and products.MULTIPLIES
    operations[CONDITIONERS] = f"{'C++ for float32' if in_extension else 'PyTorch'} on {device}"
    bfloat16 = f", bfloat16 with {'AMX' if products.has_amx() else 'AVX-512'}"
    loops = f"C++ for float32{bfloat16 if products.MULTIPLIES_BFLOAT16 else ''}"
    own = loops if device == "cpu" else "Triton" if row_kernels.runs_kernels(probe) else None
    inference = f"{own} and PyTorch on {device}" if own else f"PyTorch on {device}"
    return operations | {INFERENCE: inference} | dict.fromkeys(NATIVE_OPERATIONS, "C++ on the CPU")
