"""The operations in eager PyTorch, written as in the authors' code, FrEIA and anomalib."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 256  # side of the anomaly maps


def additive(x: Tensor, shift: Tensor, split: int) -> Tensor:
    return torch.cat([x[:, :split], x[:, split:] + shift], dim=1)


def affine(x: Tensor, params: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """Affine coupling, written as in FrEIA and anomalib."""
    params = params * 0.1
    channels = x.shape[1] - split
    log_scale = 2.0 * torch.tanh(params[:, :channels])
    y = torch.cat([x[:, :split], x[:, split:] * torch.exp(log_scale) + params[:, channels:]], dim=1)
    return y, log_scale.sum(dim=(1, 2, 3))


def masked(x: Tensor, shift: Tensor, mask: Tensor) -> Tensor:
    return x + (1 - mask) * shift


def step(
    coupling: Callable[..., object], x: Tensor, params: Tensor, kernel: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """A coupling, scale and bias, and a permutation as a dense convolution, as in FrEIA and anomalib."""
    y = coupling(x, params)
    y = (y[0] if isinstance(y, tuple) else y) * scale[:, None, None] + bias[:, None, None]
    return F.conv2d(y, kernel)


def step_kept(x: Tensor, params: Tensor, index: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Replace the index in the inputs of `step` by the dense kernel that FrEIA and anomalib keep."""
    kernel = torch.eye(len(index), device=x.device, dtype=x.dtype)[index][:, :, None, None]
    return x, params, kernel, *rest


def lu(x: Tensor, lower: Tensor, upper: Tensor, bias: Tensor, eye: Tensor) -> Tensor:
    """An LU map as a 1x1 convolution with its matrix, as in Glow's implementations."""
    matrix = (torch.tril(lower, -1) + eye) @ torch.triu(upper)
    return F.conv2d(x, matrix[:, :, None, None], bias)


def lu_inverse(x: Tensor, lower: Tensor, upper: Tensor, bias: Tensor, eye: Tensor) -> Tensor:
    matrix = (torch.tril(lower, -1) + eye) @ torch.triu(upper)
    return F.conv2d(x - bias[:, None, None], torch.linalg.inv(matrix)[:, :, None, None])


def lu_kept(x: Tensor, lower: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Append to the inputs of `lu` the identity that Glow's implementations keep."""
    return x, lower, *rest, torch.eye(len(lower), device=x.device, dtype=x.dtype)


def lu_map(
    lower: Tensor, upper: Tensor, signs: Tensor, log_diagonal: Tensor, bias: Tensor, log_scale: Tensor,
    offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """An ActNorm, then an LU map: one matrix, one bias, the log-determinant."""
    eye = torch.eye(len(lower), device=lower.device, dtype=lower.dtype)
    matrix = (torch.tril(lower, -1) + eye) @ (torch.triu(upper, 1) + torch.diag(signs * log_diagonal.exp()))
    log_det = log_diagonal.sum() + log_scale.sum()
    return matrix * log_scale.exp(), torch.mv(matrix, offset) + bias, log_det


def residual(x: Tensor, first: Tensor, b: Tensor, last: Tensor, c: Tensor) -> Tensor:
    return x + F.conv2d(F.relu(F.conv2d(x, first[:, :, None, None], b)), last[:, :, None, None], c)


def linear_norm(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, matrix[:, :, None, None], bias).pow(2).sum(dim=1)


def squared_norm(z: Tensor) -> Tensor:
    return z.pow(2).sum(dim=1)


def likelihood_map(latents: list[Tensor]) -> Tensor:
    """Anomaly map from likelihoods per scale, as in the authors' code and anomalib."""
    maps = [torch.exp(-0.5 * z.pow(2).mean(dim=1, keepdim=True)) for z in latents]
    sized = [F.interpolate(m, SIZE, mode="bilinear", align_corners=False) for m in maps]
    return 1 - torch.stack(sized).mean(dim=0)


def latent_map(latents: list[Tensor]) -> Tensor:
    """Anomaly map by the paper's printed equation: all channels are resized to the image."""
    sized = [F.interpolate(z, SIZE, mode="bilinear", align_corners=False) for z in latents]
    return 1 - torch.stack([torch.exp(-0.5 * z.pow(2).mean(dim=1, keepdim=True)) for z in sized]).mean(dim=0)
