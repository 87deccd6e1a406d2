"""A backward pass that rebuilds its inputs by inversion, so that what is kept does not grow with depth.

This is the reversible residual network (arXiv:1707.04585) for flows, which are invertible anyway: only the
output of a sequence is kept. The backward pass walks the steps from last to first. Each step rebuilds its
input from its output, and returns that input's gradient; the conditioner of a coupling is evaluated once for
both, because the half that it reads passes through unchanged.

A module takes part through `pull_back(z, grad_z, tape) -> (x, grad_x)`. It may overwrite z and grad_z, and
hands the gradients of its parameters to the tape. A module that has only `forward` and `inverse` costs a
second forward pass, and its input is kept where it draws random numbers: several conditioners would draw them
in another order on the way back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from usf_kernels.kernels.plain import rounds_to_tf32
from usf_kernels.nn.tape import Slot, State, Tape, add, going_back, swapped, uncached
from usf_kernels.ops.checks import compute_dtype
from usf_kernels.ops.matrices import forming_products
from usf_kernels.ops.native import is_grads_batched

CHECKED_SAMPLES = 8


class ReconstructionCheck:
    """Compares rebuilt inputs with samples of the true ones, in every `every`-th backward pass.

    A sample is one position of a few images, another position each time, so it costs next to nothing. The
    tolerance is the square root of the machine epsilon: an inverse may lose half of the digits.
    """

    def __init__(self, every: int) -> None:
        self.every, self.count = every, 0

    def due(self) -> bool:
        """Count a forward pass, and return whether it is to be checked."""
        self.count += 1
        return self.every > 0 and (self.count - 1) % self.every == 0

    def sample(self, x: Tensor, turn: int) -> Tensor:
        """Return (at most CHECKED_SAMPLES, C) values of x, at a position that depends on `turn`."""
        if x.numel() == 0:
            return x.new_zeros(0)
        position, rest = [], turn * 7919
        for size in x.shape[2:]:
            position.append(rest % size)
            rest = rest // size + turn
        return x[(slice(None, None, math.ceil(x.shape[0] / CHECKED_SAMPLES)), slice(None), *position)].clone()

    @staticmethod
    def compare(norms: list[tuple[int, Tensor, Tensor]], dtype: torch.dtype, device: torch.device) -> None:
        """Raise RuntimeError for the last step that is off: the backward pass starts with the last step.

        Args:
            norms: for each step, last to first: its index, the norm of its input's error, that of its input.
            dtype: the narrowest dtype of the computation.
            device: the device of the computation.
        """
        tolerance = math.sqrt(_epsilon(dtype, device))
        steps = [step for step, *_ in norms]
        values = torch.stack([torch.stack(pair) for _, *pair in norms]).tolist() if norms else []
        # Values as small as rounding errors of larger ones need not be rebuilt.
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
    """All steps as one node. Parameters are inputs, so that their hooks (DDP, accumulation) run as usual."""

    @staticmethod
    @forming_products()
    def forward(ctx, steps, inner, check, places, x, cond, *parameters):  # noqa: ANN001
        ctx.steps, ctx.places, ctx.turn = steps, places, check.count
        ctx.buffers = [_buffers(modules) for modules in inner]
        ctx.states, ctx.samples, ctx.kinds, due = [], [], [], check.due()
        ctx.check, rng = check if due else None, None
        log_det = torch.zeros((), dtype=compute_dtype(x), device=x.device)
        z, inputs = x, {}
        for i, (step, modules) in enumerate(zip(steps, inner, strict=True)):
            state, entered = State(modules, z, rng), z
            ctx.kinds.append((z.dtype, suggest_memory_format(z)))
            if due:
                ctx.samples.append(check.sample(z, ctx.turn))
            with state.autocasting(), uncached():
                z, step_log_det = step(z, cond)
            rng = state.settle(z)
            # An inverse draws random numbers in another order if several conditioners do.
            if state.rng is not None and not _has_own_pull_back(type(step)):
                inputs[i] = entered
            ctx.states.append(state)
            log_det = log_det + step_log_det
        ctx.autocast_dtype = ctx.states[0].autocast_dtype
        z = z.detach()  # a view of a step's result could not be written to
        ctx.kept = list(inputs)
        ctx.save_for_backward(z, cond, *inputs.values(), *parameters)
        return z, log_det

    @staticmethod
    @forming_products()
    def backward(ctx, grad_z, grad_log_det):  # noqa: ANN001
        found = "create_graph=True" if torch.is_grad_enabled() else None
        found = "is_grads_batched=True" if is_grads_batched(grad_z, grad_log_det) else found
        if found:
            raise RuntimeError(
                "FlowSequence: memory='reversible' (which 'auto' picks from four steps on) gives first "
                f"derivatives, one at a time, found {found}. Use memory='standard'"
            )
        z, cond, *saved = ctx.saved_tensors
        inputs = dict(zip(ctx.kept, saved, strict=False))
        parameters = saved[len(ctx.kept) :]
        leaves = [
            p.detach().requires_grad_(needed)
            for p, needed in zip(parameters, ctx.needs_input_grad[6:], strict=True)
        ]
        if cond is not None:
            cond = cond.detach().requires_grad_(ctx.needs_input_grad[5])
        z, grad_z = z.clone(), grad_z.clone()  # the steps work in place on them
        gradients: list[Tensor | None] = [None] * len(leaves)
        grad_cond, norms = None, []
        for i in reversed(range(len(ctx.steps))):
            dtype, kept = ctx.kinds[i]
            # Layers have to see the memory format of the forward pass: random numbers are drawn in the order
            # of memory.
            z, grad_z = z.contiguous(memory_format=kept), grad_z.contiguous(memory_format=kept)
            indices = {index for _, _, index in ctx.places[i]}
            tape = Tape(cond, grad_log_det, ctx.states[i], [leaves[index] for index in indices])
            own = [(place, name, leaves[index]) for place, name, index in ctx.places[i]]
            # Buffers are put back as they were, too: after a functional call, modules hold their own again.
            own += [slot for slot in ctx.buffers[i] if slot[0].get(slot[1]) is not slot[2]]
            own += ctx.states[i].buffers
            with swapped(own), going_back():
                z, grad_z = _pull_back(ctx.steps[i], z, grad_z, tape, inputs.get(i))
            z, grad_z = z.to(dtype), grad_z.to(dtype)
            for index in indices:
                grad = tape.gradient(leaves[index])
                gradients[index] = gradients[index] if grad is None else add(gradients[index], grad)
            grad_cond = grad_cond if tape.grad_cond is None else add(grad_cond, tape.grad_cond)
            if ctx.check is not None and z.numel() > 0:
                truth = ctx.samples[i].to(compute_dtype(z))
                norms.append((i, (ctx.check.sample(z, ctx.turn) - truth).norm(), truth.norm()))
        ReconstructionCheck.compare(norms, ctx.autocast_dtype or _narrowest(ctx.kinds), z.device)
        return None, None, None, None, grad_z, grad_cond, *gradients


def _buffers(modules: Sequence[nn.Module]) -> list[Slot]:
    return [(m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None]


def _narrowest(kinds: Sequence[tuple[torch.dtype, torch.memory_format]]) -> torch.dtype:
    return min((dtype for dtype, _ in kinds), key=lambda dtype: dtype.itemsize)


def _epsilon(dtype: torch.dtype, device: torch.device) -> float:
    """Machine epsilon of computations in `dtype`: float32 products may be rounded to TF32."""
    rounded = dtype == torch.float32 and device.type == "cuda" and rounds_to_tf32()
    return 2.0**-10 if rounded else torch.finfo(dtype).eps


def _has_own_pull_back(kind: type) -> bool:
    """Whether a class has a `pull_back` that is at least as derived as its `forward` and `inverse`."""
    first = {
        name: next((i for i, base in enumerate(kind.__mro__) if name in vars(base)), None)
        for name in ("pull_back", "forward", "inverse")
    }
    own = first.pop("pull_back")
    return own is not None and all(place is None or own <= place for place in first.values())


def _pull_back(
    step: nn.Module, z: Tensor, grad_z: Tensor, tape: Tape, x: Tensor | None
) -> tuple[Tensor, Tensor]:
    if _has_own_pull_back(type(step)):
        return step.pull_back(z, grad_z, tape)
    if x is None:
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
    # Called here, not as a decorator: that would import the compiler with this package, which takes long.
    return torch.compiler.disable(_run)(steps, x, cond, check)


def _run(
    steps: Sequence[nn.Module], x: Tensor, cond: Tensor | None, check: ReconstructionCheck
) -> tuple[Tensor, Tensor]:
    parameters: dict[Tensor, int] = {}
    places = []
    inner = [list(step.modules()) for step in steps]
    for modules in inner:
        places.append(
            [
                (module._parameters, name, parameters.setdefault(p, len(parameters)))
                for module in modules
                for name, p in module._parameters.items()
                if p is not None
            ]
        )
    return _Reversible.apply(list(steps), inner, check, places, x, cond, *parameters)
