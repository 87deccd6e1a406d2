"""The gradients of a training step as a CUDA graph: on small maps a flow spends its time on launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from usf_kernels.nn.capture import CapturedCall, check_capturable
from usf_kernels.nn.flow import FlowSequence


class CapturedGradients:
    """A loss and its gradients, recorded in the second call and replayed from then on.

    The first call runs as usual, because modules set themselves up in it: an ActNorm takes its statistics,
    kernels are compiled. Sequences whose memory is "auto" keep what autograd keeps, since a reversible pass
    reads values back, which a graph cannot.

    >>> gradients = usf.nn.CapturedGradients(model)  # doctest: +SKIP
    >>> for batch in batches:  # doctest: +SKIP
    ...     loss = gradients(batch)
    ...     optimizer.step()

    Args:
        module: the module whose parameters get gradients, on one CUDA device. An optimiser may change them
            in place, but they must not move, nor start or stop requiring a gradient.
        loss: returns a 0-d tensor for the arguments of a call, without reading values back; None is
            `module.loss`. No loss that you computed yourself may still be held, unless detached: its
            backward pass would become part of the recording.
        backward: called with the loss; None is `Tensor.backward`.

    Raises:
        ValueError: a module on another device, or one that holds a sequence with memory="reversible".
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[..., Tensor] | None = None,
        *,
        backward: Callable[[Tensor], object] | None = None,
    ) -> None:
        check_capturable("module", {p.device for p in module.parameters()})
        if any(sequence.memory == "reversible" for sequence in _sequences(module)):
            raise ValueError(
                "module: expected sequences with memory='auto' or 'standard', found 'reversible', whose "
                "passes read values back from the device"
            )
        self._module = module
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        loss = module.loss if loss is None else loss
        backward = Tensor.backward if backward is None else backward
        # Not a bound method: a reference cycle would keep the graph and its memory alive after this object.
        self._pass = partial(_pass, loss, backward, self._parameters)
        self._called = False
        self._graph: CapturedCall | None = None
        self._structure: _pytree.TreeSpec | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self, *batch: Any) -> Tensor:
        """Return the loss, detached: 0-d. Every parameter's `grad` is then that of this call alone, in memory
        that the next call overwrites.

        Args:
            batch: tensors, or lists, tuples and dictionaries of them, of the same structure and shapes in
                every call.

        Raises:
            ValueError: a batch of another structure, other shapes or dtypes than before.
        """
        inputs, structure = _pytree.tree_flatten(batch)
        if self._graph is None:
            with _keeping_activations(self._module):
                if not self._called:
                    self._called = True
                    return self._pass(*batch)
                self._record(inputs, structure)
        if structure != self._structure:
            raise ValueError(f"batch: expected the captured {self._structure}, found {structure}")
        value = self._graph(*inputs)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return value

    def _record(self, inputs: list[Tensor], structure: _pytree.TreeSpec) -> None:
        try:
            with _values_restored(self._module):
                self._graph = CapturedCall(partial(_unflattened, self._pass, structure), *inputs)
        except BaseException:
            for parameter in self._parameters:  # gradients of a batch that was not run
                parameter.grad = None
            raise
        self._structure = structure
        self._gradients = [p.grad for p in self._parameters]


def _pass(
    loss: Callable[..., Tensor],
    backward: Callable[[Tensor], object],
    parameters: Iterable[nn.Parameter],
    *batch: Any,
) -> Tensor:
    for parameter in parameters:
        parameter.grad = None  # backward then makes a new tensor instead of adding to one
    value = loss(*batch)
    backward(value)
    return value.detach()


def _unflattened(call: Callable[..., Tensor], structure: _pytree.TreeSpec, *tensors: Tensor) -> Tensor:
    return call(*_pytree.tree_unflatten(tensors, structure))


def _sequences(module: nn.Module) -> list[FlowSequence]:
    return [m for m in module.modules() if isinstance(m, FlowSequence)]


@contextmanager
def _keeping_activations(module: nn.Module) -> Iterator[None]:
    """Context in which sequences whose memory is "auto" run no reversible passes."""
    automatic = [sequence for sequence in _sequences(module) if sequence.memory == "auto"]
    for sequence in automatic:
        sequence.memory = "standard"
    try:
        yield
    finally:
        for sequence in automatic:
            sequence.memory = "auto"


@contextmanager
def _values_restored(module: nn.Module) -> Iterator[None]:
    """Context that restores buffers and random generators at its end, so that a warm-up leaves no trace."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.random.fork_rng([p.device for p in module.parameters() if p.is_cuda][:1]):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:  # all: versions do not count a batch norm's writes
                buffer.copy_(value)
