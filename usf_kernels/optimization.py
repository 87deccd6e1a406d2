"""Optimisation of a training run: settings, learning rate, groups of parameters, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from usf_kernels.ops.checks import check_between, check_choice, check_int, check_positive

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # Fabric's precisions that keep the weights in float32


@dataclass(frozen=True)
class Settings:
    """Settings that determine the resulting weights; a run can be resumed only with equal ones.

    They are arguments of `usf_kernels.training.fit`, and three counts: `world_size` of processes, and
    `train_samples` and `validation_samples` of data.

    Raises:
        TypeError: for a count that is not a whole number.
        ValueError: for a setting that is out of range.
    """

    max_epochs: int
    lr: float
    batch_size: int
    weight_decay: float
    seed: int
    patience: int | None
    warmup: float
    clip_norm: float | None
    ema_decay: float | None
    precision: str
    world_size: int
    train_samples: int
    validation_samples: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # checkpoints cannot hold NumPy's numbers
                object.__setattr__(self, name, value.item())
        for name in ("max_epochs", "batch_size", "patience"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.clip_norm is not None:
            check_between("clip_norm", self.clip_norm, 0, math.inf, "(]")
        check_positive("lr", self.lr)
        check_between("weight_decay", self.weight_decay, 0, math.inf, "[)")
        check_int("seed", self.seed, 0)
        check_between("warmup", self.warmup, 0, 1, "[)")
        if self.ema_decay is not None:
            check_between("ema_decay", self.ema_decay, 0, 1)
        check_choice("precision", self.precision, PRECISIONS)

    @property
    def steps(self) -> int:
        """Optimiser steps per epoch."""
        return max(1, self.train_samples // (self.batch_size * self.world_size))

    def learning_rate(self, step: int) -> float:
        """Return the rate at a step: linear warm-up, then half a cosine down to 1 %. There is no state."""
        return learning_rate(step, self.steps * self.max_epochs, lr=self.lr, warmup=self.warmup)


def learning_rate(step: int, steps: int, *, lr: float, warmup: float) -> float:
    """Return the rate at one of `steps`: linear warm-up to `lr`, then half a cosine down to 1 % of it.

    Args:
        step: from 0.
        steps: of the whole training; the rate stays low after them.
        lr: the highest rate.
        warmup: share of the steps spent on reaching it.
    """
    warm = int(warmup * steps)
    if step < warm:
        return lr * (step + 1) / (warm + 1)
    step = min(step, steps)
    return lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the parameters that require a gradient, with weight decay on matrices and kernels only.

    Raises:
        ValueError: when there are none.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and name not in exempt].append(parameter)
    if not any(groups.values()):
        raise ValueError("model: expected parameters that require a gradient, found none")
    decays = {True: weight_decay, False: 0.0}
    return [{"params": p, "weight_decay": decays[decayed]} for decayed, p in groups.items() if p]


@torch.no_grad()
def copy_values(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy the values of `source` into the tensors of the same names in `target`."""
    for name, value in source.items():
        target[name].copy_(value)


@contextmanager
def swapped(average: Mapping[str, Tensor] | None, trainable: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the block with the averaged weights in the model, if there are any."""
    if average is None:
        yield
        return
    own = {name: p.detach().clone() for name, p in trainable.items()}
    copy_values(average, trainable)
    try:
        yield
    finally:
        copy_values(own, trainable)
