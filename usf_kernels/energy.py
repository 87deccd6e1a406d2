"""Squared norms of latents per position, the input of the a-contrario test and its calibration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from usf_kernels.ops.checks import check_float, check_int, check_unmasked
from usf_kernels.ops.score import squared_norm

LARGEST_MAP = 2**30  # positions; the component tree has 32-bit indices


Array = Tensor | np.ndarray


def read_energies(latents: Array | Sequence[Array]) -> tuple[list[Tensor], list[int | None]]:
    """Return the squared norms of each scale and the number of channels that each was summed over.

    Args:
        latents: one tensor or a list or tuple of them, one per scale, float32, float64, float16 or bfloat16,
            on one device; or NumPy arrays. (B, C, H, W) are latents; (B, H, W) are squared norms already. B
            may be 0.

    Returns:
        Squared norms (B, H, W), detached, on the CPU, C-contiguous, finite and not negative, float32 (float64
        where a scale is float64); and C per scale, None where squared norms were given.

    Raises:
        TypeError, ValueError: for anything else, with the name of the argument and what was found.
    """
    scales = [latents] if isinstance(latents, Array) else latents
    if not isinstance(scales, (list, tuple)):
        raise TypeError(
            f"latents: expected a tensor or a list or tuple of them, found {type(latents).__name__}"
        )
    if not scales:
        raise ValueError("latents: expected at least one tensor, found an empty sequence")
    scales = [_tensor(f"latents[{i}]", z) if isinstance(z, np.ndarray) else z for i, z in enumerate(scales)]
    energies, channels = [], []
    for i, z in enumerate(scales):
        name = f"latents[{i}]"
        check_float(name, z)
        if z.ndim not in (3, 4) or 0 in z.shape[1:]:
            raise ValueError(
                f"{name}: expected latents (B, C, H, W) or squared norms (B, H, W), none of C, H, W zero, "
                f"found shape {tuple(z.shape)}"
            )
        if z.shape[-2] * z.shape[-1] > LARGEST_MAP:
            raise ValueError(
                f"{name}: expected at most {LARGEST_MAP} positions, found shape {tuple(z.shape)}"
            )
        if len(z) != len(scales[0]):
            raise ValueError(
                f"{name}: expected the batch size {len(scales[0])} of latents[0], found {len(z)}"
            )
        if z.device != scales[0].device:
            raise ValueError(
                f"{name}: expected the device {scales[0].device} of latents[0], found {z.device}"
            )
        channels.append(z.shape[1] if z.ndim == 4 else None)
        energies.append(_energy(name, z.detach()))
    return energies, channels


def _tensor(name: str, z: np.ndarray) -> Tensor:
    check_unmasked(name, z)
    if z.dtype not in (np.float32, np.float64, np.float16) or not z.dtype.isnative:
        raise TypeError(f"{name}: expected float32, float64 or float16, found {z.dtype} ({z.dtype.str})")
    # Copy read-only memory, which PyTorch would warn about.
    return torch.from_numpy(np.require(z, requirements="CA") if z.flags.writeable else z.copy(order="C"))


def _energy(name: str, z: Tensor) -> Tensor:
    u = squared_norm(z) if z.ndim == 4 else z.to(torch.promote_types(z.dtype, torch.float32))
    u = u.cpu().contiguous()
    if u.numel() == 0:
        return u
    low, high = (bound.item() for bound in u.aminmax())  # NaN in either if there is one
    if not (low > -float("inf") and high < float("inf")):
        where = "" if z.ndim == 3 else " in the squared norms: the latents hold it, or overflow when squared"
        raise ValueError(f"{name}: expected finite values, found NaN or infinity{where}")
    if low < 0:
        raise ValueError(f"{name}: expected squared norms (B, H, W), found a negative value, {low:.6g}")
    return u


def check_channels(channels: Sequence[int] | int, scales: int) -> tuple[int, ...]:
    """Return `channels` as one positive int per scale; raise for anything else."""
    if isinstance(channels, np.ndarray):
        channels = channels.tolist()
    values = channels if isinstance(channels, (list, tuple)) else (channels,)
    if len(values) != scales:
        raise ValueError(f"channels: expected {scales} numbers, one per scale, found {channels!r}")
    for i, value in enumerate(values):
        check_int(f"channels[{i}]", value, 1)
    return tuple(int(value) for value in values)
