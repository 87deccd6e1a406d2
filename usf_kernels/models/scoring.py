"""Scores, maps and regions from latents; shared by the models and the baseline, so they are scored alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from usf_kernels.calibration import TAIL, TESTS
from usf_kernels.null import Null
from usf_kernels.ops import anomaly_map
from usf_kernels.ops.checks import check_between
from usf_kernels.segmentation import Region, log_nfa, regions


class Prediction(NamedTuple):
    """Results of a model for a batch of images of H x W pixels.

    Attributes:
        score: (B,) in [0, 1], the higher the more anomalous the image; see `image_score`.
        anomaly_map: (B, 1, H, W) in [0, 1]; see `usf_kernels.anomaly_map`.
        log_nfa: (B, 1, H, W), log10 of the number of false alarms; see `usf_kernels.log_nfa`.
        mask: (B, 1, H, W) bool, the automatic segmentation, `log_nfa <= log_epsilon`.
        regions: for each image its `Region`s, most significant first.
    """

    score: Tensor
    anomaly_map: Tensor
    log_nfa: Tensor
    mask: Tensor
    regions: list[list[Region]]

    @property
    def anomalous(self) -> Tensor:
        """Whether each image has a region, (B,) bool on the CPU. With log_epsilon = 0, fewer than one such
        region is expected per clean image."""
        return torch.tensor([len(found) > 0 for found in self.regions], dtype=torch.bool)


def image_score(maps: Tensor, share: float = 0.05) -> Tensor:
    """Return the mean of the most anomalous pixels of each image.

    The usual maximum rests on one position of one scale and is noisy; the mean over the whole image drowns
    small defects. In maps of `usf_kernels.anomaly_map`, squared norms beyond 35 C at every scale are 1 in
    float32; images with many of them tie, and the least log NFA of their regions still ranks these.

    Args:
        maps: (B, 1, H, W).
        share: share of the pixels that are averaged, in (0, 1]; at least one pixel is.

    Returns:
        (B,).

    Raises:
        TypeError, ValueError: for a share outside (0, 1].
    """
    check_between("share", share, 0, 1, "(]")
    pixels = maps.flatten(1)
    return pixels.topk(max(1, round(share * pixels.shape[1])), dim=1).values.mean(1)


def predict(
    latents: list[Tensor],
    size: tuple[int, int],
    *,
    null: Null | None,
    log_epsilon: float = 0.0,
    tail: str = TAIL,
    tests: str = TESTS,
    upsample: str = "nearest",
) -> Prediction:
    """Score and segment the latents (B, C_l, H_l, W_l) of a batch of images of this size.

    Each image is scored on its own. Options are those of `usf_kernels.log_nfa`. The defaults are the
    recommended ones: on coarse latents, bilinear upsampling would shave the border of a region and lose small
    ones, so that the mask would show less than `regions` lists.
    """
    maps = anomaly_map(latents, size)
    options = {"null": null, "tail": tail, "tests": tests}
    log_nfas = log_nfa(latents, size, upsample=upsample, **options)
    found = regions(latents, log_epsilon=log_epsilon, **options)
    return Prediction(image_score(maps), maps, log_nfas, log_nfas <= log_epsilon, found)
