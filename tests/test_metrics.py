from types import SimpleNamespace

import numpy as np
import pytest
import torch

from usf_kernels import metrics


def maps_and_targets(seed=0, images=8, size=12, levels=None):
    """Noisy maps over rectangles; with `levels`, rounded so that many pixels tie. The last two are clean."""
    rng = np.random.default_rng(seed)
    targets = np.zeros((images, size, size), dtype=bool)
    for image in targets[:-2]:
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(0, size - 3, 2)
            height, width = rng.integers(1, 4, 2)
            image[y : y + height, x : x + width] = True
    maps = rng.normal(size=targets.shape) + 1.5 * targets
    return (maps if levels is None else np.round(maps * levels) / levels), targets


def brute_auroc(scores, targets):
    above, below = scores[targets][:, None], scores[~targets][None]
    return np.mean((above > below) + 0.5 * (above == below))


def flood(mask):
    """8-connected components as lists of pixels."""
    left, components = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        stack, component = [left.pop()], []
        while stack:
            y, x = stack.pop()
            component.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        components.append(component)
    return components


def brute_aupro(maps, targets, limit):
    regions = [(i, tuple(zip(*c, strict=True))) for i, image in enumerate(targets) for c in flood(image)]
    rates, overlaps = [0.0], [0.0]
    for threshold in sorted(set(maps.ravel()), reverse=True):
        found = maps >= threshold
        rates.append(found[~targets].mean())
        overlaps.append(np.mean([found[i][pixels].mean() for i, pixels in regions]))
    fine = np.union1d(np.linspace(0, limit, 20001), [r for r in rates if r <= limit])
    values = np.interp(fine, rates, overlaps)
    return (np.diff(fine) * (values[1:] + values[:-1]) / 2).sum() / limit


@pytest.mark.parametrize("levels", [None, 2])
def test_auroc_counts_pairs(levels):
    maps, targets = maps_and_targets(levels=levels)
    assert metrics.auroc(maps, targets) == pytest.approx(brute_auroc(maps, targets), abs=1e-12)


def test_auroc_by_hand():
    assert metrics.auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert metrics.auroc([1.0, 1.0, 1.0], [0, 1, 1]) == 0.5
    assert np.isnan(metrics.auroc([1.0, 2.0], [0, 0]))


def test_auroc_keeps_the_order_of_large_scores():
    assert metrics.auroc(torch.tensor([301.0, 302.0, 303.0]), torch.tensor([False, False, True])) == 1.0


def test_auroc_agrees_with_torchmetrics_inside_the_unit_interval():
    functional = pytest.importorskip("torchmetrics.functional")
    scores = torch.rand(2000, dtype=torch.float64)
    targets = torch.rand(2000) < scores
    expected = functional.auroc(scores, targets.long(), task="binary").item()
    assert metrics.auroc(scores, targets) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("levels", [None, 7])
def test_precision_agrees_with_scikit_learn(levels):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    maps, targets = maps_and_targets(levels=levels)
    expected = sklearn_metrics.average_precision_score(targets.ravel(), maps.ravel())
    assert metrics.average_precision(maps, targets) == pytest.approx(expected, abs=1e-12)
    precision, recall, _ = sklearn_metrics.precision_recall_curve(targets.ravel(), maps.ravel())
    best, threshold = metrics.f1_max(maps, torch.tensor(targets))
    assert best == pytest.approx(np.nanmax(2 * precision * recall / (precision + recall)), abs=1e-12)
    assert best == pytest.approx(sklearn_metrics.f1_score(targets.ravel(), maps.ravel() >= threshold))


def test_precision_by_hand():
    scores, targets = [0.9, 0.8, 0.8, 0.1], [1, 0, 1, 0]
    assert metrics.average_precision(scores, targets) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.f1_max(scores, targets) == pytest.approx((0.8, 0.8))
    for none in ([], [1.0, 2.0]):
        assert np.isnan(metrics.average_precision(none, [0] * len(none)))
        assert np.isnan(metrics.f1_max(none, [0] * len(none))).all()


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_matches_every_threshold(levels, limit):
    maps, targets = maps_and_targets(1, levels=levels)
    expected = brute_aupro(maps, targets, limit)
    # with ties the curve has sections of the vertical kind, on which interpolation by rate is ambiguous
    assert metrics.aupro(maps, targets, fpr_limit=limit) == pytest.approx(expected, abs=2e-4)


def test_aupro_by_hand():
    # Regions of 1 and 3 pixels, 4 normal ones; at no false positive half of the overlap, then all of it.
    targets = np.array([[[1, 0, 1, 1], [0, 0, 0, 1]]], dtype=bool)
    maps = np.array([[[9.0, 5.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0]]])
    assert metrics.aupro(maps, targets, fpr_limit=1.0) == pytest.approx(0.5)
    assert metrics.aupro(maps, targets) == pytest.approx(0.5)
    assert metrics.aupro(targets.astype(float), targets) == pytest.approx(1.0)


def test_aupro_joins_diagonal_neighbours():
    targets = np.zeros((1, 4, 4), dtype=bool)
    targets[0, [0, 1, 3], [0, 1, 3]] = True  # one region of two pixels, one of one
    maps = np.zeros((1, 4, 4))
    maps[0, 0, 0] = 2.0  # half of the first region, that is a quarter of the overlap
    value = metrics.aupro(maps, targets, fpr_limit=0.3)
    assert value == pytest.approx(0.25 + 0.75 * 0.3 / 2)


