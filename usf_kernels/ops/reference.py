"""The operations in plain PyTorch: the oracle for every kernel, and the path on a machine without a GPU.

Differentiable to any order, any dtype, any strides; nothing is written in place and nothing is checked
(the public functions do that). Inputs that were autocast to a narrower dtype are promoted, not refused.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from usf_kernels.ops.checks import compute_dtype, promoted_dtype

# ---------------------------------------------------------------------------------------------- couplings


def additive_coupling(x: Tensor, shift: Tensor, split: int, inverse: bool) -> Tensor:
    passive, active = x.split([split, x.shape[1] - split], dim=1)
    active = active - shift if inverse else active + shift
    return torch.cat([passive.to(active.dtype), active], dim=1)


def masked_additive_coupling(x: Tensor, shift: Tensor, mask: Tensor, inverse: bool) -> Tensor:
    keep = 1 - mask.to(shift.dtype)
    return torch.addcmul(x, keep, shift, value=-1 if inverse else 1)


def affine_coupling(
    x: Tensor, params: Tensor, split: int, clamp: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    out, wide = promoted_dtype(x, params), compute_dtype(x, params)
    active_channels = x.shape[1] - split
    passive, active = x.split([split, active_channels], dim=1)
    raw_scale, shift = (0.1 * params.to(wide)).split([active_channels, active_channels], dim=1)
    log_scale = clamp * torch.tanh(raw_scale)
    active = active.to(wide)
    if inverse:
        active, log_scale = (active - shift) * torch.exp(-log_scale), -log_scale
    else:
        active = active * torch.exp(log_scale) + shift
    y = torch.cat([passive.to(out), active.to(out)], dim=1)
    return y, log_scale.sum(dim=tuple(range(1, x.ndim)))


# ------------------------------------------------------------------------------------- LU 1x1 convolution


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast would round the matrix to half precision, and the inverse would no longer be one."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _apply_matrix(matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`matrix @ x + bias` at every position, in x's memory format. All of one dtype."""
    # A product rather than a 1x1 convolution: oneDNN's is up to seven times slower for NCHW where C is no
    # multiple of 16, and cuDNN's rounds float32 to TF32 by default.
    if x.ndim == 2 or x.stride(1) == 1:
        return F.linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)
    matrices = matrix.expand(x.shape[0], *matrix.shape)
    flat = x.flatten(2)
    y = torch.bmm(matrices, flat) if bias is None else torch.baddbmm(bias[:, None], matrices, flat)
    return y.reshape(x.shape)


def lu_conv1x1(x: Tensor, lower: Tensor, upper: Tensor, bias: Tensor | None, inverse: bool) -> Tensor:
    out, wide = promoted_dtype(x, lower, upper, bias), compute_dtype(x, lower, upper, bias)
    x, lower, upper = x.to(wide), torch.tril(lower.to(wide), -1), torch.triu(upper.to(wide))
    bias = None if bias is None else bias.to(wide)
    with _full_precision(x):
        if not inverse:
            return _apply_matrix(torch.addmm(upper, lower, upper), x, bias).to(out)
        # Two triangular solves against the identity (C columns), then one product. Measured as accurate as
        # solving for the data and up to eight times faster on CPU; and a solve for B*P columns is wrong on
        # CUDA when they are very many.
        eye = torch.eye(x.shape[1], dtype=wide, device=x.device)
        matrix = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        matrix = torch.linalg.solve_triangular(upper, matrix, upper=True)
        if bias is not None:
            x = x - bias.view(-1, *[1] * (x.ndim - 2))
        return _apply_matrix(matrix, x, None).to(out)


def lu_log_det(upper: Tensor, positions: int) -> Tensor:
    diagonal = torch.diagonal(upper).to(compute_dtype(upper))
    return positions * diagonal.abs().log().sum()


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
