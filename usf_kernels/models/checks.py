"""Argument checks shared by the models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from usf_kernels.models.conditioners import CONVOLUTIONS
from usf_kernels.ops.checks import check_float, check_int


def check_trainable(model: object, method: str) -> None:
    """Raise TypeError if `model` is an inference form: `method` is for training only."""
    if model.fused:
        raise TypeError(f"{method}: expected a model to train, found its inference form (`fuse`)")


def check_not_fused_to(model: object, dtype: torch.dtype | None) -> None:
    """Raise TypeError if `model` is an inference form already and a dtype is requested."""
    if model.fused and dtype is not None:
        raise TypeError(f"dtype: expected None, since an inference form keeps its own, found {dtype}")


def check_sample_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return a sample's shape (C, *spatial) as a tuple; raise TypeError or ValueError for anything else."""
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if len(sizes) - 1 not in (0, *CONVOLUTIONS):
        raise ValueError(f"shape: expected (C, *spatial) with at most 3 spatial sizes, found {sizes}")
    return tuple(check_int(f"shape[{i}]", size, 1) for i, size in enumerate(sizes))


def check_samples(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless x is floating and of shape (B, *shape)."""
    check_float(name, x)
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name}: expected shape (B, {', '.join(map(str, shape))}), found {tuple(x.shape)}")
