"""Fixed permutations of the channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from usf_kernels.nn.fusible import Fusible
from usf_kernels.ops.checks import check_features, check_int, compute_dtype
from usf_kernels.ops.function import Function
from usf_kernels.ops.native import is_observed

if TYPE_CHECKING:
    from usf_kernels.nn.tape import Tape


class _Gather(Function):
    """Permute channels. The backward pass gathers too, where that of indexing would scatter."""

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

    The permutation `y[:, i] = x[:, index[i]]` and its inverse are buffers, and part of the state_dict.
    Averaging models with their buffers (`AveragedModel(use_buffers=True)`) rounds means of the index down,
    which spoils it; in evaluation mode, and before it is saved, the index is restored.
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
            check_int("seed", seed, -(2**63), 2**64 - 1)  # the seeds that torch takes
            generator = torch.Generator("cpu").manual_seed(int(seed))
        index = torch.randperm(channels, generator=generator, device="cpu").to(torch.get_default_device())
        self.register_buffer("index", index)
        self.register_buffer("inverse_index", torch.argsort(index))
        self._remember()

    @classmethod
    def of(cls, index: Tensor) -> Permutation:
        """Make the permutation `y[:, i] = x[:, index[i]]` from an index (C,) int64.

        Raises:
            TypeError, ValueError: an index that is no tensor of int64, or no permutation.
        """
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            found = getattr(index, "dtype", type(index).__name__)
            raise TypeError(f"index: expected a tensor of int64, found {found}")
        if index.ndim != 1 or not _is_permutation(index):
            raise ValueError(f"index: expected a permutation, found {index.tolist()}")
        permutation = cls(len(index), seed=0).to(index.device)
        permutation.index.copy_(index)
        permutation.inverse_index.copy_(torch.argsort(index))
        permutation._remember()
        return permutation

    def order(self) -> tuple[Tensor, Tensor]:
        """The index and its inverse, (C,) int64 each."""
        # DistributedDataParallel writes it at every training step; reading it would wait for a GPU.
        if not self.training and not is_observed():
            self._restore()
        return self.index, self.inverse_index

    def _remember(self) -> None:
        """Keep a copy of the index that averaging cannot change."""
        self._remembered = self.index.detach().clone()
        self._version = None if self.index.is_inference() else self.index._version

    @torch.no_grad()
    def _restore(self) -> None:
        if self.index.is_meta or self.index.is_inference() or self.index._version == self._version:
            return
        if not _is_permutation(self.index):
            self.index.copy_(self._remembered)
            self.inverse_index.copy_(torch.argsort(self.index))
        self._remember()

    def __getstate__(self) -> dict:
        self._restore()  # a copy goes on with what is remembered
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._version = None  # a copied tensor counts its changes anew

    def _save_to_state_dict(self, *args: object) -> None:
        self._restore()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state: dict, prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        if not self.index.is_meta and not _is_permutation(self.index):
            args[-1].append(f"{prefix}index: expected a permutation of {self.channels} channels")
        self._remember()

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (y, 0)."""
        check_features("x", x, self.channels)
        return _Gather.apply(x, *self.order()), x.new_zeros((), dtype=compute_dtype(x))

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, 0)."""
        check_features("z", z, self.channels)
        return _Gather.apply(z, *self.order()[::-1]), z.new_zeros((), dtype=compute_dtype(z))

    def pull_back(self, z: Tensor, grad_z: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """Return (x, its gradient) given those of z = forward(x); see `usf_kernels.nn.reversible`."""
        _, back = self.order()
        return z.index_select(1, back), grad_z.index_select(1, back)

    def extra_repr(self) -> str:
        """Channels, for print."""
        return f"{self.channels}"


def _is_permutation(index: Tensor) -> bool:
    return torch.equal(index.sort().values, torch.arange(len(index), device=index.device))
