"""Sequences of convolutions and ReLUs as one operation, where the extension is faster than PyTorch.

Kernels of 3 x 3 run by Winograd's minimal filtering (arXiv:1509.09308), and so do both of their gradients:
16 multiplications where a sum over taps takes 36, with rounding errors of the same size. With 32 channels
at least and many positions in all maps of a batch, outputs and the gradients of inputs take 9 for 36, with
errors three to four times as large in root mean square. A value that is not finite may give NaN in all
outputs of its tiles, up to three positions away. Values between two layers stay in channels-last memory,
and a ReLU and its gradient are applied as a result is written.
Kernels of 1 x 1 are products on rows or, if all layers are 1 x 1, on maps in place.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from usf_kernels import _core
from usf_kernels.memory import in_huge_pages
from usf_kernels.ops import eager, native, products
from usf_kernels.ops.dispatch import differentiates_again, gradients_through
from usf_kernels.ops.matrices import matrix_gradient

LAST = torch.channels_last


class Layer(NamedTuple):
    """A size-keeping convolution, (C_out, C_in, odd, odd) and (C_out,) or None; whether a ReLU follows it."""

    weight: Tensor
    bias: Tensor | None
    relu: bool


def in_tiles(weight: Tensor) -> bool:
    """Whether the extension runs a size-keeping convolution with this weight."""
    outputs, inputs, *kernel = weight.shape
    return products.MULTIPLIES and kernel == [3, 3] and min(outputs, inputs) >= _core.FEWEST_CHANNELS


def pays(x: Tensor, layers: list[Layer]) -> bool:
    """Whether `convolutions` should run these (matching) layers: float32 on the CPU, not observed."""
    return (
        products.MULTIPLIES
        and native.accepts(x, *(t for layer in layers for t in (layer.weight, layer.bias)))
        and not torch.is_autocast_enabled("cpu")
        and (any(in_tiles(layer.weight) for layer in layers) or _on_maps(x, layers) or _on_rows(x, layers))
    )


def _pointwise(weight: Tensor) -> bool:
    return weight.shape[2:] == (1, 1)


def _on_maps(x: Tensor, layers: list[Layer]) -> bool:
    """Whether all layers are pointwise, and the positions of x lie side by side."""
    pointwise = all(_pointwise(layer.weight) for layer in layers)
    return pointwise and x.shape[1] > 1 and x.stride(1) != 1 and products.walks_maps(x)


def _on_rows(x: Tensor, layers: list[Layer]) -> bool:
    """Whether all layers are pointwise, and x is rows."""
    return is_rows(x) and all(_pointwise(layer.weight) for layer in layers)


def is_rows(x: Tensor) -> bool:
    """Whether the channels of each position lie side by side; rows may be slices of wider ones."""
    return x.is_contiguous(memory_format=LAST) or (x.stride(1) == 1 and products.row_stride(x) is not None)


def convolutions(x: Tensor, layers: list[Layer], share: Tensor | None = None) -> Tensor:
    """Apply all layers to x (B, C, H, W) and return the result in x's memory format.

    Args:
        x, layers: arguments for which `pays` is true; they are not checked.
        share: (1, C_out, H, W), added to every sample's output of the first layer, before its ReLU.
    """
    relus = tuple(layer.relu for layer in layers)
    return _Convolutions.apply(x, share, relus, *(t for layer in layers for t in (layer.weight, layer.bias)))


def _plain(relus: tuple[bool, ...], x: Tensor, share: Tensor | None, *parameters: Tensor | None) -> Tensor:
    """`convolutions` in plain PyTorch."""
    for i, layer in enumerate(_layers(relus, parameters)):
        x = _by_taps(x, layer)
        x = x if i > 0 or share is None else x + share
        x = F.relu(x) if layer.relu else x
    return x


class _Convolutions(torch.autograd.Function):
    """Saves the input of every layer, and the output if the last layer has a ReLU. The first input is saved
    as it was given, because second derivatives lead to it, not as a copy in another memory format."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, share: Tensor | None, relus: tuple[bool, ...], *parameters: Tensor | None
    ) -> Tensor:
        layers = _layers(relus, parameters)
        ctx.relus, ctx.on_maps = relus, _on_maps(x, layers)
        rows = [x if ctx.on_maps else _last(x)]
        for i, layer in enumerate(layers):
            beside = share if i == 0 else None
            rows.append(_convolve(rows[-1], layer, on_maps=ctx.on_maps, share=beside))
        # The share's values are needed for second derivatives only.
        ctx.save_for_backward(x, *rows[1:-1], rows[-1] if relus[-1] else None, share, *parameters)
        return rows[-1] if ctx.on_maps or is_rows(x) else _first(rows[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        count = len(ctx.relus)
        saved = ctx.saved_tensors  # read once: a checkpoint recomputes them at every access
        (x, *rows), (share, *parameters) = saved[: count + 1], saved[count + 1 :]
        if differentiates_again() or not native.accepts(grad):
            inputs = x, share, *parameters
            grad_x, grad_share, *rest = gradients_through(partial(_plain, ctx.relus), inputs, (grad,))
            return grad_x, grad_share, None, *rest
        grad_parameters: list[Tensor | None] = [None] * len(parameters)
        # Hooks on saved tensors may have laid them out anew.
        lay_out = _maps if ctx.on_maps else _last
        rows = [t if t is None else lay_out(t) for t in (x, *rows)]
        grad = grad.contiguous() if ctx.on_maps else _last(grad)
        if ctx.relus[-1]:
            grad = torch.ops.aten.threshold_backward(grad, rows[-1], 0)
        layers = _layers(ctx.relus, parameters)
        for i in reversed(range(count)):
            wanted = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
            found = _parameter_gradients(rows[i], layers[i], grad, wanted, on_maps=ctx.on_maps)
            grad_parameters[2 * i : 2 * i + 2] = found
            if i == 0:
                grad_share = _sum_of_samples(grad) if ctx.needs_input_grad[1] else None
                if not ctx.needs_input_grad[0]:
                    return None, grad_share, None, *grad_parameters
            masked = i > 0 and ctx.relus[i - 1]
            grad = _input_gradient(rows[i], layers[i], grad, masked=masked, on_maps=ctx.on_maps)
        return grad, grad_share, None, *grad_parameters


def _sum_of_samples(grad: Tensor) -> Tensor:
    """Sum over samples, (1, C, H, W), in the memory format of grad. Uses a product with ones, since PyTorch's
    sum over a few samples takes up to nine times as long."""
    if len(grad) == 1:
        return grad
    rows = is_rows(grad)
    lying = grad.movedim(1, -1) if rows else grad
    total = (grad.new_ones(len(grad)) @ lying.flatten(1)).view(1, *lying.shape[1:])
    return total.movedim(-1, 1) if rows else total


def _layers(relus: tuple[bool, ...], parameters: tuple[Tensor | None, ...]) -> list[Layer]:
    return [Layer(*parameters[2 * i : 2 * i + 2], relu) for i, relu in enumerate(relus)]


def _by_taps(x: Tensor, layer: Layer) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=_padding(layer.weight))


def _padding(weight: Tensor) -> list[int]:
    return [size // 2 for size in weight.shape[2:]]


def _maps(x: Tensor) -> Tensor:
    """Return x as maps, copied only if their positions do not lie side by side already."""
    return x if x.stride(1) != 1 and products.walks_maps(x) else x.contiguous()


def _last(x: Tensor) -> Tensor:
    """Return x as rows, copied only if it is not rows already."""
    if is_rows(x):
        return x
    if x.stride(1) == 1:
        return x.contiguous(memory_format=LAST)
    y, maps = in_huge_pages(torch.empty_like(x, memory_format=LAST)), x.detach().flatten(2)
    lie = maps.stride(2) == 1 and maps.stride(1) == maps.shape[2]  # channels of an image follow each other
    _transpose(maps if lie else maps.contiguous(), y.movedim(1, -1))
    return y


def _first(x: Tensor) -> Tensor:
    """Copy x from channels-last to contiguous memory."""
    y = in_huge_pages(torch.empty_like(x, memory_format=torch.contiguous_format))
    _transpose(x.movedim(1, -1).flatten(1, 2), y)
    return y


def _transpose(x: Tensor, y: Tensor) -> None:
    """Write x (B, M, N) transposed to the memory of y; PyTorch's copy takes up to three times as long."""
    _core.interleave(x, y.view(x.shape[0] * x.shape[2], x.shape[1]), native.threads_over(x))


# Below, tensors are rows, except with `on_maps`: maps, contiguous unless they were given to the operation.


def _convolve(x: Tensor, layer: Layer, *, on_maps: bool, share: Tensor | None) -> Tensor:
    plain = {"bias": layer.bias, "relu": layer.relu and share is None}
    if on_maps:
        y = products.map_product(layer.weight, x, **plain)
    elif _pointwise(layer.weight):
        return products.row_product(layer.weight, x, bias=layer.bias, relu=layer.relu, share=share)
    elif in_tiles(layer.weight):
        y = _in_tiles(x, layer.weight, adjoint=False, **plain)
    else:
        y = _by_taps(x, layer).contiguous(memory_format=LAST)
        y = y.relu_() if plain["relu"] else y
    if share is None:
        return y
    y.add_(share)
    return y.relu_() if layer.relu else y


def _input_gradient(x: Tensor, layer: Layer, grad: Tensor, *, masked: bool, on_maps: bool) -> Tensor:
    """Gradient of the layer's input x or, if `masked`, of the input of the ReLU that returned x."""
    mask = x if masked else None
    if on_maps:
        return products.map_product(layer.weight, grad, transposed=True, mask=mask)
    if _pointwise(layer.weight):
        return products.row_product(layer.weight, grad, transposed=True, mask=mask)
    if in_tiles(layer.weight):
        return _in_tiles(grad, layer.weight, adjoint=True, mask=mask)
    result = _gradients_by_taps(x, layer, grad, [True, False, False])[0].contiguous(memory_format=LAST)
    return torch.ops.aten.threshold_backward(result, x, 0) if masked else result


def _parameter_gradients(
    x: Tensor, layer: Layer, grad: Tensor, wanted: tuple[bool, bool], *, on_maps: bool
) -> tuple[Tensor | None, Tensor | None]:
    pointwise = _pointwise(layer.weight)
    if not pointwise and not in_tiles(layer.weight):
        return _gradients_by_taps(x, layer, grad, [False, *wanted])[1:]
    grad_weight = None
    if wanted[0] and pointwise:
        grad_weight = matrix_gradient(grad, x).view_as(layer.weight)
    elif wanted[0]:
        grad_weight = torch.empty_like(layer.weight, memory_format=torch.contiguous_format)
        rows = ((t.data_ptr(), products.row_stride(t)) for t in (x, grad))
        made = layer.weight.shape[:2], grad_weight.data_ptr()
        _core.kernel_gradient(_sizes(x), *rows, *made, _threads(x, layer.weight))
    return grad_weight, eager.channel_sums(grad) if wanted[1] else None


def _gradients_by_taps(x: Tensor, layer: Layer, grad: Tensor, wanted: list[bool]) -> tuple:
    once = [1, 1], _padding(layer.weight), [1, 1], False, [0, 0], 1
    sizes = [len(layer.weight)]
    return torch.ops.aten.convolution_backward(grad, x, layer.weight, sizes, *once, wanted)


def _in_tiles(
    x: Tensor,
    weight: Tensor,
    *,
    adjoint: bool,
    bias: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Convolve x, or with `adjoint` map gradients of the outputs to those of the inputs. The result is 0
    where `mask` is not positive."""
    if weight.stride(2) != 3 * weight.stride(3):
        weight = weight.contiguous()
    outputs, inputs = weight.shape[:2]
    shape = len(x), inputs if adjoint else outputs, *x.shape[2:]
    y = in_huge_pages(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST))
    step_output, step_input, _, step_tap = weight.stride()
    of_weight = weight.data_ptr(), (outputs, inputs), (step_output, step_input, step_tap), adjoint
    bias = None if bias is None else bias.contiguous()  # a variable keeps it alive while its address is used
    ending = None if bias is None else bias.data_ptr(), relu
    at_mask = None if mask is None else mask.data_ptr()
    threads = _threads(x, weight)
    rows = x.data_ptr(), products.row_stride(x)
    _core.convolve(_sizes(x), rows, *of_weight, *ending, at_mask, y.data_ptr(), threads)
    return y


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]


def _threads(x: Tensor, weight: Tensor) -> int:
    return products.threads_for(9 * x.numel() * weight.shape[0])
