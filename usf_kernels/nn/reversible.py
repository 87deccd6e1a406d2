"""A backward pass that rebuilds its inputs by inversion, so that memory does not grow with depth.

The reversible residual network (arXiv:1707.04585) for flows, which are invertible anyway: only the output
of a sequence is kept. The backward pass walks the steps from last to first. Each step rebuilds its input
from its output, and gives that input's gradient; the conditioner of a coupling is evaluated once for both,
because the half that it reads passes through unchanged.

A module takes part through `pull_back(z, grad_z, tape) -> (x, grad_x)`. It may overwrite z and grad_z, and
hands the gradients of its parameters to the tape. A module that has only `forward` and `inverse` costs a
second forward pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from usf_kernels.nn.act_norm import ActNorm
from usf_kernels.nn.linear import LUConv1x1, Permutation
from usf_kernels.ops.checks import compute_dtype
from usf_kernels.ops.matrices import forming_products

CHECKED_SAMPLES = 8
Slot = tuple[dict[str, Tensor | None], str, Tensor]  # a module's parameters or buffers, a name, a value
SETTLED = (ActNorm, LUConv1x1, Permutation)


class Tape:
    """What one step's pull-back reads and leaves: the condition, the context to evaluate in, gradients.

    Attributes:
        cond: the condition, a leaf of its own where it needs a gradient; or None.
        grad_log_det: of the sequence's log-determinant, 0-d or (B,).
        grad_cond: sum of the condition's gradients so far, or None.
    """

    def __init__(
        self, cond: Tensor | None, grad_log_det: Tensor, state: _State, parameters: Sequence[Tensor]
    ) -> None:
        self.cond, self.grad_log_det, self.grad_cond = cond, grad_log_det, None
        self._state = state
        self._parameters = [p for p in parameters if p.requires_grad]
        self._gradients: dict[Tensor, Tensor] = {}

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Evaluate as the forward pass did (autocast, random numbers), with a graph."""
        with torch.enable_grad(), self._state.restored():
            yield

    def pull(
        self, outputs: Sequence[Tensor], grads: Sequence[Tensor], x: Tensor | None = None
    ) -> Tensor | None:
        """Gradient with respect to `x` of outputs of the step; its parameters' and cond's are kept here.

        Outputs that depend on nothing are left out. A grad may have a batch dimension that its output lacks.
        """
        pairs = []
        for output, grad in zip(outputs, grads, strict=True):
            if output.is_leaf and output.requires_grad:  # a parameter as it is
                self._gradients[output] = _add(self._gradients.get(output), grad.to(output.dtype))
            elif output.requires_grad:
                pairs.append((output, grad))
        inputs = [*self._parameters, *(v for v in (x, self.cond) if v is not None and v.requires_grad)]
        if not pairs or not inputs:
            return None
        results = torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [g.sum_to_size(o.shape).to(o.dtype) for o, g in pairs],
            allow_unused=True,
        )
        grad_x = None
        for value, grad in zip(inputs, results, strict=True):
            if grad is None:
                continue
            if value is x:
                grad_x = grad
            elif value is self.cond:
                self.grad_cond = _add(self.grad_cond, grad)
            else:
                self._gradients[value] = _add(self._gradients.get(value), grad)
        return grad_x

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """What was pulled back to a parameter, None for nothing."""
        return self._gradients.get(parameter)


