"""Every operation compiles without a graph break for changing shapes, and exports."""

import pytest
import torch
from helpers import max_error
from torch import nn

from usf_kernels import ops


def everything(x, params, lower, upper, bias):
    """All operations in one graph."""
    split = x.shape[1] - x.shape[1] // 2
    y = ops.additive_coupling(x, params[:, split:], split=split)
    y = ops.masked_additive_coupling(y, params[:, : x.shape[1]], torch.ones(x.shape[2:]).tril() > 0)
    y, log_det = ops.affine_coupling(y, params, split=split, inverse=True)
    y = ops.lu_conv1x1(y, lower, upper, bias)
    y = ops.lu_conv1x1(y.flatten(2), lower, upper, bias, inverse=True).view_as(y)
    log_det = log_det + ops.lu_log_det(upper, y.shape[2] * y.shape[3])
    u = ops.squared_norm(y)
    size = (2 * y.shape[2], 40)
    return u, log_det, ops.anomaly_map([y], size), ops.anomaly_map([y, x], size, interpolate="latent")


def arguments(batch, height, width, channels=4):
    eye = torch.eye(channels) + 0.1 * torch.randn(channels, channels)
    x = torch.randn(batch, channels, height, width)
    return x, torch.randn(batch, channels, height, width), eye, eye.clone(), torch.randn(channels)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compile_fullgraph_dynamic(backend):
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 5, 6), (3, 7, 4), (5, 9, 12)):
            args = [a.requires_grad_() for a in arguments(*shape)]
            outputs, expected = compiled(*args), everything(*args)
            for actual, truth in zip(outputs, expected, strict=True):
                assert max_error(actual, truth) < 1e-4
            grads = torch.autograd.grad(sum(o.sum() for o in outputs), args)
            truth = torch.autograd.grad(sum(o.sum() for o in expected), args)
            for actual, expected_grad in zip(grads, truth, strict=True):
                assert max_error(actual, expected_grad) < 1e-3 * (1 + expected_grad.abs().max())


def test_export_with_dynamic_shapes():
    class Everything(nn.Module):
        def forward(self, *args):
            return everything(*args)

    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    dims = {0: batch, 2: height, 3: width}
    exported = torch.export.export(
        Everything(), arguments(2, 5, 6), dynamic_shapes={"args": (dims, dims, None, None, None)}
    ).module()
    args = arguments(3, 8, 7)
    for actual, truth in zip(exported(*args), everything(*args), strict=True):
        assert max_error(actual, truth) < 1e-5
