"""Coupling layers as modules: the passive half conditions what happens to the active half."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from usf_kernels.nn.conditioner_layers import evaluate, overwrites
from usf_kernels.nn.fusible import Fusible
from usf_kernels.ops import additive_coupling, affine_coupling
from usf_kernels.ops.checks import check_clamp, check_features, check_int, check_shape, compute_dtype
from usf_kernels.ops.eager import inverse_permutation, per_channel
from usf_kernels.ops.function import Function
from usf_kernels.ops.native import is_grads_batched, is_observed, memory_format
from usf_kernels.ops.step import undo_step

if TYPE_CHECKING:
    from usf_kernels.nn.tape import Tape

Subnet = Callable[[int, int], nn.Module]


def zero_last_layer(subnet: nn.Module) -> bool:
    """Zero the weight and bias of the last module registered in `subnet` if that is a convolution or linear
    layer, and return whether it is. Others (an activation, a reparameterised layer) are left alone."""
    last = list(subnet.modules())[-1]
    zeroed = isinstance(last, (_ConvNd, nn.Linear)) and last._parameters.get("weight") is not None
    if zeroed:
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    return zeroed


class _Fork(Function):
    """Return (the first channels, all channels) of x, as views or with a copy of the first. The backward pass
    writes both gradients into one tensor in one pass; that of a slice would fill a second tensor with zeros
    first, and then add the two."""

    @staticmethod
    def forward(x: Tensor, split: int, fresh: bool, copied: bool) -> tuple[Tensor, Tensor]:
        first = x[:, :split]
        return first.clone(memory_format=memory_format(x)) if copied else first, x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:  # noqa: ANN001
        _, ctx.split, ctx.fresh, _ = inputs

    @staticmethod
    def backward(ctx, grad_first: Tensor, grad_all: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN001
        if is_observed() or torch.is_grad_enabled() or is_grads_batched(grad_first, grad_all):
            first, rest = grad_all[:, : ctx.split], grad_all[:, ctx.split :]
            return torch.cat([first + grad_first, rest], dim=1), None, None, None
        joined = grad_all if ctx.fresh else grad_all.clone()
        joined[:, : ctx.split].add_(grad_first)
        return joined, None, None, None


def check_condition(x: Tensor, cond: Tensor | None, channels: int) -> None:
    """Raise unless `cond` is a condition of so many channels for the input `x`, or None for 0 channels."""
    if channels == 0:
        if cond is not None:
            raise ValueError("cond: expected None because cond_channels is 0, found a condition")
        return
    if cond is None:
        raise ValueError(f"cond: expected a tensor with {channels} channels, found None")
    check_features("cond", cond, channels)
    if cond.shape[0] not in (1, x.shape[0]) or cond.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"cond: expected batch size 1 or {x.shape[0]} and spatial size {tuple(x.shape[2:])} as x, "
            f"found shape {tuple(cond.shape)}"
        )


class Conditioned(Fusible, nn.Module):
    """Base of modules with a conditioner from `inputs` channels and those of the condition to `outputs`."""

    def __init__(
        self,
        channels: int,
        inputs: int,
        outputs: int,
        *,
        subnet: Subnet,
        cond_channels: int,
        zero_init: bool,
    ) -> None:
        super().__init__()
        check_int("cond_channels", cond_channels, 0)
        self.channels, self.cond_channels, self.outputs = channels, cond_channels, outputs
        if not callable(subnet):
            kind = type(subnet).__name__
            raise TypeError(f"subnet: expected a callable (c_in, c_out) -> nn.Module, found {kind}")
        self.subnet = subnet(inputs + cond_channels, outputs)
        if not isinstance(self.subnet, nn.Module):
            raise TypeError(f"subnet: expected it to return an nn.Module, found {type(self.subnet).__name__}")
        if zero_init:
            zero_last_layer(self.subnet)

    def condition(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """The conditioner's output for its input x and the condition."""
        check_condition(x, cond, self.cond_channels)
        output = evaluate(self.subnet, x, None if cond is None else cond.to(x.dtype))
        expected = (x.shape[0], self.outputs, *x.shape[2:])
        check_shape("output of subnet", output, expected, "(B, c_out, *spatial)")
        return output

    def extra_repr(self) -> str:
        """Channels and the condition's channels, for print."""
        return f"{self.channels}, cond_channels={self.cond_channels}"


