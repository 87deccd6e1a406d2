"""Products by PyTorch, and how they may be rounded; shared by kernels and operations. No Triton."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor


def autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device; for meta tensors, which have none, asking torch raises."""
    return device != "meta" and torch.is_autocast_enabled(device)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Context without autocast, which would round matrices to half precision, and so break inverses."""
    device = x.device.type
    if autocasts(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def rounds_to_tf32() -> bool:
    """Whether torch's own setting allows float32 products on a GPU to be rounded to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def plain_product(matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`matrix @ x + bias` at every position, in x's memory format. All share one dtype."""
    # A product rather than a 1x1 convolution: oneDNN's is up to seven times slower for NCHW where C is no
    # multiple of 16, and cuDNN's rounds float32 to TF32 by default.
    if has_rows(x):
        return F.linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)
    matrices = matrix.expand(x.shape[0], *matrix.shape)
    flat = x.flatten(2)
    y = torch.bmm(matrices, flat) if bias is None else torch.baddbmm(bias[:, None], matrices, flat)
    return y.reshape(x.shape[0], matrix.shape[0], *x.shape[2:])


def has_rows(x: Tensor) -> bool:
    """Whether the channels of a position lie next to each other."""
    return x.ndim == 2 or x.stride(1) == 1
