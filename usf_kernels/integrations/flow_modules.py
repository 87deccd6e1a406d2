"""This package's flow modules as FrEIA's `InvertibleModule`s, for its `SequenceINN` and `GraphINN`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from usf_kernels import nn as flows
from usf_kernels.nn.folding import Coupling, LinearMap, parts

Dims = Sequence[tuple[int, ...]]


class FlowModule(InvertibleModule):
    """A flow module of `usf_kernels.nn` under FrEIA's contract.

    Args:
        dims_in: one shape (C, *spatial).
        dims_c: shapes (C_cond, *spatial) of the conditions, which are concatenated for the flow.
        flow: module with `forward(x, cond=None)` and `inverse(z, cond=None)`; becomes the submodule `flow`.

    `forward(x_or_z, c=None, rev=False, jac=True) -> ((y,), log_det)` takes a tuple of one (B, C, *spatial)
    and returns log_det as (B,), for the direction computed.

    Raises:
        ValueError: for more or fewer inputs than one, or a condition of other spatial sizes.
    """

    folds = True

    def __init__(self, dims_in: Dims, dims_c: Dims | None, flow: nn.Module) -> None:
        super().__init__(dims_in, dims_c)
        self.flow = flow

    def forward(
        self, x_or_z: Sequence[Tensor], c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Apply the flow, or its inverse."""
        (x,) = x_or_z
        cond = torch.cat(list(c), dim=1) if c else None
        y, log_det = (self.flow.inverse if rev else self.flow)(x, cond)
        return (y,), log_det.expand(x.shape[0]).clone()  # callers may write to it

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes of the input: they do not change."""
        _check_dims(input_dims, ())
        return input_dims

    def flow_parts(self) -> Iterator[LinearMap | Coupling]:
        """Return the parts of the flow, see `usf_kernels.nn.folding.parts`."""
        return parts(self.flow)


def _check_dims(dims_in: Dims, dims_c: Dims | None) -> tuple[int, int]:
    """Return the number of channels, and that of all conditions together; raise for bad shapes."""
    dims_in, dims_c = list(dims_in), list(dims_c or ())
    if len(dims_in) != 1:
        raise ValueError(f"dims_in: expected the shape of one input, found {dims_in}")
    for dims in dims_c:
        if tuple(dims[1:]) != tuple(dims_in[0][1:]):
            raise ValueError(f"dims_c: expected the spatial sizes of dims_in {dims_in[0]}, found {dims}")
    return dims_in[0][0], sum(dims[0] for dims in dims_c)


class LUConv1x1(FlowModule):
    """`usf_kernels.nn.LUConv1x1`: an invertible 1x1 convolution. Its log-determinant depends on no data.

    Args:
        dims_in: one shape (C, *spatial).
        dims_c: None or empty; the map takes no conditions.
        bias, diagonal, init: see that class; `init` is a random rotation by default.
    """

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        *,
        bias: bool = True,
        diagonal: str = "free",
        init: str = "orthogonal",
    ) -> None:
        channels, cond_channels = _check_dims(dims_in, dims_c)
        if cond_channels:
            raise ValueError(f"dims_c: expected no conditions, found {list(dims_c)}")
        super().__init__(dims_in, dims_c, flows.LUConv1x1(channels, bias=bias, diagonal=diagonal, init=init))


class USFBlock(FlowModule):
    """`usf_kernels.nn.USFBlock`: an additive coupling between a linear map and its inverse; log-det 0.

    Args:
        dims_in: one shape (C, *spatial).
        dims_c: shapes of the conditions.
        subnet_constructor: called as `subnet_constructor(c_in, c_out)`; returns the conditioner.
        mask, zero_init: see that class.
    """

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        *,
        subnet_constructor: Callable[[int, int], nn.Module],
        mask: str = "half",
        zero_init: bool = True,
    ) -> None:
        channels, cond_channels = _check_dims(dims_in, dims_c)
        options = {"subnet": subnet_constructor, "mask": mask, "zero_init": zero_init}
        super().__init__(dims_in, dims_c, flows.USFBlock(channels, cond_channels=cond_channels, **options))


class FlowStep(FlowModule):
    """`usf_kernels.nn.FlowStep`: coupling, ActNorm and linear map. By default, additive with an LU map, it is
    the uniformly scaling form of `AllInOneBlock`.

    Args:
        dims_in: one shape (C, *spatial).
        dims_c: shapes of the conditions.
        subnet_constructor: called as `subnet_constructor(c_in, c_out)`; returns the conditioner.
        coupling, linear, clamp, act_norm, zero_init: see that class.
    """

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        *,
        subnet_constructor: Callable[[int, int], nn.Module],
        coupling: str = "additive",
        linear: str = "lu",
        clamp: float = 2.0,
        act_norm: bool = True,
        zero_init: bool = True,
    ) -> None:
        channels, cond_channels = _check_dims(dims_in, dims_c)
        step = flows.FlowStep(
            channels,
            subnet=subnet_constructor,
            coupling=coupling,
            linear=linear,
            clamp=clamp,
            act_norm=act_norm,
            cond_channels=cond_channels,
            zero_init=zero_init,
        )
        super().__init__(dims_in, dims_c, step)
