"""Training steps of coupling blocks: time, memory, and what is saved for the backward, over the depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from bench import table
from bench.blocks import SHAPES
from bench.flows import FORMATS, FORMS, PEERS, SHARED, Shape, best_layout, convolutions, our_flow, peer_flow
from bench.subject import LIMIT, OURS, PEER, Case, Provider, Subject, close_to

DIRECTION = "training step"
CURVE = Shape(256, 32, 3, 2)  # shape for which memory and time are measured over the depth
DEPTHS = (4, 8, 16, 32, 64)
# The modes of FlowSequence, by suffix of the provider's name.
MODES = {"": {"memory": "standard"}, table.REVERSIBLE: {"memory": "reversible"}}


def loss(flow: nn.Module, x: Tensor) -> Tensor:
    """Return the negative log-likelihood per dimension, with which flows are trained."""
    z, log_det = flow(x)
    return (0.5 * z.square().flatten(1).sum(1) - log_det).mean() / x[0].numel()


def step(flow: nn.Module, x: Tensor) -> None:
    """Run one forward and backward with fresh gradients, as after `zero_grad`."""
    for parameter in flow.parameters():
        parameter.grad = None
    loss(flow, x).backward()


def gradient(flow: nn.Module, first: Tensor, x: Tensor) -> Tensor:
    """Return the gradient (1, ...) of the first sample's loss with respect to the first weight of the first
    block, which depends on the whole backward pass."""
    step(flow, x[:1])
    return first.grad[None].clone()


@cache
def true_gradient(form: str, shape: Shape) -> Tensor:
    """Return that gradient in float64, computed without saving memory."""
    flow = deepcopy(our_flow(form, shape, **MODES[""])).double().train()
    first = flow[0].coupling.subnet[0].weight
    return gradient(flow, first, shape.input(torch.device("cpu")).double())


def _right(form: str, shape: Shape, flow: nn.Module, first: Tensor, x: Tensor, _: object) -> str | None:
    truth = partial(true_gradient, form, replace(shape, batch=1))
    # Most of a gradient cancels where a flow maps white noise to white noise; its rounding errors do not. And
    # a ReLU whose input rounds to the other side of zero turns one position's share of it, about 1 %, around.
    return close_to(truth, "float32", slack=200)(gradient(flow, first, x))


def _provider(
    name: str, role: str, form: str, shape: Shape, flow: nn.Module, first: Tensor, x: Tensor
) -> Provider:
    kind = FORMS[form]
    live = (*flow.parameters(), *flow.buffers(), x)
    return Provider(
        name,
        partial(step, flow, x),
        role,
        direction=DIRECTION,
        check=partial(_right, form, shape, flow, first, x),
        # Backward: the gradients of inputs and of weights cost as much as the forward, each.
        gigaflops=3 * shape.gigaflops(outputs=kind.outputs, product=kind.product),
        saves=partial(loss, flow, x),
        live=live,
        peak=True,
        # A reversible pass reads the states of random generators and its rebuilt inputs back.
        capture=not name.endswith(table.REVERSIBLE),
    )


def _providers(
    shape: Shape, forms: Sequence[str], modes: Sequence[str], device: torch.device
) -> list[Provider]:
    x = shape.input(device)
    return [*_ours(shape, forms, modes, x), *_peers(shape, x), *_limits(shape, x)]


def _ours(shape: Shape, forms: Sequence[str], modes: Sequence[str], x: Tensor) -> Iterator[Provider]:
    for form in forms:
        for mode in modes:
            flow = our_flow(form, shape, **MODES[mode]).to(x.device).train()
            first = flow[0].coupling.subnet[0].weight
            yield _provider(form + mode, OURS, form, shape, flow, first, x)


def _peers(shape: Shape, x: Tensor) -> Iterator[Provider]:
    for package, name in (("anomalib", "anomalib"), ("FrEIA", "FrEIA 0.2")):
        flow = peer_flow(package, our_flow(SHARED, shape), shape)
        if flow is not None:
            flow = flow.to(x.device).train()
            yield _provider(name, PEER, SHARED, shape, flow, flow[0].subnet[0].weight, x)


def _limits(shape: Shape, x: Tensor) -> Iterator[Provider]:
    """Yield forward and backward of the conditioners' bare convolutions, in their best memory format."""
    for form in ("additive, permutation", SHARED):
        layers = convolutions(our_flow(form, shape)).to(x.device)

        def bare(layout: str, layers: nn.ModuleList = layers) -> Callable[[], object]:
            nets = deepcopy(layers).to(memory_format=FORMATS[layout])
            # Inside a flow, what a conditioner sees needs a gradient; at its very beginning, it does not.
            inputs = x[:, : shape.passive].contiguous(memory_format=FORMATS[layout])
            inputs.requires_grad_(shape.depth > 1)

            def run() -> None:
                for parameter in (*nets.parameters(), inputs):
                    parameter.grad = None
                for net in nets:
                    net(inputs).sum().backward()

            return run

        layout = best_layout(bare, x.device)
        yield Provider(
            f"convolutions of {FORMS[form].coupling} blocks",
            bare(layout),
            LIMIT,
            direction=DIRECTION,
            layout=layout,
            gigaflops=3 * shape.gigaflops(outputs=FORMS[form].outputs, product=False),
        )


def _case(shape: Shape, *, quick: bool) -> Case:
    # One block gains nothing from reversal. Long sequences take long, so they are measured in one form only.
    modes = tuple(MODES) if shape.depth > 1 else ("",)
    forms = tuple(FORMS) if shape.depth <= 8 else ("additive, LU",)
    return Case(
        shape.title,
        partial(_providers, shape, forms, modes),
        shape.columns,
        seconds=4.0,
        quick=quick,
        first=shape.depth == 8,
    )


def cases() -> tuple[Case, ...]:
    """Return the cases: the shapes of `blocks`, eight blocks in a row, and one shape over the depth."""
    return (
        *(
            _case(Shape(channels, side, kernel, batch), quick=channels <= 256 and batch == 8 and kernel == 1)
            for channels, side in SHAPES
            for kernel in (1, 3)
            for batch in (1, 8, 32)
        ),
        *(
            _case(Shape(channels, side, kernel, 8, 8), quick=False)
            for channels, side in SHAPES
            for kernel in (1, 3)
        ),
        *(_case(replace(CURVE, depth=depth), quick=depth <= 4) for depth in DEPTHS),
    )


SUBJECT = Subject(
    name="training_step",
    about="forward and backward of coupling blocks",
    cases=cases(),
    peers=PEERS,
)
