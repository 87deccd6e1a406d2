"""Gradients of the anomaly map in closed form: matrix products and a stencil, so reruns give the same bits.

On a GPU, autograd would scatter with atomic additions through the reference. This is plain PyTorch, so it is
differentiable again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from usf_kernels.kernels.plain import full_precision
from usf_kernels.ops import reference
from usf_kernels.ops.checks import compute_dtype


def anomaly_map_gradients(
    grad: Tensor, latents: Sequence[Tensor], size: Sequence[int], latent: bool
) -> list[Tensor]:
    """Gradients of `latents`, given that of their anomaly map; `latent` for interpolate="latent"."""
    grad = grad[:, 0] / len(latents)
    gradients = _through_products if latent else _through_likelihood
    with full_precision(grad):
        return [gradients(grad, z.to(compute_dtype(z)), size).to(z.dtype) for z in latents]


def _weights(n_in: int, n_out: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices (n_out, n_in) with which an output pixel weighs its two sources i0 and i1: linear weights (w0
    at i0, w1 at i1), those of squares (w0^2, w1^2), and that of the product of the two (2 w0 w1 at i0)."""
    i0, i1, w0, w1 = reference.bilinear_weights(n_in, n_out, like)
    pixels = torch.arange(n_in, device=like.device)
    first, second = ((i[:, None] == pixels).to(like.dtype) for i in (i0, i1))
    w0, w1 = w0[:, None], w1[:, None]
    return w0 * first + w1 * second, w0 * w0 * first + w1 * w1 * second, 2 * w0 * w1 * first


def _through_likelihood(grad: Tensor, z: Tensor, size: Sequence[int]) -> Tensor:
    channels = z.shape[1]
    rows, columns = (_weights(n, out, z)[0] for n, out in zip(z.shape[2:], size, strict=True))
    likelihood = torch.exp(reference.squared_norm(z) / (-2 * channels))
    return (rows.mT @ grad @ columns * likelihood / channels)[:, None] * z


def _through_products(grad: Tensor, z: Tensor, size: Sequence[int]) -> Tensor:
    channels = z.shape[1]
    u = reference.resized_squared_norm(z, tuple(size))
    grad = grad * torch.exp(u / (-2 * channels)) / (2 * channels)
    _, rows, next_rows = _weights(z.shape[2], size[0], z)
    _, columns, next_columns = _weights(z.shape[3], size[1], z)
    own = (rows.mT @ grad @ columns)[:, None]
    right = (rows.mT @ grad @ next_columns)[:, None]
    down = (next_rows.mT @ grad @ columns)[:, None]
    diagonals = 0.5 * (next_rows.mT @ grad @ next_columns)[:, None]
    # The derivative of a product by each factor is the other factor, weighted.
    total = 2 * own * z
    for weight, dy, dx in ((right, 0, 1), (down, 1, 0), (diagonals, 1, 1), (diagonals, 1, -1)):
        total = total + _shift(weight, 0, min(dx, 0)) * _shift(z, dy, dx)
        total = total + _shift(_shift(weight, 0, min(dx, 0)) * z, -dy, -dx)
    return total


def _shift(v: Tensor, dy: int, dx: int) -> Tensor:
    """Return v at (y + dy, x + dx), with 0 outside."""
    return F.pad(v, (-dx, dx, -dy, dy))
