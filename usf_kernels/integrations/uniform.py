"""Conversion of an `AllInOneBlock` into a uniformly scaling block, and the way back.

The affine coupling `x2 * exp(s) + t` becomes the additive one `x2 + t`. The subnet keeps all layers except
the half of the last one that computes s. ActNorm and permutation R, as the matrix `R diag(scale)`, are
factorised once with pivoting into P L U: L and U are trained, P stays an index. So the map, its
log-determinant and t stay the same, and the log scales are gone.
"""

from __future__ import annotations

from typing import Any

import torch
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from usf_kernels.integrations.all_in_one import AllInOneMixin, index_of
from usf_kernels.integrations.faster import Faster, named
from usf_kernels.integrations.flow_modules import FlowModule
from usf_kernels.nn import FlowSequence, FlowStep, LUConv1x1, Permutation
from usf_kernels.nn.fused_conditioner import copy_of

NOTE = (
    "additive coupling and LU map. Kept: the subnet but for its log scales, the shifts, the scales and the "
    "permutation (as P L U, P fixed). Fresh: what L and U add to them, which starts at zero. The log scales "
    "are gone, so train again; to a checkpoint the keys are new"
)
_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CannotConvert(Exception):
    """Raised, with the reason, for a block without a uniformly scaling form that keeps its weights."""


class UniformBlock(Faster, FlowModule):
    """An `AllInOneBlock` after `replace_blocks(to="usf")`: the same object, with other contents.

    Attributes:
        flow: the `FlowSequence` that it runs.
    """

    _original: tuple[type, dict[str, Any]]

    def become(self, original: type, flow: FlowSequence) -> None:
        """Replace all contents by `flow`; the old ones are kept aside, unregistered."""
        if self.householder:  # results of its last forward, which do not copy or pickle
            self.w_perm = self.w_perm_inv = None
        # FrEIA's lambdas do not pickle either, and look up a submodule that will be gone.
        self.global_scale_activation = named(self.global_scale_activation)
        self.__dict__["_original"] = (original, {name: self.__dict__[name] for name in _STATE})
        for name in _STATE:
            self.__dict__[name] = type(self.__dict__[name])()
        self.flow = flow

    def end_fast(self) -> None:
        """Restore class and contents, with the current device, dtype and mode of the block."""
        now = next(self.parameters())
        self.__class__, contents = self.__dict__.pop("_original")
        self.__dict__.update(contents)
        self.to(now.device, now.dtype).train(self.training)


@torch.inference_mode(False)  # inference tensors cannot be trained
def uniform_flow(block: InvertibleModule) -> FlowSequence:
    """Return the flow that replaces an `AllInOneBlock` of either package, replaced or not; it is not changed.

    Raises:
        CannotConvert: for one channel, or if the half of its subnet that computes shifts cannot be separated.
    """
    if block.in_channels < 2:
        raise CannotConvert("one channel, so there is nothing to couple")
    scale = block.global_scale_activation(block.global_scale).detach().flatten()
    rotation = AllInOneMixin._rotation(block).detach()
    subnet = _shifts_of(block)
    step = FlowStep(
        block.in_channels,
        subnet=lambda c_in, c_out: subnet,
        linear="none",
        act_norm=False,
        cond_channels=block.condition_channels,
        zero_init=False,
    )
    step.linear, permutation = _factorised(
        rotation * scale, rotation @ block.global_offset.detach().flatten()
    )
    steps = [step, permutation]
    if block.reverse_pre_permute:
        enter = _factorised(rotation.mT, torch.zeros_like(scale))
        steps = [*(enter if index_of(rotation) is None else enter[1:]), *steps]
    flow = FlowSequence(steps, memory="standard").train(block.training)
    if not (block.global_scale.requires_grad or block.global_offset.requires_grad):  # frozen, so is the rest
        for layer in flow.modules():
            if isinstance(layer, LUConv1x1):
                layer.requires_grad_(False)
    return flow


@torch.no_grad()
def _factorised(matrix: Tensor, bias: Tensor) -> tuple[LUConv1x1, Permutation]:
    """Factorise `matrix @ x + bias` into a map with L and U, then a fixed permutation."""
    pivots, lower, upper = torch.linalg.lu(matrix.to("cpu", torch.float64))
    index = pivots.argmax(dim=1)
    linear = LUConv1x1(len(matrix))
    linear.to(matrix).set_triangles(lower.to(matrix), upper.to(matrix))
    linear.bias[index] = bias
    return linear, Permutation.of(index.to(matrix.device))


def _shifts_of(block: InvertibleModule) -> nn.Module:
    """Return a copy of the block's subnet that computes only the shifts, times 0.1.

    Raises:
        CannotConvert: if its last layer cannot be halved, or is not what determines its outputs.
    """
    channels = block.splits[1]
    subnet = _halved(copy_of(block.subnet), channels)
    # The layer registered last need not be the one that runs last: compare outputs, with random weights in
    # that layer that would show a difference.
    whole = copy_of(block.subnet).eval()
    last = list(whole.modules())[-1]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
        half = _halved(copy_of(whole), channels)
        like, spatial = next(whole.parameters()), block.dims_in[0][1:]
        sizes = (1, block.splits[0] + block.condition_channels, *spatial)
        x = torch.randn(sizes, generator=generator, device="cpu").to(like)
        try:
            expected, found = 0.1 * whole(x)[:, channels:], half(x)
        except Exception as error:  # shapes no longer fit, or the subnet refuses the input in its own way
            raise CannotConvert(f"its subnet does not run with half of its last layer: {error}") from error
    tolerance = 0.01 * expected.abs().max().item()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=tolerance):
        raise CannotConvert("its subnet changes the outputs of its last layer")
    return subnet


def _halved(subnet: nn.Module, channels: int) -> nn.Module:
    """Remove the first `channels` outputs of the subnet's last layer and scale the rest by 0.1, in place."""
    last = list(subnet.modules())[-1]
    if type(last) not in _LAYERS or last._parameters.get("weight") is None or getattr(last, "groups", 1) != 1:
        raise CannotConvert(f"its subnet ends with {last}, expected a plain linear layer or convolution")
    name = "out_features" if isinstance(last, nn.Linear) else "out_channels"
    if getattr(last, name) != 2 * channels:
        raise CannotConvert(f"its subnet ends with {last}, expected {2 * channels} outputs")
    for key, parameter in list(last._parameters.items()):
        if parameter is not None:
            half = 0.1 * parameter.detach()[channels:]
            setattr(last, key, nn.Parameter(half, requires_grad=parameter.requires_grad))
    setattr(last, name, channels)
    return subnet
