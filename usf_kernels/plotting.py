"""Pictures of predictions: image, ground truth, anomaly map, log-NFA map and automatic mask side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from usf_kernels.extras import needs_extra
from usf_kernels.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

TRUTH, FOUND, INK, FAINT = "#00a99d", "#f0541e", "#20262e", "#7b8794"
CELL, GAP, LEFT, TOP, BOTTOM, RIGHT = 1.75, 0.07, 1.3, 0.95, 0.62, 0.12  # inches
CLEAN = "good"  # the kind of clean images
LABEL = 13  # letters per line of a label in the margin LEFT
COLUMNS = ("Image", "Ground truth", "Anomaly map", "log10 NFA", "Automatic mask")


class Shown(NamedTuple):
    """The part of a `Prediction` that a picture shows, for as many images as wanted."""

    score: Tensor
    anomaly_map: Tensor
    log_nfa: Tensor
    mask: Tensor

    @classmethod
    def of(cls, predictions: Any | Sequence[Any]) -> Shown:
        """Make one from a `Prediction`, or from those of several batches, in order."""
        batches = [predictions] if hasattr(predictions, "anomaly_map") else list(predictions)
        return cls(*(torch.cat([getattr(batch, name).cpu() for batch in batches]) for name in cls._fields))


def choose_rows(kinds: Sequence[str], scores: Sequence[float] | Tensor, *, clean: str = CLEAN) -> list[int]:
    """Choose one image of each kind of defect in order of appearance, then a clean one.

    For each kind, the image with the median score is taken: a typical one, not the best.

    Args:
        kinds: the kind of each image.
        scores: the score of each image.
        clean: the kind of clean images.

    Returns:
        Indices into the images.
    """
    by_kind: dict[str, list[int]] = {}
    for index, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(index)
    names = sorted(by_kind, key=lambda kind: kind == clean)
    return [sorted(by_kind[kind], key=lambda i: float(scores[i]))[len(by_kind[kind]) // 2] for kind in names]


def panel(
    images: Tensor,
    targets: Tensor | None,
    prediction: Any,
    *,
    kinds: Sequence[str],
    rows: Sequence[int] | None = None,
    title: str = "",
    subtitle: str = "",
    log_epsilon: float = 0.0,
) -> Figure:
    """Draw one row per image and one column per step from the image to its mask.

    The colour scales are shared by all rows. The ground truth is outlined in green, the detections in orange.
    The fourth column is grey where nothing is significant, and the redder the fewer regions like the one
    found there are expected in a clean image.

    Args:
        images: (N, 3, H, W), values in [0, 1].
        targets: (N, 1, H, W), True where defective; None without a ground truth.
        prediction: a `Prediction` for these images.
        kinds: the kind of defect of each image; "good" for clean ones.
        rows: indices of the images to draw; None takes those of `choose_rows`.
        title, subtitle: heading, and a smaller line under it.
        log_epsilon: the threshold on the log NFA that the prediction was made with.

    Returns:
        A matplotlib figure that belongs to no window and no global state.

    Raises:
        ImportError: without matplotlib.
        ValueError: when the images, targets, kinds and prediction differ in number, or there is no row.
    """
    parts = (images, kinds, prediction.score, prediction.anomaly_map)
    counts = {len(part) for part in (*parts, *([] if targets is None else [targets]))}
    if len(counts) != 1:
        raise ValueError(f"images, targets, kinds, prediction: expected equally many, found {sorted(counts)}")
    rows = choose_rows(kinds, prediction.score) if rows is None else list(rows)
    if not rows:
        raise ValueError("rows: expected at least one image, found none")
    with needs_extra("train", "pictures"):
        from matplotlib.figure import Figure
    height, width = images.shape[-2:]
    cell = CELL * height / width
    total = (
        LEFT + len(COLUMNS) * (CELL + GAP) - GAP + RIGHT,
        TOP + len(rows) * (cell + GAP) - GAP + BOTTOM,
    )
    figure = Figure(figsize=total, facecolor="white")
    norms = _norms(prediction, rows, log_epsilon)

    def place(row: int, column: int) -> list[float]:
        x = LEFT + column * (CELL + GAP)
        y = total[1] - TOP - row * (cell + GAP) - cell
        return [x / total[0], y / total[1], CELL / total[0], cell / total[1]]

    for row, index in enumerate(rows):
        image = images[index].detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
        truth = None if targets is None else _plane(targets, index) > 0.5
        mask = _plane(prediction.mask, index) > 0.5
        axes = [_empty_axes(figure, place(row, column)) for column in range(len(COLUMNS))]
        if row == 0:
            for axis, name in zip(axes, COLUMNS, strict=True):
                axis.set_title(name, fontsize=9.5, color=INK, pad=5)
        for column in (0, 4) if truth is None else (0, 1, 4):
            axes[column].imshow(image, interpolation="nearest")
        anomaly = axes[2].imshow(_plane(prediction.anomaly_map, index), cmap="magma", norm=norms[0])
        alarms = axes[3].imshow(
            _plane(prediction.log_nfa, index), cmap=_significance_colours(), norm=norms[1]
        )
        _fill(axes[4], mask, FOUND)
        _outline(axes[4], mask, FOUND)
        if truth is None:
            centre = {"ha": "center", "va": "center", "transform": axes[1].transAxes}
            axes[1].text(0.5, 0.5, "not given", fontsize=8.5, color=FAINT, **centre)
        else:
            _fill(axes[1], truth, TRUTH)
            for axis in (axes[1], axes[4]):
                _outline(axis, truth, TRUTH)
        facts = f"score {float(prediction.score[index]):.3f}\n{_verdict(kinds[index], truth, mask)}"
        _row_label(figure, place(row, 0), kinds[index], facts)
    for column, mappable, label in (
        (2, anomaly, "less likely →"),
        (3, alarms, f"log₁₀ NFA; significant below {log_epsilon:g}"),
    ):
        _colour_bar(figure, place(len(rows) - 1, column), mappable, label, total[1])
    defect = () if targets is None else (("defect", TRUTH),)
    for column, entries in ((1, defect), (4, (("detected", FOUND), *defect))):
        x, y, *_ = place(len(rows) - 1, column)
        for name, colour in entries:
            figure.text(x, y - 0.125 / total[1], "■", fontsize=9, color=colour, va="center")
            figure.text(x + 0.14 / total[0], y - 0.13 / total[1], name, fontsize=8, color=FAINT, va="center")
            x += 0.75 / total[0]
    left = LEFT / total[0]
    # Names of folders may hold dollars, which do not start a formula, and may not be UTF-8.
    title, subtitle = (text.encode("utf-8", "replace").decode() for text in (title, subtitle))
    plain = {"va": "center", "parse_math": False}
    figure.text(left, 1 - 0.33 / total[1], title, fontsize=14, weight="bold", color=INK, **plain)
    figure.text(left, 1 - 0.56 / total[1], subtitle, fontsize=9, color=FAINT, **plain)
    return figure


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 160) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        OSError: naming the file, when it cannot be written.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def heat_map(values: np.ndarray, *, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Colour a map: float (H, W) to uint8 (H, W, 3), `low` and below dark, `high` and above bright."""
    with needs_extra("train", "pictures"):
        from matplotlib import colormaps
    colours = (colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return colours[np.clip((values - low) * (256 / (high - low)), 0, 255).astype(np.uint8)]


def outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a copy of an image, uint8 (H, W, 3), with a mask, bool (H, W), tinted and outlined in it."""
    width = max(1, round(min(mask.shape) / 200))
    whole, colour = image.copy(), np.frombuffer(bytes.fromhex(FOUND[1:]), np.uint8)
    # Photographs are large and masks small: work on the mask's bounding box only.
    part = tuple(slice(*(np.flatnonzero(mask.any(axis))[[0, -1]] + (0, 1))) for axis in (1, 0) if mask.any())
    if not part:
        return whole
    drawn, mask = whole[part], mask[part]
    outside = functional.pad(torch.from_numpy(~mask).float()[None], (width,) * 4, value=1.0)
    for kernel in ((2 * width + 1, 1), (1, 2 * width + 1)):
        outside = functional.max_pool2d(outside, kernel, stride=1)
    drawn[mask] = (0.75 * drawn[mask] + 0.25 * colour).astype(np.uint8)
    drawn[mask & (outside[0].numpy() > 0)] = colour
    return whole


def _plane(maps: Tensor, index: int) -> np.ndarray:
    return maps[index, 0].detach().cpu().float().numpy()


def _norms(prediction: Any, rows: Sequence[int], log_epsilon: float) -> tuple[Normalize, Normalize]:
    """Return colour scales over all rows: anomaly map from its bulk to its top, NFA centred on its threshold,
    which may be infinite."""
    from matplotlib.colors import Normalize, TwoSlopeNorm

    maps = np.stack([_plane(prediction.anomaly_map, i) for i in rows])
    low, high = np.quantile(maps, [0.2, 0.999])
    alarms = np.stack([_plane(prediction.log_nfa, i) for i in rows])
    least, most = float(alarms.min()), float(alarms.max())  # float32 has no thousandths of large numbers
    centre = min(max(log_epsilon, least - 1e-3), most + 1e-3)
    return (
        Normalize(low, max(high, low + 1e-6)),
        TwoSlopeNorm(centre, vmin=min(least, centre - 1e-3), vmax=max(most, centre + 1e-3)),
    )


def _significance_colours() -> Colormap:
    """Return a colour map with greys above the threshold and a ramp from orange to dark red below it."""
    from matplotlib.colors import LinearSegmentedColormap

    significant = ((0.0, "#5c0011"), (0.2, "#a3101c"), (0.4, "#e0451f"), (0.5, "#fbb04e"))
    stops = (*significant, (0.5, "#d5dce4"), (1.0, "#eef1f4"))
    return LinearSegmentedColormap.from_list("significance", stops, N=512)


def _empty_axes(figure: Figure, place: Sequence[float]) -> Axes:
    axes = figure.add_axes(place)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _fill(axes: Axes, mask: np.ndarray, colour: str) -> None:
    from matplotlib.colors import to_rgb

    overlay = np.zeros((*mask.shape, 4))
    overlay[mask] = (*to_rgb(colour), 0.38)
    axes.imshow(overlay, interpolation="nearest")


def _outline(axes: Axes, mask: np.ndarray, colour: str) -> None:
    if not mask.any() or mask.all():
        return
    padded = np.pad(mask.astype(float), 1)  # so that a region at the border is closed
    x, y = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
    limits = axes.get_xlim(), axes.get_ylim()
    axes.contour(x, y, padded, levels=[0.5], colors="white", linewidths=2.2, alpha=0.75)
    axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=1.2)
    axes.set(xlim=limits[0], ylim=limits[1])


def _verdict(kind: str, truth: np.ndarray | None, mask: np.ndarray) -> str:
    if truth is not None and truth.any():
        return f"IoU {(truth & mask).sum() / (truth | mask).sum():.2f}"
    if truth is None and kind != CLEAN:
        return "detected" if mask.any() else "missed"
    return "false alarm" if mask.any() else "no alarm"


def _row_label(figure: Figure, place: Sequence[float], kind: str, facts: str) -> None:
    height = figure.get_figheight()
    x, middle = place[0] - 0.12 / figure.get_figwidth(), place[1] + place[3] / 2
    name = "clean" if kind == CLEAN else textwrap.fill(kind.replace("_", " "), LABEL)
    figure.text(
        x,
        middle + 0.05 / height,
        name,
        fontsize=10,
        weight="bold",
        color=INK,
        ha="right",
        va="bottom",
        parse_math=False,
    )
    figure.text(x, middle, facts, fontsize=8.5, color=FAINT, ha="right", va="top", linespacing=1.4)


def _colour_bar(figure: Figure, place: Sequence[float], mappable: Any, label: str, height: float) -> None:
    axes = figure.add_axes([place[0], place[1] - 0.17 / height, place[2], 0.09 / height])
    bar = figure.colorbar(mappable, cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    low, high = mappable.norm.vmin, mappable.norm.vmax
    ticks = [low, getattr(mappable.norm, "vcenter", (low + high) / 2), high]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" if abs(tick) < 10 else f"{tick:.0f}" for tick in ticks])
    for text, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
        text.set(ha=side, fontsize=7.5, color=FAINT)
    axes.tick_params(length=2, color=FAINT, pad=1.5)
    axes.set_xlabel(label, fontsize=8, color=FAINT, labelpad=2)