class _Coupling(Conditioned):
    """Base of both couplings: the split, and the order of operations."""

    outputs_per_channel: int
    clamp: float | None = None

    def __init__(
        self, channels: int, *, subnet: Subnet, cond_channels: int = 0, zero_init: bool = True
    ) -> None:
        check_int("channels", channels, 2)
        split, outputs = channels - channels // 2, self.outputs_per_channel * (channels // 2)
        super().__init__(
            channels, split, outputs, subnet=subnet, cond_channels=cond_channels, zero_init=zero_init
        )
        self.split = split

    def couple(self, x: Tensor, params: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Couple x, given the conditioner's output: (y, log_det)."""
        raise NotImplementedError

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (y, log_det)."""
        return self._run(x, cond, "x", inverse=False)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, log_det)."""
        return self._run(z, cond, "z", inverse=True)

    def _run(self, x: Tensor, cond: Tensor | None, name: str, *, inverse: bool) -> tuple[Tensor, Tensor]:
        x, params = self.conditioned(x, cond, name)
        return self.couple(x, params, inverse=inverse)

    def conditioned(
        self, x: Tensor, cond: Tensor | None, name: str = "x", *, fresh: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return (x, the conditioner's output for its passive half); use this x afterwards. Set `fresh` if
        the gradient of that x is a tensor that nobody else holds: it is then overwritten."""
        check_features(name, x, self.channels)
        copied = is_observed() or overwrites(self.subnet)
        passive, x = _Fork.apply(x, self.split, fresh, copied)
        return x, self.condition(passive, cond)

    def pull_back(self, z: Tensor, grad_z: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """Return (x, its gradient) given those of z = forward(x); see `usf_kernels.nn.reversible`."""
        return self.pull_back_through(z, grad_z, tape)[:2]

    def pull_back_through(
        self,
        z: Tensor,
        grad_z: Tensor,
        tape: Tape,
        *,
        index: Tensor | None = None,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """`pull_back` for a z that `coupling_step` returned with this exit: x and the gradients of x, scale
        and bias; the last two are (C,), or None without a scale."""
        out, passive = z.dtype, self._passive(z, index, scale, bias)
        passive.requires_grad_()  # z and x share it: one evaluation serves both
        with tape.replay():
            params = self.condition(passive.clone() if overwrites(self.subnet) else passive, tape.cond)
        wide = compute_dtype(z, params)
        given = (z, grad_z, tape.grad_log_det, params.detach(), index, scale, bias)
        given = (v.to(wide) if v is not None and v.is_floating_point() else v for v in given)
        x, grad_x, grad_params, *grad_exit = undo_step(*given, self.split, self.clamp)
        grad_passive = tape.pull([params], [grad_params], passive)
        if grad_passive is not None:
            grad_x[:, : self.split].add_(grad_passive)
        return x.to(out), grad_x.to(out), *grad_exit

    def _passive(self, z: Tensor, index: Tensor | None, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        """The passive half of the coupling's input, recovered from its result z after the exit."""
        if index is None:
            passive = z[:, : self.split].clone(memory_format=memory_format(z))
        else:
            passive = z.index_select(1, inverse_permutation(index)[: self.split])
            passive = passive.contiguous(memory_format=memory_format(z))
        if scale is not None:
            passive.sub_(per_channel(bias[: self.split], z)).div_(per_channel(scale[: self.split], z))
        return passive


class AdditiveCoupling(_Coupling):
    """Additive coupling `y = [x1, x2 + subnet(x1)]`, log-det 0. NICE (arXiv:1410.8516), section 3.2.

    The passive half x1 is the first C - C//2 channels, as in FrEIA. The subnet gets it with the condition's
    channels appended.

    Args:
        channels: C, at least 2.
        subnet: called once as `subnet(C - C//2 + cond_channels, C//2)`; returns the conditioner, a module
            that keeps the batch and spatial sizes.
        cond_channels: channels of the condition; 0 for none.
        zero_init: zero the weight and bias of the subnet's last module if that is a convolution or linear
            layer, so that the untrained coupling is the identity.

    `forward(x, cond=None) -> (y, log_det)` and `inverse(y, cond=None) -> (x, log_det)` take (B, C, *spatial)
    and a cond of (B or 1, cond_channels, *spatial); log_det is a 0-d zero.

    Raises:
        TypeError, ValueError: a bad argument, an x or cond of the wrong shape or dtype.
    """

    outputs_per_channel = 1

    def couple(self, x: Tensor, params: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        y = additive_coupling(x, params, split=self.split, inverse=inverse)
        return y, y.new_zeros((), dtype=compute_dtype(y))


class AffineCoupling(_Coupling):
    """Affine coupling `y = [x1, x2 * exp(s) + t]` with s, t from `subnet(x1)`, in the convention of FrEIA's
    and anomalib's `AllInOneBlock`: see `usf_kernels.ops.affine_coupling`. RealNVP (arXiv:1605.08803),
    equations 4 and 5. It is not uniformly scaling: the log-det depends on the input.

    Args:
        channels: C, at least 2.
        subnet: called once as `subnet(C - C//2 + cond_channels, 2 * (C//2))`; see `AdditiveCoupling`.
        clamp: bound on |s|, positive.
        cond_channels, zero_init: see `AdditiveCoupling`.

    `forward(x, cond=None) -> (y, log_det)` and `inverse(y, cond=None) -> (x, log_det)`; log_det is (B,), for
    the direction computed.

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
        self.clamp = check_clamp(clamp)

    def couple(self, x: Tensor, params: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        return affine_coupling(x, params, split=self.split, clamp=self.clamp, inverse=inverse)

    def extra_repr(self) -> str:
        """Channels, the condition's channels and the clamp, for print."""
        return f"{super().extra_repr()}, clamp={self.clamp}"
