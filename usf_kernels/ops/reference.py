"""The operations in plain PyTorch: the oracle for every kernel, and the path on a machine without a GPU.

Differentiable to any order, any dtype, any strides; nothing is written in place and nothing is checked
(the public functions do that). Inputs that were autocast to a narrower dtype are promoted, not refused.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from usf_kernels.ops.checks import compute_dtype, promoted_dtype

# ---------------------------------------------------------------------------------------------- couplings


class _AdditiveCoupling(torch.autograd.Function):
    """The gradient of x is that of y as it is, and the shift's a slice of it: nothing is written."""

    generate_vmap_rule = True

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
        grad_shift = grad[:, ctx.split :]
        grad_shift = -grad_shift if ctx.inverse else grad_shift
        return grad.to(ctx.dtypes[0]), grad_shift.to(ctx.dtypes[1]), None, None


def additive_coupling(x: Tensor, shift: Tensor, split: int, inverse: bool) -> Tensor:
    run = _AdditiveCoupling.apply if torch.is_grad_enabled() else _AdditiveCoupling.forward
    return run(x, shift, split, inverse)


def masked_additive_coupling(x: Tensor, shift: Tensor, mask: Tensor, inverse: bool) -> Tensor:
    keep = 1 - mask.to(shift.dtype)
    return torch.addcmul(x, keep, shift, value=-1 if inverse else 1)


class _AffineCoupling(torch.autograd.Function):
    """Keeps x and params only: what else the gradients need is cheaper to compute again than to keep."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, params: Tensor, split: int, clamp: float, inverse: bool) -> tuple[Tensor, Tensor]:
        out = promoted_dtype(x, params)
        passive, active = x.split([split, x.shape[1] - split], dim=1)
        tanh, shift = _tanh_and_shift(x, params, split)
        log_scale = tanh.mul_(-clamp if inverse else clamp)
        log_det = log_scale.sum(dim=tuple(range(1, x.ndim)))
        active, scale = active.to(shift.dtype), log_scale.exp_()
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
    """Fresh tensors in the compute dtype."""
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
    # y2 = x2 e^s + t depends on s by x2 e^s, and (x2 - t) e^-s by minus itself; log_det on s by 1 and -1.
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
    run = _AffineCoupling.apply if torch.is_grad_enabled() else _AffineCoupling.forward
    return run(x, params, split, clamp, inverse)


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
    if inverse and scale is not None:
        x = (x.to(wide) - bias.to(wide).view(per_channel)) / scale.to(wide).view(per_channel)
    if inverse and index is not None:
        x = x.index_select(1, torch.argsort(index))
    if clamp is None:
        y, log_det = additive_coupling(x, params, split, inverse), x.new_empty(0, dtype=wide)
    else:
        y, log_det = affine_coupling(x, params, split, clamp, inverse)
    if not inverse and index is not None:
        y = y.index_select(1, index)
    if not inverse and scale is not None:
        y = y.to(wide) * scale.to(wide).view(per_channel) + bias.to(wide).view(per_channel)
    return y.to(out), log_det


# ------------------------------------------------------------------------------------- LU 1x1 convolution


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast would round the matrix to half precision, and the inverse would no longer be one."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def apply_matrix(matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`matrix @ x + bias` at every position, in x's memory format. All of one dtype."""
    # A product rather than a 1x1 convolution: oneDNN's is up to seven times slower for NCHW where C is no
    # multiple of 16, and cuDNN's rounds float32 to TF32 by default.
    if x.ndim == 2 or x.stride(1) == 1:
        return F.linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)
    matrices = matrix.expand(x.shape[0], *matrix.shape)
    flat = x.flatten(2)
    y = torch.bmm(matrices, flat) if bias is None else torch.baddbmm(bias[:, None], matrices, flat)
    return y.reshape(x.shape[0], matrix.shape[0], *x.shape[2:])


