"""anomalib's models with random weights, before and after `replace_blocks` and `accelerate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain

import torch
from torch import Tensor, nn

from bench.flows import PEERS
from bench.model_peers import Peer
from bench.models import FLOW, SPECS, Inputs, Spec, peers_of
from bench.subject import OURS, PEER, Case, Provider, Subject, close_to
from usf_kernels import accelerate, replace_blocks

FLIPPED = 1e-3  # share of a mask's pixels that rounding may turn over
ORIGINAL, REPLACED, ACCELERATED, EXACT = "anomalib", "replace_blocks", "accelerate", "accelerate, exact"
CHANGES: dict[str, Callable[[nn.Module], object]] = {
    ORIGINAL: lambda model: None,
    REPLACED: partial(replace_blocks, compact=True),  # `compact` changes checkpoints only
    ACCELERATED: accelerate,
    EXACT: partial(accelerate, exact=True),
}


@torch.no_grad()
def _flow(model: Peer, inputs: Inputs) -> list[Tensor]:
    return model.flow_part(inputs)


@torch.no_grad()
def _whole(model: Peer, inputs: Inputs) -> list[Tensor]:
    """Return anomaly maps, and masks if the model makes them."""
    found = model.model(*inputs)
    return [found.anomaly_map] if found.pred_mask is None else [found.anomaly_map, found.pred_mask]


@torch.no_grad()
def _original(model: Peer, part: str, inputs: Inputs) -> list[Tensor]:
    return model.flow_part(inputs) if part == FLOW else [model(*inputs)]


@torch.no_grad()
def _corrected(model: Peer, inputs: Inputs) -> list[Tensor]:
    return model.corrected(*inputs)


def _right(truth: Callable[[], list[Tensor]], result: list[Tensor]) -> str | None:
    """Check a result against the truth in float64, for the first images."""
    for found, expected in zip(result, truth(), strict=True):
        if expected.dtype == torch.bool:
            share = (found[: len(expected)].cpu() != expected).double().mean().item()
            wrong = f"{share:.2g} of a mask" if share > FLIPPED else None
        else:
            wrong = close_to(lambda expected=expected: expected, "float32")(found)
        if wrong:
            return wrong
    return None


def _sharing(model: Peer) -> Peer:
    """Return a copy that shares its tensors with the model."""
    tensors = chain(model.parameters(), model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


class _Count:
    """A file object that only counts the bytes written."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None: ...


def checkpoint_bytes(flow: nn.Module) -> int:
    """Size in bytes of the file that `torch.save` makes of the flow's state_dict.

    Tensors that share memory until the model is moved to a GPU, as anomalib's permutations and their inverses
    do, count in full.
    """
    file = _Count()
    torch.save({name: tensor.clone() for name, tensor in flow.state_dict().items()}, file)
    return file.size


def _providers(spec: Spec, part: str, batch: int, device: torch.device) -> Iterator[Provider]:
    make = next(iter(peers_of(spec).values()), None)
    if make is None or not find_spec("timm"):
        return
    inputs = spec.features(batch) if part == FLOW else [spec.images(batch)]
    inputs = [x.to(device) for x in inputs]
    original = make().to(device).eval()
    wide = cache(lambda: deepcopy(original).cpu().double())
    # CFlow's own map of an image depends on the whole batch.
    depends = spec.model == "CFlow" and part != FLOW
    first, checked = ([x[:count].double().cpu() for x in inputs] for count in (1, batch if depends else 1))
    kept = cache(lambda: _original(wide(), part, checked))
    corrected = cache(lambda: _corrected(wide(), first)) if part != FLOW else kept
    run = _flow if part == FLOW else _whole
    for name, change in CHANGES.items():
        if name == EXACT and (part == FLOW or spec.model == "FastFlow"):
            continue  # nothing there is corrected
        model = _sharing(original)
        change(model)
        sized = part == FLOW and name in (ORIGINAL, REPLACED)
        yield Provider(
            name,
            partial(run, model, inputs),
            PEER if name == ORIGINAL else OURS,
            check=partial(_right, corrected if name == ACCELERATED else kept),
            checkpoint=checkpoint_bytes(model.flow) if sized else 0,
            capture=False,  # masks are made on the CPU
        )


def _cases() -> Iterator[Case]:
    for spec in SPECS:
        for part in (FLOW, "whole model") if spec.given is None else ():
            for batch in (1, 8):
                yield Case(
                    f"{spec.title}, batch {batch}, {part}",
                    partial(_providers, spec, part, batch),
                    {"batch": batch, "side": spec.side},
                    seconds=8.0,
                    quick=batch == 1 and spec.backbone == "resnet18",
                )


SUBJECT = Subject(
    name="accelerate",
    about="anomalib's Fastflow, Uflow and Cflow before and after replace_blocks and accelerate",
    cases=tuple(_cases()),
    peers={"timm": "pip install 'usf-kernels[models]'", **PEERS},
)
