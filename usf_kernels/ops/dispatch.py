"""Which code runs an operation: the one place that knows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from usf_kernels.ops import reference
from usf_kernels.ops.checks import check_choice

IMPLS = ("reference", "triton")


def implementation(op: str, impl: str | None, *tensors: Tensor | None) -> Callable:
    """The function that runs `op` on these tensors.

    `impl=None` picks by device; naming one forces it, and it never falls back to another. Every
    implementation of an operation has the same positional signature, so call sites do not change when one
    is added. At present each operation has the PyTorch reference, on every device.

    Raises:
        ValueError: an `impl` that does not exist.
        RuntimeError: an `impl` that cannot run here.
    """
    if impl is not None:
        check_choice("impl", impl, IMPLS)
    if impl == "triton":
        raise RuntimeError(
            f"{op}: impl='triton' is not available: this version of usf_kernels has no Triton kernel for it. "
            "Use impl=None or impl='reference'"
        )
    return getattr(reference, op)
