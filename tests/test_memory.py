"""Pages that are written for the first time: fewer of them, and results as before."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import usf_kernels as usf
from usf_kernels.memory import LARGE, in_huge_pages
from usf_kernels.ops import native

resource = pytest.importorskip("resource")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

ROUNDS = """
import resource, sys
import torch
import usf_kernels as usf

if sys.argv[1] == "kept":
    assert usf.keep_freed_memory()
def run():
    x = torch.ones(3 << 22)  # 48 MB
    return (x + 1).sum()
for _ in range(3):
    run()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    assert run() == 2 * (3 << 22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@glibc
def test_freed_memory_is_kept():
    faults = {}
    for word in ("kept", "returned"):
        done = subprocess.run(
            [sys.executable, "-c", ROUNDS, word], capture_output=True, text=True, check=True, timeout=120
        )
        faults[word] = int(done.stdout)
    if faults["returned"] < 1000:
        pytest.skip("this system has few faults anyway: its pages are large")
    # Not 0: an aligned block may need more than one that was freed.
    assert faults["kept"] < faults["returned"] / 4


def test_where_there_is_nothing_to_set(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert not usf.keep_freed_memory()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", [0, 1, LARGE // 4, LARGE + 3])
def test_large_results_are_the_same_tensors(numbers, dtype):
    x = torch.arange(numbers, dtype=torch.float32).to(dtype)
    assert in_huge_pages(x) is x
    assert torch.equal(x, torch.arange(numbers, dtype=torch.float32).to(dtype))


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no huge pages")
def test_large_results_take_few_faults():
    z, grad = torch.randn(1, 64, 512, 512), torch.ones(1, 512, 512)  # 64 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    out = native.squared_norm_gradient(grad, z)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert torch.equal(out, 2 * z)
    assert faults < out.nbytes // 4096 // 4
