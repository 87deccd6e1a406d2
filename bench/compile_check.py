"""Compiles every kernel in every configuration for GPUs that need not be here, and reads the machine code.

    python -m bench.compile_check [--target sm_90] [--only coupling] [--output bench/results/compile_sm90.csv]

Prints a table of registers, spills, shared memory, the widest load and store of global memory and tensor-core
instructions. Fails on a spill, on a kernel declared to need vectors that moves less than 16 bytes at a time,
and on one declared to need tensor cores that does not use them. See `usf_kernels.kernels.launch.Case`.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from usf_kernels import kernels
from usf_kernels.kernels.launch import Case, Launch, record

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Code(NamedTuple):
    """Properties of a kernel's machine code. `spills` counts instructions on NVIDIA, registers on AMD."""

    registers: int
    spills: int
    shared_bytes: int
    load_bytes: int
    store_bytes: int
    tensor_cores: int


def compile_cases(only: Sequence[str] = ("",)) -> Iterator[Case]:
    """Yield the cases of all files in `usf_kernels.kernels` whose "file: name" contains one of `only`."""
    for module in sorted(pkgutil.iter_modules(kernels.__path__), key=lambda m: m.name):
        loaded = importlib.import_module(f"usf_kernels.kernels.{module.name}")
        for case in getattr(loaded, "COMPILE_CASES", ()):
            name = f"{module.name}: {case.name}"
            if any(part in name for part in only):
                yield case._replace(name=name)


def launches_of(case: Case, target: GPUTarget) -> list[Launch]:
    """Return what a case would launch on a target, with every candidate of the tuner."""
    capability = target.arch if target.backend == "cuda" else 0
    with record(target.warp_size, capability) as launches:
        case.call()
    return launches


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """Compile a kernel as Triton would at this launch on a device of this kind."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def inspect(compiled: Any, target: GPUTarget) -> Code:
    """Read the machine code."""
    if target.backend == "hip":
        return _inspect_amd(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _inspect_nvidia(compiled.asm["cubin"], compiled.metadata.shared)


def _inspect_nvidia(binary: bytes, shared_bytes: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    return Code(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared_bytes=shared_bytes,
        load_bytes=_widest(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]+", code)),
        store_bytes=_widest(re.findall(r"\bSTG\.[\w.]+", code)),
        tensor_cores=len(re.findall(r"\b(?:[HQ]G?MMA|UTC\w*MMA)\b", code)),
    )


def _widest(instructions: list[str]) -> int:
    """Return the bytes of the widest instruction; one without a width moves four, U8 and U16 fewer."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    found = ({widths[part] for part in name.split(".") if part in widths} or {4} for name in instructions)
    return max((max(width) for width in found), default=0)


def _inspect_amd(code: str, shared_bytes: int) -> Code:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    def widest(kind: str) -> int:
        names = re.findall(rf"\b(?:global|buffer)_{kind}_(\w+)", code)
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}
        return max((sizes.get(name, 1) for name in names), default=0)

    return Code(
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count") + field("sgpr_spill_count"),
        shared_bytes=shared_bytes,
        load_bytes=widest("load"),
        store_bytes=widest("store"),
        tensor_cores=len(re.findall(r"\bv_mfma_", code)),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def complaints(code: Code, need: str | None) -> list[str]:
    """Describe what is wrong with the code, if anything."""
    wrong = []
    if code.spills:
        wrong.append("spills registers")
    if need in ("vectors", "vector loads") and code.load_bytes < 16:
        wrong.append("loads less than 16 bytes at a time")
    if need in ("vectors", "vector stores") and code.store_bytes < 16:
        wrong.append("stores less than 16 bytes at a time")
    if need == "tensor cores" and not code.tensor_cores:
        wrong.append("does not use tensor cores")
    return wrong


def check(case: Case, target_name: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each kernel and configuration of a case; `problem` is empty if all is well."""
    target, seen = TARGETS[target_name], set()
    for launch in launches_of(case, target):
        name = launch.kernel.__name__
        shown = " ".join(f"{k}={v}" for k, v in launch.options.items() if not isinstance(v, bool) or v)
        if (name, shown) in seen:
            continue
        seen.add((name, shown))
        code = inspect(compile_for(launch, target), target)
        problem = "; ".join(complaints(code, case.needs.get(name)))
        yield (
            {"target": target_name, "case": case.name, "kernel": name, "options": shown}
            | code._asdict()
            | {"problem": problem}
        )


def main(arguments: list[str] | None = None) -> int:
    """Compile, print and write the rows; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--only", action="append", help="cases whose name contains this; default: all")
    parser.add_argument("--output", type=Path, help="write the rows here as CSV")
    options = parser.parse_args(arguments)
    rows = []
    for case in compile_cases(options.only or [""]):
        for target in options.target or TARGETS:
            for row in check(case, target):
                rows.append(row)
                print(*row.values(), sep="\t", flush=True)
    if options.output is not None:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    bad = [row for row in rows if row["problem"]]
    print(f"{len(rows)} kernels compiled, {len(bad)} with a problem")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
