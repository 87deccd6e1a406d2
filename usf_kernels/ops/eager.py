"""A coupling and the channel map behind it, with hand-written gradients, for the CPU.

Fresh memory and passes over it take most of the time there, and tanh costs as much as ten copies. In float32
a step is one pass in the extension, and its gradient another (`native`). Otherwise a step writes one tensor
where autograd would write five, and works in place on tensors that it has made itself. Second derivatives,
function transforms and compilers use the operations of `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usf_kernels.kernels.plain import full_precision
from usf_kernels.ops import native, reference
from usf_kernels.ops.dispatch import differentiates_again, gradients_through
from usf_kernels.ops.matrices import apply_matrix, matrix_gradient

LOG2_E = 1.4426950408889634


def by_hand(*tensors: Tensor | None) -> bool:
    """Whether the functions here may run: CPU tensors, all float32 or all float64, and nobody looks."""
    given = [t for t in tensors if t is not None]
    return (
        all(t.device.type == "cpu" and t.dtype == given[0].dtype for t in given)
        and given[0].dtype in (torch.float32, torch.float64)
        and not native.somebody_looks()
        and not native.batched(*given)
    )


def couple(
    x: Tensor,
    params: Tensor,
    split: int,
    clamp: float | None,
    exit_scale: Tensor | None,
    exit_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the coupled x, scaled and shifted per channel if an exit is given, and the log-determinant."""
    if native.fits(x, params, exit_scale, exit_bias):
        found = native.couple(x, params, None, exit_scale, exit_bias, split, clamp, inverse=False)
        if found is not None:
            return found
    y, active_channels = torch.empty_like(x), x.shape[1] - split
    passive, active = y.split([split, active_channels], dim=1)
    if clamp is None:
        torch.add(x[:, split:], params, out=active)
        log_det = x.new_empty(0)
    else:
        raw_scale, shift = params.split([active_channels, active_channels], dim=1)
        torch.mul(raw_scale, 0.1, out=active).tanh_().mul_(clamp)
        log_det = active.sum(dim=tuple(range(1, x.ndim)))
        active.exp_().mul_(x[:, split:]).add_(shift, alpha=0.1)
    if exit_scale is None:
        passive.copy_(x[:, :split])
    else:
        exit_scale, exit_bias = per_channel(exit_scale, x), per_channel(exit_bias, x)
        torch.mul(x[:, :split], exit_scale[:split], out=passive)
        active.mul_(exit_scale[split:])
        y.add_(exit_bias)
    return y, log_det


def uncouple_gradient_(
    grad: Tensor, grad_log_det: Tensor, x: Tensor, params: Tensor, split: int, clamp: float | None
) -> Tensor:
    """Turn `grad`, the gradient of the coupled x, into that of x in place; return the gradient of params."""
    if native.fits(grad, grad_log_det, x, params):
        grad_params = native.uncouple_gradient_(grad, grad_log_det, x, params, split, clamp)
        if grad_params is not None:
            return grad_params
    active = grad[:, split:]
    if clamp is None:
        return active.clone()
    result, active_channels = torch.empty_like(params), x.shape[1] - split
    grad_scale, grad_shift = result.split([active_channels, active_channels], dim=1)
    torch.mul(active, 0.1, out=grad_shift)
    # tanh(u) = 2 s - 1 with s = sigmoid(2 u), which is six times faster and accurate to a rounding error in
    # absolute terms; the slope is 4 s (1 - s).
    sigmoid = torch.mul(params[:, :active_channels], 0.2).sigmoid_()
    scale = torch.mul(sigmoid, 2 * clamp * LOG2_E, out=grad_scale).sub_(clamp * LOG2_E).exp2_()
    active.mul_(scale)
    torch.mul(active, x[:, split:], out=grad_scale)
    grad_scale.add_(grad_log_det.view(-1, *[1] * (x.ndim - 1)))
    slope = sigmoid.addcmul_(sigmoid, sigmoid, value=-1)
    grad_scale.mul_(slope).mul_(0.4 * clamp)
    return result


