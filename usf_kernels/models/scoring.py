"""From latents to what a user acts on; the models and the baseline share it, and so are scored alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from usf_kernels.ops import anomaly_map
from usf_kernels.segmentation import Null, Region, calibrate, log_nfa, regions

TAIL, TESTS = "exact", "per_size"  # the recommended form of the a-contrario test


class Prediction(NamedTuple):
    """What a model says about a batch of images of H x W pixels.

    Attributes:
        score: (B,), the higher the more anomalous the image, in [0, 1]; see `image_score`.
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


def image_score(maps: Tensor, share: float = 0.05) -> Tensor:
    """Mean of the most anomalous pixels of each image.

    The maximum, which is usual, rests on one position of one scale and is noisy; the mean over the image
    drowns small defects.

    Args:
        maps: (B, 1, H, W).
        share: of the pixels that are averaged, in (0, 1]; at least one is.

    Returns:
        (B,).
    """
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


def fit_null(squared_norms: Sequence[Tensor], *, false_alarms: float = 0.1) -> Null:
    """Fit the null model of the automatic threshold to held-out normal images.

    `usf_kernels.calibrate` fits the distribution of squared norms at single positions. Neighbouring positions
    of a real image are not independent, though, and regions of several positions come up more often (or, in a
    narrow null, less often) than their number of false alarms says. So all scales of the fit are then
    multiplied by one factor, found by bisection, with which the held-out images show as many as they may.

    Args:
        squared_norms: one (N, H, W) tensor per scale.
        false_alarms: regions at log_epsilon = 0 per held-out image, on average and at most.

    Raises:
        ValueError: for a number that is not positive; also whatever `usf_kernels.calibrate` raises.
    """
    if not false_alarms > 0:
        raise ValueError(f"false_alarms: expected a positive number, found {false_alarms!r}")
    fitted = calibrate(squared_norms)

    def stretched(factor: float) -> Null:
        return Null(tuple(factor * scale for scale in fitted.scale), fitted.dof)

    def alarms(factor: float) -> float:
        found = regions(squared_norms, null=stretched(factor), tail=TAIL, tests=TESTS)
        return sum(len(image) for image in found) / len(found)

    low, high = 0.5, 1.0
    while alarms(high) > false_alarms:
        low, high = high, 1.5 * high
    while high / low > 1.005:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if alarms(middle) <= false_alarms else (middle, high)
    return stretched(high)
