"""The operations in plain PyTorch: the oracle for every kernel, and the path on a machine without a GPU.

They are differentiable to any order and take any dtype and strides; nothing is written in place and nothing
is checked (the public functions do that). Inputs that autocast has narrowed are promoted, not refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from usf_kernels.kernels.plain import full_precision, plain_product
from usf_kernels.ops.checks import compute_dtype, promoted_dtype
from usf_kernels.ops.function import Function, additive_gradients
from usf_kernels.ops.matrices import Product, apply_lu, lu_inverse

# ---------------------------------------------------------------------------------------------- couplings


class _AdditiveCoupling(Function):
    @staticmethod
    def forward(x: Tensor, shift: Tensor, split: int, inverse: bool) -> Tensor:
        passive, active = x.split([split, x.shape[1] - split], dim=1)
        active = active - shift if inverse else active + shift
        return torch.cat([passive.to(active.dtype), active], dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, shift, ctx.split, ctx.inverse = inputs
        ctx.dtypes = x.dtype, shift.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_shift = additive_gradients(grad, ctx.split, ctx.inverse)
        return grad_x.to(ctx.dtypes[0]), grad_shift.to(ctx.dtypes[1]), None, None


def additive_coupling(x: Tensor, shift: Tensor, split: int, inverse: bool) -> Tensor:
    return _AdditiveCoupling.run(x, shift, split, inverse)


def masked_additive_coupling(x: Tensor, shift: Tensor, mask: Tensor, inverse: bool) -> Tensor:
    keep = 1 - mask.to(shift.dtype)
    return torch.addcmul(x, keep, shift, value=-1 if inverse else 1)


class _AffineCoupling(Function):
    """Saves x and params only: whatever else the gradients need is cheaper to recompute than to keep."""

    @staticmethod
    def forward(x: Tensor, params: Tensor, split: int, clamp: float, inverse: bool) -> tuple[Tensor, Tensor]:
        out = promoted_dtype(x, params)
        passive, active = x.split([split, x.shape[1] - split], dim=1)
        tanh, shift = _tanh_and_shift(x, params, split)
        log_scale = tanh * (-clamp if inverse else clamp)
        log_det = log_scale.sum(dim=tuple(range(1, x.ndim)))
        active, scale = active.to(shift.dtype), log_scale.exp()
        active = (active - shift) * scale if inverse else torch.addcmul(shift, active, scale)
        return torch.cat([passive.to(out), active.to(out)], dim=1), log_det

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, params, *ctx.options = inputs
        ctx.save_for_backward(x, params)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple:
        gradients = affine_coupling_gradients(*ctx.saved_tensors, *ctx.options, grad, grad_log_det)
        return *gradients, None, None, None


def _tanh_and_shift(x: Tensor, params: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """Return tanh of the scaled raw scales, and the scaled shift: fresh tensors in the compute dtype."""
    wide, active_channels = compute_dtype(x, params), x.shape[1] - split
    raw_scale, shift = params.to(wide).split([active_channels, active_channels], dim=1)
    return torch.tanh(0.1 * raw_scale), 0.1 * shift


def affine_coupling_gradients(
    x: Tensor,
    params: Tensor,
    split: int,
    clamp: float,
    inverse: bool,
    grad: Tensor,
    grad_log_det: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and params, given those of both results of `affine_coupling`. Differentiable again."""
    tanh, shift = _tanh_and_shift(x, params, split)
    wide = shift.dtype
    scale = torch.exp(-clamp * tanh if inverse else clamp * tanh)
    grad_passive, grad_active = grad.to(wide).split([split, x.shape[1] - split], dim=1)
    active, grad_out = x[:, split:].to(wide), grad_active * scale
    # d/ds of y2 = x2 e^s + t is x2 e^s, that of (x2 - t) e^-s is minus itself; that of log_det is 1 or -1.
    grad_scale = torch.addcmul(
        grad_log_det.to(wide).view(-1, *[1] * (x.ndim - 1)), grad_out, active - shift if inverse else active
    )
    slope = torch.addcmul(torch.ones((), dtype=wide, device=x.device), tanh, tanh, value=-1)
    grad_scale = grad_scale * slope * (-0.1 * clamp if inverse else 0.1 * clamp)
    grad_shift = -0.1 * grad_out if inverse else 0.1 * grad_active
    grad_x = torch.cat([grad_passive, grad_out], dim=1)
    return grad_x.to(x.dtype), torch.cat([grad_scale, grad_shift], dim=1).to(params.dtype)


