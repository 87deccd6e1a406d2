"""Whole models, image to anomaly map, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from bench.flows import PEERS
from bench.subject import OURS, PEER, Case, Provider, Subject, relative_error
from usf_kernels.models import FastFlow, create_backbone
from usf_kernels.ops import anomaly_map

BACKBONE, SIDE = "resnet18", 256
FORMS = (("affine", "permutation"), ("additive", "permutation"), ("additive", "lu"))


def _images(batch: int, device: torch.device) -> Tensor:
    return torch.rand(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)


def _score(model: FastFlow, images: Tensor) -> Tensor:
    """Image to anomaly map, which is what anomalib's model returns too."""
    with torch.no_grad():
        latents, _ = model(images)
        return anomaly_map(latents, SIDE)


def _check(model: torch.nn.Module, images: Tensor, found: object) -> str | None:
    """Against itself in float64, on the first image."""
    found = getattr(found, "anomaly_map", found)
    with torch.no_grad():
        double = _copy(model).double()
        if isinstance(model, FastFlow):
            expected = _score(double, images[:1].double().cpu())
        else:
            expected = double(images[:1].double().cpu()).anomaly_map
    error = relative_error(found[:1].double().cpu(), expected)
    return None if error < 1e-4 else f"relative error {error:.2g}"


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    from copy import deepcopy

    return deepcopy(model).cpu()


def _providers(batch: int, device: torch.device) -> list[Provider]:
    return list(_flows(batch, device))


def _flows(batch: int, device: torch.device) -> Iterator[Provider]:
    images = _images(batch, device)
    for coupling, linear in FORMS:
        torch.manual_seed(0)
        backbone = create_backbone(BACKBONE, weights=None, out_indices=(1, 2, 3))
        model = FastFlow(backbone, coupling=coupling, linear=linear).to(device).eval()
        name = f"FastFlow, {coupling}, {linear.replace('lu', 'LU')}"
        yield Provider(name, partial(_score, model, images), OURS, check=partial(_check, model, images))
    if find_spec("anomalib"):
        from anomalib.models.image.fastflow.torch_model import FastflowModel

        torch.manual_seed(0)
        theirs = FastflowModel((SIDE, SIDE), BACKBONE, pre_trained=False).to(device).eval()

        def score(model: torch.nn.Module) -> object:
            with torch.no_grad():
                return model(images)

        check = partial(_check, theirs, images)
        yield Provider("anomalib Fastflow", partial(score, theirs), PEER, check=check)
        compiled = torch.compile(theirs, dynamic=False)
        yield Provider(
            "anomalib Fastflow, torch.compile", partial(score, compiled), PEER, check=check, compiles=True
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
    peers=PEERS,
)
