import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

import cli_toys
from cli_toys import fails, write_image
from PIL import Image
from toy import ToyDetector

from usf_kernels import data, files, metrics
from usf_kernels.checkpoint import save_checkpoint
from usf_kernels.cli import main
from usf_kernels.cli.predict import _expand, _names
from usf_kernels.models import UFlow, create_backbone

toy_models, checkpoint, folder = cli_toys.toy_models, cli_toys.checkpoint, cli_toys.folder  # fixtures


def test_predict_writes_maps_in_the_image_s_size(checkpoint, tmp_path, capsys):
    image = tmp_path / "in" / "a.png"
    mask = write_image(image, spot=3, size=(40, 32))
    other = tmp_path / "in" / "sub" / "a.png"  # the same stem again
    write_image(other)
    out = tmp_path / "out"
    assert main(["predict", str(checkpoint), str(image), str(other.parent), "--output", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    ends = ("map.npy", "map.png", "log_nfa.npy", "mask.png", "overlay.png")
    assert names == {"predictions.json"} | {f"{n}_{end}" for n in ("in_a", "sub_a") for end in ends}
    anomaly = np.load(out / "in_a_map.npy")
    assert anomaly.shape == (40, 32)
    assert anomaly.dtype == np.float32
    assert Image.open(out / "in_a_map.png").size == (32, 40)
    found = np.asarray(Image.open(out / "in_a_mask.png"))
    assert set(np.unique(found)) <= {0, 255}
    changed = (np.asarray(Image.open(out / "in_a_overlay.png")) != np.asarray(Image.open(image))).any(-1)
    assert 0 < changed.sum() <= (found > 0).sum()
    assert not changed[found == 0].any()
    assert metrics.mean_iou(found[None] > 0, mask[None] > 0) > 0.4  # predicted at half the size
    first, second = json.loads((out / "predictions.json").read_text())
    assert first["image"] == str(image)
    assert first["score"] == pytest.approx(anomaly.max(), abs=0.05)
    assert first["regions"][0]["image_box"] == [0, 0, 40, 32]
    assert second["regions"] == []
    assert (first["anomalous"], second["anomalous"]) == (True, False)
    assert "a.png" in capsys.readouterr().out


def test_names_are_the_shortest_that_tell_files_apart():
    def names(*files):
        return list(_names([Path("/x") / file for file in files]))

    assert names("a/grey.png", "a/grey.jpg", "b.png") == ["grey_png", "grey_jpg", "b"]
    assert names("a/b.png", "c/b.png", "c/d.png") == ["a_b", "c_b", "d"]
    assert len(names("a_b.png", "a/b.png")) == 2
    # One file where capital letters, or how an accent is written, make no difference.
    assert names("c/Part.png", "d/part.png") == ["c_Part", "d_part"]
    assert names("c/\u00e9.png", "d/e\u0301.png") == ["c_\u00e9", "d_e\u0301"]


def test_names_of_files_given_by_way_of_a_parent():
    assert list(_names([Path("/x/y/../a.png"), Path("/x/y/a.png")])) == ["x_a", "y_a"]
    given = [Path("/x/y/../a.png"), Path("/x/a.png"), Path("/x/b.png")]
    assert _expand(given, Path("/out"), recursive=False) == [given[0], given[2]]
    again = [*given[1:], given[1]]
    assert _expand(again, Path("/out"), recursive=False) == given[1:]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes")
def test_names_that_are_long_or_not_utf_8(checkpoint, tmp_path, capsys):
    long, odd = "x" * 250, os.fsdecode(b"b\xff")
    for name in ("a", long, odd, "z"):
        write_image(tmp_path / "in" / f"{name}.png")
    out = tmp_path / "out"
    assert main(["predict", str(checkpoint), str(tmp_path / "in"), "--output", str(out)]) == 0
    found = json.loads((out / "predictions.json").read_text())
    assert [entry["name"] for entry in found] == ["a", odd, long[:230], "z"]
    assert all((out / f"{entry['name']}_log_nfa.npy").exists() for entry in found)


def test_images_are_decoded_once_and_predicted_in_batches(checkpoint, tmp_path, monkeypatch):
    for name in "abc":
        write_image(tmp_path / "in" / f"{name}.png")
    decoded, batches = [], []
    read, predict = data.read_image, ToyDetector.predict
    monkeypatch.setattr(data, "read_image", lambda *path: decoded.append(path) or read(*path))
    monkeypatch.setattr(
        ToyDetector, "predict", lambda self, x, **_: batches.append(len(x)) or predict(self, x)
    )
    words = ["predict", str(checkpoint), str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main([*words, "--batch-size", "2"]) == 0
    assert (len(decoded), batches) == (3, [2, 1])


def test_predict_refuses_to_read_what_it_writes(checkpoint, folder, capsys):
    images = folder / "test" / "good"
    assert "holds the images" in fails(capsys, "predict", checkpoint, images, "--output", images)
    error = fails(capsys, "predict", checkpoint, folder / "test")
    assert "test: holds no image; there are some in" in error
    words = ["predict", str(checkpoint), str(folder / "test"), "--recursive", "--output"]
    assert "holds the images" in fails(capsys, *words, folder / "test")
    assert main([*words, str(folder / "out")]) == 0
    found = json.loads((folder / "out" / "predictions.json").read_text())
    assert {Path(facts["image"]) for facts in found} == set((folder / "test").rglob("*.png"))


def test_predict_warns_of_another_size_than_the_training_s(checkpoint, folder, tmp_path, capsys):
    image = str(folder / "test" / "good" / "0.png")
    words = ["predict", str(checkpoint), image, "--output", str(tmp_path / "out"), "--image-size"]
    assert main([*words, "8"]) == 0
    assert "warning: --image-size 8x8: the model was trained" in capsys.readouterr().err
    assert main([*words, "20x16"]) == 0
    assert capsys.readouterr().err == ""


def test_an_unreadable_image_stops_before_anything_is_written(checkpoint, tmp_path, capsys):
    write_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    out = tmp_path / "out"
    error = fails(capsys, "predict", checkpoint, tmp_path / "good.png", tmp_path / "bad.png", "--output", out)
    assert str(tmp_path / "bad.png") in error
    assert not out.exists()
    assert "gone.png: no such file" in fails(
        capsys, "predict", checkpoint, tmp_path / "gone.png", "--output", out
    )


def test_no_space_is_named_and_leaves_nothing_half_written(checkpoint, tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "a.png")
    opened = open

    def full(path, mode):
        class Full:
            def __enter__(self):
                self.file = opened(path, mode)
                return self

            def __exit__(self, *error):
                self.file.close()

            def write(self, data):
                self.file.write(bytes(data)[:10])
                raise OSError(28, "No space left on device")

        return Full() if "mask" in str(path) else opened(path, mode)

    monkeypatch.setattr(files, "open", full, raising=False)
    error = fails(capsys, "predict", checkpoint, tmp_path / "a.png", "--output", tmp_path / "out")
    assert error == f"usf-kernels: error: {tmp_path / 'out' / 'a_mask.png'}: No space left on device\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a_map.npy",
        "a_map.png",
        "a_log_nfa.npy",
    }


def test_an_output_that_is_a_file_is_named(checkpoint, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    error = fails(capsys, "predict", checkpoint, tmp_path / "a.png", "--output", tmp_path / "file")
    assert str(tmp_path / "file") in error


def test_predict_without_matplotlib_writes_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = fails(capsys, "predict", checkpoint, tmp_path / "a.png", "--output", tmp_path / "out")
    assert "pip install 'usf-kernels[train]'" in error
    assert not list((tmp_path / "out").iterdir())


def write_images(folder, names, cut_off):
    """Images of these names, one of them without its last bytes."""
    for name in names:
        write_image(folder / f"{name}.png")
    path = folder / f"{cut_off}.png"
    path.write_bytes(path.read_bytes()[:-300])


def test_an_image_that_is_cut_off_loses_nothing(checkpoint, tmp_path, capsys):
    write_images(tmp_path / "in", "abc", cut_off="c")
    out = tmp_path / "out"
    error = fails(capsys, "predict", checkpoint, tmp_path / "in", "--output", out, "--batch-size", "1")
    assert "c.png: cannot be read as an image" in error
    assert [entry["name"] for entry in json.loads((out / "predictions.json").read_text())] == ["a", "b"]


def test_names_that_look_like_markup(checkpoint, tmp_path, capsys):
    for name in ("q[", "photo[copy]"):
        write_image(tmp_path / name / "b].png")
    inputs = [str(tmp_path / "q[" / "b].png"), str(tmp_path / "photo[copy]" / "b].png")]
    assert main(["predict", str(checkpoint), *inputs, "--output", str(tmp_path / "o")]) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert "q[/b].png" in printed
    assert "photo[copy]/b].png" in printed


def test_weights_of_the_backbone_from_another_place(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    weights, moved, path = (tmp_path / name for name in ("weights.pt", "moved.pt", "model.pt"))
    torch.save(timm.create_model("resnet10t").state_dict(), weights)
    backbone = create_backbone("resnet10t", weights=weights, out_indices=(0, 1))
    save_checkpoint(path, UFlow(backbone, steps=1), extra={"image_size": [32, 32]})
    weights.rename(moved)
    write_image(tmp_path / "a.png", size=(32, 32))
    asked = ["predict", str(path), str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert "no such file" in fails(capsys, *asked)
    assert main([*asked, "--weights", str(moved)]) == 0
    assert (tmp_path / "out" / "a_map.npy").exists()


def test_one_unreadable_image_takes_none_of_its_batch(checkpoint, tmp_path, capsys):
    write_images(tmp_path / "in", "abcde", cut_off="b")
    out = tmp_path / "out"
    error = fails(capsys, "predict", checkpoint, tmp_path / "in", "--output", out, "--batch-size", "3")
    assert "1 of 5 images are left out: " in error
    found = json.loads((out / "predictions.json").read_text())
    assert [entry["name"] for entry in found] == ["a", "c", "d", "e"]


def test_termination_leaves_what_is_done(checkpoint, tmp_path, monkeypatch, capsys):
    """As schedulers and containers end a program."""
    predict, calls = ToyDetector.predict, []

    def predict_two(self, images, **options):
        calls.append(1)
        if len(calls) > 2:
            signal.raise_signal(signal.SIGTERM)
        return predict(self, images, **options)

    monkeypatch.setattr(ToyDetector, "predict", predict_two)
    for name in "abc":
        write_image(tmp_path / "in" / f"{name}.png")
    before, write = signal.getsignal(signal.SIGTERM), files.write_json

    def write_json(*given):  # a second one, as of `timeout`, which signals a process and its group
        signal.raise_signal(signal.SIGTERM)
        write(*given)

    monkeypatch.setattr(files, "write_json", write_json)
    words = ["predict", checkpoint, tmp_path / "in", "--batch-size", "1", "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "usf-kernels: terminated\n"
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["name"] for entry in found] == ["a", "b"]


def test_rows_in_a_pipe_are_whole(checkpoint, tmp_path, capsys):
    image = tmp_path / ("l" * 100) / ("m" * 100) / "a.png"
    write_image(image)
    assert main(["predict", str(checkpoint), str(image), "--output", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith(str(image))]
    assert len(row.split()) == 4
    assert not any(line.endswith(" ") for line in lines)


def test_names_with_line_breaks_are_one_line(checkpoint, tmp_path, capsys):
    image = tmp_path / "a\nb.png"
    write_image(image)
    assert main(["predict", str(checkpoint), str(image), "--output", str(tmp_path / "out")]) == 0
    assert f"{tmp_path}/a\\nb.png" in capsys.readouterr().out


def test_predict_takes_log_epsilon(checkpoint, tmp_path):
    write_image(tmp_path / "in" / "a.png", spot=3)
    found = []
    for value in ("0", "-100"):
        out = tmp_path / value
        words = ["predict", str(checkpoint), str(tmp_path / "in"), "--output", str(out)]
        assert main([*words, f"--log-epsilon={value}"]) == 0
        (entry,) = json.loads((out / "predictions.json").read_text())
        found.append(entry["anomalous"])
    assert found == [True, False]
