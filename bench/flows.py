"""The flows that are measured: ours in four forms, and FrEIA's and anomalib's with the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bench.measure import least_seconds
from usf_kernels import nn as flows

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PEERS = {"anomalib": "pip install 'usf-kernels[anomalib]'", "FrEIA": "pip install FrEIA"}


@dataclass(frozen=True)
class Shape:
    """A stack of coupling blocks and its input batch. Conditioners are convolution, ReLU, convolution, and as
    wide as their input."""

    channels: int
    side: int
    kernel: int
    batch: int
    depth: int = 1

    @property
    def active(self) -> int:
        """Number of channels that a block changes."""
        return self.channels // 2

    @property
    def passive(self) -> int:
        """Number of channels that its conditioner sees."""
        return self.channels - self.active

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Shape of the input, (B, C, H, W)."""
        return self.batch, self.channels, self.side, self.side

    @property
    def title(self) -> str:
        """Name of the shape, to be read by people."""
        blocks = "" if self.depth == 1 else f", {self.depth} blocks"
        return f"{self.channels} @ {self.side}^2, k={self.kernel}, batch {self.batch}{blocks}"

    @property
    def columns(self) -> dict[str, int]:
        """Columns of the shape in a row."""
        return asdict(self)

    def gigaflops(self, *, outputs: int, product: bool) -> float:
        """Work of all blocks' convolutions, with `outputs` per active channel, and of C x C products."""
        positions = self.batch * self.side**2
        weights = self.kernel**2 * self.passive * (self.passive + outputs * self.active)
        return 2e-9 * self.depth * positions * (weights + product * self.channels**2)

    def gigabytes(self, *, outputs: int, product: bool, width: int) -> float:
        """Least traffic, even of one kernel for everything: the input, the output and the weights once."""
        weights = self.kernel**2 * self.passive * (self.passive + outputs * self.active)
        return (
            1e-9 * width * (2 * math.prod(self.sizes) + self.depth * (weights + product * self.channels**2))
        )

    def input(self, device: torch.device) -> Tensor:
        """Make a white input, float32, contiguous; the first sample is the same for every batch size."""
        generator = torch.Generator().manual_seed(1)
        return torch.stack([torch.randn(self.sizes[1:], generator=generator) for _ in range(self.batch)]).to(
            device
        )


@dataclass(frozen=True)
class Form:
    """A form of our coupling blocks."""

    name: str
    coupling: str
    product: bool  # whether a block has a C x C product that no index replaces
    block: Callable[[int, Callable[[int, int], nn.Module]], nn.Module]

    @property
    def outputs(self) -> int:
        """Number of outputs of the conditioner per active channel."""
        return 2 if self.coupling == "affine" else 1


def _step(coupling: str, linear: str) -> Callable[[int, Callable[[int, int], nn.Module]], nn.Module]:
    def make(channels: int, subnet: Callable[[int, int], nn.Module]) -> nn.Module:
        return flows.FlowStep(channels, subnet=subnet, coupling=coupling, linear=linear, zero_init=False)

    return make


def _conjugated(channels: int, subnet: Callable[[int, int], nn.Module]) -> nn.Module:
    return flows.USFBlock(channels, subnet=subnet, zero_init=False)


FORMS = {
    form.name: form
    for form in (
        Form("affine, permutation", "affine", False, _step("affine", "permutation")),
        Form("additive, permutation", "additive", False, _step("additive", "permutation")),
        Form("additive, LU", "additive", True, _step("additive", "lu")),
        Form("conjugated", "additive", True, _conjugated),
    )
}
SHARED = "affine, permutation"  # the form that peers have, too; they get its weights


def subnet(kernel: int) -> Callable[[int, int], nn.Module]:
    """Return a maker of conditioners: convolution, ReLU, convolution, as wide as the input."""

    def make(c_in: int, c_out: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(c_in, c_in, kernel, padding=kernel // 2),
            nn.ReLU(),
            nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2),
        )

    return make


def our_flow(form: str, shape: Shape, **options: object) -> flows.FlowSequence:
    """Make our flow, float32 on the CPU, in evaluation mode, with the same weights at every call. Options are
    passed to the sequence."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [FORMS[form].block(shape.channels, subnet(shape.kernel)) for _ in range(shape.depth)]
        for block in blocks:
            if hasattr(block, "act_norm"):
                _scatter(block.act_norm)
    return flows.FlowSequence(blocks, **options).eval()


def convolutions(flow: flows.FlowSequence) -> nn.ModuleList:
    """Return the convolutions of each block's conditioner, without the layers between them."""
    return nn.ModuleList(
        nn.Sequential(*(layer for layer in block.coupling.subnet if isinstance(layer, nn.Conv2d)))
        for block in flow
    )


def _scatter(act_norm: flows.ActNorm) -> None:
    """Set random scales and offsets, as if data had set them."""
    state = {name: 0.1 * torch.randn(act_norm.channels) for name in ("log_scale", "bias")}
    act_norm.load_state_dict(state | {"initialized": torch.tensor(True)})


def peer_flow(package: str, ours: flows.FlowSequence, shape: Shape) -> nn.Module | None:
    """Make FrEIA's SequenceINN of the package's AllInOneBlocks with our weights; None without the package."""
    if not find_spec("FrEIA") or not find_spec(package):
        return None
    from FrEIA.framework import SequenceINN

    if package == "anomalib":
        from anomalib.models.components.flow import AllInOneBlock
    else:
        from FrEIA.modules import AllInOneBlock

    flow = SequenceINN(shape.channels, shape.side, shape.side)
    for _ in ours:
        flow.append(AllInOneBlock, subnet_constructor=subnet(shape.kernel))
    with torch.no_grad():
        for theirs, step in zip(flow, ours, strict=True):
            theirs.subnet.load_state_dict(step.coupling.subnet.state_dict())
            per_channel = theirs.global_scale.shape
            # Peers' scale is softplus(g) with beta 1/2, over 10.
            scale = 2 * torch.log(torch.expm1(5 * step.act_norm.log_scale.exp()))
            theirs.global_scale.copy_(scale.view(per_channel))
            theirs.global_offset.copy_(step.act_norm.bias.view(per_channel))
            permutation = torch.eye(shape.channels)[step.linear.index]
            theirs.w_perm.copy_(permutation[:, :, None, None])
            theirs.w_perm_inv.copy_(permutation.T[:, :, None, None])
    return flow.eval()


def best_layout(make: Callable[[str], Callable[[], object]], device: torch.device) -> str:
    """Return the memory format in which the call that `make` returns takes the least time."""
    return min(FORMATS, key=lambda layout: least_seconds(make(layout), device))


def truth(form: str, shape: Shape, direction: str) -> tuple[Tensor, Tensor]:
    """Return the transformed first sample and the log-determinant in float64, from the modules that define
    each form."""
    return _truth(form, replace(shape, batch=1), direction)


@cache
def _truth(form: str, shape: Shape, direction: str) -> tuple[Tensor, Tensor]:
    flow = deepcopy(our_flow(form, shape)).double()
    sample = shape.input(torch.device("cpu")).double()
    with torch.no_grad():
        return (flow if direction == "forward" else flow.inverse)(sample)
