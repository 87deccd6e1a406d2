"""Coupling layers as modules: the passive half conditions what happens to the active half."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from usf_kernels.ops import additive_coupling, affine_coupling
from usf_kernels.ops.checks import check_clamp, check_features, check_int, check_shape, compute_dtype

Subnet = Callable[[int, int], nn.Module]


def zero_last_layer(subnet: nn.Module) -> bool:
    """Zero the weight and bias of the last module registered in `subnet`, where that is a convolution or
    linear layer; True if it was. Anything else (an activation, a reparameterised layer) is left alone."""
    last = list(subnet.modules())[-1]
    zeroed = isinstance(last, (_ConvNd, nn.Linear)) and last._parameters.get("weight") is not None
    if zeroed:
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    return zeroed


class _Coupling(nn.Module):
    """What both couplings share: the split, the conditioner and the condition."""

    outputs_per_channel: int

    def __init__(
        self, channels: int, *, subnet: Subnet, cond_channels: int = 0, zero_init: bool = True
    ) -> None:
        super().__init__()
        check_int("channels", channels, 2)
        check_int("cond_channels", cond_channels, 0)
        self.channels, self.cond_channels = channels, cond_channels
        self.split = channels - channels // 2
        self.subnet = subnet(self.split + cond_channels, self.outputs_per_channel * (channels // 2))
        if not isinstance(self.subnet, nn.Module):
            raise TypeError(f"subnet: expected it to return an nn.Module, found {type(self.subnet).__name__}")
        if zero_init:
            zero_last_layer(self.subnet)

    def _condition(self, x: Tensor, cond: Tensor | None, name: str) -> Tensor:
        """The conditioner's output for the passive half of x, which forward and inverse share."""
        check_features(name, x, self.channels)
        inputs = x[:, : self.split]
        if self.cond_channels > 0:
            inputs = torch.cat([inputs, self._check_cond(x, cond).to(x.dtype)], dim=1)
        elif cond is not None:
            raise ValueError("cond: expected None because cond_channels is 0, found a condition")
        output = self.subnet(inputs)
        expected = (x.shape[0], self.outputs_per_channel * (self.channels - self.split), *x.shape[2:])
        check_shape("output of subnet", output, expected, "(B, c_out, *spatial)")
        return output

    def _check_cond(self, x: Tensor, cond: Tensor | None) -> Tensor:
        if cond is None:
            raise ValueError(f"cond: expected a tensor with {self.cond_channels} channels, found None")
        check_features("cond", cond, self.cond_channels)
        if cond.shape[0] not in (1, x.shape[0]) or cond.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"cond: expected batch size 1 or {x.shape[0]} and spatial size {tuple(x.shape[2:])} as x, "
                f"found shape {tuple(cond.shape)}"
            )
        return cond.expand(x.shape[0], *cond.shape[1:])

    def extra_repr(self) -> str:
        """Channels and the condition's channels, for print."""
        return f"{self.channels}, cond_channels={self.cond_channels}"


class AdditiveCoupling(_Coupling):
    """Additive coupling `y = [x1, x2 + subnet(x1)]`, log-det 0. NICE (arXiv:1410.8516), section 3.2.

    The passive half x1 is the first C - C//2 channels, as in FrEIA. A condition is concatenated to it in
    front of the subnet.

    Args:
        channels: C, at least 2.
        subnet: called once as `subnet(C - C//2 + cond_channels, C//2)`; returns the conditioner, a module
            that keeps the batch and spatial sizes.
        cond_channels: channels of the condition; 0 for none.
        zero_init: zero the weight and bias of the subnet's last module where that is a convolution or linear
            layer, so that the untrained coupling is the identity.

    `forward(x, cond=None) -> (y, log_det)` and `inverse(y, cond=None) -> (x, log_det)` take (B, C, *spatial)
    and a cond of (B or 1, cond_channels, *spatial); log_det is a 0-d zero.

    Raises:
        TypeError, ValueError: a bad argument, an x or cond of the wrong shape or dtype.
    """

    outputs_per_channel = 1

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (y, 0)."""
        return self._run(x, cond, inverse=False)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, 0)."""
        return self._run(z, cond, inverse=True)

    def _run(self, x: Tensor, cond: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        y = additive_coupling(
            x, self._condition(x, cond, "z" if inverse else "x"), split=self.split, inverse=inverse
        )
        return y, y.new_zeros((), dtype=compute_dtype(y))


class AffineCoupling(_Coupling):
    """Affine coupling `y = [x1, x2 * exp(s) + t]` with s, t from `subnet(x1)`, in the convention of FrEIA's
    and anomalib's `AllInOneBlock`: see `usf_kernels.ops.affine_coupling`. RealNVP (arXiv:1605.08803),
    equations 4 and 5. Not uniformly scaling: the log-det depends on the input.

    Args:
        channels: C, at least 2.
        subnet: called once as `subnet(C - C//2 + cond_channels, 2 * (C//2))`; see `AdditiveCoupling`.
        clamp: bound on |s|, positive.
        cond_channels, zero_init: see `AdditiveCoupling`.

    `forward(x, cond=None) -> (y, log_det)` and `inverse(y, cond=None) -> (x, log_det)`; log_det is (B,), that
    of the direction computed.

    Raises:
        TypeError, ValueError: a bad argument, an x or cond of the wrong shape or dtype.
    """

    outputs_per_channel = 2

    def __init__(
        self,
        channels: int,
        *,
        subnet: Subnet,
        clamp: float = 2.0,
        cond_channels: int = 0,
        zero_init: bool = True,
    ) -> None:
        super().__init__(channels, subnet=subnet, cond_channels=cond_channels, zero_init=zero_init)
        check_clamp(clamp)
        self.clamp = clamp

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (y, log_det (B,))."""
        params = self._condition(x, cond, "x")
        return affine_coupling(x, params, split=self.split, clamp=self.clamp)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, log_det (B,))."""
        params = self._condition(z, cond, "z")
        return affine_coupling(z, params, split=self.split, clamp=self.clamp, inverse=True)

    def extra_repr(self) -> str:
        """Channels, the condition's channels and the clamp, for print."""
        return f"{super().extra_repr()}, clamp={self.clamp}"
