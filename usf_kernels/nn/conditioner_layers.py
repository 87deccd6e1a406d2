"""The layers of conditioners that `fuse()` and the extension understand."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usf_kernels.ops import native
from usf_kernels.ops.convolution import LAST, Layer, convolutions, is_rows, pays
from usf_kernels.ops.linear import linear as product

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ELEMENTWISE = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardswish,
)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # in eval mode


def flat(module: nn.Module) -> Iterator[nn.Module]:
    """Layers of nested nn.Sequentials, with pointwise convolutions as nn.Linear and without idle layers."""
    if type(module) is nn.Sequential and not hooked(module):
        for child in module:
            yield from flat(child)
    elif type(module) in NOTHING and not hooked(module):
        return
    elif is_linear(module) and isinstance(module, CONVOLUTIONS) and is_pointwise(module):
        yield linear(module.weight.flatten(1), module.bias)
    else:
        if type(module) in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardswish) and not hooked(module):
            module = copy(module)  # the same module may be used elsewhere too
            module.inplace = True  # nothing else reads the input: a layer's output
        yield module


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks around its forward pass, which may set its weights as weight normalisation
    does, or a `forward` set on the instance."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__)


def evaluate(conditioner: nn.Module, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """`conditioner([x, cond])`, in the extension where that is faster and nobody could see the difference.

    Args:
        conditioner: takes the channels of x, then those of cond.
        x: (B, C, *spatial).
        cond: (B or 1, K, *spatial), or None. If all samples share it, a first 1x1 convolution is applied to
            it only once.
    """
    if cond is not None and cond.shape[0] == 1 and _starts_pointwise(conditioner):
        return _with_shared(conditioner, x, cond)
    if cond is not None:
        x = torch.cat([x, cond.expand(x.shape[0], *cond.shape[1:])], dim=1)
    layers = _convolutional_layers(conditioner) if x.ndim == 4 and native.accepts(x) else None
    if layers and x.shape[1] == layers[0].weight.shape[1] and pays(x, layers):
        return convolutions(x, layers)
    return conditioner(x)


def _with_shared(conditioner: nn.Sequential, x: Tensor, cond: Tensor) -> Tensor:
    """`evaluate` for a shared cond and a first layer that is pointwise, so that its sum can be split."""
    first = conditioner[0]
    own, shared = first.weight.split([x.shape[1], cond.shape[1]], dim=1)
    layers = _convolutional_layers(conditioner) if native.accepts(x) else None
    if layers:
        layers[0] = layers[0]._replace(weight=own, bias=None)
        if pays(x, layers):
            # In x's memory format, so that the share has it too.
            cond = cond.contiguous(memory_format=LAST if is_rows(x) else torch.contiguous_format)
            return convolutions(x, layers, product(cond, shared.flatten(1), first.bias))
    share = F.linear(cond.movedim(1, -1), shared.flatten(1), first.bias).movedim(-1, 1)
    hidden = F.conv2d(x, own) + share
    for layer in list(conditioner)[1:]:
        hidden = layer(hidden)
    return hidden


def _starts_pointwise(conditioner: nn.Module) -> bool:
    """Whether a conditioner is a plain nn.Sequential that begins with a plain 1x1 convolution."""
    if type(conditioner) is not nn.Sequential or len(conditioner) == 0 or watched(conditioner):
        return False
    first = conditioner[0]
    return type(first) is nn.Conv2d and first.groups == 1 and is_pointwise(first) and not watched(first)


def _convolutional_layers(conditioner: nn.Module) -> list[Layer] | None:
    """Layers of a plain nn.Sequential of size-keeping convolutions and ReLUs; None for other conditioners."""
    if type(conditioner) is not nn.Sequential or watched(conditioner):
        return None
    layers: list[Layer] = []
    for module in conditioner:
        if watched(module):
            return None
        if type(module) is nn.ReLU and layers:
            layers[-1] = layers[-1]._replace(relu=True)
        elif type(module) is nn.Conv2d and keeps_size(module) and _follows(module, layers):
            layers.append(Layer(module.weight, module.bias, relu=False))
        else:
            return None
    return layers


def _follows(module: nn.Conv2d, layers: list[Layer]) -> bool:
    return not layers or module.weight.shape[1] == len(layers[-1].weight)


def overwrites(conditioner: nn.Module) -> bool:
    """Whether a conditioner may overwrite its input: PyTorch's layers do not unless told to, others may."""
    first = conditioner
    while type(first) is nn.Sequential and len(first) > 0 and not hooked(first):
        first = first[0]
    known = isinstance(first, (nn.Linear, *CONVOLUTIONS, *ELEMENTWISE)) and not hooked(first)
    return not known or bool(getattr(first, "inplace", False))


def watched(module: nn.Module) -> bool:
    """Whether a module has hooks of any kind, or a `forward` set on the instance."""
    return hooked(module) or bool(module._backward_hooks or module._backward_pre_hooks)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear, or a convolution that is linear in its input apart from a bias."""
    if type(module) is nn.Linear:
        return not hooked(module)
    return (
        type(module) in CONVOLUTIONS
        and not hooked(module)
        and module.groups == 1
        and (module.padding_mode == "zeros" or is_pointwise(module))
    )


def is_pointwise(conv: nn.Module) -> bool:
    """Whether a convolution maps every position, and each one alone."""
    once = all(size == 1 for size in (*conv.kernel_size, *conv.stride))
    return once and (isinstance(conv.padding, str) or not any(conv.padding))


def keeps_size(module: nn.Module) -> bool:
    """Whether a module is a one- or two-dimensional convolution that returns maps of the same size."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or not is_linear(module):
        return False
    odd = all(size % 2 == 1 for size in module.kernel_size)
    once = all(step == 1 for step in (*module.stride, *module.dilation))
    same = module.padding == "same" or module.padding == tuple(size // 2 for size in module.kernel_size)
    return odd and once and same


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return an nn.Linear with this weight and bias; zeros if the bias is None."""
    layer = nn.Linear(1, 1, device="meta")  # draws no random weights, which would be replaced
    layer.weight = nn.Parameter(weight.detach())
    layer.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias.detach())
    layer.out_features, layer.in_features = weight.shape
    return layer
