"""FastFlow, in its original affine form and as a uniformly scaling flow.

J. Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows",
arXiv:2111.07677; uniformly scaling flows for anomaly detection: arXiv:2510.09452.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from usf_kernels.models.backbones import Backbone
from usf_kernels.models.feature_flow import FeatureFlow, add_noise, check_kernels, entry_map, glow_steps
from usf_kernels.nn import FlowSequence


class FastFlow(FeatureFlow):
    """One flow per scale of a frozen feature pyramid; the latents' norm is the anomaly score.

    A flow is a whitening map and then `steps` Glow-like steps, whose conditioners (convolution, ReLU,
    convolution) alternate between 3 x 3 and 1 x 1 kernels. With the couplings starting as the identity, the
    flow that `initialize` leaves behind scores exactly as a Mahalanobis distance, and training improves on
    that. Everything trainable is counted in the log-determinant, so the likelihood is bounded.

    The paper's flows are affine with permutations: `coupling="affine", linear="permutation"`. The paper omits
    some settings. Those below are from public reimplementations, and agree with the numbers of parameters
    that it gives for the ResNets. Create transformers with `final_norm=True`.

    | `create_backbone` | steps | kernels | hidden_ratio |
    |---|---|---|---|
    | `"resnet18"` | 8 | (3,) | 1 |
    | `"wide_resnet50_2"` | 8 | (3, 1) | 1 |
    | `"cait_m48_448", out_indices=(40,), input_size=448` | 20 | (3, 1) | 0.16 |
    | `"deit_base_distilled_patch16_384", out_indices=(7,), input_size=384` | 20 | (3, 1) | 0.16 |

    Args:
        backbone: from `create_backbone`.
        coupling: "additive" (uniformly scaling) or "affine" (the paper's).
        linear: "lu" or "permutation" (the paper's, with ActNorm).
        steps: number of steps per scale.
        hidden_ratio: hidden channels of a conditioner per input channel of it.
        kernels: sizes of the kernels, repeated over the steps.
        clamp: bound on the log scales of affine couplings.
        noise: standard deviation of the Gaussian noise put on whitened features in training mode. It keeps
            the flow from learning directions in which few training images happen not to vary.
        memory: what training keeps for the backward pass, see `usf_kernels.nn.FlowSequence`.

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
        hidden_ratio: float = 1.0,
        kernels: Sequence[int] = (3, 1),
        clamp: float = 2.0,
        noise: float = 0.3,
        memory: str = "auto",
    ) -> None:
        flow = {
            "coupling": coupling,
            "linear": linear,
            "steps": steps,
            "hidden_ratio": hidden_ratio,
            "kernels": check_kernels(kernels),
            "clamp": clamp,
        }
        super().__init__(backbone, options={**flow, "noise": noise, "memory": memory})
        self.flows = nn.ModuleList(
            FlowSequence([entry_map(channels, linear), *glow_steps(channels, **flow)], memory=memory)
            for channels in backbone.channels
        )

    @torch.no_grad()
    def inverse(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Return the features of latents (B, C_l, H_l, W_l). Works on the inference form too.

        Raises:
            ValueError: for latents with other channels than the features.
        """
        self._check(latents, "latents")
        return self._leave([flow.inverse(z)[0] for flow, z in zip(self.flows, latents, strict=True)])

    def _transform(self, features: Sequence[Tensor], noise: float) -> tuple[list[Tensor], Tensor]:
        latents, total = [], 0.0
        for flow, maps in zip(self.flows, features, strict=True):
            if noise > 0:
                z, entry_log_det = flow[0](maps)
                z, log_det = flow[1:](add_noise(z, noise))
                log_det = log_det + entry_log_det
            else:
                z, log_det = flow(maps)
            latents.append(z)
            total = total + log_det
        return latents, total
