import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib import _pylab_helpers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from usf_kernels import plotting


def example(count=4, height=24, width=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, height, width, generator=generator)
    targets = torch.zeros(count, 1, height, width, dtype=torch.bool)
    targets[: count - 1, :, 5:12, 8:20] = True
    log_nfa = torch.where(targets, -20.0, 15.0)
    prediction = SimpleNamespace(
        score=torch.arange(count) / count, anomaly_map=targets * 0.5 + 0.3, log_nfa=log_nfa, mask=log_nfa < 0
    )
    return images, targets, prediction, ["stain", "cut_and_paste", "stain", "good"][:count]


def texts(figure):
    return [text.get_text() for text in figure.texts]


def test_rows_are_the_median_of_each_kind_with_the_clean_one_last():
    kinds = ["good", "blob", "scratch", "blob", "blob", "good"]
    assert plotting.choose_rows(kinds, [0.3, 0.9, 0.5, 0.1, 0.4, 0.1]) == [4, 2, 0]


def test_panel_has_a_row_per_kind_and_says_what_it_shows():
    images, targets, prediction, kinds = example()
    figure = plotting.panel(images, targets, prediction, kinds=kinds, title="Brick", subtitle="how well")
    words = texts(figure)
    assert {"Brick", "how well", "stain", "cut and paste", "clean"} <= set(words)
    assert "score 0.500\nIoU 1.00" in words
    assert "score 0.750\nno alarm" in words
    assert len(figure.axes) == 3 * len(plotting.COLUMNS) + 2  # and two colour bars
    assert [axis.get_title() for axis in figure.axes[:5]] == list(plotting.COLUMNS)


@pytest.mark.parametrize("kind", ["cut_outer_insulation", "discolouration_everywhere", "stain"])
def test_long_names_stay_inside_the_picture(kind):
    images, targets, prediction, _ = example()
    figure = plotting.panel(images, targets, prediction, kinds=[kind] * 4, rows=[0])
    (label,) = [text for text in figure.texts if text.get_text()[:3] == kind[:3]]
    box = label.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert box.x0 >= 0
    assert "".join(label.get_text().split()) == kind.replace("_", "")


def test_colour_scales_are_shared_by_the_rows():
    images, targets, prediction, kinds = example()
    prediction.anomaly_map = prediction.anomaly_map * torch.tensor([1.0, 0.2, 0.4, 0.1])[:, None, None, None]
    figure = plotting.panel(images, targets, prediction, kinds=kinds, rows=[0, 1, 3])
    columns = len(plotting.COLUMNS)
    for column in (2, 3):
        limits = {figure.axes[row * columns + column].images[0].get_clim() for row in range(3)}
        assert len(limits) == 1
    assert figure.axes[3].images[0].norm.vcenter == 0


@pytest.mark.parametrize(
    ("log_epsilon", "significant", "not_significant"),
    [
        (0.0, -20.0, 15.0),
        (-5.0, -20.0, -4.9),
        (3.0, 2.9, 15.0),
        (math.inf, 15.0, None),
        (-math.inf, None, -20.0),
    ],
)
def test_greys_begin_at_the_threshold(log_epsilon, significant, not_significant):
    images, targets, prediction, kinds = example()
    figure = plotting.panel(images, targets, prediction, kinds=kinds, log_epsilon=log_epsilon)
    drawn = figure.axes[3].images[0]
    assert significant is None or np.ptp(drawn.to_rgba(significant)[:3]) > 0.3
    assert not_significant is None or np.ptp(drawn.to_rgba(not_significant)[:3]) < 0.1
    labels = [text.get_text() for axes in figure.axes for text in (axes.xaxis.label, axes.title)]
    assert f"log₁₀ NFA; significant below {log_epsilon:g}" in labels + texts(figure)


def test_shapes_are_kept_and_nothing_is_global():
    images, targets, prediction, kinds = example()
    figure = plotting.panel(images, targets, prediction, kinds=kinds)
    box, (width, height) = figure.axes[0].get_position(), figure.get_size_inches()
    assert box.width * width / (box.height * height) == pytest.approx(32 / 24)
    assert not _pylab_helpers.Gcf.figs


