"""Anomaly scores from latents: squared norms and maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from usf_kernels.kernels.layout import empty_output
from usf_kernels.ops import reference
from usf_kernels.ops.checks import check_choice, check_features, check_size, compute_dtype
from usf_kernels.ops.dispatch import (
    define,
    differentiates_again,
    gradients_through,
    implementation,
    kernel,
)
from usf_kernels.ops.function import Function
from usf_kernels.ops.map_gradients import anomaly_map_gradients


def squared_norm(z: Tensor, *, impl: str | None = None) -> Tensor:
    """Sum of squares over channels; chi-square with C degrees of freedom where z is standard normal.

    Args:
        z: (B, C, *spatial) latents.
        impl: None picks by device; "reference" or "triton" force one.

    Returns:
        (B, *spatial), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
        RuntimeError: an `impl` that cannot run here.
    """
    check_features("z", z)
    return implementation("squared_norm", impl, z)(z)


def anomaly_map(
    latents: Tensor | Sequence[Tensor],
    size: int | tuple[int, int],
    *,
    interpolate: str = "likelihood",
    impl: str | None = None,
) -> Tensor:
    """Anomaly map of latents at one or several scales: `1 - mean_l exp(-u_l / (2 C_l))`, in [0, 1].

    `u_l = sum_k z_l^2`, resized bilinearly (align_corners=False) to `size`. U-Flow (Tailanian et al.,
    arXiv:2211.12353).

    Args:
        latents: one tensor (B, C, h, w), or a sequence of them; C, h and w may differ, B may not.
        size: (H, W) of the map, or one int for a square.
        interpolate: "likelihood" resizes exp(-u / 2C), which is what the authors' code does; "latent" is the
            printed equation, where z itself is resized before it is squared. The second is computed exactly
            from inner products of neighbouring pixels, which must not overflow; no C x H x W tensor is made.
        impl: None picks by device; "reference" or "triton" force one.

    Returns:
        (B, 1, H, W), float32 (float64 where a latent is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
        RuntimeError: an `impl` that cannot run here.
    """
    if not isinstance(latents, Iterable):
        raise TypeError(f"latents: expected tensors or one tensor, found {type(latents).__name__}")
    latents = [latents] if isinstance(latents, Tensor) else list(latents)
    if not latents:
        raise ValueError("latents: expected at least one tensor, found an empty sequence")
    for i, z in enumerate(latents):
        check_features(f"latents[{i}]", z)
        if z.ndim != 4 or 0 in z.shape[1:]:
            raise ValueError(
                f"latents[{i}]: expected shape (B, C, h, w), none of C, h, w 0, found {tuple(z.shape)}"
            )
        batch = latents[0].shape[0]
        if z.shape[0] != batch:
            raise ValueError(f"latents[{i}]: expected batch size {batch} as latents[0], found {z.shape[0]}")
    height_width = check_size(size)
    check_choice("interpolate", interpolate, ("likelihood", "latent"))
    if impl is None and latents[0].is_cpu:  # the extension's loops take float32
        wide = compute_dtype(*latents)
        latents = [z.to(wide) for z in latents]
    return implementation("anomaly_map", impl, *latents)(latents, height_width, interpolate)


# ------------------------------------------------------------------------------------------- as torch ops


def _norm_fake(z: Tensor) -> Tensor:
    return z.new_empty((z.shape[0], *z.shape[2:]), dtype=torch.float32)


def _norm_backward_fake(grad: Tensor, z: Tensor) -> Tensor:
    return empty_output(z, z.dtype)


def _map_fake(latents: list[Tensor], size: list[int], latent: bool) -> Tensor:
    return latents[0].new_empty((latents[0].shape[0], 1, *size), dtype=torch.float32)


_norm_op = define("squared_norm(Tensor z) -> Tensor", _norm_fake, "score.squared_norm")
_norm_backward_op = define(
    "squared_norm_backward(Tensor grad, Tensor z) -> Tensor",
    _norm_backward_fake,
    "score.squared_norm_backward",
)
_map_op = define(
    "anomaly_map(Tensor[] latents, SymInt[] size, bool latent) -> Tensor",
    _map_fake,
    "anomaly_map.anomaly_map",
)


class _SquaredNorm(Function):
    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return _norm_op(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        if differentiates_again():
            return gradients_through(reference.squared_norm, (z,), (grad,))[0]
        return _norm_backward_op(grad, z)


class _AnomalyMap(Function):
    @staticmethod
    def forward(size: tuple[int, int], latent: bool, *latents: Tensor) -> Tensor:
        return _map_op(latents, size, latent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.options, latents = inputs[:2], inputs[2:]
        ctx.save_for_backward(*latents)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, None, *anomaly_map_gradients(grad, ctx.saved_tensors, *ctx.options)


kernel("squared_norm")(_SquaredNorm.run)


@kernel("anomaly_map")
def _anomaly_map(latents: Sequence[Tensor], size: tuple[int, int], interpolate: str) -> Tensor:
    latent = interpolate == "latent"
    # Dynamo counts a Function's arguments to tell whether it takes a context, and here their number varies:
    # without gradients it must not see a Function. (Not compiled, requires_grad says nothing within vmap.)
    compiled_away = torch.compiler.is_compiling() and not any(z.requires_grad for z in latents)
    if compiled_away or not torch.is_grad_enabled():
        return _map_op(latents, size, latent)
    return _AnomalyMap.apply(size, latent, *latents)
