"""Kernels compiled for GPUs that are not here: a few on one of them, in a process without the interpreter."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from bench.compile_check import TARGETS, Code, _inspect_amd, _widest, compile_cases, complaints, launches_of

ROOT = Path(__file__).parent.parent


ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def test_a_few_kernels_compile_well(tmp_path):
    output, names = (
        tmp_path / "rows.csv",
        ["masked: masked, bfloat16, contiguous", "outer: outer, bfloat16, contiguous"],
    )
    command = [sys.executable, "-m", "bench.compile_check", "--target", "sm_90", "--output", output]
    command += [word for name in names for word in ("--only", name)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(output.open()))
    assert {row["kernel"] for row in rows} >= {"masked_kernel"}
    for row in rows:
        assert int(row["registers"]) > 0
        assert int(row["load_bytes"]) == 16


EVERY_LAUNCH = """
import random
from bench.compile_check import TARGETS, compile_cases, create_function_from_signature
from bench.compile_check import launches_of, make_backend
from usf_kernels.kernels.compiled import inspected

random.seed(0)
backend, found = make_backend(TARGETS["sm_90"]), {}

def another(value):
    if isinstance(value, tuple):
        return tuple(map(another, value))
    return random.choice((1, 2, 8, 16, 48, 2**31 + 16, value)) if isinstance(value, int) else value

for case in compile_cases():
    for kernel, arguments, options in launches_of(case, TARGETS["sm_90"]):
        names = [parameter.name for parameter in kernel.params[len(arguments):]]
        assert set(names) == set(options) - {"num_warps", "num_stages"}, (kernel.__name__, names)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        for _ in range(30):
            changed = tuple(map(another, arguments))
            bound, specialization, _ = bind(*changed, **options)
            assert list(bound.values()) == [*changed, *(options[name] for name in names)]
            kinds = []
            inspected(changed, kinds)
            key = kernel.__name__, *options.items(), *kinds
            assert found.setdefault(key, specialization) == specialization, (kernel.__name__, changed)
print(len(found))
"""


def test_a_compiled_kernel_is_found_again_only_for_what_it_was_compiled_for():
    """`launch` skips Triton's own look at the arguments: its key must tell apart whatever Triton does."""
    command = [sys.executable, "-c", EVERY_LAUNCH]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert int(done.stdout or 0) > 100, done.stdout + done.stderr


def test_every_case_launches_and_every_need_is_of_a_kernel():
    launched, needed = set(), set()
    for case in compile_cases():
        names = {launch.kernel.__name__ for launch in launches_of(case, TARGETS["sm_90"])}
        assert names, case.name
        launched |= names
        needed |= set(case.needs)
    assert needed <= launched


def test_the_committed_table_has_every_case_and_no_problem():
    rows = list(csv.DictReader((ROOT / "bench" / "results" / "compile_sm90.csv").open()))
    assert {row["case"] for row in rows} == {case.name for case in compile_cases()}
    assert not any(row["problem"] for row in rows)


def test_complaints():
    good = Code(registers=64, spills=0, shared_bytes=0, load_bytes=16, store_bytes=16, tensor_cores=4)
    for need in (None, "vectors", "vector loads", "vector stores", "tensor cores"):
        assert complaints(good, need) == []
    assert complaints(good._replace(spills=2), None) == ["spills registers"]
    narrow = good._replace(load_bytes=4)
    assert (
        complaints(narrow, "vectors")
        == complaints(narrow, "vector loads")
        == ["loads less than 16 bytes at a time"]
    )
    assert complaints(narrow, "vector stores") == []
    assert complaints(good._replace(tensor_cores=0), "tensor cores") == ["does not use tensor cores"]


def test_widths_of_instructions():
    assert _widest(["LDG.E.128.CONSTANT", "LDG.E"]) == 16
    assert _widest(["LDG.E.U16", "LDG.E.64.CONSTANT"]) == 8
    assert _widest(["STG.E.U16"]) == 2
    assert _widest([]) == 0
    metadata = ".vgpr_count: 12\n.vgpr_spill_count: 1\n.sgpr_spill_count: 0\n"
    assert _inspect_amd(metadata + "global_load_dwordx4 v[0:3]\nbuffer_store_short v1\n", 7) == Code(
        12, 1, 7, 16, 2, 0
    )
