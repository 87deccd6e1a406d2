import argparse
import json
import os
import signal
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("PIL")

import cli_toys
from cli_toys import fails
from toy import ToyDetector

import usf_kernels
from usf_kernels import metrics, models
from usf_kernels.checkpoint import load_checkpoint, save_checkpoint
from usf_kernels.cli import main
from usf_kernels.cli.options import add_checkpoint, add_inference, load_for_inference
from usf_kernels.models import UFlow, USFlow
from usf_kernels.models.backbones import create_backbone
from usf_kernels.plotting import Shown

toy_models, checkpoint, folder = cli_toys.toy_models, cli_toys.checkpoint, cli_toys.folder  # fixtures


def test_outputs_are_checked_before_the_work(checkpoint, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ToyDetector, "predict", None)
    monkeypatch.setattr(models, "export_onnx", None)
    (tmp_path / "file").touch()
    error = fails(capsys, "evaluate", checkpoint, folder, "--output", tmp_path / "file")
    assert error.endswith("file: Not a folder\n")
    error = fails(capsys, "export", checkpoint, tmp_path / "none" / "x.onnx")
    assert error.endswith(f"{tmp_path / 'none'}: No such folder\n")
    if os.path.exists("/dev/null"):
        assert fails(capsys, "export", checkpoint, "/dev/null").endswith("/dev/null: Not a regular file\n")


def test_export_leaves_its_checkpoint_alone(checkpoint, tmp_path, capsys):
    before = checkpoint.read_bytes()
    other = tmp_path / "link.onnx"
    other.symlink_to(checkpoint)
    for path in (checkpoint, other):
        assert "is the checkpoint itself" in fails(capsys, "export", checkpoint, path)
    assert checkpoint.read_bytes() == before


def test_export_refuses_what_predict_refuses(tmp_path, capsys):
    save_checkpoint(tmp_path / "density.pt", USFlow(4, blocks=1))
    error = fails(capsys, "export", tmp_path / "density.pt", tmp_path / "x.onnx")
    assert f"{tmp_path / 'density.pt'}: expected a FastFlow, CFlow or UFlow, found a USFlow" in error


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
    add_checkpoint(parser)
    add_inference(parser)
    asked = [str(tmp_path / "model.pt"), "--device", "cpu", "--precision", precision]
    loaded, device = load_for_inference(parser.parse_args(asked))
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
    "train x --precision 64-true",
    "train x --image-size abc",
    "train x --epochs 1.5",
    "train x --image-size 40000",
    "train x --batch-size 99999999999999999999",
    "demo --textures sand",
)


@pytest.mark.parametrize("arguments", USAGE_ERRORS)
def test_usage_errors_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "usage: usf-kernels" in error
    for word, message in (("size abc", "must be like 256 or 256x320"), ("1.5", "must be a whole number")):
        assert word not in arguments or message in error


def test_empty_paths_are_refused(capsys):
    """An empty variable of a shell would be the current folder."""
    for arguments in (["predict", "model.pt", ""], ["train", ""], ["export", "", "x.onnx"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "must not be empty" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"usf-kernels {usf_kernels.__version__}\n"


def test_help_and_doctor_import_no_extra():
    code = (
        "import sys; from usf_kernels.cli import main; main(['doctor'])\n"
        "heavy = {'lightning', 'matplotlib', 'timm', 'skimage', 'scipy', 'rich', 'anomalib', 'FrEIA',\n"
        "    'onnx', 'triton', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=env)