def _add(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value


class _State:
    """Autocast and random numbers as they were before a step, and buffers that the step has changed since."""

    def __init__(self, step: nn.Module, x: Tensor) -> None:
        self.device = x.device.type
        self.autocast = torch.is_autocast_enabled(self.device)
        self.autocast_dtype = torch.get_autocast_dtype(self.device) if self.autocast else None
        self.rng = (torch.get_rng_state(), *get_device_states(x))
        # The buffers of flow modules are set for good; others (running averages, power iterations) have to be
        # what they were, and their second update goes nowhere.
        self._before = [
            [
                (module._buffers, name, b, b._version, b.clone())
                for name, b in module._buffers.items()
                if b is not None
            ]
            for module in step.modules()
            if module._buffers and not isinstance(module, SETTLED)
        ]
        self.buffers: list[Slot] = []

    def settle(self, x: Tensor) -> None:
        """After the step: keep what it changed, so that an ordinary conditioner costs no memory."""
        after = (torch.get_rng_state(), get_device_states(x)[1])
        cpu, _, devices = self.rng
        unchanged = torch.equal(cpu, after[0]) and all(map(torch.equal, devices, after[1]))
        self.rng = None if unchanged else self.rng
        for buffers in self._before:  # of a module all or none: batch_norm's updates leave the versions alone
            if any(buffer._version != version for _, _, buffer, version, _ in buffers):
                self.buffers.extend((place, name, old) for place, name, _, _, old in buffers)
        self._before = []

    def autocasting(self) -> contextlib.AbstractContextManager:
        """Autocast as it was."""
        if not self.autocast and not torch.is_autocast_enabled(self.device):
            return contextlib.nullcontext()
        # Without the cache: weights rounded where no graph is recorded must not serve where one is.
        return torch.autocast(
            self.device, dtype=self.autocast_dtype, enabled=self.autocast, cache_enabled=False
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.autocasting())
            if self.rng is not None:
                cpu, devices, states = self.rng
                stack.enter_context(torch.random.fork_rng(devices, device_type=self._rng_device()))
                torch.set_rng_state(cpu)
                set_device_states(devices, states, device_type=self._rng_device())
            yield

    def _rng_device(self) -> str:
        return "cuda" if self.device == "cpu" else self.device


class ReconstructionCheck:
    """Compares rebuilt inputs with samples of the true ones, in every `every`-th backward pass.

    A sample is one position of a few images, another one each time, so it costs next to nothing. The
    tolerance is the root of the machine epsilon: an inverse may lose half of the digits.
    """

    def __init__(self, every: int) -> None:
        self.every, self.count = every, 0

    def due(self) -> bool:
        """Whether the forward pass that starts now is to be checked."""
        self.count += 1
        return self.every > 0 and (self.count - 1) % self.every == 0

    def sample(self, x: Tensor, turn: int) -> Tensor:
        """(at most CHECKED_SAMPLES, C) values of x, in the `turn`-th place."""
        if x.numel() == 0:
            return x.new_zeros(0)
        position, rest = [], turn * 7919
        for size in x.shape[2:]:
            position.append(rest % size)
            rest = rest // size + turn
        return x[(slice(None, None, math.ceil(x.shape[0] / CHECKED_SAMPLES)), slice(None), *position)].clone()

    @staticmethod
    def compare(norms: list[tuple[int, Tensor, Tensor]], dtype: torch.dtype) -> None:
        """Raise RuntimeError for the last step (where the backward pass starts) that is off.

        Args:
            norms: per step, last to first: its index, the norm of its input's error, and of its input.
            dtype: the narrowest that was computed in.
        """
        tolerance = math.sqrt(torch.finfo(dtype).eps)
        steps = [step for step, *_ in norms]
        values = torch.stack([torch.stack(pair) for _, *pair in norms]).tolist() if norms else []
        # What is nothing but the rounding errors of larger values need not be rebuilt.
        largest = max((norm for _, norm in values), default=0.0)
        for step, (error, norm) in zip(steps, values, strict=True):
            error = error / max(norm + tolerance * largest, 1e-300)
            if not error <= tolerance:
                raise RuntimeError(
                    f"FlowSequence: the inverse of step {step} lost precision: its rebuilt input is off by "
                    f"{error:.1e} relative, and at most {tolerance:.1e} is allowed in {dtype}. Gradients "
                    "would be wrong. Use memory='standard' or a wider dtype, or find out why the step is "
                    "close to singular (or the values not finite)"
                )


class _Reversible(torch.autograd.Function):
    """Steps as one node: parameters are inputs, so that their hooks (DDP, accumulation) run as always."""

    @staticmethod
    def forward(ctx, steps, check, places, x, cond, *parameters):  # noqa: ANN001
        ctx.steps, ctx.places, ctx.turn = steps, places, check.count
        ctx.states, ctx.samples, ctx.dtypes, due = [], [], [], check.due()
        ctx.check = check if due else None
        log_det = torch.zeros((), dtype=compute_dtype(x), device=x.device)
        z = x
        for step in steps:
            state = _State(step, z)
            ctx.dtypes.append(z.dtype)
            if due:
                ctx.samples.append(check.sample(z, ctx.turn))
            with state.autocasting(), forming_products():
                z, step_log_det = step(z, cond)
            state.settle(z)
            ctx.states.append(state)
            log_det = log_det + step_log_det
        ctx.autocast_dtype = ctx.states[0].autocast_dtype
        ctx.save_for_backward(z, cond, *parameters)
        return z, log_det

    @staticmethod
    def backward(ctx, grad_z, grad_log_det):  # noqa: ANN001
        if torch.is_grad_enabled():
            raise RuntimeError(
                "FlowSequence: memory='reversible' (which 'auto' picks from four steps on) has no second "
                "derivative, found create_graph=True. Use memory='standard'"
            )
        z, cond, *parameters = ctx.saved_tensors
        leaves = [
            p.detach().requires_grad_(needed)
            for p, needed in zip(parameters, ctx.needs_input_grad[5:], strict=True)
        ]
        if cond is not None:
            cond = cond.detach().requires_grad_(ctx.needs_input_grad[4])
        z, grad_z = z.clone(), grad_z.clone()  # the steps work in place on them
        gradients: list[Tensor | None] = [None] * len(leaves)
        grad_cond, norms = None, []
        for i in reversed(range(len(ctx.steps))):
            indices = {index for _, _, index in ctx.places[i]}
            tape = Tape(cond, grad_log_det, ctx.states[i], [leaves[index] for index in indices])
            own = [(place, name, leaves[index]) for place, name, index in ctx.places[i]]
            own += [(place, name, buffer.clone()) for place, name, buffer in ctx.states[i].buffers]
            with _swapped(own), forming_products():
                z, grad_z = _pull_back(ctx.steps[i], z, grad_z, tape)
            z, grad_z = z.to(ctx.dtypes[i]), grad_z.to(ctx.dtypes[i])
            for index in indices:
                grad = tape.gradient(leaves[index])
                gradients[index] = gradients[index] if grad is None else _add(gradients[index], grad)
            grad_cond = grad_cond if tape.grad_cond is None else _add(grad_cond, tape.grad_cond)
            if ctx.check is not None and z.numel() > 0:
                truth = ctx.samples[i].to(compute_dtype(z))
                norms.append((i, (ctx.check.sample(z, ctx.turn) - truth).norm(), truth.norm()))
        ReconstructionCheck.compare(norms, ctx.autocast_dtype or min(ctx.dtypes, key=lambda d: d.itemsize))
        return None, None, None, grad_z, grad_cond, *gradients


@contextlib.contextmanager
def _swapped(slots: Sequence[Slot]) -> Iterator[None]:
    """What `functional_call` does, in a fifth of its time, which the steps of small maps take themselves."""
    before = [(place, name, place[name]) for place, name, _ in slots]
    try:
        for place, name, value in slots:
            place[name] = value
        yield
    finally:
        for place, name, value in before:
            place[name] = value


def _pull_back(step: nn.Module, z: Tensor, grad_z: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
    if hasattr(step, "pull_back"):
        return step.pull_back(z, grad_z, tape)
    with tape.replay(), torch.no_grad():
        x = step.inverse(z, tape.cond)[0]
    x = x.detach().clone().requires_grad_()
    with tape.replay():
        outputs = step(x, tape.cond)
    grad_x = tape.pull(outputs, (grad_z, tape.grad_log_det), x)
    return x.detach(), torch.zeros_like(z) if grad_x is None else grad_x.clone()


def run_reversibly(
    steps: Sequence[nn.Module], x: Tensor, cond: Tensor | None, check: ReconstructionCheck
) -> tuple[Tensor, Tensor]:
    """Apply the steps first to last and keep only the output: (z, log_det). Never compiled."""
    # As a decorator, `disable` would import the compiler with this package, which takes longer than all else.
    return torch.compiler.disable(_run)(steps, x, cond, check)


def _run(
    steps: Sequence[nn.Module], x: Tensor, cond: Tensor | None, check: ReconstructionCheck
) -> tuple[Tensor, Tensor]:
    parameters: dict[Tensor, int] = {}
    places = []
    for step in steps:
        own = [
            (module._parameters, name, p)
            for module in step.modules()
            for name, p in module._parameters.items()
        ]
        places.append(
            [
                (place, name, parameters.setdefault(p, len(parameters)))
                for place, name, p in own
                if p is not None
            ]
        )
    return _Reversible.apply(list(steps), check, places, x, cond, *parameters)
