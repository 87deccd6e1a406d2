"""Loops of the extension over float32 tensors on the CPU, each one pass over memory.

Where torch needs a pass and fresh memory for every operation, these read each value once. Callers must ask
`accepts` first. Tensors go to the extension as addresses and strides. It walks contiguous and channels-last
memory, including slices of channels or of the batch; tensors with other strides are copied first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from usf_kernels import _core
from usf_kernels.memory import in_huge_pages

WORTH_THREADS = 1 << 15  # elements; below, waking threads takes longer than they save
LARGEST_CLAMP = 80.0  # e^s is then finite: the loops do not check
PLAIN = (Tensor, nn.Parameter)


def is_observed() -> bool:
    """Whether a compiler, a transform, a mode or a tracer would have to see an operation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def is_grads_batched(*tensors: Tensor | None) -> bool:
    """Whether autograd runs many gradients at once (`is_grads_batched`); they must not be written to."""
    return any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


def accepts(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the extension may read these tensors: plain CPU tensors of this dtype, none observed."""
    if is_observed():
        return False
    for t in tensors:
        if t is not None and not (type(t) in PLAIN and t.dtype is dtype and t.is_cpu and is_materialized(t)):
            return False
    return True


def is_materialized(t: Tensor) -> bool:
    """Whether the values of a tensor are what lies at its address."""
    # Takes one tensor and does not call `is_grads_batched`: it runs often, and a loop would cost.
    of_many = torch._C._functorch.is_legacy_batchedtensor(t)
    return t.layout is torch.strided and not (t.is_neg() or t._is_zerotensor() or of_many)


def squared_norm(z: Tensor) -> Tensor:
    """`usf_kernels.ops.squared_norm`: (B, *spatial)."""
    shape = z.shape
    out = z.new_empty((shape[0], *shape[2:]))
    if not _core.squared_norm(shape, _of(z), out.data_ptr(), threads_over(z)):
        z = _formatted(z, z)
        _core.squared_norm(shape, _of(z), out.data_ptr(), threads_over(z))
    return out


def squared_norm_gradient(grad: Tensor, z: Tensor) -> Tensor:
    """Return `2 * grad * z` in the memory format of z."""
    out, grad = in_huge_pages(torch.empty_like(z)), grad.contiguous()
    if not _core.squared_norm_gradient(z.shape, grad.data_ptr(), _of(z), _of(out), threads_over(z)):
        z, out = _formatted(z, z), _formatted_empty(z, z)
        _core.squared_norm_gradient(z.shape, grad.data_ptr(), _of(z), _of(out), threads_over(z))
    return out


def channel_sums(x: Tensor) -> Tensor | None:
    """Sums per channel, (C,): of up to 256 values in float32, and of these in float64. None for strides that
    have no loop."""
    sums = x.new_empty(x.shape[1])
    return sums if _core.channel_sums(x.shape, _of(x), sums.data_ptr(), threads_over(x)) else None


def couple(
    x: Tensor,
    params: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    split: int,
    clamp: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor] | None:
    """`usf_kernels.ops.step.coupling_step` in x's memory format; inverses must have no index and scale.

    Returns None for what is left to torch: a clamp beyond `LARGEST_CLAMP`, an index that is no permutation.
    """
    if not _takes(index, clamp):
        return None
    shape, y = x.shape, _dense(x)
    log_det = None if clamp is None else x.new_empty(shape[0])
    options = split, clamp, inverse
    index, scale, bias = (None if v is None else v.contiguous() for v in (index, scale, bias))
    exits, threads = (address(index), address(scale), address(bias)), threads_over(x)
    if not _core.couple(shape, _of(x), _of(params), *options, *exits, _of(y), address(log_det), threads):
        x, params, y = _formatted(x, y), _formatted(params, y), _formatted_empty(x, y)
        if not _core.couple(shape, _of(x), _of(params), *options, *exits, _of(y), address(log_det), threads):
            return None
    return y, x.new_empty(0) if log_det is None else log_det


def shift(x: Tensor, values: Tensor, split: int, inverse: bool) -> Tensor:
    """`usf_kernels.ops.additive_coupling`, a fifth faster than `couple` on small tensors."""
    shape, y, threads = x.shape, _dense(x), threads_over(x)
    options = split, None, inverse, None, None, None
    if not _core.couple(shape, _of(x), _of(values), *options, _of(y), None, threads):
        x, values, y = _formatted(x, y), _formatted(values, y), _formatted_empty(x, y)
        _core.couple(shape, _of(x), _of(values), *options, _of(y), None, threads)
    return y


def couple_gradient(
    grad: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    params: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    split: int,
    clamp: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """Gradients of x, params, scale and bias (None without a scale). Returns None where `couple` does."""
    if not _takes(index, clamp):
        return None
    per_channel = [None if scale is None else torch.empty_like(scale) for _ in range(2)]
    exits = [None if v is None else v.contiguous() for v in (index, scale)]
    options = split, clamp, inverse, exits, per_channel
    grad_x, grad_params = _dense(x), _dense(params)
    if not _write_gradients(grad, grad_log_det, x, params, grad_x, grad_params, *options):
        grad, x, params = (_formatted(t, grad_x) for t in (grad, x, params))
        grad_x, grad_params = _formatted_empty(x, grad_x), _formatted_empty(params, grad_x)
        if not _write_gradients(grad, grad_log_det, x, params, grad_x, grad_params, *options):
            return None
    return grad_x, grad_params, *per_channel


def uncouple_gradient_(
    grad: Tensor, grad_log_det: Tensor, x: Tensor, params: Tensor, split: int, clamp: float | None
) -> Tensor | None:
    """`usf_kernels.ops.eager.uncouple_gradient_`; None for strides that have no loop."""
    if not _takes(None, clamp):
        return None
    grad_params = _dense(params)
    options = split, clamp, False, (None, None), (None, None)
    done = _write_gradients(grad, grad_log_det, x, params, grad, grad_params, *options)
    return grad_params if done else None


def _write_gradients(
    grad: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    params: Tensor,
    grad_x: Tensor,
    grad_params: Tensor,
    split: int,
    clamp: float | None,
    inverse: bool,
    exits: Sequence[Tensor | None],
    per_channel: Sequence[Tensor | None],
) -> bool:
    """Write `grad_x`, `grad_params` and `per_channel`. For strides without a loop, only return False."""
    grad_log_det = None if clamp is None else grad_log_det.contiguous()
    return _core.couple_gradient(
        x.shape, _of(grad), address(grad_log_det), _of(x), _of(params), split, clamp, inverse,
        *map(address, exits), _of(grad_x), _of(grad_params), *map(address, per_channel), threads_over(x),
    )  # fmt: skip


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """`usf_kernels.ops.eager.uncouple`, in place if there is neither index nor scale. Returns None where
    `couple` does."""
    if not _takes(index, clamp):
        return None
    grad_log_det = None if clamp is None else grad_log_det.expand(y.shape[0]).contiguous()
    per_channel = [None if scale is None else torch.empty_like(scale) for _ in range(2)]
    exits = [None if v is None else v.contiguous() for v in (index, scale, bias)]

    def run(y: Tensor, grad: Tensor, params: Tensor, x: Tensor, grad_x: Tensor, grad_params: Tensor) -> bool:
        return _core.uncouple(
            y.shape, _of(y), _of(grad), address(grad_log_det), _of(params), split, clamp,
            *map(address, exits), _of(x), _of(grad_x), _of(grad_params), *map(address, per_channel),
            threads_over(y),
        )  # fmt: skip

    for format_ in (lambda t: t, lambda t: _formatted(t, y)):
        given = format_(y), format_(grad), format_(params)
        x, grad_x = given[:2] if index is None and scale is None else (_dense(given[0]), _dense(given[1]))
        made = x, grad_x, _dense(given[2])
        if run(*given, *made):
            return *made, *per_channel
    return None


def threads_over(x: Tensor) -> int:
    """Number of threads for one pass over x."""
    return torch.get_num_threads() if x.numel() >= WORTH_THREADS else 1


def _takes(index: Tensor | None, clamp: float | None) -> bool:
    return (clamp is None or clamp <= LARGEST_CLAMP) and (index is None or index.is_cpu)


def _of(t: Tensor) -> tuple[int, tuple[int, ...]]:
    """Address and strides of a tensor, in the form that the extension takes."""
    return t.data_ptr(), t.stride()


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _dense(x: Tensor) -> Tensor:
    """Empty tensor of the shape of x, in the memory format that torch.cat over channels would return."""
    if x.ndim in (4, 5):
        return in_huge_pages(torch.empty_like(x))
    return in_huge_pages(torch.empty_like(x, memory_format=torch.contiguous_format))


def memory_format(like: Tensor) -> torch.memory_format:
    """Channels-last where `like` has the channels of a position side by side, contiguous otherwise."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.ndim)
    contiguous = last is None or like.is_contiguous() or not like.is_contiguous(memory_format=last)
    return torch.contiguous_format if contiguous else last


def _formatted(t: Tensor, like: Tensor) -> Tensor:
    return t.contiguous(memory_format=memory_format(like))


def _formatted_empty(t: Tensor, like: Tensor) -> Tensor:
    return in_huge_pages(torch.empty_like(t, memory_format=memory_format(like)))
