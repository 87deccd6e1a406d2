"""Fixed permutations of the channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from usf_kernels.nn.fusible import Fusible
from usf_kernels.ops.checks import check_features, check_int, compute_dtype
from usf_kernels.ops.function import Function

if TYPE_CHECKING:
    from usf_kernels.nn.tape import Tape


class _Gather(Function):
    """Channels in a permuted order. The backward gathers too: indexing's own would scatter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse_index: Tensor) -> Tensor:
        return x.index_select(1, index)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:  # noqa: ANN001
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        index, inverse_index = ctx.saved_tensors
        return _Gather.apply(grad, inverse_index, index), None, None


class Permutation(Fusible, nn.Module):
    """A fixed random permutation of the channels, kept as an index; log-det 0.

    Args:
        channels: C.
        seed: for the permutation; None draws from torch's global generator of the CPU.

    The permutation and its inverse are buffers and travel with the state_dict: `y[:, i] = x[:, index[i]]`.
    `forward(x, cond=None) -> (y, 0)` and `inverse(y, cond=None) -> (x, 0)` take (B, C, *spatial); `cond` is
    ignored.

    Raises:
        TypeError, ValueError: a bad argument, an x of the wrong shape or dtype.
    """

    def __init__(self, channels: int, *, seed: int | None = None) -> None:
        super().__init__()
        check_int("channels", channels, 1)
        self.channels = channels
        generator = None
        if seed is not None:
            check_int("seed", seed, -(2**63), 2**64 - 1)  # as torch takes them
            generator = torch.Generator("cpu").manual_seed(int(seed))
        index = torch.randperm(channels, generator=generator, device="cpu").to(torch.get_default_device())
        self.register_buffer("index", index)
        self.register_buffer("inverse_index", torch.argsort(index))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (y, 0)."""
        check_features("x", x, self.channels)
        return _Gather.apply(x, self.index, self.inverse_index), x.new_zeros((), dtype=compute_dtype(x))

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, 0)."""
        check_features("z", z, self.channels)
        return _Gather.apply(z, self.inverse_index, self.index), z.new_zeros((), dtype=compute_dtype(z))

    def pull_back(self, z: Tensor, grad_z: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """(x, its gradient) from those of z = forward(x); see `usf_kernels.nn.reversible`."""
        return z.index_select(1, self.inverse_index), grad_z.index_select(1, self.inverse_index)

    def extra_repr(self) -> str:
        """Channels, for print."""
        return f"{self.channels}"
