"""Fixtures for all tests: fixed seeds, and fresh memory that is full of NaN for those who ask for it."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # kernels then run in Triton's interpreter; read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

settings.register_profile("repo", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("repo")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def nan_memory():
    """`torch.empty` returns NaN, so a result that reads memory nobody wrote does not pass by luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
