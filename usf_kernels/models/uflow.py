"""U-Flow, in its original affine form and as a uniformly scaling flow.

M. Tailanian, A. Pardo, P. Musé, "U-Flow: A U-shaped Normalizing Flow for Anomaly Detection with Unsupervised
Threshold", arXiv:2211.12353; uniformly scaling flows for anomaly detection: arXiv:2510.09452.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from usf_kernels.models.backbones import Backbone
from usf_kernels.models.feature_flow import FeatureFlow, add_noise, check_kernels, entry_map, glow_steps
from usf_kernels.nn import ActNorm, FlowSequence, LUConv1x1
from usf_kernels.nn.folding import LinearMap, parts
from usf_kernels.nn.fusing import fuse_parts


class UFlow(FeatureFlow):
    """One flow over all scales of a frozen feature pyramid; the latents' norm is the anomaly score.

    Each scale, from the coarsest up, has a stage of `steps` Glow-like steps. About half of its output
    channels are the latents of that scale; the others are spread over the positions of the next finer scale
    (pixel shuffle) and concatenated to its features. The finest scale keeps all of its channels as latents.

    Every scale's features first pass a map that `initialize` makes a whitening. With the couplings starting
    as the identity, the sum of all scales' squared norms is then a Mahalanobis distance, and training
    improves on that. Everything trainable is counted in the log-determinant, so the likelihood is bounded.
    The authors' trainable LayerNorm between a CNN and the flow would not be counted, and is left out. Behind
    it, the affine form computes what theirs and anomalib's do, channel by channel.

    Args:
        backbone: from `create_backbone`, with at least two scales, every stride a multiple of the one before.
        coupling: "additive" (uniformly scaling) or "affine" (the paper's).
        linear: "lu" or "permutation" (the paper's, with ActNorm).
        steps: number of steps per scale.
        hidden_ratio: hidden channels of a conditioner per input channel of it.
        kernels: sizes of the kernels, repeated over the steps: (3, 1) alternates as in the paper.
        clamp: bound on the log scales of affine couplings.
        noise: standard deviation of the Gaussian noise put on whitened features in training mode, as in
            `FastFlow`.
        memory: what training keeps for the backward pass, see `usf_kernels.nn.FlowSequence`.

    `model(images) -> (latents, log_det)`: a list of (B, C'_l, H_l, W_l), finest first, and the
    log-determinant: 0-d for the uniformly scaling form, (B,) for the affine one. C' is `latent_channels`:
    where the next finer map has r times the side (r = 2 in most pyramids), the first `C // (2 r^2) * r^2`
    channels of a stage, and never fewer than r^2, go there.

    A map does not always have exactly r times the side of the next one, for example if the image size is odd.
    Maps are therefore extended at the bottom and right, by replication, until they do, and so are the
    latents. The extension counts in the likelihood, but not in scores, masks or the null model.

    Raises:
        TypeError, ValueError: for a bad argument, a backbone of one scale, or one with too few channels.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        coupling: str = "additive",
        linear: str = "lu",
        steps: int = 4,
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
        self.ratios = _ratios(backbone.strides)
        channels, self.passed = _channels(backbone.channels, self.ratios)
        self.latent_channels = tuple(c - p for c, p in zip(channels, self.passed, strict=True))
        self.entries = nn.ModuleList(entry_map(c, linear) for c in backbone.channels)
        self.stages = nn.ModuleList(FlowSequence(glow_steps(c, **flow), memory=memory) for c in channels)

    @torch.no_grad()
    def inverse(
        self, latents: Sequence[Tensor], *, sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Tensor]:
        """Return the features (B, C_l, H_l, W_l) of latents (B, C'_l, H_l, W_l).

        Undoes `latents`, on the inference form too.

        Args:
            latents: latent maps, finest first.
            sizes: (H_l, W_l) of the features, needed where `latents` has extended them (see the class);
                without them, the result includes the extension.

        Raises:
            TypeError, ValueError: for latents of another number, shape or dtype.
        """
        if len(latents) != len(self.stages):
            raise ValueError(f"latents: expected {len(self.stages)} maps, found {len(latents)}")
        features, passed = [], None  # finest first
        for level, z in enumerate(latents):
            if passed is not None:
                z = torch.cat([passed, z], dim=1)
            x, _ = self.stages[level].inverse(z)
            maps, spread = x.tensor_split([self.backbone.channels[level]], dim=1)
            features.append(maps if self.fused else self.entries[level].inverse(maps)[0])
            if level < len(self.ratios):
                passed = _gathered(spread, self.ratios[level])
        if sizes is not None:
            features = [x[..., :height, :width] for x, (height, width) in zip(features, sizes, strict=True)]
        return self._leave(features)

    def _entries(self) -> list[LUConv1x1 | ActNorm]:
        return list(self.entries)

    def _fuse_flows(self, dtype: torch.dtype | None) -> None:
        for level, (entry, stage) in enumerate(zip(self.entries, self.stages, strict=True)):
            like = next(stage.parameters(), next(entry.parameters()))
            (enter,) = parts(entry)
            width = self.latent_channels[level] + self.passed[level]
            first = _beside(enter, LinearMap.identity(width - entry.channels))
            self.stages[level] = fuse_parts([first, *parts(stage)], dtype or like.dtype, like.device)
        self.entries = nn.ModuleList()  # folded into the stages

    def _transform(self, features: Sequence[Tensor], noise: float) -> tuple[list[Tensor], Tensor]:
        latents, total, spread = [], 0.0, None
        extended = _extended(features, self.ratios)
        for level in reversed(range(len(features))):
            z = extended[level]
            if not self.fused:
                z, log_det = self.entries[level](z)
                z, total = add_noise(z, noise), total + log_det
            if spread is not None:
                z = torch.cat([z, spread], dim=1)
            z, log_det = self.stages[level](z)
            total = total + log_det
            if level > 0:
                passed, z = z.split([self.passed[level], self.latent_channels[level]], dim=1)
                spread = F.pixel_shuffle(passed, self.ratios[level - 1])
            latents.insert(0, z)
        return latents, total


def _ratios(strides: Sequence[int]) -> list[int]:
    """Return the ratio of each map's side to that of the next coarser one, finest first."""
    fits = all(fine > 0 and coarse >= fine and coarse % fine == 0 for fine, coarse in pairwise(strides))
    if len(strides) < 2 or not fits:
        raise ValueError(
            "backbone: expected two scales or more, the stride of each a multiple of the one before, found "
            f"strides {tuple(strides)}"
        )
    return [coarse // fine for fine, coarse in pairwise(strides)]


def _channels(features: Sequence[int], ratios: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the channels of each stage and how many of them go to the next finer scale, finest first."""
    channels, passed = [features[-1]], []
    for own, ratio in zip(reversed(features[:-1]), reversed(ratios), strict=True):
        passed.insert(0, _passed(channels[0], ratio))
        channels.insert(0, own + passed[0] // ratio**2)
    return channels, [0, *passed]  # nothing is finer than the finest


def _passed(channels: int, ratio: int) -> int:
    area = ratio**2
    if channels <= area:
        raise ValueError(
            f"backbone: expected more than {area} channels below a map of {ratio} times the side, found "
            f"{channels}"
        )
    return max(channels // (2 * area), 1) * area


def _extended(features: Sequence[Tensor], ratios: Sequence[int]) -> list[Tensor]:
    """Extend maps by replication at bottom and right until their sides are `ratios` times the next one's."""
    factors = [1]  # each map's side over the coarsest one's
    for ratio in reversed(ratios):
        factors.insert(0, ratio * factors[0])
    height, width = (
        reduce(
            torch.sym_max,  # takes the symbols that sizes are while a program is exported
            ((maps.shape[dim] + f - 1) // f for maps, f in zip(features, factors, strict=True)),
        )
        for dim in (2, 3)
    )
    return [
        _extend(_extend(maps, 2, height * factor), 3, width * factor)
        for maps, factor in zip(features, factors, strict=True)
    ]


def _extend(maps: Tensor, dim: int, size: int) -> Tensor:
    # An exported program serves any size: no branch in it may depend on the size.
    if not torch.compiler.is_exporting() and size == maps.shape[dim]:
        return maps
    positions = torch.arange(size, device=maps.device).clamp(max=maps.shape[dim] - 1)
    return maps.index_select(dim, positions)


def _gathered(maps: Tensor, ratio: int) -> Tensor:
    """Undo F.pixel_shuffle, for empty batches too, which F.pixel_unshuffle leaves as they are."""
    blocks = maps.unflatten(3, (-1, ratio)).unflatten(2, (-1, ratio))
    return blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def _beside(first: LinearMap, second: LinearMap) -> LinearMap:
    """Return a map that applies both, each to its own channels."""
    return LinearMap(torch.block_diag(first.matrix, second.matrix), torch.cat([first.bias, second.bias]))
