"""What tests share: the error budget, memory layouts, shapes, Jacobians."""

import math

import torch
from hypothesis import strategies as st
from torch import nn

# Where kernels are tested: the GPU if there is one, otherwise the CPU in Triton's interpreter (see conftest).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 is what these are measured against
SHAPES = [(2, 5), (3, 4, 6), (2, 5, 3, 4), (1, 2, 1, 1), (2, 3, 2, 3, 2), (0, 4, 3, 3), (2, 4, 0, 3), (0, 3)]


def shapes(min_channels=1, max_channels=7):
    """(B, C, *spatial) with none to three spatial dimensions; batch and spatial sizes may be 0."""
    spatial = st.lists(st.integers(0, 4), max_size=3)
    channels = st.integers(min_channels, max_channels)
    return st.tuples(st.integers(0, 3), channels, spatial).map(lambda t: (t[0], t[1], *t[2]))


def max_error(value, truth):
    value, truth = value.double(), truth.double()
    assert value.shape == truth.shape
    return (value - truth).abs().max().item() if truth.numel() else 0.0


def assert_within_budget(actual, eager, truth, factor=2.0, scale=0.0):
    """`actual` may err by `factor` times what straightforward code in the same dtype errs against a float64
    truth, plus one rounding of the largest value, or of `scale`: how large sums on the way to it are where
    they cancel. Nothing is tuned until it passes."""
    scale = max(scale, truth.abs().max().item() if truth.numel() else 0.0)
    budget = factor * max_error(eager, truth) + torch.finfo(actual.dtype).eps * scale
    assert not actual.isnan().any()
    assert max_error(actual, truth) <= budget, (max_error(actual, truth), budget)


def layouts(x):
    """The same values in other strides: a channel slice, every other row of NaN-filled memory, reversed
    dimensions, channels-last."""
    wide = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), math.nan)
    wide[:, 2:-1] = x
    yield "channel slice", wide[:, 2:-1]
    strided = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
    strided[..., ::2] = x
    yield "strided", strided[..., ::2]
    dims = list(range(x.ndim))[::-1]
    yield "reversed", x.permute(dims).contiguous().permute(dims)
    if x.ndim == 4:
        wide = wide.to(memory_format=torch.channels_last)
        yield "channels last", x.to(memory_format=torch.channels_last)
        yield "channels-last slice", wide[:, 2:-1]


def jacobian_log_det(fn, x):
    """log|det d fn(x) / dx| per sample of a float64 batch, (B,); fn sees batches of one."""

    def flat(v):
        return fn(v.view(1, *x.shape[1:])).flatten()

    return torch.stack([torch.linalg.slogdet(torch.func.jacrev(flat)(v.flatten()))[1] for v in x])


def conv_subnet(c_in, c_out):
    """A small smooth conditioner for maps."""
    return nn.Sequential(nn.Conv2d(c_in, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, c_out, 1))


def linear_subnet(c_in, c_out):
    """A small smooth conditioner for vectors."""
    return nn.Sequential(nn.Linear(c_in, 8), nn.Tanh(), nn.Linear(8, c_out))


def randomise_(module):
    """Move every parameter off its initial value, as training would."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module
