"""Per-channel scale and shift, initialised from data and counted in the log-determinant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from usf_kernels.nn.fusible import Fusible
from usf_kernels.ops.checks import check_features, check_int, compute_dtype, count_positions

if TYPE_CHECKING:
    from usf_kernels.nn.tape import Tape


class ActNorm(Fusible, nn.Module):
    """`y = exp(log_scale) * x + bias` per channel. Glow (arXiv:1807.03039), section 3.1.

    The first non-empty batch seen in training mode sets scale and bias so that every channel leaves with
    mean 0 and standard deviation 1 over batch and positions. A channel that is constant there (so also every
    channel of a single position), or varies by less than a millionth of its own or of all channels' values,
    keeps scale 1 and is only centred. A parametrised scale or bias is set through its `right_inverse`. In
    eval mode nothing is ever initialised: a fresh ActNorm is the identity. With torch.distributed the
    statistics are those of the batches of all processes, so every process must take its first training step
    together with the others. A functional call that replaces the parameters before that must replace the
    buffer, too.

    Args:
        channels: C.
        trainable: False makes scale and bias buffers: fixed statistics, still in the log-determinant.

    The buffer `initialized` is part of the state_dict. `forward(x, cond=None) -> (y, log_det)` and
    `inverse(y, cond=None) -> (x, log_det)` take (B, C, *spatial); log_det is 0-d, P * sum(log_scale) or its
    negative. `cond` is ignored.

    Raises:
        TypeError, ValueError: a bad argument, an x of the wrong shape or dtype.
    """

    def __init__(self, channels: int, *, trainable: bool = True) -> None:
        super().__init__()
        check_int("channels", channels, 1)
        self.channels = channels
        for name in ("log_scale", "bias"):
            value = torch.zeros(channels)
            if trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        # 0 or 1, as a float: averages of models cannot subtract booleans, and round means of integers down.
        self.register_buffer("initialized", torch.zeros(()))
        # Whether the buffer is known to be 1, so that it is not read back from the device at every step.
        self._initialized = False

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._initialized = not self.initialized.is_meta and bool(self.initialized)

    @torch.no_grad()
    def initialize_(self, make: Callable[[], Tensor]) -> None:
        """Set scale and bias from the x that `make` returns, unless they have been initialised."""
        if self._initialized:
            return
        x = make()
        if x.numel() == 0 and not _distributed():
            return
        x = x.detach().to(compute_dtype(x))
        dims, shape = [d for d in range(x.ndim) if d != 1], (-1, *[1] * (x.ndim - 2))
        count = _sum_over_processes(x.new_tensor(float(x.shape[0] * count_positions(x))))
        if _distributed() and count == 0:
            return
        mean = _sum_over_processes(x.sum(dims)) / count
        variance = _sum_over_processes((x - mean.view(shape)).square().sum(dims)) / count
        # "Constant" is relative to the values of this and the other channels, and allows for rounding errors.
        floor = 1e-6 * (mean.abs() + (variance + mean.square()).mean().sqrt())
        varies = variance.sqrt() > floor
        log_scale = torch.where(varies, -0.5 * variance.log(), torch.zeros_like(variance))
        # The buffer decides: it may have been set in another way than by a state_dict.
        for name, value in (("log_scale", log_scale), ("bias", -mean * log_scale.exp())):
            kept = getattr(self, name)
            value = torch.where(self.initialized > 0, kept, value.to(kept.dtype))
            if parametrize.is_parametrized(self, name):  # what was read is computed, by its `right_inverse`
                setattr(self, name, value)
            else:
                kept.copy_(value)
        self.initialized.fill_(1)
        # After a functional call with other tensors in their place, the module's own are still to be set.
        own = self._parameters.get("log_scale")
        self._initialized = own is None or isinstance(own, nn.Parameter)

    def forget_(self) -> None:
        """Forget the statistics: the next batch in training mode initialises scale and bias again."""
        self.initialized.zero_()
        self._initialized = False

    def log_det(self, positions: int) -> Tensor:
        """log|det| of the forward map on an input of this many positions: 0-d, in nats."""
        return positions * self.log_scale.to(compute_dtype(self.log_scale)).sum()

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (y, log_det). Initialises in training mode."""
        check_features("x", x, self.channels)
        if self.training:
            self.initialize_(lambda: x)
        scale, bias = self._per_channel(x, self.log_scale.exp())
        return scale * x + bias, self.log_det(count_positions(x))

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, log_det). Never initialises."""
        check_features("z", z, self.channels)
        scale, bias = self._per_channel(z, (-self.log_scale).exp())
        return scale * (z - bias), -self.log_det(count_positions(z))

    def pull_back(self, z: Tensor, grad_z: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """Return (x, its gradient) given those of z = forward(x); see `usf_kernels.nn.reversible`."""
        wide, dims = compute_dtype(z), [d for d in range(z.ndim) if d != 1]
        scale, offset = self._per_channel(z, self.log_scale.exp())
        z.sub_(offset)
        grad_log_scale, grad_bias = (v.sum(dims, dtype=wide) for v in (grad_z * z, grad_z))
        self.pull(tape, grad_log_scale, grad_bias, count_positions(z))
        return z.div_(scale), grad_z.mul_(scale)

    def pull(self, tape: Tape, grad_log_scale: Tensor, grad_bias: Tensor, positions: int) -> None:
        """Pass these gradients, (C,) each, to the tape, and add what the log-determinant contributes."""
        grad_log_scale = grad_log_scale + positions * tape.grad_log_det.sum()
        with torch.enable_grad():  # a parameter may be computed from others
            tape.pull((self.log_scale, self.bias), (grad_log_scale, grad_bias))

    def _per_channel(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (x.ndim - 2))
        return scale.view(shape), self.bias.view(shape)

    def extra_repr(self) -> str:
        """Channels, for print."""
        return f"{self.channels}, trainable={isinstance(self.log_scale, nn.Parameter)}"


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_processes(value: Tensor) -> Tensor:
    if _distributed():
        dist.all_reduce(value)
    return value
