"""CFlow, in its original affine form and as a uniformly scaling flow.

D. Gudovskiy, S. Ishizaka, K. Kozuka, "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization
via Conditional Normalizing Flows", arXiv:2107.12571; uniformly scaling flows: arXiv:2510.09452.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from usf_kernels.models.backbones import Backbone
from usf_kernels.models.encoding import Encodings, check_encoding_channels
from usf_kernels.models.feature_flow import FeatureFlow, add_noise, entry_map, glow_steps
from usf_kernels.nn import FlowSequence
from usf_kernels.ops.checks import check_between, check_int

Condition = Tensor | Sequence[Tensor]  # (1, D, H, W), or what `FusedFlow.project` made of it


class CFlow(FeatureFlow):
    """One flow per scale that treats every position alone, conditioned on where it is.

    A flow is a whitening map and then `steps` Glow-like steps, whose conditioners are MLPs on the channels of
    one position and its encoding (`models.encoding`). With the couplings starting as the identity, the
    flow that `initialize` leaves behind scores exactly as a Mahalanobis distance. The paper uses the scales
    of strides 8, 16 and 32: `create_backbone("resnet18", out_indices=(2, 3, 4))`.

    Args:
        backbone: from `create_backbone`.
        coupling: "additive" (uniformly scaling) or "affine" (the paper's).
        linear: "lu" or "permutation" (the paper's, with ActNorm).
        steps: number of steps per scale.
        hidden_ratio: hidden units of a conditioner per input of it, the encoding's channels included.
        encoding_channels: channels of the positional encoding, a multiple of 4.
        clamp: bound on the log scales of affine couplings.
        noise: standard deviation of the Gaussian noise put on whitened features in training mode. It keeps
            the flow from learning directions in which few training images happen not to vary.
        position_share: share of the positions that a loss in training mode looks at, in (0, 1]: drawn at
            random at every scale, the same in all images of a batch. The mean of such losses is the loss of
            all positions, up to rounding the share to whole numbers of positions per scale.
        memory: what training keeps for the backward pass, see `usf_kernels.nn.FlowSequence`.
        memory_budget: bytes, about, that a flow may take without gradients besides its input and output. More
            positions than fit are treated one stretch after the other, with the same results.

    `model(images) -> (latents, log_det)`: a list of (B, C_l, H_l, W_l), and the log-determinant summed over
    scales: 0-d for the uniformly scaling form, (B,) for the affine one.

    Raises:
        TypeError, ValueError: for a bad argument.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        coupling: str = "additive",
        linear: str = "lu",
        steps: int = 8,
        hidden_ratio: float = 2.0,
        encoding_channels: int = 128,
        clamp: float = 1.9,
        noise: float = 0.3,
        position_share: float = 1.0,
        memory: str = "auto",
        memory_budget: int = 256 << 20,
    ) -> None:
        check_encoding_channels(encoding_channels)
        check_between("position_share", position_share, 0, 1, "(]")
        memory_budget = check_int("memory_budget", memory_budget, 1)
        flow = {
            "coupling": coupling,
            "linear": linear,
            "steps": steps,
            "hidden_ratio": hidden_ratio,
            "clamp": clamp,
        }
        rest = {
            "encoding_channels": encoding_channels,
            "noise": noise,
            "position_share": position_share,
            "memory": memory,
            "memory_budget": memory_budget,
        }
        super().__init__(backbone, options=flow | rest)
        self.flows = nn.ModuleList()
        for channels in backbone.channels:
            glow = glow_steps(channels, kernels=(1,), cond_channels=encoding_channels, **flow)
            self.flows.append(FlowSequence([entry_map(channels, linear), *glow], memory=memory))
        self._encodings = [Encodings(encoding_channels) for _ in self.flows]

    @torch.no_grad()
    def inverse(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Return the features of latents (B, C_l, H_l, W_l). Works on the inference form too.

        Raises:
            ValueError: for latents with other channels than the features.
        """
        self._check(latents, "latents")
        return self._leave(self._run(latents, self._conditions(latents), inverse=True)[0])

    def _transform(self, features: Sequence[Tensor], noise: float) -> tuple[list[Tensor], Tensor]:
        return self._run(features, self._conditions(features), noise)

    def _training_transform(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        share, some, conditions = self.options["position_share"], [], []
        if share == 1:
            return super()._training_transform(features)
        for maps, encoding in zip(features, self._conditions(features), strict=True):
            positions = maps.shape[2] * maps.shape[3]
            chosen = torch.randperm(positions, device=maps.device)[: max(1, round(share * positions))]
            some.append(maps.flatten(2)[:, :, chosen, None])
            conditions.append(encoding.flatten(2)[:, :, chosen, None])
        return self._run(some, conditions, self.options["noise"])

    def _conditions(self, inputs: Sequence[Tensor]) -> list[Condition]:
        if self.fused:
            three = zip(self._encodings, self.flows, inputs, strict=True)
            return [encodings.projected(flow, maps) for encodings, flow, maps in three]
        return [encodings.of(maps) for encodings, maps in zip(self._encodings, inputs, strict=True)]

    def _run(
        self,
        inputs: Sequence[Tensor],
        conditions: Sequence[Condition],
        noise: float = 0.0,
        *,
        inverse: bool = False,
    ) -> tuple[list[Tensor], Tensor]:
        outputs, total = [], 0.0
        for flow, maps, cond in zip(self.flows, inputs, conditions, strict=True):
            if noise > 0:
                z, entry_log_det = flow[0](maps)
                z, log_det = flow[1:](add_noise(z, noise), cond)
                log_det = log_det + entry_log_det
            else:
                call = flow.inverse if inverse else flow
                # In training, an ActNorm takes its statistics from all positions.
                positions = None if self.training else self._positions_at_a_time(maps)
                z, log_det = in_stretches(call, maps, cond, positions)
            outputs.append(z)
            total = total + log_det
        return outputs, total

    def _positions_at_a_time(self, maps: Tensor) -> int:
        """Number of positions that fit into the memory budget."""
        channels, encoding_channels = maps.shape[1], self.options["encoding_channels"]
        hidden = self.options["hidden_ratio"] * (channels / 2 + encoding_channels)
        # The state, a copy of it and the conditioner's output; the conditioner's input, and its hidden units
        # before and after the activation.
        numbers = 4 * channels + encoding_channels + 2 * hidden
        return max(1, int(self.options["memory_budget"] / (numbers * maps.element_size())))


def in_stretches(
    call: Callable[[Tensor, Condition], tuple[Tensor, Tensor]],
    maps: Tensor,
    cond: Condition,
    positions: int | None,
) -> tuple[Tensor, Tensor]:
    """Evaluate `call(maps, cond)`, for a call that treats every position alone, in stretches of positions.

    All positions are taken at once where gradients are recorded, which keep everything anyway, and in traced
    graphs, which may not depend on the number of positions.

    Args:
        call: function of maps (B, C, H, W) and their condition that returns maps and a log-determinant, which
            is either 0-d and proportional to the number of positions, or (B,).
        maps, cond: arguments of `call`.
        positions: most positions at a time, at least 1; whole images where they fit. None for no limit.
    """
    size = maps.shape[2] * maps.shape[3]
    whole = positions is None or torch.compiler.is_compiling() or torch.is_grad_enabled()
    if whole or maps.shape[0] * size <= positions:
        return call(maps, cond)
    outputs, log_dets = [], []
    for images in maps.flatten(2).split(max(1, positions // size)):
        parts = [
            call(images[..., start : start + positions, None], _cut(cond, start, start + positions))
            for start in range(0, size, positions)
        ]
        outputs.append(torch.cat([part for part, _ in parts], dim=2))
        log_dets.append(sum(log_det for _, log_det in parts))
    log_det = log_dets[0] if log_dets[0].ndim == 0 else torch.cat(log_dets)
    return torch.cat(outputs).reshape(maps.shape), log_det


def _cut(cond: Condition, start: int, stop: int) -> Condition:
    """Condition of the positions from `start` to `stop`."""
    if cond is None:
        return None
    if isinstance(cond, Tensor):
        return cond.flatten(2)[..., start:stop, None]
    return [part[:, start:stop] for part in cond]