def test_mean_iou_ignores_clean_images():
    targets = np.zeros((3, 2, 2), dtype=bool)
    targets[0, 0] = targets[1, 1, 1] = True
    masks = np.zeros_like(targets)
    masks[0, :, 0] = True  # 1 common pixel, 3 in all
    masks[2] = True  # a false alarm: not the business of this metric
    assert metrics.mean_iou(masks, targets) == pytest.approx((1 / 3 + 0) / 2)


@pytest.mark.parametrize("levels", [None, 2])
def test_oracle_is_the_best_threshold(levels):
    maps, targets = maps_and_targets(2, levels=levels)
    by_threshold = {t: metrics.mean_iou(maps >= t, targets) for t in np.unique(maps)}
    best, threshold = metrics.oracle_mean_iou(maps, targets)
    assert best == pytest.approx(max(by_threshold.values()), abs=1e-12)
    assert metrics.mean_iou(maps >= threshold, targets) == pytest.approx(best, abs=1e-12)


def prediction(maps, masks, regions):
    maps = torch.tensor(maps)[:, None]
    return SimpleNamespace(
        score=maps.amax((1, 2, 3)), anomaly_map=maps, mask=torch.tensor(masks)[:, None], regions=regions
    )


def test_evaluate_gives_every_metric_and_takes_batches():
    maps, targets = maps_and_targets(3)
    masks = maps > 1.5
    regions = [["r"] * n for n in (1, 0, 2, 1, 1, 3, 2, 0)]  # 2 and 0 on the two clean images
    truth = torch.tensor(targets)[:, None]
    whole = metrics.evaluate(prediction(maps, masks, regions), truth)
    batches = [prediction(maps[i : i + 3], masks[i : i + 3], regions[i : i + 3]) for i in (0, 3, 6)]
    assert metrics.evaluate(batches, [truth[:5], truth[5:]]) == whole
    assert whole == {
        "image_auroc": metrics.auroc(maps.max((1, 2)), targets.any((1, 2))),
        "image_ap": metrics.average_precision(maps.max((1, 2)), targets.any((1, 2))),
        "image_f1_max": metrics.f1_max(maps.max((1, 2)), targets.any((1, 2)))[0],
        "pixel_auroc": metrics.auroc(maps, targets),
        "pixel_ap": metrics.average_precision(maps, targets),
        "pixel_f1_max": metrics.f1_max(maps, targets)[0],
        "aupro": metrics.aupro(maps, targets),
        "miou_automatic": metrics.mean_iou(masks, targets),
        "miou_oracle": metrics.oracle_mean_iou(maps, targets)[0],
        "false_alarms_per_clean_image": 1.0,
    }


def test_evaluate_without_defects_or_without_clean_images_says_nan():
    maps, targets = maps_and_targets(4)
    clean = metrics.evaluate(
        prediction(maps, maps > 9, [[]] * 8), torch.zeros(8, 1, 12, 12, dtype=torch.bool)
    )
    assert clean.pop("false_alarms_per_clean_image") == 0
    assert all(np.isnan(value) for value in clean.values())
    bad = slice(0, 6)
    only = metrics.evaluate(
        prediction(maps[bad], maps[bad] > 1, [[]] * 6), torch.tensor(targets[bad])[:, None]
    )
    assert np.isnan(only["false_alarms_per_clean_image"])
    assert np.isnan(only["image_auroc"])
    assert only["pixel_auroc"] > 0.5


def test_errors_name_the_shapes():
    maps, targets = maps_and_targets(5)
    with pytest.raises(ValueError, match=r"\(7, 12, 12\), found \(8, 12, 12\)"):
        metrics.aupro(maps, targets[1:])
    with pytest.raises(ValueError, match="NaN"):
        metrics.auroc([float("nan"), 1.0], [0, 1])
    for wrong in ([2, 0], [-1, 1], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="targets: expected bool, or 0 and 1, found"):
            metrics.auroc([1.0, 2.0], wrong)
    with pytest.raises(ValueError, match=r"masks: expected bool, or 0 and 1, found 0.3"):
        metrics.mean_iou([[[0.0, 0.3]]], [[[0, 1]]])
    with pytest.raises(
        ValueError, match=r"masks: expected the shape of targets, \(1, 1, 2\), found \(1, 1, 3\)"
    ):
        metrics.mean_iou([[[0, 1, 1]]], [[[0, 1]]])
    with pytest.raises(ValueError, match=r"maps: expected numbers, found NaN"):
        metrics.aupro([[[0.0, float("nan")]]], [[[0, 1]]])
    with pytest.raises(ValueError, match="fpr_limit"):
        metrics.aupro(maps, targets, fpr_limit=0.0)
    with pytest.raises(ValueError, match="targets of shape"):
        metrics.evaluate(prediction(maps, maps > 1, [[]] * 8), torch.tensor(targets[1:])[:, None])


def test_maps_of_booleans():
    maps, masks = np.random.default_rng(0).random((2, 3, 8, 9)) > 0.5
    assert metrics.aupro(maps, masks) == metrics.aupro(maps.astype(float), masks)
    assert metrics.oracle_mean_iou(maps, masks) == metrics.oracle_mean_iou(maps.astype(float), masks)