def uncouple(
    y: Tensor,
    grad: Tensor,
    grad_log_det: Tensor,
    params: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    split: int,
    clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Invert a coupling step: return the x that `gather_step` turned into y, and the gradients of x, params,
    scale and bias (None for the last two without a scale).

    Tensors may be on any device, but of one dtype; y and `grad` may be overwritten. This uses tanh, as
    `couple` does, and not a sigmoid, so that it undoes the same numbers.
    """
    if native.fits(y, grad, grad_log_det, params, scale, bias):
        found = native.uncouple(y, grad, grad_log_det, params, index, scale, bias, split, clamp)
        if found is not None:
            return found
    if index is not None:
        y, grad = (t.index_select(1, inverse_permutation(index)) for t in (y, grad))
    grad_scale = grad_bias = None
    if scale is not None:
        y.sub_(per_channel(bias, y)).div_(per_channel(scale, y))
        grad_scale, grad_bias = channel_sums(y * grad), channel_sums(grad)
        grad.mul_(per_channel(scale, y))
    return y, grad, _uncouple_active_(y, grad, grad_log_det, params, split, clamp), grad_scale, grad_bias


def _uncouple_active_(
    y: Tensor, grad: Tensor, grad_log_det: Tensor, params: Tensor, split: int, clamp: float | None
) -> Tensor:
    active, grad_active = y[:, split:], grad[:, split:]
    if clamp is None:
        active.sub_(params)
        return grad_active.clone()  # `grad` is overwritten while this is still in use
    active_channels = y.shape[1] - split
    raw_scale, shift = params.split([active_channels, active_channels], dim=1)
    result = torch.empty_like(params)
    grad_scale, grad_shift = result.split([active_channels, active_channels], dim=1)
    tanh = torch.mul(raw_scale, 0.1).tanh_()
    scale = torch.mul(tanh, clamp).exp_()
    active.sub_(shift, alpha=0.1)  # now x2 * scale, which the scale's gradient needs
    torch.mul(active, grad_active, out=grad_scale)
    grad_scale.add_(grad_log_det.view(-1, *[1] * (y.ndim - 1)))
    grad_scale.mul_(tanh.square_().neg_().add_(1)).mul_(0.1 * clamp)
    torch.mul(grad_active, 0.1, out=grad_shift)
    active.div_(scale)
    grad_active.mul_(scale)
    return result


def inverse_permutation(index: Tensor) -> Tensor:
    """Return the inverse of a permutation `index`, (C,) int64."""
    return torch.empty_like(index).index_copy_(0, index, torch.arange(len(index), device=index.device))


class _GatherStep(torch.autograd.Function):
    """The coupling, then a scale, a shift and a permutation. Saves its input and params, and its output
    unless the extension recomputes it in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        params: Tensor,
        index: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        split: int,
        clamp: float | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.options, found = (split, clamp), None
        if native.fits(x, params, scale, bias):
            found = native.couple(x, params, index, scale, bias, split, clamp, inverse=False)
        ctx.native = found is not None
        if found is None:
            y, log_det = couple(x, params, split, clamp, scale, bias)
            found = y if index is None else y.index_select(1, index), log_det
        ctx.save_for_backward(x, params, index, scale, bias, None if ctx.native else found[0])
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple:
        x, params, index, scale, bias, y = ctx.saved_tensors
        again, fits = differentiates_again(), ctx.native and native.fits(grad, grad_log_det)
        if fits and not again:
            grads = native.couple_gradient(
                grad, grad_log_det, x, params, index, scale, *ctx.options, inverse=False
            )
            return *grads[:2], None, *grads[2:], None, None
        if again or ctx.native or not by_hand(grad, grad_log_det):

            def plain(
                x: Tensor, params: Tensor, scale: Tensor | None, bias: Tensor | None
            ) -> tuple[Tensor, Tensor]:
                return reference.coupling_step(x, params, index, scale, bias, *ctx.options, inverse=False)

            grads = gradients_through(plain, (x, params, scale, bias), (grad, grad_log_det))
            return *grads[:2], None, *grads[2:], None, None
        if index is None:
            grad_x = grad.clone()
        else:
            back = inverse_permutation(index)
            grad_x, y = grad.index_select(1, back), None if scale is None else y.index_select(1, back)
        grad_scale = grad_bias = None
        if scale is not None:
            grad_bias = channel_sums(grad_x)
            grad_scale = channel_sums((y - per_channel(bias, x)).mul_(grad_x)) / scale
            grad_x.mul_(per_channel(scale, x))
        grad_params = uncouple_gradient_(grad_x, grad_log_det, x, params, *ctx.options)
        return grad_x, grad_params, None, grad_scale, grad_bias, None, None


class _MatrixStep(torch.autograd.Function):
    """The coupling, then `matrix @ y + bias` at every position. Saves x, params and the coupled x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        params: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        split: int,
        clamp: float | None,
    ) -> tuple[Tensor, Tensor]:
        y, log_det = couple(x, params, split, clamp, None, None)
        ctx.options = split, clamp
        ctx.save_for_backward(x, params, matrix, bias, y)
        with full_precision(x):
            return apply_matrix(matrix, y, bias).detach(), log_det

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple:
        x, params, matrix, bias, y = ctx.saved_tensors
        if differentiates_again() or not by_hand(grad, grad_log_det):

            def plain(
                x: Tensor, params: Tensor, matrix: Tensor, bias: Tensor | None
            ) -> tuple[Tensor, Tensor]:
                y, log_det = reference.coupling_step(x, params, None, None, None, *ctx.options, inverse=False)
                return apply_matrix(matrix, y, bias), log_det

            grads = gradients_through(plain, (x, params, matrix, bias), (grad, grad_log_det))
            return *grads, None, None
        with full_precision(grad):
            grad_matrix = matrix_gradient(grad, y)
            grad_x = apply_matrix(matrix.mT, grad, None)
        grad_bias = None if bias is None else channel_sums(grad)
        grad_params = uncouple_gradient_(grad_x, grad_log_det, x, params, *ctx.options)
        return grad_x, grad_params, grad_matrix, grad_bias, None, None


class _Product(torch.autograd.Function):
    """`apply_matrix` with its own gradient: autograd's would write a matrix per image before summing them."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(matrix, x, bias)
        return apply_matrix(matrix, x, bias).detach()  # not a view: autograd forbids writing to those

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, x, bias = ctx.saved_tensors
        if differentiates_again() or native.batched(grad):
            return tuple(gradients_through(apply_matrix, (matrix, x, bias), (grad,)))
        with full_precision(grad):
            return (
                matrix_gradient(grad, x) if ctx.needs_input_grad[0] else None,
                apply_matrix(matrix.mT, grad, None) if ctx.needs_input_grad[1] else None,
                None if bias is None else channel_sums(grad),
            )


def channel_sums(value: Tensor) -> Tensor:
    """Sum of (B, C, *spatial) over all dimensions but the channels: (C,)."""
    if not torch.is_grad_enabled() and native.fits(value):
        sums = native.channel_sums(value)
        if sums is not None:
            return sums
    return value.sum(dim=[d for d in range(value.ndim) if d != 1])


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return a view of `values` (C,) that broadcasts over x (B, C, *spatial)."""
    return values.view(-1, *[1] * (x.ndim - 2))


def product(matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`matrix @ x + bias` at every position, for what `by_hand` accepts."""
    with full_precision(x):
        return _Product.apply(matrix, x, bias)


def gather_step(
    x: Tensor,
    params: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    split: int,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """Forward direction of `usf_kernels.ops.step.coupling_step`, for what `by_hand` accepts."""
    return _GatherStep.apply(x, params, index, scale, bias, split, clamp)


def matrix_step(
    x: Tensor, params: Tensor, matrix: Tensor, bias: Tensor | None, split: int, clamp: float | None
) -> tuple[Tensor, Tensor]:
    """A coupling, then a matrix (C, C), for what `by_hand` accepts; returns the same as `gather_step`."""
    return _MatrixStep.apply(x, params, matrix, bias, split, clamp)
