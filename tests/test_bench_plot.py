import pytest
from test_bench_compare import row

from bench import table

pytest.importorskip("matplotlib")

from bench import plot
from bench.drawing import names_at_ends, strips
from bench.machine import result_files
from bench.pictures import PICTURES, blocks, depth, overview, roofline, scaling, tree

MACHINE = {"device": "a machine", "threads": "2", "versions": "python=3 torch=2.14", "cache": "warm"}


def measured():
    """A little of every subject."""
    for depth_ in ("1", "8"):
        for kernel in ("1", "3"):
            shared = {"subject": "blocks", "case": kernel + depth_, "kernel": kernel, "depth": depth_}
            shared |= {"channels": "256", "batch": "8", "direction": "forward"}
            shared |= {"gb_per_s": "4", "gflop_per_s": "90", **MACHINE}
            for dtype, peer in (("float32", "anomalib"), ("bfloat16", "anomalib, autocast, channels-last")):
                yield row("additive, LU, fused", 1, dtype=dtype, **shared)
                yield row(peer, 3, "peer", dtype=dtype, **shared)
    for blocks_ in (4, 8, 64):
        shared = {"subject": "training_step", "depth": str(blocks_), "case": str(blocks_), **MACHINE}
        shared |= {"channels": "256", "side": "32", "kernel": "3", "batch": "2", "peak_mb": "9"}
        yield row("additive, LU, reversible", blocks_, saved_mb="3", **shared)
        yield row("anomalib", 2 * blocks_, "peer", saved_mb=str(blocks_), **shared)
    for side in (28, 448):
        shared = {"subject": "tree", "case": f"white {side}^2", "side": str(side), "batch": "1", **MACHINE}
        yield row("usf_kernels", 1, mpixel_per_s="20", **shared)
        yield row("higra implicit", 4, "peer", mpixel_per_s="5", **shared)
    for name, rates in (("copy", {"gb_per_s": "20"}), ("matrix product", {"gflop_per_s": "150"})):
        for dtype in ("float32", "bfloat16"):
            yield row(name, 1, "limit", subject="machine", dtype=dtype, **rates, **MACHINE)


def test_every_picture_is_drawn(tmp_path, capsys):
    table.write(tmp_path / "rows.csv", measured())
    assert plot.main([str(tmp_path / "rows.csv"), "--output", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.png")} == set(PICTURES)
    assert "do not suffice" not in capsys.readouterr().out


def test_a_processor_without_bfloat16_has_one_panel(tmp_path, capsys):
    rows = [r for r in measured() if r.get("dtype") != "bfloat16"]
    assert texts(blocks(rows)) == ["  3.0x"]
    assert len(roofline(rows).axes) == 1
    table.write(tmp_path / "rows.csv", rows)
    assert plot.main([str(tmp_path / "rows.csv"), "--output", str(tmp_path)]) == 0
    assert "do not suffice" not in capsys.readouterr().out


def test_pictures_are_of_the_first_file_that_suffices(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "PICTURES", {"speed_tree": PICTURES["speed_tree"]})
    for name, rows in (("first", measured()), ("rest", [r | {"device": "Another"} for r in measured()])):
        table.write(tmp_path / f"{name}.csv", rows)
    table.write(tmp_path / "none.csv", [r for r in measured() if r["subject"] == "machine"])
    for name, files in (("both", ("none", "first", "rest")), ("one", ("first",)), ("other", ("rest",))):
        (tmp_path / name).mkdir()
        paths = [str(tmp_path / f"{file}.csv") for file in files]
        assert plot.main([*paths, "--output", str(tmp_path / name)]) == 0
    both, one, other = ((tmp_path / f / "speed_tree.png").read_bytes() for f in ("both", "one", "other"))
    assert both == one != other
    assert result_files("cpu*.csv")[0].name == "cpu.csv"


def test_without_rows_nothing_is_drawn(tmp_path, capsys):
    assert plot.main([str(tmp_path / "none.csv"), "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out.count("the rows do not suffice") == len(PICTURES)


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_blocks_show_the_mean_over_shapes():
    assert texts(blocks(list(measured()))) == ["  3.0x", "  3.0x"]


def test_anomalib_is_shown_in_its_faster_memory_format():
    rows = list(measured())
    last = [
        r | {"provider": "anomalib, channels-last", "p50_ms": "2"}
        for r in rows
        if r["provider"] == "anomalib"
    ]
    assert texts(blocks(rows + last)) == ["  2.0x", "  3.0x"]
    peer = scaling(rows + last).axes[0].lines[0]
    assert list(peer.get_ydata()) == [2 / 8]


def test_float32_has_a_second_roof():
    wide, narrow = (axis.lines for axis in roofline(list(measured())).axes)
    assert list(wide[-1].get_ydata()) == [4 * 150] * 2
    assert len(wide) == len(narrow) + 1


def test_the_overview_says_that_it_has_more_than_the_table():
    title, under, *_ = (text.get_text() for text in overview(list(measured())).texts)
    assert "all shapes and batches" in title
    assert "torch.compile among the peers" in under


def test_depth_follows_the_deepest_shape():
    rows = [*measured(), row("anomalib", 9, "peer", subject="training_step", depth="1", channels="64")]
    saved, _, time = depth(rows).axes
    lines = {tuple(line.get_ydata()) for line in saved.lines}
    assert lines == {(4, 8, 64), (3, 3, 3)}
    assert {tuple(line.get_ydata()) for line in time.lines} == {(8, 16, 128), (4, 8, 64)}


def test_headlines_fit_long_names_of_processors():
    device = "A processor with a name of many words, family 25 model 17, AVX512, AMX"
    for draw in PICTURES.values():
        figure = draw([r | {"device": device} for r in measured()])
        assert any(device in text.get_text() for text in figure.texts)
        for text in figure.texts:
            assert 0 <= text.get_window_extent().x0 < text.get_window_extent().x1 <= figure.bbox.x1


def test_names_do_not_overlap():
    axis = tree(list(measured())).axes[0]
    names_at_ends(axis, [(20.0, "one", "k", False), (20.0, "two", "k", False)])
    one, two = axis.texts[-2:]
    assert abs(one.xyann[1] - two.xyann[1]) >= 10


def test_ratios_below_one_extend_to_the_left():
    figure = tree(list(measured()))
    axis = figure.add_axes((0, 0, 1, 1))
    strips(axis, [[(0.5, "k"), (0.5, "k")], []])
    assert [text.get_text() for text in axis.texts] == ["  0.5x"]
    assert axis.patches[0].get_width() == -0.5