def affine_coupling(
    x: Tensor, params: Tensor, split: int, clamp: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    return _AffineCoupling.run(x, params, split, clamp, inverse)


def coupling_step(
    x: Tensor,
    params: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    split: int,
    clamp: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    out, wide = promoted_dtype(x, params), compute_dtype(x, params, scale)
    per_channel = (-1, *[1] * (x.ndim - 2))
    if inverse and index is not None:
        x = x.index_select(1, torch.argsort(index))
    if inverse and scale is not None:
        x = (x.to(wide) - bias.to(wide).view(per_channel)) / scale.to(wide).view(per_channel)
    if clamp is None:
        y, log_det = additive_coupling(x, params, split, inverse), x.new_empty(0, dtype=wide)
    else:
        y, log_det = affine_coupling(x, params, split, clamp, inverse)
    if not inverse and scale is not None:
        y = y.to(wide) * scale.to(wide).view(per_channel) + bias.to(wide).view(per_channel)
    if not inverse and index is not None:
        y = y.index_select(1, index)
    return y.to(out), log_det


# ------------------------------------------------------------------------------------- LU 1x1 convolution


def lu_conv1x1(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    bias: Tensor | None,
    inverse: bool,
    multiply: Product = plain_product,
) -> Tensor:
    out, wide = promoted_dtype(x, lower, upper, bias), compute_dtype(x, lower, upper, bias)
    x, lower, upper = x.to(wide), lower.to(wide), upper.to(wide)
    bias = None if bias is None else bias.to(wide)
    with full_precision(x):
        if not inverse:
            return apply_lu(lower, upper, x, bias, multiply).to(out)
        if bias is not None:
            x = x - bias.view(-1, *[1] * (x.ndim - 2))
        return multiply(lu_inverse(lower, upper), x, None).to(out)


def lu_log_det(upper: Tensor, positions: int) -> Tensor:
    diagonal = torch.diagonal(upper).to(compute_dtype(upper))
    return positions * diagonal.abs().log().sum()


# --------------------------------------------------------------------------------- products and what follows


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None, multiply: Product = plain_product) -> Tensor:
    out, wide = promoted_dtype(x, matrix), compute_dtype(x, matrix, bias)
    with full_precision(x):
        return multiply(matrix.to(wide), x.to(wide), None if bias is None else bias.to(wide)).to(out)


def linear_squared_norm(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    wide = compute_dtype(x, matrix, bias)
    with full_precision(x):
        z = plain_product(matrix.to(wide), x.to(wide), None if bias is None else bias.to(wide))
    return z.square().sum(dim=1)


def residual_mlp(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    last: Tensor,
    last_bias: Tensor | None,
    bias_map: Tensor | None,
    activation: str,
    inverse: bool,
    multiply: Product = plain_product,
) -> Tensor:
    given = (x, first, first_bias, last, last_bias, bias_map)
    out, wide = promoted_dtype(*given), compute_dtype(*given)
    x, first, first_bias, last, last_bias, bias_map = (None if t is None else t.to(wide) for t in given)
    with full_precision(x):
        hidden = multiply(first, x, first_bias)
        if bias_map is not None:
            hidden = hidden + bias_map
        residual = multiply(last, F.relu(hidden) if activation == "relu" else hidden, last_bias)
    return (x - residual if inverse else x + residual).to(out)


# ------------------------------------------------------------------------------------------------- scores


def squared_norm(z: Tensor) -> Tensor:
    return z.to(compute_dtype(z)).square().sum(dim=1)


def anomaly_map(latents: list[Tensor], size: tuple[int, int], interpolate: str) -> Tensor:
    total = None
    for z in latents:
        channels = z.shape[1]
        if interpolate == "latent":
            anomaly = -torch.expm1(resized_squared_norm(z, size) / (-2 * channels))[:, None]
        else:
            # Bilinear weights sum to one, so 1 - exp(.) may be resized in place of exp(.); expm1 keeps the
            # digits of small scores.
            anomaly = -torch.expm1(squared_norm(z) / (-2 * channels))[:, None]
            anomaly = F.interpolate(anomaly, size=size, mode="bilinear", align_corners=False)
        total = anomaly if total is None else total + anomaly
    return total / len(latents)


def bilinear_weights(n_in: int, n_out: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(i0, i1, w0, w1) of a resize with `align_corners=False`: value = w0 * v[i0] + w1 * v[i1]."""
    position = torch.arange(n_out, device=like.device, dtype=like.dtype)
    position = ((position + 0.5) * (n_in / n_out) - 0.5).clamp(0, n_in - 1)
    i0 = position.floor().long()
    i1 = (i0 + 1).clamp(max=n_in - 1)
    w1 = position - i0
    return i0, i1, 1 - w1, w1


def resized_squared_norm(z: Tensor, size: tuple[int, int]) -> Tensor:
    """`squared_norm(F.interpolate(z, size, mode="bilinear"))` without resizing z: (B, H, W).

    The squared norm of a blend of four corners is a quadratic form in their inner products, so the maps of
    the products of each pixel with itself, with its right and lower neighbours and along the two diagonals
    (which always carry the same weight, hence one map) hold all there is to know about z.
    """
    z = z.to(compute_dtype(z))
    padded = F.pad(z, (0, 1, 0, 1))
    rows, columns, corner = padded[:, :, 1:, :-1], padded[:, :, :-1, 1:], padded[:, :, 1:, 1:]
    own, right, down = squared_norm(z), (z * columns).sum(1), (z * rows).sum(1)
    diagonals = (z * corner + rows * columns).sum(1)

    def blend(pairs: Tensor, neighbours: Tensor, weights: tuple[Tensor, ...], dim: int) -> Tensor:
        """w0^2 p[i0] + w1^2 p[i1] + 2 w0 w1 n[i0]: the quadratic form of two neighbours along `dim`."""
        i0, i1, w0, w1 = weights
        ends = w0 * w0 * pairs.index_select(dim, i0) + w1 * w1 * pairs.index_select(dim, i1)
        return ends + 2 * w0 * w1 * neighbours.index_select(dim, i0)

    x_weights, y_weights = bilinear_weights(z.shape[3], size[1], z), bilinear_weights(z.shape[2], size[0], z)
    within_row = blend(own, right, x_weights, 2)
    with_next_row = blend(down, 0.5 * diagonals, x_weights, 2)
    y_weights = (*y_weights[:2], y_weights[2][:, None], y_weights[3][:, None])
    u = blend(within_row, with_next_row, y_weights, 1)
    return u.clamp(min=0)  # rounding may leave a tiny negative where the corners cancel
