"""Inference of coupling blocks, alone and eight in a row, beside FrEIA, anomalib and bare convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.flows import (
    FORMATS,
    FORMS,
    PEERS,
    SHARED,
    Form,
    Shape,
    best_layout,
    convolutions,
    our_flow,
    peer_flow,
    truth,
)
from bench.machine import dtypes
from bench.subject import LIMIT, OURS, PEER, Case, Provider, Subject, close_to
from bench.table import FUSED

# (channels, side) of FastFlow on ResNet-18 at 256 x 256, then of U-Flow on MS-CaiT.
SHAPES = ((64, 64), (128, 32), (256, 16), (384, 14), (816, 28))
DEPTH = 8
WIDTH = {"float32": 4, "bfloat16": 2}


def _no_grad(call: Callable[..., object], *inputs: object, **options: object) -> object:
    with torch.no_grad():
        return call(*inputs, **options)


def _each(calls: Sequence[Callable[[], object]]) -> None:
    """Make the calls in turn and drop the results, so that each finds warm memory, as inside a flow."""
    for call in calls:
        call()


def _autocast(call: Callable[..., object], x: Tensor, **options: object) -> object:
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        return call(x, **options)


def _providers(shape: Shape, device: torch.device) -> list[Provider]:
    x = shape.input(device)
    return [*_ours(shape, x), *_peers(shape, x), *_limits(shape, x)]


def _ours(shape: Shape, x: Tensor) -> Iterator[Provider]:
    for form in FORMS.values():
        flow = our_flow(form.name, shape).to(x.device)
        yield _provider(form, form.name, flow, shape, x, "contiguous", "forward")
        for dtype in dtypes(x.device):
            fused = flow.fuse(dtype=dtype)

            def run(
                layout: str, fused: nn.Module = fused, dtype: torch.dtype = dtype
            ) -> Callable[[], object]:
                return partial(_no_grad, fused, x.to(dtype, memory_format=FORMATS[layout]))

            layout = best_layout(run, x.device)
            inputs = x.to(dtype, memory_format=FORMATS[layout])
            for direction in ("forward", "inverse"):
                yield _provider(form, form.name + FUSED, fused, shape, inputs, layout, direction)


def _provider(
    form: Form, name: str, flow: nn.Module, shape: Shape, x: Tensor, layout: str, direction: str
) -> Provider:
    dtype = str(x.dtype).removeprefix("torch.")
    return Provider(
        name,
        partial(_no_grad, flow if direction == "forward" else flow.inverse, x),
        OURS,
        dtype,
        direction,
        layout,
        check=close_to(partial(truth, form.name, shape, direction), dtype),
        gigaflops=shape.gigaflops(outputs=form.outputs, product=form.product),
        gigabytes=shape.gigabytes(outputs=form.outputs, product=form.product, width=x.itemsize),
    )


def _peers(shape: Shape, x: Tensor) -> Iterator[Provider]:
    ours = our_flow(SHARED, shape)
    channels_last = x.to(memory_format=torch.channels_last)
    narrow = channels_last.to(torch.bfloat16)  # the output of a backbone under autocast
    for package, version in (("anomalib", ""), ("FrEIA", " 0.2")):
        flow = peer_flow(package, ours, shape)
        if flow is None:
            continue
        flow = flow.to(x.device)
        last = deepcopy(flow).to(memory_format=torch.channels_last)

        def provider(
            name: str,
            call: Callable[[], object],
            dtype: str = "float32",
            *,
            rev: bool = False,
            layout: str = "contiguous",
            compiles: bool = False,
        ) -> Provider:
            direction = "inverse" if rev else "forward"
            return Provider(
                name,
                call,
                PEER,
                dtype,
                direction,
                layout,
                check=close_to(partial(truth, SHARED, shape, direction), dtype),
                gigaflops=shape.gigaflops(outputs=2, product=False),
                gigabytes=shape.gigabytes(outputs=2, product=False, width=WIDTH[dtype]),
                compiles=compiles,
            )

        for rev in (False, True):
            yield provider(package + version, partial(_no_grad, flow, x, rev=rev), rev=rev)
        if package != "anomalib":
            continue
        yield provider(
            "anomalib, channels-last", partial(_no_grad, last, channels_last), layout="channels_last"
        )
        for rev in (False, True):
            yield provider(
                "anomalib, autocast, channels-last",
                partial(_autocast, last, narrow, rev=rev),
                "bfloat16",
                rev=rev,
                layout="channels_last",
            )
        compiled = torch.compile(flow, dynamic=False)
        yield provider("anomalib, torch.compile", partial(_no_grad, compiled, x), compiles=True)


def _limits(shape: Shape, x: Tensor) -> Iterator[Provider]:
    """Yield the bare convolutions of conditioners and C x C products, in their best memory format."""
    for dtype in dtypes(x.device):
        word = str(dtype).removeprefix("torch.")
        for name in ("additive, permutation", SHARED):
            form = FORMS[name]
            layers = convolutions(our_flow(name, shape)).to(x.device, dtype)
            passive = x[:, : shape.passive].to(dtype).contiguous()

            def bare(
                layout: str, layers: nn.ModuleList = layers, passive: Tensor = passive
            ) -> Callable[[], object]:
                nets = deepcopy(layers).to(memory_format=FORMATS[layout])
                inputs = passive.to(memory_format=FORMATS[layout])
                return partial(_no_grad, _each, [partial(net, inputs) for net in nets])

            layout = best_layout(bare, x.device)
            yield Provider(
                f"convolutions of {form.coupling} blocks",
                bare(layout),
                LIMIT,
                word,
                layout=layout,
                gigaflops=shape.gigaflops(outputs=form.outputs, product=False),
                gigabytes=shape.gigabytes(outputs=form.outputs, product=False, width=dtype.itemsize),
            )

        def products(layout: str, dtype: torch.dtype = dtype) -> Callable[[], object]:
            matrix = torch.randn(shape.channels, shape.channels).to(x.device, dtype)
            inputs = x.to(dtype).to(memory_format=FORMATS[layout])
            if layout == "channels_last":
                product = partial(F.linear, inputs.permute(0, 2, 3, 1).flatten(0, 2), matrix)
            else:
                product = partial(torch.matmul, matrix, inputs.flatten(2))
            return partial(_no_grad, _each, [product] * shape.depth)

        layout = best_layout(products, x.device)
        yield Provider(
            "C x C products",
            products(layout),
            LIMIT,
            word,
            layout=layout,
            gigaflops=2e-9 * shape.depth * x.numel() * shape.channels,
            gigabytes=1e-9 * dtype.itemsize * (2 * x.numel() + shape.depth * shape.channels**2),
        )


def _case(shape: Shape) -> Case:
    work = shape.gigaflops(outputs=2, product=True)
    return Case(
        shape.title,
        partial(_providers, shape),
        shape.columns,
        seconds=4.0,
        quick=shape.depth == 1 and work < 5 and shape.batch in (1, 8),
        first=shape.depth == DEPTH and shape.batch == 8,
    )


def cases(depths: Sequence[int] = (1, DEPTH)) -> tuple[Case, ...]:
    """Return the cases of every shape, kernel and batch, for each depth."""
    return tuple(
        _case(Shape(channels, side, kernel, batch, depth))
        for depth in depths
        for channels, side in SHAPES
        for kernel in (1, 3)
        for batch in (1, 8, 32)
        # Left out, as it takes half an hour by itself and behaves like a batch of 8.
        if (channels, kernel, batch, depth) != (816, 3, 32, DEPTH)
    )


SUBJECT = Subject(
    name="blocks",
    about="inference of coupling blocks, with conditioners as wide as their input",
    cases=cases(),
    peers=PEERS,
)
