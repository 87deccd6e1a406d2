"""Metrics of a detector: ranking of images and pixels, overlap with the ground truth, false alarms.

Everything is computed exactly from all pixels, in float64, with no binning of scores. The area under the
ROC curve is the rank statistic of `scipy.stats`; torchmetrics first squashes scores outside [0, 1] with a
sigmoid, so that all scores above 17 tie in float32 (measured: 0.50 for a detector with 0.91).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from usf_kernels.extras import needs_extra
from usf_kernels.ops.checks import check_between

Array = npt.ArrayLike | Tensor


def evaluate(predictions: Any | Sequence[Any], targets: Tensor | Sequence[Tensor]) -> dict[str, float]:
    """Compute all metrics of a test set.

    Args:
        predictions: one `Prediction` for the whole set, or one per batch in order, with `score` (B,),
            `anomaly_map` (B, 1, H, W), `mask` (B, 1, H, W) and `regions` (a list per image).
        targets: ground truth, True where defective: one (N, 1, H, W) tensor, or one per batch. An image with
            any such pixel is anomalous. Or labels (N,) of the images; metrics of pixels are NaN then.

    Returns:
        `image_auroc`, `image_ap`, `image_f1_max`, the same three for pixels (`pixel_auroc`, ...), `aupro` (up
        to a false positive rate of 0.3), `miou_automatic`, `miou_oracle`, `false_alarms_per_clean_image`
        (detected regions on clean images / clean images). NaN where the set lacks the clean or the anomalous
        images that a metric needs.

    Raises:
        ImportError: without the extra `train`.
        ValueError: when predictions and targets do not match, or a target is not 0 or 1.
    """
    batches = [predictions] if hasattr(predictions, "anomaly_map") else list(predictions)
    targets = [targets] if isinstance(targets, Tensor) else list(targets)
    truth = _binary("targets", _concatenate("targets", targets))
    scores = _concatenate("predictions", [batch.score for batch in batches])
    maps = _concatenate("predictions", [batch.anomaly_map for batch in batches])
    masks = _concatenate("predictions", [batch.mask for batch in batches])
    regions = [found for batch in batches for found in batch.regions]
    pixels = truth.shape if truth.ndim > 1 else maps.shape
    if not (maps.shape == masks.shape == pixels and len(scores) == len(regions) == len(truth)):
        raise ValueError(
            f"targets of shape {truth.shape} do not match predictions with {len(scores)} scores, maps "
            f"{maps.shape}, masks {masks.shape} and regions of {len(regions)} images"
        )
    anomalous = truth.reshape(len(truth), -1).any(1)
    clean_alarms = [len(found) for found, bad in zip(regions, anomalous, strict=True) if not bad]
    found = _ranked("image", scores, anomalous)
    if truth.ndim == 1:
        names = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "miou_automatic", "miou_oracle")
        found |= dict.fromkeys(names, float("nan"))
    else:
        found |= _ranked("pixel", maps, truth) | {
            "aupro": aupro(maps, truth),
            "miou_automatic": mean_iou(masks, truth),
            "miou_oracle": oracle_mean_iou(maps, truth)[0],
        }
    alarms = float(np.mean(clean_alarms)) if clean_alarms else float("nan")
    return found | {"false_alarms_per_clean_image": alarms}


def _ranked(name: str, scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {
        f"{name}_auroc": auroc(scores, truth),
        f"{name}_ap": average_precision(scores, truth),
        f"{name}_f1_max": f1_max(scores, truth)[0],
    }


def auroc(scores: Array, targets: Array) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative; ties count half.

    Args:
        scores: any shape, higher is more anomalous.
        targets: same shape, bool or 0 / 1.

    Returns:
        A number in [0, 1]; NaN when one class is absent.

    Raises:
        ImportError: without the extra `train`.
        ValueError: for differing shapes, a score that is NaN, or a target that is not 0 or 1.
    """
    with needs_extra("train", "this metric"):
        from scipy.stats import rankdata

    scores, targets = _pair("scores", scores, targets)
    positives = int(targets.sum())
    negatives = targets.size - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores.ravel())[targets.ravel()].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: Array, targets: Array) -> float:
    """Mean precision over the positives, each at the threshold at which it is found.

    Equal scores are found together, as in `sklearn.metrics.average_precision_score`.

    Args:
        scores: any shape, higher is more anomalous.
        targets: same shape, bool or 0 / 1.

    Returns:
        A number in [0, 1]; NaN without a positive.

    Raises:
        ValueError: for differing shapes, a score that is NaN, or a target that is not 0 or 1.
    """
    hits, detected, _ = _found(scores, targets)
    if not hits.size or not hits[-1]:
        return float("nan")
    return float((np.diff(hits, prepend=0) * hits / detected).sum() / hits[-1])


