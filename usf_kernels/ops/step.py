"""A coupling and the channel map after it as one operation: a flow step without its conditioner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usf_kernels.kernels.layout import empty_output
from usf_kernels.ops import eager, reference
from usf_kernels.ops.checks import (
    check_clamp,
    check_features,
    check_int,
    check_shape,
    promoted_dtype,
)
from usf_kernels.ops.dispatch import (
    define,
    differentiates_again,
    gradients_through,
    implementation,
    kernel,
    runs_triton,
)
from usf_kernels.ops.function import Function
from usf_kernels.ops.linear import linear


def coupling_step(
    x: Tensor,
    params: Tensor,
    *,
    split: int,
    clamp: float | None = None,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    inverse: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A coupling, then an ActNorm and a permutation of its channels: a Glow step without its conditioner.

    `y[:, i] = scale[j] * v[:, j] + bias[j]`, with j = index[i] and v the coupled x. The coupling is additive,
    with the shift `params`, if `clamp` is None, else affine. The inverse takes the same arguments.

    Args:
        x: (B, C, *spatial), the step's input, or its output for the inverse.
        params: the conditioner's output for the passive half of the coupling's input, as `additive_coupling`
            or `affine_coupling` takes it.
        split, clamp: see `affine_coupling`.
        index: (C,) int64, a permutation; None for none. Its values are not read for checking.
        scale, bias: (C,) each, no scale zero; both None for no ActNorm.
        inverse, impl: see `affine_coupling`.

    Returns:
        y: (B, C, *spatial) in the promoted dtype of x and params.
        log_det: (B,), of the coupling alone, in the direction computed; of shape (0,) for an additive
            coupling.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
        RuntimeError: an `impl` that cannot run here.
    """
    check_features("x", x)
    channels = x.shape[1]
    split = check_int("split", split, 0, channels)
    active = channels - split
    if clamp is None:
        check_shape("params", params, (x.shape[0], active, *x.shape[2:]), "(B, C - split, *spatial)")
    else:
        clamp = check_clamp(clamp)
        check_shape(
            "params", params, (x.shape[0], 2 * active, *x.shape[2:]), "(B, 2 * (C - split), *spatial)"
        )
    if index is not None and (index.dtype != torch.int64 or tuple(index.shape) != (channels,)):
        raise ValueError(
            f"index: expected int64 of shape ({channels},), found {index.dtype} of shape {tuple(index.shape)}"
        )
    if index is not None and index.device != x.device:
        raise ValueError(f"index: expected a tensor on {x.device} as x, found one on {index.device}")
    if (scale is None) != (bias is None):
        raise ValueError(f"bias: expected a tensor exactly where scale is one, found {bias!r}")
    if scale is not None:
        check_shape("scale", scale, (channels,), "(C,)")
        check_shape("bias", bias, (channels,), "(C,)")
    run = implementation("coupling_step", impl, x, params, scale, bias)
    return run(x, params, index, scale, bias, split, clamp, inverse)


def coupling_matrix(
    x: Tensor,
    params: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    *,
    split: int,
    clamp: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A coupling, then `matrix @ y + bias` at every position: `coupling_step` with a matrix (C, C) in place
    of a permutation. Autocast does not reduce the precision; matrix and bias (C,) are not checked.

    Args:
        x, params, split, clamp: as for `coupling_step`.

    Returns and raises the same as `coupling_step`.
    """
    if eager.by_hand(x, params, matrix, bias):
        return eager.matrix_step(x, params, matrix, bias, split, clamp)
    y, log_det = coupling_step(x, params, split=split, clamp=clamp)
    return linear(y, matrix, bias), log_det


def undo_step(
    y: Tensor,
    grad: Tensor,
    grad_log_det: Tensor,
    params: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    split: int,
    clamp: float | None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Recover a step's input from its output y, with the gradients, for a reversible backward pass.

    Nothing is checked or recorded. All tensors share one dtype; y and `grad` may be overwritten.
    `grad_log_det` is 0-d or (B,), the other arguments are those of `coupling_step`.

    Returns:
        x, and the gradients of x, params, scale and bias; the last two are None without a scale.
    """
    options = index, scale, bias, split, clamp
    if impl == "triton" or (impl is None and runs_triton("coupling_step", y, grad, params)):
        of_log_det = grad_log_det.new_empty(0) if clamp is None else grad_log_det.expand(len(y)).contiguous()
        x, _ = _op(y, params, *options, True)
        grads = _backward_op(grad, of_log_det, x, params, *options, False)
        return x, *grads[:2], *(grads[2:] if scale is not None else (None, None))
    return eager.uncouple(y, grad, grad_log_det, params, *options)


# ------------------------------------------------------------------------------------------- as torch ops

_ARGUMENTS = (
    "Tensor x, Tensor params, Tensor? index, Tensor? scale, Tensor? bias, "
    "SymInt split, float? clamp, bool inverse"
)


def _fake(x: Tensor, params: Tensor, index: Tensor | None, scale: Tensor | None, bias: Tensor | None,
          split: int, clamp: float | None, inverse: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    log_det = x.new_empty(0 if clamp is None else x.shape[0], dtype=torch.float32)
    return empty_output(x, promoted_dtype(x, params)), log_det


def _backward_fake(grad: Tensor, grad_log_det: Tensor, x: Tensor, params: Tensor, index: Tensor | None,
                   scale: Tensor | None, bias: Tensor | None, *options: Any) -> tuple:  # fmt: skip
    per_channel = (x.new_empty(0) if v is None else v.new_empty(v.shape) for v in (scale, bias))
    return empty_output(x, x.dtype), empty_output(params, params.dtype), *per_channel


_op = define(f"coupling_step({_ARGUMENTS}) -> (Tensor, Tensor)", _fake, "coupling.coupling_step")
_backward_op = define(
    f"coupling_step_backward(Tensor grad, Tensor grad_log_det, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    "coupling_backward.coupling_step_backward",
)


class _Step(Function):
    """Saves the input and the parameters only; the backward pass recomputes scales and shifts."""

    @staticmethod
    def forward(x: Tensor, params: Tensor, index: Tensor | None, scale: Tensor | None, bias: Tensor | None,
                split: int, clamp: float | None, inverse: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        # Arguments are named one by one: Dynamo counts them to tell whether a context is among them.
        return _op(x, params, index, scale, bias, split, clamp, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.options = inputs[5:]
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple:
        x, params, index, scale, bias = ctx.saved_tensors
        if differentiates_again():

            def plain(
                x: Tensor, params: Tensor, scale: Tensor | None, bias: Tensor | None
            ) -> tuple[Tensor, Tensor]:
                return reference.coupling_step(x, params, index, scale, bias, *ctx.options)

            grads = gradients_through(plain, (x, params, scale, bias), (grad, grad_log_det))
        else:
            grads = _backward_op(grad, grad_log_det, x, params, index, scale, bias, *ctx.options)
        return *grads[:2], None, *(grads[2:] if scale is not None else (None, None)), None, None, None


@kernel("coupling_step")
def fused_step(
    x: Tensor,
    params: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    split: int,
    clamp: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """`coupling_step` with Triton, unchecked."""
    return _Step.run(x, params, index, scale, bias, split, clamp, inverse)
