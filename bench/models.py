"""Whole models, image to anomaly map, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bench.flows import PEERS
from bench.subject import LIMIT, OURS, PEER, Case, Provider, Subject, close_to
from bench.table import FUSED
from usf_kernels.models import FastFlow, create_backbone
from usf_kernels.ops import anomaly_map

BACKBONE, SIDE = "resnet18", 256
FORMS = (("affine", "permutation"), ("additive", "permutation"), ("additive", "lu"))


def _model(coupling: str, linear: str) -> FastFlow:
    """Ours, in evaluation mode, with couplings that are not the identity."""
    torch.manual_seed(0)
    backbone = create_backbone(BACKBONE, weights=None, out_indices=(1, 2, 3))
    model = FastFlow(backbone, coupling=coupling, linear=linear).eval()
    with torch.no_grad():
        for parameter in model.flows.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _their_model() -> nn.Module:
    from anomalib.models.image.fastflow.torch_model import FastflowModel

    torch.manual_seed(0)
    return FastflowModel((SIDE, SIDE), BACKBONE, pre_trained=False).eval()


def _map(call: Callable[[Tensor], object], images: Tensor) -> object:
    with torch.no_grad():
        return call(images)


def _score(model: FastFlow, images: Tensor) -> Tensor:
    """Image to anomaly map, which is what anomalib's model returns too."""
    return anomaly_map(model(images)[0], SIDE)


def _check(double: nn.Module, images: Tensor, dtype: str, found: object) -> str | None:
    """Against the model in float64, on the first image."""
    first = images[:1].double().cpu()
    expected = _map(partial(_score, double) if isinstance(double, FastFlow) else double, first)
    expected = getattr(expected, "anomaly_map", expected)
    return close_to(lambda: expected, dtype)(getattr(found, "anomaly_map", found))


def _autocast(model: Callable[[Tensor], object], images: Tensor) -> object:
    """The backbone in bfloat16, and what of the flow autocast knows."""
    with torch.autocast(images.device.type, torch.bfloat16):
        return model(images)


def _providers(batch: int, device: torch.device) -> Iterator[Provider]:
    if not find_spec("timm"):  # neither side has a backbone without it
        return
    images = torch.rand(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    last = images.to(memory_format=torch.channels_last)
    for coupling, linear in FORMS:
        model = _model(coupling, linear)
        check = partial(_check, deepcopy(model).double(), images)
        model = model.to(device)
        name = f"{coupling}, {linear.replace('lu', 'LU')}"
        yield Provider(
            name, partial(_map, partial(_score, model), images), OURS, check=partial(check, "float32")
        )
        yield Provider(
            name + FUSED,
            partial(_map, partial(_score, model.fuse()), images),
            OURS,
            check=partial(check, "float32"),
        )
        narrow = partial(_autocast, partial(_score, model.fuse(torch.bfloat16)))
        yield Provider(
            name + FUSED, partial(_map, narrow, last), OURS, "bfloat16", check=partial(check, "bfloat16")
        )
    yield Provider("backbone alone", partial(_map, model.features, images), LIMIT)
    if find_spec("anomalib"):
        yield from _their_providers(images)


def _their_providers(images: Tensor) -> Iterator[Provider]:
    model = _their_model()
    check = partial(_check, deepcopy(model).double(), images)
    model, last = model.to(images.device), images.to(memory_format=torch.channels_last)
    narrow = partial(_autocast, deepcopy(model).to(memory_format=torch.channels_last))
    compiled = torch.compile(model, dynamic=False)
    for name, call, x, dtype in (
        ("anomalib Fastflow", model, images, "float32"),
        ("anomalib Fastflow, torch.compile", compiled, images, "float32"),
        ("anomalib Fastflow, autocast, channels-last", narrow, last, "bfloat16"),
    ):
        yield Provider(
            name, partial(_map, call, x), PEER, dtype, check=partial(check, dtype), compiles=call is compiled
        )


SUBJECT = Subject(
    name="models",
    about=f"FastFlow on {BACKBONE} at {SIDE}^2, image to anomaly map",
    cases=tuple(
        Case(
            f"FastFlow {BACKBONE} {SIDE}^2, batch {batch}",
            partial(_providers, batch),
            {"batch": batch, "side": SIDE},
            seconds=8.0,
            quick=batch == 1,
            first=True,
        )
        for batch in (1, 8)
    ),
    peers={"timm": "pip install 'usf-kernels[models]'", **PEERS},
)