def f1_max(scores: Array, targets: Array) -> tuple[float, float]:
    """Return the best F1 score (harmonic mean of precision and recall) of all thresholds, and its threshold.

    Args:
        scores: any shape, higher is more anomalous; scores of at least the threshold count as positive.
        targets: same shape, bool or 0 / 1.

    Returns:
        The F1 score in [0, 1] and the threshold; NaN and NaN without a positive.

    Raises:
        ValueError: for differing shapes, a score that is NaN, or a target that is not 0 or 1.
    """
    hits, detected, thresholds = _found(scores, targets)
    if not hits.size or not hits[-1]:
        return float("nan"), float("nan")
    values = 2 * hits / (detected + hits[-1])
    best = int(values.argmax())
    return float(values[best]), float(thresholds[best])


def _found(scores: Array, targets: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for every distinct score from high to low, how many positives and how many samples reach it,
    and the score."""
    scores, targets = _pair("scores", scores, targets)
    if not scores.size:
        return (np.empty(0),) * 3
    order, ends = _descending(scores)
    return np.cumsum(targets.ravel()[order])[ends], ends + 1, scores.ravel()[order[ends]]


def aupro(maps: Array, targets: Array, *, fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap curve up to a false positive rate, divided by that rate.

    The overlap is the share of each connected ground-truth region (8-connectivity) that is detected, averaged
    over all regions, whatever their size; the false positive rate is over all normal pixels of all images.
    The definition is that of Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, evaluated at
    every distinct threshold.

    Args:
        maps: (N, H, W) or (N, 1, H, W), higher is more anomalous.
        targets: same shape, bool or 0 / 1.
        fpr_limit: largest false positive rate, in (0, 1].

    Returns:
        A number in [0, 1]; NaN without a region or without a normal pixel.

    Raises:
        ImportError: without the extra `train`.
        ValueError: for differing or other shapes, NaN scores, a target that is not 0 or 1, or a limit out of
            range.
    """
    with needs_extra("train", "this metric"):
        from skimage.measure import label

    check_between("fpr_limit", fpr_limit, 0, 1, "(]")
    maps, targets = _images("maps", maps, targets)
    normal = ~targets
    if not targets.any() or not normal.any():
        return float("nan")
    share = np.zeros(maps.shape)  # contribution of a detected pixel to the sum of overlaps
    count = 0
    for image, values in zip(targets, share, strict=True):
        labels = label(image, connectivity=2)
        areas = np.bincount(labels.ravel())
        areas[0] = 1
        values[image] = 1 / areas[labels[image]]
        count += len(areas) - 1
    order, ends = _descending(maps)
    overlap = np.concatenate([[0.0], np.cumsum(share.ravel()[order])[ends] / count])
    rate = np.concatenate([[0.0], np.cumsum(normal.ravel()[order])[ends] / normal.sum()])
    inside = rate <= fpr_limit
    rates = np.append(rate[inside], fpr_limit)
    overlaps = np.append(overlap[inside], np.interp(fpr_limit, rate, overlap))
    area = (np.diff(rates) * (overlaps[1:] + overlaps[:-1]) / 2).sum()
    return min(1.0, float(area / fpr_limit))  # rounding can exceed 1 by 1e-16


def mean_iou(masks: Array, targets: Array) -> float:
    """Mean over the anomalous images of the intersection over union of mask and ground truth.

    This is the mIoU of U-Flow (Tailanian et al., arXiv:2211.12353) on the anomalous images. The authors' code
    averages over clean images too, where an empty mask counts 1; here false alarms are counted separately.

    Args:
        masks: (N, H, W) or (N, 1, H, W), bool or 0 / 1.
        targets: same shape, bool or 0 / 1.

    Returns:
        A number in [0, 1]; NaN without an anomalous image.

    Raises:
        ValueError: for differing or other shapes, or a value that is not 0 or 1.
    """
    masks, targets = _images("masks", _binary("masks", masks), targets)
    anomalous = targets.any((1, 2))
    if not anomalous.any():
        return float("nan")
    masks, targets = masks[anomalous], targets[anomalous]
    return float(((masks & targets).sum((1, 2)) / (masks | targets).sum((1, 2))).mean())


def oracle_mean_iou(maps: Array, targets: Array) -> tuple[float, float]:
    """Return the best `mean_iou` that one threshold for the whole set can reach, and that threshold.

    Every distinct value of the maps is tried, with masks `maps >= threshold`. Each image's IoU changes with
    every pixel that the falling threshold adds; the mean is the running sum of the changes of all images.

    Args:
        maps: (N, H, W) or (N, 1, H, W), higher is more anomalous.
        targets: same shape, bool or 0 / 1.

    Returns:
        The mean IoU in [0, 1] and the threshold; NaN and NaN without an anomalous image.

    Raises:
        ValueError: for differing or other shapes, NaN scores, or a target that is not 0 or 1.
    """
    maps, targets = _images("maps", maps, targets)
    anomalous = targets.any((1, 2))
    if not anomalous.any():
        return float("nan"), float("nan")
    maps, targets = maps[anomalous].reshape(anomalous.sum(), -1), targets[anomalous]
    steps = np.empty(maps.shape)
    for values, truth, changes in zip(maps, targets.reshape(maps.shape), steps, strict=True):
        order = _from_high(values)
        hits = np.cumsum(truth[order])
        detected = np.arange(1, len(order) + 1)
        changes[order] = np.diff(hits / (truth.sum() + detected - hits), prepend=0.0)
    # Stable sorts keep equal values of an image in one order, so their changes add up to a valid IoU.
    order, ends = _descending(maps)
    means = np.cumsum(steps.ravel()[order])[ends] / len(maps)
    best = int(np.argmax(means))
    threshold = float(maps.ravel()[order[ends[best]]])
    return mean_iou(maps[:, None] >= threshold, targets.reshape(len(maps), 1, -1)), threshold


def _descending(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of the flattened values from high to low, and the last position of each run of ties."""
    flat = values.ravel()
    order = _from_high(flat)
    ordered = flat[order]
    return order, np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), flat.size - 1)


def _from_high(values: np.ndarray) -> np.ndarray:
    """Return indices from high to low; equal values keep their order."""
    return np.argsort(~values if values.dtype == bool else -values, kind="stable")


def _array(values: Array) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _concatenate(name: str, parts: Sequence[Array]) -> np.ndarray:
    if not parts:
        raise ValueError(f"{name}: expected at least one image, found none")
    return np.concatenate([_array(part) for part in parts])


def _binary(name: str, values: Array) -> np.ndarray:
    """Return values as bool; raise unless each is 0 or 1. A label of -1 or NaN would count as positive."""
    values = _array(values)
    if values.dtype == bool:
        return values
    wrong = values[(values != 0) & (values != 1)]
    if wrong.size:
        raise ValueError(
            f"{name}: expected bool, or 0 and 1, found {wrong[0]} (of 0 and 255, pass {name} > 0)"
        )
    return values.astype(bool)


def _pair(name: str, scores: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
    scores, targets = _array(scores), _binary("targets", targets)
    if scores.shape != targets.shape:
        raise ValueError(f"{name}: expected the shape of targets, {targets.shape}, found {scores.shape}")
    if scores.dtype != bool:
        scores = scores.astype(np.float64)
        if np.isnan(scores).any():
            raise ValueError(f"{name}: expected numbers, found NaN")
    return scores, targets


def _images(name: str, maps: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
    maps, targets = _pair(name, maps, targets)
    if maps.ndim == 4 and maps.shape[1] == 1:
        maps, targets = maps[:, 0], targets[:, 0]
    if maps.ndim != 3:
        raise ValueError(f"{name}: expected shape (N, H, W) or (N, 1, H, W), found {maps.shape}")
    return maps, targets
