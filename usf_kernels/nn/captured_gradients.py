"""The gradients of a training step as a CUDA graph: on small maps a flow waits for its launches."""

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

    The first call is the plain one, since modules set themselves up in it: an ActNorm takes its statistics,
    kernels are compiled. Sequences whose memory is "auto" keep what autograd keeps, since a reversible pass
    reads values back, which a graph cannot.

    >>> gradients = usf.nn.CapturedGradients(model)  # doctest: +SKIP
    >>> for batch in batches:  # doctest: +SKIP
    ...     loss = gradients(batch)
    ...     optimizer.step()

    Args:
        module: whose parameters get their gradients, on one CUDA device. An optimiser may change them where
            they are, but they may not move, nor start or stop to require a gradient.
        loss: of what a call is given, to a 0-d tensor, without reading values back; None is `module.loss`.
            Nobody may hold one, undetached, of an earlier call of their own: its backward pass would be a
            part of what is recorded.
        backward: what is called with the loss; None is its own `backward`.

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
        # No method: in a cycle the graph and its memory would outlive this.
        self._pass = partial(_pass, loss, backward, self._parameters)
        self._called = False
        self._graph: CapturedCall | None = None
        self._structure: _pytree.TreeSpec | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self, *batch: Any) -> Tensor:
        """The loss, detached: 0-d. Every parameter's `grad` is that of this call, not added to one before, in
        memory that the next call writes over.

        Args:
            batch: tensors, or lists, tuples and dictionaries of them, of the same structure and shapes in
                every call.

        Raises:
            ValueError: one of another structure, other shapes or dtypes than before.
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
            for parameter in self._parameters:  # gradients of nothing that was asked for
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
        parameter.grad = None  # so that backward makes a tensor, instead of adding to one
    value = loss(*batch)
    backward(value)
    return value.detach()


def _unflattened(call: Callable[..., Tensor], structure: _pytree.TreeSpec, *tensors: Tensor) -> Tensor:
    return call(*_pytree.tree_unflatten(tensors, structure))


def _sequences(module: nn.Module) -> list[FlowSequence]:
    return [m for m in module.modules() if isinstance(m, FlowSequence)]


@contextmanager
def _keeping_activations(module: nn.Module) -> Iterator[None]:
    """No pass is reversible meanwhile."""
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
    """Calls without a trace in buffers and random generators, as those that warm up for a recording."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.random.fork_rng([p.device for p in module.parameters() if p.is_cuda][:1]):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:  # all: batch norms write without counting it in versions
                buffer.copy_(value)
