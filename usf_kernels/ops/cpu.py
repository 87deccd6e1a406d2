"""Operations that the extension runs on the CPU, with gradients: see `usf_kernels.ops.native`.

Second derivatives, and tensors that the extension may not read, use the operations of `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from usf_kernels import _core
from usf_kernels.kernels.plain import full_precision
from usf_kernels.ops import eager, native, products, reference
from usf_kernels.ops.dispatch import differentiates_again, gradients_through, on_cpu
from usf_kernels.ops.function import additive_gradients
from usf_kernels.ops.matrices import apply_matrix
from usf_kernels.ops.rows import rows_of


class _AdditiveCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, split: int, inverse: bool) -> Tensor:
        ctx.options = split, inverse
        return native.shift(x, shift, split, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *additive_gradients(grad, *ctx.options), None, None


@on_cpu("additive_coupling")
def additive_coupling(x: Tensor, shift: Tensor, split: int, inverse: bool) -> Tensor:
    if _records(x, shift):
        return _AdditiveCoupling.apply(x, shift, split, inverse)
    return native.shift(x, shift, split, inverse)


class _AffineCoupling(torch.autograd.Function):
    """Saves x and params only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, params: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        ctx.options = options
        ctx.save_for_backward(x, params)
        return native.couple(x, params, None, None, None, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple:
        x, params = ctx.saved_tensors
        if differentiates_again():

            def plain(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
                return reference.affine_coupling(x, params, *ctx.options)

            grads = gradients_through(plain, (x, params), (grad, grad_log_det))
        elif native.accepts(grad, grad_log_det, x, params):
            grads = native.couple_gradient(grad, grad_log_det, x, params, None, None, *ctx.options)[:2]
        else:
            grads = reference.affine_coupling_gradients(x, params, *ctx.options, grad, grad_log_det)
        return *grads, None, None, None


@on_cpu("affine_coupling")
def affine_coupling(
    x: Tensor, params: Tensor, split: int, clamp: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    if clamp > native.LARGEST_CLAMP:
        return reference.affine_coupling(x, params, split, clamp, inverse)
    if _records(x, params):
        return _AffineCoupling.apply(x, params, split, clamp, inverse)
    return native.couple(x, params, None, None, None, split, clamp, inverse)


@on_cpu("coupling_step")
def coupling_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, inverse = arguments
    return reference.coupling_step(*arguments) if inverse else eager.gather_step(*given)


class _SquaredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return native.squared_norm(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        if differentiates_again() or not native.accepts(grad, z):
            return 2 * grad.unsqueeze(1) * z
        return native.squared_norm_gradient(grad, z)


@on_cpu("squared_norm")
def squared_norm(z: Tensor) -> Tensor:
    return _SquaredNorm.apply(z) if _records(z) else native.squared_norm(z)


@on_cpu("anomaly_map")
def anomaly_map(latents: Sequence[Tensor], size: tuple[int, int], interpolate: str) -> Tensor:
    if _records(*latents):
        return reference.anomaly_map(latents, size, interpolate)
    batch, latent = len(latents[0]), interpolate == "latent"
    out = latents[0].new_empty(batch, 1, *size)
    if out.numel() > 0:
        maps = [_pixel_products(z) if latent else native.squared_norm(z) for z in latents]
        scales = [(m.data_ptr(), *z.shape[1:]) for m, z in zip(maps, latents, strict=True)]
        _core.anomaly_map(scales, latent, (batch, *size), out.data_ptr(), native.threads_over(out))
    return out


def _pixel_products(z: Tensor) -> Tensor:
    """Inner products of pixels with themselves and with neighbours, (4, B, H, W): csrc/anomaly_map.hpp."""
    batch, channels, height, width = z.shape
    rows, out = rows_of(z, z.dtype, copy=False), z.new_empty(4, batch, height, width)
    sizes = batch, height, width, channels
    _core.pixel_products(rows.data_ptr(), sizes, out.data_ptr(), native.threads_over(z))
    return out


if products.MULTIPLIES:  # `apply_matrix` uses the extension where nothing is recorded
    for name in ("lu_conv1x1", "linear", "residual_mlp"):
        on_cpu(name)(partial(getattr(reference, name), multiply=apply_matrix))


@on_cpu("linear_squared_norm")
def linear_squared_norm(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    with full_precision(x):
        return squared_norm(apply_matrix(matrix, x, bias))


def _records(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