def test_flat_maps_full_masks_and_one_clean_image_are_drawn(tmp_path):
    images, targets, prediction, kinds = example()
    prediction.anomaly_map = torch.full_like(prediction.anomaly_map, 0.4)
    prediction.log_nfa = torch.full_like(prediction.log_nfa, 480.0)
    prediction.mask = torch.ones_like(prediction.mask)
    figure = plotting.panel(images, targets, prediction, kinds=kinds, rows=[3])
    assert "score 0.750\nfalse alarm" in texts(figure)
    plotting.save_figure(figure, tmp_path / "panel.png", dpi=60)
    pixels = np.asarray(Image.open(tmp_path / "panel.png"))
    assert pixels.std() > 5
    assert [path.name for path in tmp_path.iterdir()] == ["panel.png"]


def test_shown_joins_batches():
    _, _, prediction, _ = example()
    parts = [
        SimpleNamespace(**{key: value[part] for key, value in vars(prediction).items()})
        for part in (slice(0, 3), slice(3, 4))
    ]
    for joined, whole in zip(plotting.Shown.of(parts), plotting.Shown.of(prediction), strict=True):
        assert torch.equal(joined, whole)


def test_heat_map_runs_from_dark_to_bright_and_clips():
    colours = plotting.heat_map(np.array([[-1.0, 0.0, 0.5, 1.0, 2.0]]))
    assert colours.shape == (1, 5, 3)
    assert colours.dtype == np.uint8
    brightness = colours.sum(-1)[0].astype(int)
    assert brightness[0] == brightness[1] < brightness[2] < brightness[3] == brightness[4]


def test_an_outline_is_inside_its_mask_and_closed_at_the_border():
    image = np.full((6, 7, 3), 9, np.uint8)
    mask = np.zeros((6, 7), bool)
    mask[2:, 1:5] = True
    drawn = plotting.outlined(image, mask)
    assert (image == 9).all()
    inside = np.zeros_like(mask)
    inside[3:5, 2:4] = True
    colour = np.frombuffer(bytes.fromhex(plotting.FOUND[1:]), np.uint8)
    assert np.array_equal((drawn == colour).all(-1), mask & ~inside)
    assert np.array_equal((drawn == (0.75 * 9 + 0.25 * colour).astype(np.uint8)).all(-1), inside)
    assert (drawn[~mask] == 9).all()
    assert np.array_equal(plotting.outlined(image, np.zeros_like(mask)), image)


def test_mismatches_are_named():
    images, targets, prediction, kinds = example()
    with pytest.raises(ValueError, match=r"equally many, found \[3, 4\]"):
        plotting.panel(images[:3], targets, prediction, kinds=kinds)
    with pytest.raises(ValueError, match="rows"):
        plotting.panel(images, targets, prediction, kinds=kinds, rows=[])


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    images, targets, prediction, kinds = example(1)
    figure = plotting.panel(images, targets, prediction, kinds=kinds)
    with pytest.raises(FileNotFoundError, match=r"no/panel\.png"):
        plotting.save_figure(figure, tmp_path / "no" / "panel.png")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    assert buffer.getbuffer()


def test_without_a_ground_truth_it_is_said_what_was_found():
    images, _, prediction, kinds = example()
    prediction.mask[2] = False
    figure = plotting.panel(images, None, prediction, kinds=kinds, rows=[0, 2, 3])
    words = texts(figure)
    assert "score 0.000\ndetected" in words
    assert "score 0.500\nmissed" in words
    assert "score 0.750\nno alarm" in words
    assert "defect" not in words
    assert [text.get_text() for text in figure.axes[1].texts] == ["not given"]


@pytest.mark.parametrize("log_nfa", [-5e4, 3e6])
@pytest.mark.parametrize("log_epsilon", [0.0, -math.inf])
def test_large_numbers_of_false_alarms_are_drawn(log_nfa, log_epsilon):
    images, targets, prediction, kinds = example()
    prediction.log_nfa = torch.full_like(prediction.log_nfa, log_nfa)
    plotting.panel(images, targets, prediction, kinds=kinds, log_epsilon=log_epsilon)
