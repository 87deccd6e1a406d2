"""What a reversible step's backward pass uses: the state that it replays, and the gradients it collects."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import get_device_states, set_device_states

from usf_kernels.kernels.plain import autocasts
from usf_kernels.nn.act_norm import ActNorm
from usf_kernels.nn.linear import LUConv1x1
from usf_kernels.nn.permutation import Permutation

Slot = tuple[dict[str, Tensor | None], str, Tensor]  # a module's parameters or buffers, a name, a value
Generators = tuple[Tensor, list[int], list[Tensor]]  # the CPU's state, devices, their states
_swapped: set[int] = set()
_here = threading.local()
SETTLED = (ActNorm, LUConv1x1, Permutation)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Context without `parametrize.cached()`: weights cached in the forward pass have no graph."""
    before = parametrize._cache_enabled
    if not before:
        yield
        return
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before


class Tape:
    """Inputs and results of one step's `pull_back`: the condition, the context to evaluate in, gradients.

    Attributes:
        cond: the condition, a leaf of its own where it needs a gradient; or None.
        grad_log_det: gradient of the sequence's log-determinant, 0-d or (B,).
        grad_cond: sum of the condition's gradients so far, or None.
    """

    def __init__(
        self, cond: Tensor | None, grad_log_det: Tensor, state: State, parameters: Sequence[Tensor]
    ) -> None:
        self.cond, self.grad_log_det, self.grad_cond = cond, grad_log_det, None
        self._state = state
        self._parameters = [p for p in parameters if p.requires_grad]
        self._leaves = set(self._parameters)
        self._gradients: dict[Tensor, Tensor] = {}

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Context to evaluate as the forward pass did (autocast, random numbers, buffers), with a graph."""
        self._state.rewind()
        with torch.enable_grad(), self._state.restored():
            yield

    def pull(
        self, outputs: Sequence[Tensor], grads: Sequence[Tensor], x: Tensor | None = None
    ) -> Tensor | None:
        """Return the gradient of `x` given those of outputs of the step; keep those of parameters and cond.

        Outputs that need no gradient are left out. A grad may have a batch dimension that its output lacks.
        """
        pairs = []
        for output, grad in zip(outputs, grads, strict=True):
            if not isinstance(output, Tensor):  # a log-determinant that is a plain number
                continue
            if output.is_leaf and output in self._leaves:  # a parameter: there is nothing to go through
                self._keep(output, grad.sum_to_size(output.shape).to(output.dtype))
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
                self.grad_cond = add(self.grad_cond, grad)
            else:
                self._keep(value, grad)
        return grad_x

    def _keep(self, parameter: Tensor, grad: Tensor) -> None:
        self._gradients[parameter] = add(self._gradients.get(parameter), grad)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Gradient that was pulled back to a parameter; None if there was none."""
        return self._gradients.get(parameter)


@contextlib.contextmanager
def going_back() -> Iterator[None]:
    """Context of a reversible backward pass."""
    outer = goes_back()
    _here.goes_back = True
    try:
        yield
    finally:
        _here.goes_back = outer


def goes_back() -> bool:
    """Whether this thread is in a reversible backward pass. Sequences inside of the steps, or of checkpointed
    parts of them, then keep what autograd keeps: it is needed at once."""
    return getattr(_here, "goes_back", False)


def add(total: Tensor | None, value: Tensor) -> Tensor:
    """Add `value` to an optional tensor, treating None as zero."""
    return value if total is None else total + value


def generators(x: Tensor) -> Generators:
    """States of the CPU's random generator, and of that of x's device."""
    if x.is_cpu:
        return torch.get_rng_state(), [], []
    return (torch.get_rng_state(), *get_device_states(x))


class State:
    """Autocast and random numbers as they were before a step, and the buffers that the step has changed."""

    def __init__(self, modules: Sequence[nn.Module], x: Tensor, rng: Generators | None = None) -> None:
        """Take the state of a step's modules before it runs; pass `rng` if the previous step returned it."""
        self.device = x.device.type
        self.autocast = autocasts(self.device)
        self.autocast_dtype = torch.get_autocast_dtype(self.device) if self.autocast else None
        self.rng: Generators | None = generators(x) if rng is None else rng
        # The buffers of flow modules are final; others (running averages, power iterations) have to be what
        # they were, and their second update is discarded.
        self._before = [
            [
                (module._buffers, name, b, b._version, b.clone(), module.training)
                for name, b in module._buffers.items()
                if b is not None
            ]
            for module in modules
            if module._buffers and not isinstance(module, SETTLED)
        ]
        self.buffers: list[Slot] = []
        self._training = [(module, module.training) for module in modules]

    def settle(self, x: Tensor) -> Generators:
        """Keep only what the step changed, so that an ordinary conditioner costs no memory. Call this after
        the step; it returns the generators' new states."""
        before, after = self.rng, generators(x)
        unchanged = torch.equal(before[0], after[0]) and all(map(torch.equal, before[2], after[2]))
        self.rng = None if unchanged else before
        for buffers in self._before:  # all of a module or none
            if any(_changed(*buffer) for buffer in buffers):
                self.buffers.extend((place, name, old) for place, name, _, _, old, _ in buffers)
        self._before = []
        return after

    def rewind(self) -> None:
        """Give the step's modules copies of the buffers that it changed, as they were before."""
        for place, name, old in self.buffers:
            place[name] = old.clone()

    def autocasting(self) -> contextlib.AbstractContextManager:
        """Context with autocast as it was."""
        if not self.autocast and not autocasts(self.device):
            return contextlib.nullcontext()
        # No cache: weights that were rounded without a graph must not be used where one is recorded.
        return torch.autocast(
            self.device, dtype=self.autocast_dtype, enabled=self.autocast, cache_enabled=False
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Context with autocast, training modes and random numbers as they were."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.autocasting())
            stack.enter_context(uncached())
            for module, training in self._training:
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            if self.rng is not None:
                cpu, devices, states = self.rng
                stack.enter_context(torch.random.fork_rng(devices, device_type=self._rng_device()))
                torch.set_rng_state(cpu)
                set_device_states(devices, states, device_type=self._rng_device())
            yield

    def _rng_device(self) -> str:
        return "cuda" if self.device == "cpu" else self.device


def _changed(
    place: dict[str, Tensor | None], name: str, b: Tensor, version: int, old: Tensor, training: bool
) -> bool:
    """Whether a step has changed its buffer b; a batch norm's updates do not count in its version."""
    return place[name] is not b or b._version != version or (training and not torch.equal(b, old))


@contextlib.contextmanager
def swapped(slots: Sequence[Slot]) -> Iterator[None]:
    """Context with other values in these slots. `functional_call` does the same, but looks up names: it takes
    50 microseconds for a step, this takes 2.

    Raises:
        RuntimeError: another thread has swapped these slots: both would lose the original values.
    """
    places = {id(place) for place, _, _ in slots}
    if not _swapped.isdisjoint(places):
        raise RuntimeError(
            "FlowSequence: two threads run reversible backward passes through the same modules at once. Use "
            "memory='standard', or a copy of the modules for each thread"
        )
    _swapped.update(places)
    before = [(place, name, place[name]) for place, name, _ in slots]
    try:
        for place, name, value in slots:
            place[name] = value
        yield
    finally:
        for place, name, value in before:
            place[name] = value
        _swapped.difference_update(places)
