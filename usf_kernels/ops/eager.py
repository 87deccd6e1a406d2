"""A coupling and the channel map after it, with hand-written gradients, for the CPU.

Fresh memory and passes over it take most of the time there. In float32 a step is one pass in the extension,
and its gradient another (`native`). Where that has no loop, in float64, and for second derivatives, function
transforms and compilers, the operations of `reference` are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usf_kernels.kernels.plain import full_precision
from usf_kernels.ops import native, reference
from usf_kernels.ops.dispatch import differentiates_again, gradients_through
from usf_kernels.ops.matrices import apply_matrix, matrix_gradient


def by_hand(*tensors: Tensor | None) -> bool:
    """Whether the functions here may run: CPU tensors, all float32 or all float64, not observed."""
    given = [t for t in tensors if t is not None]
    return (
        all(t.device.type == "cpu" and t.dtype == given[0].dtype for t in given)
        and given[0].dtype in (torch.float32, torch.float64)
        and not native.is_observed()
        and not native.is_grads_batched(*given)
    )


def couple(x: Tensor, params: Tensor, split: int, clamp: float | None) -> tuple[Tensor, Tensor]:
    """Return the coupled x and the log-determinant."""
    if native.accepts(x, params):
        found = native.couple(x, params, None, None, None, split, clamp, inverse=False)
        if found is not None:
            return found
    return reference.coupling_step(x, params, None, None, None, split, clamp, False)


def uncoupled_gradients(
    grad: Tensor, grad_log_det: Tensor, x: Tensor, params: Tensor, split: int, clamp: float | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and params from `grad`, the gradient of the coupled x, which may be overwritten."""
    if native.accepts(grad, grad_log_det, x, params):
        grad_params = native.uncouple_gradient_(grad, grad_log_det, x, params, split, clamp)
        if grad_params is not None:
            return grad, grad_params
    if clamp is None:
        return grad, grad[:, split:].clone()
    grad_log_det = grad_log_det.expand(len(x))
    return reference.affine_coupling_gradients(x, params, split, clamp, False, grad, grad_log_det)


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
    if native.accepts(y, grad, grad_log_det, params, scale, bias):
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
    x, _ = reference.coupling_step(y, params, None, None, None, split, clamp, True)
    grad_x, grad_params = uncoupled_gradients(grad, grad_log_det, x, params, split, clamp)
    return x, grad_x, grad_params, grad_scale, grad_bias


def inverse_permutation(index: Tensor) -> Tensor:
    """Return the inverse of a permutation `index`, (C,) int64."""
    return torch.empty_like(index).index_copy_(0, index, torch.arange(len(index), device=index.device))


class _GatherStep(torch.autograd.Function):
    """The coupling, then a scale, a shift and a permutation. Saves what it is given, not its output."""

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
        if native.accepts(x, params, scale, bias):
            found = native.couple(x, params, index, scale, bias, split, clamp, inverse=False)
        ctx.native = found is not None
        if found is None:
            found = reference.coupling_step(x, params, index, scale, bias, split, clamp, False)
        ctx.save_for_backward(x, params, index, scale, bias)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple:
        x, params, index, scale, bias = ctx.saved_tensors
        if ctx.native and native.accepts(grad, grad_log_det) and not differentiates_again():
            grads = native.couple_gradient(
                grad, grad_log_det, x, params, index, scale, *ctx.options, inverse=False
            )
            return *grads[:2], None, *grads[2:], None, None

        def plain(
            x: Tensor, params: Tensor, scale: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            return reference.coupling_step(x, params, index, scale, bias, *ctx.options, inverse=False)

        grads = gradients_through(plain, (x, params, scale, bias), (grad, grad_log_det))
        return *grads[:2], None, *grads[2:], None, None


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
        y, log_det = couple(x, params, split, clamp)
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
        grad_x, grad_params = uncoupled_gradients(grad_x, grad_log_det, x, params, *ctx.options)
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
        if differentiates_again() or native.is_grads_batched(grad):
            return tuple(gradients_through(apply_matrix, (matrix, x, bias), (grad,)))
        with full_precision(grad):
            return (
                matrix_gradient(grad, x) if ctx.needs_input_grad[0] else None,
                apply_matrix(matrix.mT, grad, None) if ctx.needs_input_grad[1] else None,
                None if bias is None else channel_sums(grad),
            )


def channel_sums(value: Tensor) -> Tensor:
    """Sum of (B, C, *spatial) over all dimensions but the channels: (C,)."""
    if not torch.is_grad_enabled() and native.accepts(value):
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
