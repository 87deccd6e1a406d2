"""What the optimiser of a training run is given: settings, learning rate, groups of parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Settings:
    """Whatever decides the weights that come out; a run is resumed only with equal ones."""

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

    @property
    def steps(self) -> int:
        """Optimiser steps per epoch."""
        return max(1, self.train_samples // (self.batch_size * self.world_size))

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to 1 %; depends on the step only, so nothing to save."""
        total = self.steps * self.max_epochs
        warm = int(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that require a gradient, with weight decay on matrices and kernels only.

    Raises:
        ValueError: when there is none.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and name not in exempt].append(parameter)
    if not any(groups.values()):
        raise ValueError("model has no parameter that requires a gradient")
    decays = {True: weight_decay, False: 0.0}
    return [{"params": p, "weight_decay": decays[decayed]} for decayed, p in groups.items() if p]
