"""Which code runs an operation called by its name; docs/develop.md says who decides for all others."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from usf_kernels.ops import native, reference
from usf_kernels.ops.checks import check_choice

IMPLS = ("reference", "triton")
# Read once, at import: under torch.compile, reading the environment would break the graph.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

_library = torch.library.Library("usf_kernels", "FRAGMENT")
_kernels: dict[str, Callable] = {}
_on_cpu: dict[str, Callable] = {}
F = TypeVar("F", bound=Callable)


def implementation(op: str, impl: str | None, *tensors: Tensor | None) -> Callable:
    """Return the function that runs `op` on these tensors.

    `impl=None` takes the Triton kernel on a CUDA or ROCm device, the extension's loops for float32 on the CPU
    if `op` has some and they may run (`native.accepts`), and the PyTorch reference elsewhere. Naming an
    implementation forces it, without a fallback. All have the same positional signature. With
    TRITON_INTERPRET=1 in the environment, forced kernels run on CPU tensors too.

    Raises:
        ValueError: an `impl` that does not exist; tensors on several devices.
        TypeError: `impl="triton"` for float64.
        RuntimeError: an `impl` that cannot run here.
    """
    if impl is not None:
        check_choice("impl", impl, IMPLS)
    if impl == "triton":
        _check_triton(op, tensors)
    if impl == "triton" or (impl is None and runs_triton(op, *tensors)):
        _check_one_device(op, tensors)
        return _kernels[op]
    if impl is None and runs_loops(op, *tensors):
        return _on_cpu[op]
    return getattr(reference, op)


def operations() -> tuple[str, ...]:
    """Names of the operations that have a Triton kernel."""
    return tuple(_kernels)


def runs_triton(op: str, *tensors: Tensor | None) -> bool:
    """Whether `impl=None` takes the Triton kernel of `op` for these tensors."""
    for t in tensors:
        if t is not None and (not t.is_cuda or t.dtype == torch.float64):
            return False
    return HAS_TRITON and op in _kernels


def runs_loops(op: str, *tensors: Tensor | None) -> bool:
    """Whether `impl=None` takes the extension's loops for these tensors."""
    return op in _on_cpu and native.accepts(*tensors)


def _check_triton(op: str, tensors: tuple[Tensor | None, ...]) -> None:
    def no(reason: str) -> str:
        return f"{op}: impl='triton' is not available: {reason}. Use impl=None or impl='reference'"

    if op not in _kernels:
        raise RuntimeError(no("this version of usf_kernels has no Triton kernel for it"))
    if not HAS_TRITON:
        raise RuntimeError(no("Triton is not installed"))
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype == torch.float64:
            raise TypeError(no("its kernels compute in float32, found float64"))
        if tensor.device.type != "cuda" and not (INTERPRETED and tensor.device.type == "cpu"):
            raise RuntimeError(no(f"it needs CUDA or ROCm tensors, found one on {tensor.device}"))


def _check_one_device(op: str, tensors: tuple[Tensor | None, ...]) -> None:
    """Raise unless all tensors are on one device: a kernel would read wrong memory where PyTorch raises."""
    devices = [t.device for t in tensors if t is not None]
    for device in devices:
        if device != devices[0]:
            raise ValueError(f"{op}: expected all tensors on one device, found {devices[0]} and {device}")


def kernel(op: str) -> Callable[[F], F]:
    """Decorator that registers a differentiable function to run `op` with Triton."""

    def register(function: F) -> F:
        _kernels[op] = function
        return function

    return register


def on_cpu(op: str) -> Callable[[F], F]:
    """Decorator that registers a differentiable function to run `op` where `native.accepts`."""

    def register(function: F) -> F:
        _on_cpu[op] = function
        return function

    return register


def define(schema: str, fake: Callable, launcher: str) -> Callable[..., Any]:
    """Define the torch op `usf_kernels::<schema>` and return it.

    It is opaque to compilers, not differentiable (an `autograd.Function` goes around it), and known without
    Triton, so that an exported program loads anywhere.

    Args:
        schema: name, arguments and results, in the language of `torch.library`.
        fake: takes the same arguments and returns empty results of the right shape, dtype and strides.
        launcher: "module.function" in `usf_kernels.kernels`, imported at the first call.
    """
    name = schema.partition("(")[0]
    # Compilers may not restride the inputs: the strides of a result follow from theirs.
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

    def run(*arguments: Any) -> Any:
        with torch.no_grad():  # torch operations inside a launcher must not be recorded
            return _load(launcher)(*arguments)

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"usf_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.usf_kernels, name).default

    def call(*arguments: Any) -> Any:
        if _may_bypass(arguments):  # PyTorch's dispatcher takes as long as a kernel
            return _load(launcher)(*arguments)
        return op(*arguments)

    return call


def _may_bypass(arguments: tuple[Any, ...]) -> bool:
    """Whether an operation may bypass PyTorch's dispatcher: all tensors are plain CUDA tensors whose values
    are what lies in memory, no gradients are recorded, and no compiler, transform, mode or tracer has to see
    the operation."""
    if native.is_observed() or torch.is_grad_enabled():
        return False
    for value in arguments:
        if isinstance(value, Tensor) and not (
            type(value) in native.PLAIN and value.is_cuda and native.is_materialized(value)
        ):
            return False
        if isinstance(value, (list, tuple)) and not _may_bypass(tuple(value)):
            return False
    return True


def differentiates_again() -> bool:
    """Whether the calling backward pass is itself recorded (`create_graph=True`) and must therefore consist
    of differentiable operations. Compiled code has no double backward."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients_through(
    plain: Callable, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `inputs` through the reference `plain`, given those of its results; differentiable again.
    An input that is None gets None; a result that is None has None as its gradient."""
    places = [i for i, value in enumerate(inputs) if value is not None]
    result: list[Tensor | None] = [None] * len(inputs)

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        every = list(result)
        for i, value in zip(places, given, strict=True):
            every[i] = value
        found = plain(*every)
        return tuple(v for v in ((found,) if isinstance(found, Tensor) else found) if v is not None)

    pull = torch.func.vjp(run, *(inputs[i] for i in places))[1]
    for i, value in zip(places, pull(tuple(g for g in grads if g is not None)), strict=True):
        result[i] = value
    return result


@functools.cache
def _load(launcher: str) -> Callable:
    module, _, function = launcher.rpartition(".")
    return getattr(importlib.import_module(f"usf_kernels.kernels.{module}"), function)
