"""Flow steps and sequences of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from usf_kernels.nn.act_norm import ActNorm
from usf_kernels.nn.conditioner_layers import watched
from usf_kernels.nn.coupling import AdditiveCoupling, AffineCoupling, Subnet
from usf_kernels.nn.fusible import Fusible
from usf_kernels.nn.linear import LUConv1x1
from usf_kernels.nn.permutation import Permutation
from usf_kernels.nn.reversible import ReconstructionCheck, run_reversibly
from usf_kernels.nn.tape import Tape, goes_back
from usf_kernels.ops.checks import (
    check_choice,
    check_clamp,
    check_features,
    check_int,
    compute_dtype,
    count_positions,
    promoted_dtype,
)
from usf_kernels.ops.matrices import factors_pay
from usf_kernels.ops.step import coupling_matrix, coupling_step

AUTO_STEPS = 4


class FlowStep(Fusible, nn.Module):
    """A Glow-like step: coupling, then ActNorm, then a linear map that mixes the channels.

    The order is that of FrEIA's `AllInOneBlock`, the step of FastFlow (arXiv:2111.07677). With
    coupling="additive" it is uniformly scaling (arXiv:2510.09452): its log-det depends on no data.

    Args:
        channels: C, at least 2.
        subnet: makes the conditioner: `subnet(c_in, c_out) -> nn.Module` with c_in = C - C//2 +
            cond_channels, and c_out = C//2 (additive) or 2 * (C//2) (affine).
        coupling: "additive" or "affine".
        linear: "lu" (an `LUConv1x1` that starts as a random rotation and runs as one map with the ActNorm),
            "permutation" (fixed, random) or "none".
        clamp: bound on the affine coupling's log scales.
        act_norm: include an ActNorm; the first batch in training mode initialises it.
        cond_channels: channels of the condition, concatenated to the passive half.
        zero_init: start the coupling as the identity (see `AdditiveCoupling`), so that the untrained step is
            its ActNorm and linear map.

    `forward(x, cond=None) -> (z, log_det)` and `inverse(z, cond=None) -> (x, log_det)` take (B, C, *spatial);
    log_det is for the direction computed, 0-d for additive coupling and (B,) for affine. Coupling, ActNorm
    and linear map run as one operation: hooks on them are not called, but hooks on the step and the subnet
    are.

    Raises:
        TypeError, ValueError: a bad argument, an x or cond of the wrong shape or dtype.
    """

    def __init__(
        self,
        channels: int,
        *,
        subnet: Subnet,
        coupling: str = "additive",
        linear: str = "lu",
        clamp: float = 2.0,
        act_norm: bool = True,
        cond_channels: int = 0,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        check_choice("coupling", coupling, ("additive", "affine"))
        check_choice("linear", linear, ("lu", "permutation", "none"))
        check_clamp(clamp)
        options = {"subnet": subnet, "cond_channels": cond_channels, "zero_init": zero_init}
        self.coupling: nn.Module
        if coupling == "additive":
            self.coupling = AdditiveCoupling(channels, **options)
        else:
            self.coupling = AffineCoupling(channels, clamp=clamp, **options)
        self.act_norm = ActNorm(channels) if act_norm else None
        self.linear: nn.Module | None = None
        if linear == "lu":
            self.linear = LUConv1x1(channels, init="orthogonal")
        elif linear == "permutation":
            self.linear = Permutation(channels)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (z, log_det)."""
        # If something follows the coupling, its backward pass writes a new gradient of the coupling's result.
        fresh = self.linear is not None or self.act_norm is not None
        x, params = self.coupling.conditioned(x, cond, fresh=fresh)
        if self.training and self.act_norm is not None:
            self.act_norm.initialize_(lambda: self.coupling.couple(x, params)[0])
        options = {"split": self.coupling.split, "clamp": self.coupling.clamp}
        z, log_dets = self._exit(x, params, options)
        if not log_dets:
            return z, z.new_zeros((), dtype=compute_dtype(z))
        return z, sum(log_dets[1:], log_dets[0])

    def _exit(self, x: Tensor, params: Tensor, options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """Run the coupling and what follows it, given the conditioner's output: (z, log-dets to add up)."""
        positions = count_positions(x)
        if isinstance(self.linear, LUConv1x1) and not factors_pay(x, self.linear.channels):
            matrix, bias, map_log_det = self.linear.map(
                compute_dtype(x, params, self.linear.upper), self.act_norm
            )
            matrix = matrix.to(promoted_dtype(x, params, self.linear.upper))
            z, coupling_log_det = coupling_matrix(x, params, matrix, bias, **options)
            constant = [positions * map_log_det]
        elif isinstance(self.linear, LUConv1x1):
            y, coupling_log_det = coupling_step(x, params, **options)
            z, map_log_det = self.linear.run(y, inverse=False, act_norm=self.act_norm)
            constant = [map_log_det]
        else:
            z, coupling_log_det = coupling_step(x, params, **options, **self._channels_in_order())
            constant = [] if self.act_norm is None else [self.act_norm.log_det(positions)]
        return z, constant if self.coupling.clamp is None else [coupling_log_det, *constant]

    def _channels_in_order(self) -> dict[str, Tensor | None]:
        """ActNorm and permutation as keyword arguments of `coupling_step`."""
        index = None if self.linear is None else self.linear.order()[0]
        if self.act_norm is None:
            return {"index": index}
        return {"index": index, "scale": self.act_norm.log_scale.exp(), "bias": self.act_norm.bias}

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, log_det)."""
        if isinstance(self.linear, LUConv1x1):
            x, log_det = self.linear.run(z, inverse=True, act_norm=self.act_norm)
        else:
            x, log_det = z, z.new_zeros((), dtype=compute_dtype(z))
            for layer in (self.linear, self.act_norm):
                if layer is not None:
                    x, layer_log_det = layer.inverse(x)
                    log_det = log_det + layer_log_det
        x, coupling_log_det = self.coupling.inverse(x, cond)
        return x, log_det + coupling_log_det

    def pull_back(self, z: Tensor, grad_z: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """Return (x, its gradient) given those of z = forward(x); see `usf_kernels.nn.reversible`."""
        if isinstance(self.linear, LUConv1x1):
            z, grad_z = self.linear.pull_back(z, grad_z, tape, act_norm=self.act_norm)
            return self.coupling.pull_back(z, grad_z, tape)
        exit_ = self._channels_in_order()
        x, grad_x, *grad_exit = self.coupling.pull_back_through(z, grad_z, tape, **exit_)
        if self.act_norm is not None:
            grad_scale, grad_bias = grad_exit
            self.act_norm.pull(tape, grad_scale * exit_["scale"], grad_bias, count_positions(x))
        return x, grad_x


class FlowSequence(Fusible, nn.ModuleList):
    """Flow modules one after the other, as one flow.

    Args:
        steps: modules with `forward(x, cond=None) -> (z, log_det)` and `inverse(z, cond=None) -> (x,
            log_det)`; all get the same cond. Their parameters must be registered.
        memory: "reversible" keeps only the output for the backward pass, which rebuilds everything else by
            inversion (`usf_kernels.nn.reversible`): what is kept does not grow with the number of steps, and
            a pass mostly takes 1.2 to 1.5 times as long on a CPU, nearly twice as long on a GPU. There are no
            second derivatives, and other threads must not use the modules during the backward pass.
            "standard" keeps what autograd keeps, and so does any sequence with hooks on its steps; hooks
            further inside are called in both passes. A sequence inside of a reversible step is a part of it.
            "auto" is reversible from four steps on, except under torch.compile, torch.export and torch.func,
            and where a batch has fewer positions than channels: activations then take less memory than the
            parameters.
        check_every: compare a sample of the rebuilt inputs with the true ones in every so many reversible
            passes, and raise RuntimeError if an inverse has lost half of the digits; 0 for never.

    `forward` and `inverse` have the same form as those of the steps. Log-dets are summed: the sum is 0-d if
    all of them are, and (B,) if one step is affine. Only `forward` is ever reversible. Otherwise this is an
    nn.ModuleList: indexing, slicing (slices keep the options), len, append.

    Raises:
        TypeError, ValueError: a bad argument, an x or cond of the wrong shape or dtype.
    """

    def __init__(
        self, steps: Iterable[nn.Module] = (), *, memory: str = "auto", check_every: int = 16
    ) -> None:
        super().__init__(steps)
        check_choice("memory", memory, ("auto", "reversible", "standard"))
        check_int("check_every", check_every, 0)
        self.memory, self._check = memory, ReconstructionCheck(check_every)

    @property
    def check_every(self) -> int:
        """Reversible passes between two comparisons; 0 for none."""
        return self._check.every

    def __getitem__(self, index: int | slice) -> nn.Module:
        """Return one step, or a slice as a sequence that shares its count of passes with this one."""
        found = super().__getitem__(index)
        if isinstance(index, slice):
            found.memory, found._check = self.memory, self._check
        return found

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply all steps, first to last: (z, log_det)."""
        check_features("x", x)
        if self._reverses(x, cond):
            return run_reversibly(_flatten(self), x, cond, self._check)
        log_det = torch.zeros((), dtype=compute_dtype(x), device=x.device)
        for step in self:
            x, step_log_det = step(x, cond)
            log_det = log_det + step_log_det
        return x, log_det

    def _reverses(self, x: Tensor, cond: Tensor | None) -> bool:
        if self.memory == "standard" or not torch.is_grad_enabled() or len(self) == 0:
            return False
        if torch.jit.is_tracing():  # which records operations, and no autograd functions
            return False
        if getattr(self, "_is_replica", False):  # made by nn.DataParallel, with unregistered parameters
            return False
        if self.memory == "auto" and (
            len(self) < AUTO_STEPS
            or torch.compiler.is_compiling()  # tested before sizes, on which a graph must not depend
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or x.numel() < x.shape[1] ** 2
        ):
            return False
        if goes_back():
            return False
        given = itertools.chain((x, cond), self.parameters())
        if not any(t is not None and t.requires_grad for t in given):
            return False
        return not any(watched(step) for step in _flatten(self))  # hooks expect ordinary passes

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo all steps, last to first: (x, log_det)."""
        check_features("z", z)
        log_det = torch.zeros((), dtype=compute_dtype(z), device=z.device)
        for step in reversed(self):
            z, step_log_det = step.inverse(z, cond)
            log_det = log_det + step_log_det
        return z, log_det

    def log_prior(self, positions: int) -> Tensor:
        """Sum of `log_prior` over all LUConv1x1 modules inside, for inputs of this many positions: 0-d."""
        priors = (m.log_prior(positions) for m in self.modules() if isinstance(m, LUConv1x1))
        return sum(priors, torch.zeros(()))

    def extra_repr(self) -> str:
        """The options, for print."""
        return f"memory={self.memory!r}, check_every={self.check_every}"


def _flatten(sequence: FlowSequence) -> list[nn.Module]:
    """Steps of a sequence, with those of nested sequences in their place."""
    nested = (
        _flatten(step) if type(step) is FlowSequence and not watched(step) else [step] for step in sequence
    )
    return [step for steps in nested for step in steps]
