"""Fixtures for all tests: fixed seeds, and fresh memory that is full of NaN for those who ask for it."""

import contextlib
import multiprocessing
import os
import sys
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # kernels then run in Triton's interpreter; read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


from hypothesis import settings

settings.register_profile("repo", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("repo")


def _numbers(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


def _interpreter_fails() -> bool:
    """Loops in the interpreter of Triton before 3.8 read their bounds in a way that NumPy 2.4 forbids."""
    try:
        old = _numbers(version("triton")) < (3, 8)
    except PackageNotFoundError:
        return False
    return old and _numbers(np.__version__) >= (2, 4) and os.environ.get("TRITON_INTERPRET") == "1"


if _interpreter_fails():
    collect_ignore_glob = ["test_kernels_*.py"]


def pytest_report_header():
    if _interpreter_fails():
        return (
            "test_kernels_*.py are left out: Triton before 3.8 interprets kernels with NumPy before 2.4 only"
        )
    return None


@pytest.fixture(autouse=True)
def _fresh():
    """Fixed seeds, and launchers that decide anew: tests change what they decide by."""
    torch.manual_seed(0)
    replay = sys.modules.get("usf_kernels.kernels.replay")
    if replay is not None:
        replay.forget()


@pytest.fixture
def nan_memory():
    """`torch.empty` returns NaN, so a result that reads memory nobody wrote does not pass by luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def offline(monkeypatch):
    """timm's models have random weights: anomalib's Uflow asks for pretrained ones whatever it is told."""
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **{**k, "pretrained": False}))


@pytest.fixture(scope="session")
def toy_run():
    """Model and history of the default toy run when nothing disturbs it."""
    from toy import train

    return train()


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have imported lightning already, which takes seconds."""
    if sys.platform == "win32":
        pytest.skip("needs a fork server and SIGKILL")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy", "lightning.fabric", "lightning.pytorch.utilities.seed"])
    return context


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs are recordings on the CPU, where anything may be captured; the list of those made."""
    from graphs import Nothing, Recording

    made = []

    def graph():
        made.append(Recording())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda recording, *arguments, **options: recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *arguments: None, raising=False)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: contextlib.nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for module in ("nn.capture", "nn.captured_gradients", "training"):
        monkeypatch.setattr(f"usf_kernels.{module}.check_capturable", lambda name, devices: None)
    return made