def matrix_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(C, C) gradient of the matrix of `apply_matrix`: outer products of grad and x, summed. One dtype."""
    if x.ndim == 2 or (x.stride(1) == 1 and grad.stride(1) == 1):
        grad, x = (t.movedim(1, -1).flatten(0, -2) for t in (grad, x))
        return grad.mT @ x
    # Image after image into one matrix, where a batched product would write one for each.
    grad, x = grad.flatten(2), x.flatten(2)
    total = grad.new_zeros(grad.shape[1], x.shape[1])
    return torch.addbmm(total, grad, x.mT)


def lu_matrix(lower: Tensor, upper: Tensor) -> Tensor:
    """L U, (C, C). Both of one dtype, of which float32 is the narrowest."""
    upper = torch.triu(upper)
    with full_precision(upper):
        return torch.addmm(upper, torch.tril(lower, -1), upper)


def lu_inverse(lower: Tensor, upper: Tensor) -> Tensor:
    """The inverse of L U, (C, C). Both of one dtype, of which float32 is the narrowest."""
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    if torch.compiler.is_exporting():  # ONNX has no triangular solver
        return triangular_inverse(torch.triu(upper)) @ triangular_inverse(torch.tril(lower, -1) + eye)
    # Two triangular solves against the identity (C columns), then one product. Measured as accurate as
    # solving for the data and up to eight times faster on CPU; and a solve for B*P columns is wrong on
    # CUDA when they are very many.
    matrix = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, matrix, upper=True)


def triangular_inverse(matrix: Tensor) -> Tensor:
    """The inverse of a triangular (C, C), lower or upper, in log2(C) steps of two products.

    Block substitution, for all blocks of a size at once: with X the inverse of the blocks of the diagonal and
    N what is beside them within blocks of twice the size, X - X N X is the inverse of those.
    """
    index = torch.arange(len(matrix), device=matrix.device)
    inverse, size = torch.diag(1 / torch.diagonal(matrix)), 1
    while size < len(matrix):
        block, pair = index // size, index // (2 * size)
        beside = (pair[:, None] == pair) & (block[:, None] != block)
        inverse, size = inverse - inverse @ (matrix * beside) @ inverse, 2 * size
    return inverse


def lu_conv1x1(x: Tensor, lower: Tensor, upper: Tensor, bias: Tensor | None, inverse: bool) -> Tensor:
    out, wide = promoted_dtype(x, lower, upper, bias), compute_dtype(x, lower, upper, bias)
    x, lower, upper = x.to(wide), lower.to(wide), upper.to(wide)
    bias = None if bias is None else bias.to(wide)
    with full_precision(x):
        if not inverse:
            return apply_matrix(lu_matrix(lower, upper), x, bias).to(out)
        if bias is not None:
            x = x - bias.view(-1, *[1] * (x.ndim - 2))
        return apply_matrix(lu_inverse(lower, upper), x, None).to(out)


def lu_log_det(upper: Tensor, positions: int) -> Tensor:
    diagonal = torch.diagonal(upper).to(compute_dtype(upper))
    return positions * diagonal.abs().log().sum()


# --------------------------------------------------------------------------------- products and what follows


def linear_squared_norm(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    wide = compute_dtype(x, matrix, bias)
    with full_precision(x):
        z = apply_matrix(matrix.to(wide), x.to(wide), None if bias is None else bias.to(wide))
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
) -> Tensor:
    given = (x, first, first_bias, last, last_bias, bias_map)
    out, wide = promoted_dtype(*given), compute_dtype(*given)
    x, first, first_bias, last, last_bias, bias_map = (None if t is None else t.to(wide) for t in given)
    with full_precision(x):
        hidden = apply_matrix(first, x, first_bias)
        if bias_map is not None:
            hidden = hidden + bias_map
        residual = apply_matrix(last, F.relu(hidden) if activation == "relu" else hidden, last_bias)
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


def _bilinear(n_in: int, n_out: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source indices and weights of `align_corners=False`: value = w0 * v[i0] + w1 * v[i1]."""
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

    x_weights, y_weights = _bilinear(z.shape[3], size[1], z), _bilinear(z.shape[2], size[0], z)
    within_row = blend(own, right, x_weights, 2)
    with_next_row = blend(down, 0.5 * diagonals, x_weights, 2)
    y_weights = (*y_weights[:2], y_weights[2][:, None], y_weights[3][:, None])
    u = blend(within_row, with_next_row, y_weights, 1)
    return u.clamp(min=0)  # rounding may leave a tiny negative where the corners cancel
