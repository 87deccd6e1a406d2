"""What `fuse()` computes once, in float64: one linear map out of all those between two conditioners.

A flow is read as a list of parts: linear maps, and couplings. Consecutive linear maps are multiplied, so what
remains is `map, coupling, map, coupling, ..., map`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn

from usf_kernels.nn.act_norm import ActNorm
from usf_kernels.nn.conjugation import AffineCheckerboard, Conjugated, Householder
from usf_kernels.nn.coupling import AdditiveCoupling, AffineCoupling
from usf_kernels.nn.flow import FlowSequence, FlowStep
from usf_kernels.nn.linear import LUConv1x1
from usf_kernels.nn.permutation import Permutation
from usf_kernels.nn.usf_block import CheckerboardCoupling, USFBlock
from usf_kernels.ops.matrices import lu_matrix

WIDE = torch.float64
ON_CPU: Any = {"dtype": WIDE, "device": "cpu"}  # whatever the default device is


@dataclass(frozen=True, eq=False)
class LinearMap:
    """`x -> matrix @ x + bias` at every position; float64, on the CPU.

    Attributes:
        matrix: (C_out, C_in).
        bias: (C_out,).
    """

    matrix: Tensor
    bias: Tensor

    @classmethod
    def identity(cls, channels: int) -> LinearMap:
        """The map that changes nothing."""
        return cls(torch.eye(channels, **ON_CPU), torch.zeros(channels, **ON_CPU))

    def after(self, first: LinearMap) -> LinearMap:
        """The composition of `first`, then this map."""
        matrix = (
            first.right_multiply(self.matrix) if self.selection is None else self.left_multiply(first.matrix)
        )
        return LinearMap(matrix, self.matrix @ first.bias + self.bias)

    def left_multiply(self, matrix: Tensor) -> Tensor:
        """Return `self.matrix @ matrix`; a selection needs no product for it."""
        if self.selection is None:
            return self.matrix @ matrix
        index, scale = self.selection
        return scale[:, None] * matrix[index]

    def right_multiply(self, matrix: Tensor) -> Tensor:
        """Return `matrix @ self.matrix`; a selection needs no product for it."""
        if self.selection is None:
            return matrix @ self.matrix
        index, scale = self.selection
        return matrix.new_zeros(len(matrix), self.matrix.shape[1]).index_add_(1, index, matrix * scale)

    def inverse(self) -> LinearMap:
        """The map that undoes this one."""
        if self.selection is not None:
            index, scale = self.selection
            matrix = torch.zeros_like(self.matrix).scatter_(0, index[None], 1 / scale[None])
        else:
            matrix = torch.linalg.inv(self.matrix)
        return LinearMap(matrix, -(matrix @ self.bias))

    def rows(self, index: Tensor) -> LinearMap:
        """The map to these outputs alone."""
        return LinearMap(self.matrix[index], self.bias[index])

    @cached_property
    def selection(self) -> tuple[Tensor, Tensor] | None:
        """(index, scale) if every output is one scaled input, `scale * x[index] + bias`; else None."""
        if not bool(((self.matrix != 0).sum(1) == 1).all()):
            return None
        index = self.matrix.abs().argmax(1)
        return index, self.matrix.gather(1, index[:, None])[:, 0]

    @property
    def is_identity(self) -> bool:
        """Whether the map changes nothing; one that selects the first of more channels is no identity."""
        return self.matrix.shape[0] == self.matrix.shape[1] and self.error_of_identity == 0

    @property
    def error_of_identity(self) -> float:
        """Distance from the identity: the largest difference in any entry of matrix and bias."""
        eye = torch.eye(*self.matrix.shape, **ON_CPU)
        return max((self.matrix - eye).abs().max().item(), self.bias.abs().max().item())

    @property
    def log_det(self) -> float:
        """log|det| at one position, in nats."""
        if self.selection is not None:
            return self.selection[1].abs().log().sum().item()
        return torch.linalg.slogdet(self.matrix)[1].item()


Coupling = AdditiveCoupling | AffineCoupling | CheckerboardCoupling | AffineCheckerboard
KNOWN = (
    *get_args(Coupling),
    ActNorm,
    Permutation,
    LUConv1x1,
    FlowStep,
    USFBlock,
    Householder,
    Conjugated,
    FlowSequence,
)


def parts(flow: nn.Module) -> Iterator[LinearMap | Coupling]:
    """The maps and couplings of a flow module, first to last.

    Raises:
        TypeError: a module that is not one of this package's flow modules, a subclass of one that overrides
            `forward` or `inverse`, a coupling within the `linear` of a `Conjugated`.
    """
    if not any(_does_as(type(flow), kind) for kind in KNOWN):
        raise TypeError(
            f"fuse: expected a flow module of usf_kernels.nn with its own forward and inverse, found "
            f"{type(flow).__name__}"
        )
    if isinstance(flow, Coupling):
        yield flow
    elif isinstance(flow, ActNorm):
        yield LinearMap(torch.diag(_wide(flow.log_scale).exp()), _wide(flow.bias))
    elif isinstance(flow, Permutation):
        index, _ = flow.order()
        yield LinearMap.identity(len(index)).rows(index.cpu())
    elif isinstance(flow, LUConv1x1):
        yield _lu_map(flow)
    elif isinstance(flow, FlowStep):
        for layer in (flow.coupling, flow.act_norm, flow.linear):
            if layer is not None:
                yield from parts(layer)
    elif isinstance(flow, USFBlock):
        enter = _lu_map(flow.linear)
        if flow.mask == "channel":
            order = torch.arange(flow.channels, device="cpu")
            enter = enter.rows(torch.cat([order[::2], order[1::2]]))
        yield from (enter, flow.coupling, enter.inverse())
    elif isinstance(flow, Householder):
        yield LinearMap(_wide(flow.matrix(WIDE)), torch.zeros(flow.channels, **ON_CPU))
    elif isinstance(flow, Conjugated):
        (enter, *_), couplings = alternate(list(parts(flow.linear)))
        if couplings:
            raise TypeError(
                "fuse: expected linear maps as the linear of a Conjugated, found a "
                f"{type(couplings[0]).__name__} in it"
            )
        yield from (enter, *parts(flow.coupling), enter.inverse())
    else:
        for step in flow:
            yield from parts(step)


def _does_as(kind: type, known: type) -> bool:
    """Whether `kind` is `known` or a subclass of it with the same `forward` and `inverse`."""
    return issubclass(kind, known) and all(
        getattr(kind, name) is getattr(known, name) for name in ("forward", "inverse")
    )


def _wide(values: Tensor) -> Tensor:
    return values.detach().to("cpu", WIDE)


def _lu_map(layer: LUConv1x1) -> LinearMap:
    lower, upper, bias = (v if v is None else v.detach() for v in deepcopy(layer).to("cpu", WIDE).factors())
    bias = torch.zeros(layer.channels, **ON_CPU) if bias is None else bias
    return LinearMap(lu_matrix(lower, upper), bias)


def alternate(flow: Sequence[LinearMap | Coupling]) -> tuple[list[LinearMap], list[Coupling]]:
    """Return (maps, couplings) with one map before each coupling, and one after the last.

    Raises:
        ValueError: an empty flow.
    """
    if not flow:
        raise ValueError("flow: expected at least one step to fuse, found none")
    first = flow[0]
    identity = LinearMap.identity(len(first.bias) if isinstance(first, LinearMap) else first.channels)
    maps, couplings = [identity], []
    for part in flow:
        if isinstance(part, LinearMap):
            maps[-1] = part.after(maps[-1])
        else:
            couplings.append(part)
            maps.append(identity)
    return maps, couplings
