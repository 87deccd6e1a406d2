"""Data loading in which a sample depends on the seed, the epoch and its index, and on nothing else."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


def seed_generators(*key: int) -> None:
    """Seed the global generators of PyTorch, NumPy and Python from a tuple of non-negative integers."""
    seed = _mix(*key)
    _seed_torch(seed)
    np.random.seed(seed)  # noqa: NPY002 - users' augmentation code draws from the global generator
    random.seed(seed)


def _seed_torch(seed: int) -> None:
    """Seed as `torch.manual_seed` does, but only what is in use: for every other kind of device, that keeps
    the seed and a stack trace of each call, which takes longer than to load a sample."""
    torch.default_generator.manual_seed(seed)
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():
            backend.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def _mix(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class SeededSamples(Dataset[Any]):
    """A dataset that seeds every item (epoch, index), so that resuming and workers change nothing."""

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed_generators(self.seed, epoch, index)
        item = self.data[index]
        return item.image if hasattr(item, "image") else item


def epoch_order(
    count: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Return shuffled indices of one process's batches in an epoch, as many full batches in each process.

    With fewer samples than one batch of every process there is one step: the processes share the samples, and
    the first ones are repeated so that all shares are equal.
    """
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    order = torch.randperm(count, generator=generator, device="cpu").tolist()
    steps = count // (batch_size * world_size)
    if steps == 0:
        share = -(-count // world_size)
        order = (order * world_size)[: share * world_size]
        return [order[rank * share : (rank + 1) * share]]
    rows = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return list(rows)[rank : steps * world_size : world_size]


def loader(
    data: Dataset[Any], batches: list[list[int]], *, seed: int, epoch: int, workers: int = 0
) -> DataLoader[Any]:
    """Return a loader of the given batches of `data`, with the samples seeded for this epoch."""
    keys = [[(epoch, index) for index in batch] for batch in batches]
    return DataLoader(SeededSamples(data, seed), batch_sampler=keys, num_workers=workers)
