"""Whole models with random weights: image to anomaly map, their flows alone, and training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from bench import model_peers
from bench.flows import PEERS
from bench.subject import LIMIT, OURS, PEER, Case, Provider, Subject, close_to
from bench.table import FUSED, REVERSIBLE
from usf_kernels import models
from usf_kernels.models.feature_flow import FeatureFlow
from usf_kernels.ops import anomaly_map

FORMS = (("affine", "permutation"), ("additive", "permutation"), ("additive", "lu"))
FLOW, TRAINING = "flow part", "training step"
MODES = {"": "standard", REVERSIBLE: "auto"}  # suffix of a provider's name -> memory mode


@dataclass(frozen=True)
class Spec:
    """A model on a backbone.

    Attributes:
        model: name of its class in `usf_kernels.models`.
        backbone: a timm name, or a name for the given features.
        stages: stages of the backbone.
        side: side of the images.
        final_norm: put maps through the norm with which the network ends, as the papers do with transformers.
        given: (channels, strides) of features where there is no backbone, and only the flow is timed.
        forms: (coupling, linear) of our models.
    """

    model: str
    backbone: str
    stages: tuple[int, ...] = ()
    side: int = 256
    final_norm: bool = False
    given: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    forms: tuple[tuple[str, str], ...] = FORMS

    @property
    def title(self) -> str:
        """Name of the model, to be read by people."""
        return f"{self.model} {self.backbone.replace('ms_cait', 'MS-CaiT')} {self.side}^2"

    def ours(self, coupling: str, linear: str, memory: str = "standard") -> FeatureFlow:
        """Make our model, in evaluation mode, with couplings that are not the identity; always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options = {"coupling": coupling, "linear": linear, "noise": 0.0, "memory": memory}
            model = getattr(models, self.model)(self._backbone, **options).eval()
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(torch.randn_like(p), alpha=0.1 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.02)
        return model

    @cached_property
    def _backbone(self) -> models.Backbone:
        if self.given is None:
            stages = self.stages or None
            return models.create_backbone(
                self.backbone, weights=None, out_indices=stages, final_norm=self.final_norm
            )
        network = nn.Module()
        channels, strides = self.given
        network.feature_info = SimpleNamespace(channels=lambda: channels, reduction=lambda: strides)
        return models.Backbone(network, {"name": self.backbone}, mean=(0.5,) * 3, std=(0.5,) * 3)

    def images(self, batch: int) -> Tensor:
        """Make random images, (B, 3, H, W)."""
        return torch.rand(batch, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))

    def features(self, batch: int) -> list[Tensor]:
        """Make white features, in the shapes of the backbone's."""
        generator = torch.Generator().manual_seed(0)
        scales = zip(self._backbone.channels, self._backbone.strides, strict=True)
        sizes = [(batch, channels, self.side // stride, self.side // stride) for channels, stride in scales]
        return [torch.randn(size, generator=generator) for size in sizes]


SPECS = (
    Spec("FastFlow", "resnet18", (1, 2, 3)),
    Spec("FastFlow", "deit_base_distilled_patch16_384", (7,), side=384, final_norm=True),
    Spec("UFlow", "resnet18", (1, 2, 3)),
    Spec("UFlow", "wide_resnet50_2", (1, 2, 3)),
    Spec("UFlow", "MS-CaiT", side=448, given=((768, 384), (16, 32))),
    Spec("CFlow", "resnet18", (2, 3, 4)),
    Spec("CFlow", "wide_resnet50_2", (2, 3, 4)),
)
# With its 400 million weights: once from images, in one form, since a process holds about ten copies of them.
LARGE = Spec("UFlow", "ms_cait", side=448, forms=FORMS[:1])

Inputs = list[Tensor]  # one batch of images, or features


def _map(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Map images to anomaly maps, which anomalib's models return themselves."""
    (images,) = inputs
    found = model(images)
    return [found if isinstance(found, Tensor) else anomaly_map(found[0], tuple(images.shape[-2:]))]


def _latents(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    found = model.latents(inputs)
    return found[0] if isinstance(model, FeatureFlow) else found


def _step(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run forward and backward with fresh gradients; return that of the first parameter."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None
    if isinstance(model, FeatureFlow):
        model.loss(inputs[0]).backward()
    else:
        model.step(inputs[0])
    return [trained[0].grad[None].clone()]


Run = Callable[[nn.Module, Inputs], list[Tensor]]


@torch.no_grad()
def _without_gradients(run: Run, model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return run(model, inputs)


@torch.no_grad()
def _autocast(run: Run, model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run under autocast: backbones in bfloat16, and those operations of a flow that autocast knows."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        return run(model, inputs)


def _flat(results: Sequence[Tensor]) -> Tensor:
    return torch.cat([result.flatten(1).double().cpu() for result in results], 1)


def _right(run: Run, model: nn.Module, inputs: Inputs, dtype: str, result: Sequence[Tensor]) -> str | None:
    """Check against the model in float64 on these inputs, on their device: kernels leave float64 to torch."""
    wide = deepcopy(model).to(inputs[0].device, torch.float64)
    expected = _flat(_without_gradients(run, wide, [x.double() for x in inputs]))
    # The LU maps of a deep flow on 2,048 channels, of condition 60 each, amplify earlier rounding errors.
    return close_to(lambda: expected, dtype, slack=2 if dtype == "float32" else 1)(_flat(result))


def _right_gradient(model: nn.Module, inputs: Inputs, _: object) -> str | None:
    """Check the gradient of the first image against float64."""
    first = [x[:1] for x in inputs]
    wide = deepcopy(model).double()
    expected = _flat(_step(wide, [x.double() for x in first]))
    # Most of a gradient may cancel; its rounding errors do not. And a ReLU whose input rounds to the other
    # side of zero, in the features already, turns one position's share of it, about 1 %, around.
    return close_to(lambda: expected, "float32", slack=200)(_flat(_step(model, first)))


def _inference(run: Run, spec: Spec, inputs: Inputs) -> Iterator[Provider]:
    """Yield all providers of a result for these inputs without gradients."""
    device = inputs[0].device
    narrow = [x.to(memory_format=torch.channels_last) for x in inputs]
    first = [x[:1] for x in inputs]
    for coupling, linear in spec.forms:
        model = spec.ours(coupling, linear)
        check = partial(_right, run, deepcopy(model), first)
        model, name = model.to(device), f"{coupling}, {linear.replace('lu', 'LU')}"
        for suffix, made in (("", model), (FUSED, model.fuse())):
            call = partial(_without_gradients, run, made, inputs)
            yield Provider(name + suffix, call, OURS, check=partial(check, "float32"))
        call = partial(_without_gradients, run, model.fuse(torch.bfloat16), narrow)
        yield Provider(name + FUSED, call, OURS, "bfloat16", check=partial(check, "bfloat16"))
    if run is _map:
        call = partial(_without_gradients, _features, model, inputs)
        yield Provider("backbone alone", call, LIMIT)
    for name, make in peers_of(spec).items():
        model = make().to(device).eval()
        # CFlow scales its anomaly map by the maximum over the batch.
        check = partial(_right, run, deepcopy(model), inputs if spec.model == "CFlow" else first)
        compiled = torch.compile(partial(run, model), dynamic=False)
        for suffix, call, dtype in (
            ("", partial(_without_gradients, run, model, inputs), "float32"),
            (", torch.compile", partial(_compiled, compiled, inputs), "float32"),
            (", autocast, channels-last", partial(_autocast, run, _last(model), narrow), "bfloat16"),
        ):
            compiles = suffix == ", torch.compile"
            yield Provider(
                name + suffix,
                call,
                PEER,
                dtype,
                check=partial(check, dtype),
                compiles=compiles,
                graphed=None if compiles else partial(_all_on, device, call),
            )


def _training(spec: Spec, inputs: Inputs) -> Iterator[Provider]:
    """Yield all providers of forward and backward from images on, without the optimiser."""
    device = inputs[0].device
    for coupling, linear in spec.forms:
        for mode, memory in MODES.items():
            model = spec.ours(coupling, linear, memory).to(device).train()
            yield Provider(
                f"{coupling}, {linear.replace('lu', 'LU')}{mode}",
                partial(_step, model, inputs),
                OURS,
                direction=TRAINING,
                check=partial(_right_gradient, model, inputs),
                # A reversible pass reads the states of random generators and its rebuilt inputs back.
                capture=mode != REVERSIBLE,
            )
    for name, make in peers_of(spec).items():
        model = make().to(device).train()
        call, check = partial(_step, model, inputs), partial(_right_gradient, model, inputs)
        graphed = partial(_all_on, device, call)
        yield Provider(name, call, PEER, direction=TRAINING, check=check, graphed=graphed)


def _all_on(device: torch.device, call: Callable[[], object]) -> object:
    """Call with `device` as default: peers make constants on the CPU, and graphs allow no copies of them."""
    with device:
        return call()


def _features(model: FeatureFlow, inputs: Inputs) -> list[Tensor]:
    return model.features(inputs[0])


@torch.no_grad()
def _compiled(call: Callable[[Inputs], list[Tensor]], inputs: Inputs) -> list[Tensor]:
    return call(inputs)


def _last(model: nn.Module) -> nn.Module:
    return deepcopy(model).to(memory_format=torch.channels_last)


def peers_of(spec: Spec) -> dict[str, Callable[[], nn.Module]]:
    """Return makers of anomalib's models of a specification, by name; weights are the same at every call."""
    if not find_spec("anomalib"):
        return {}
    return {
        name: partial(_seeded, partial(make, spec.backbone, spec.side))
        for name, make in model_peers.PEERS[spec.model].items()
    }


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _providers(spec: Spec, part: str, batch: int, device: torch.device) -> Iterator[Provider]:
    if not find_spec("timm"):  # neither side has a backbone without it
        return
    inputs = spec.features(batch) if part == FLOW else [spec.images(batch)]
    inputs = [x.to(device) for x in inputs]
    if part == TRAINING:
        yield from _training(spec, inputs)
    else:
        yield from _inference(_latents if part == FLOW else _map, spec, inputs)


def _cases() -> Iterator[Case]:
    for spec in SPECS:
        for part in ("", FLOW, TRAINING):
            if spec.given is not None and part != FLOW:
                continue
            for batch in (1, 8):
                yield Case(
                    f"{spec.title}, batch {batch}" + (f", {part}" if part else ""),
                    partial(_providers, spec, part, batch),
                    {"batch": batch, "side": spec.side},
                    seconds=8.0,
                    quick=batch == 1 and spec.backbone == "resnet18",
                )
    columns = {"batch": 1, "side": LARGE.side}
    run = partial(_providers, LARGE, "", 1)
    yield Case(f"{LARGE.title}, batch 1", run, columns, seconds=8.0, quick=False)


SUBJECT = Subject(
    name="models",
    about="FastFlow, U-Flow and CFlow: image to anomaly map, the flow alone, a training step",
    cases=tuple(_cases()),
    peers={"timm": "pip install 'usf-kernels[models]'", **PEERS},
)
