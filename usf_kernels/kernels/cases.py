"""The kinds of products that are compiled offline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from usf_kernels.kernels.launch import Case


def product_cases(
    name: str, kernel: str, call: Callable[[Callable[..., Tensor]], Any], channels_last: bool
) -> Iterator[Case]:
    """Yield a case for each kind of product: `call` gets a function that makes meta tensors of given sizes.

    `kernel` must use tensor cores, except for float32 products, which must not be rounded.
    """
    kinds = {
        "bfloat16": (torch.bfloat16, False),
        "float16": (torch.float16, False),
        "tf32": (torch.float32, True),
        "float32": (torch.float32, False),
    }

    def run(dtype: torch.dtype, tf32: bool) -> None:
        def tensor(*size: int) -> Tensor:
            made = torch.empty(size, dtype=dtype, device="meta")
            return made.to(memory_format=torch.channels_last) if channels_last and len(size) == 4 else made

        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            call(tensor)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    layout = "channels last" if channels_last else "contiguous"
    for kind, options in kinds.items():
        need = "vector loads" if kind == "float32" else "tensor cores"
        yield Case(f"{name}, {kind}, {layout}", functools.partial(run, *options), {kernel: need})
