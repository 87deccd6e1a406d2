"""Small folders in the layouts of MVTec AD, VisA and BTAD, made here; nothing is downloaded."""

import csv
import re

import numpy as np
import pytest
import torch

from bench.accuracy import datasets
from usf_kernels.demo import Recipe

pytest.importorskip("anomalib")
from PIL import Image

SIDE = 48


def picture(path, *, defect=False, mask=None):
    """A grey gradient, with a bright square at (8, 16) where there is a defect; its mask where wanted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.add.outer(np.arange(SIDE), np.arange(SIDE)).astype(np.uint8)
    if defect:
        pixels[8:20, 16:24] = 250
    Image.fromarray(np.repeat(pixels[..., None], 3, 2)).save(path)
    if mask is not None:
        mask.parent.mkdir(parents=True, exist_ok=True)
        truth = np.zeros((SIDE, SIDE), np.uint8)
        truth[8:20, 16:24] = 1 if "visa" in str(mask) else 255  # VisA counts its kinds of defects
        Image.fromarray(truth).save(mask)


def mvtec(root, category="bottle", good="good", suffix="_mask"):
    for i in range(6):
        picture(root / category / "train" / good / f"{i:03}.png")
    picture(root / category / "test" / good / "000.png")
    for i in range(2):
        path = root / category / "test" / "broken" / f"{i:03}.png"
        mask = root / category / "ground_truth" / "broken" / f"{i:03}{suffix}.png"
        picture(path, defect=True, mask=mask)


def btad(root):
    mvtec(root, "01", good="ok", suffix="")


def visa(root):
    rows = []
    for i in range(7):
        name = f"candle/Data/Images/Normal/{i:04}.png"
        picture(root / name)
        rows.append(["candle", "train" if i < 6 else "test", "normal", name, ""])
    for i in range(2):
        name, mask = (f"candle/Data/{part}/Anomaly/{i:04}.png" for part in ("Images", "Masks"))
        picture(root / name, defect=True, mask=root / mask)
        rows.append(["candle", "test", "anomaly", name, mask])
    (root / "split_csv").mkdir()
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])


LAYOUTS = {"mvtec": (mvtec, "bottle"), "visa": (visa, "candle"), "btad": (btad, "01")}


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_a_layout_is_read(tmp_path, dataset):
    make, category = LAYOUTS[dataset]
    root = tmp_path / dataset
    make(root)
    assert datasets.categories(root, dataset) == [category]
    parts = datasets.splits(category, Recipe(side=24), root=root, dataset=dataset)
    train, held_out, test = ([part[i] for i in range(len(part))] for part in parts)
    assert (len(train), len(held_out), len(test)) == (5, 1, 3)
    assert not {sample.name for sample in train} & {sample.name for sample in held_out}
    assert all(sample.label == 0 and not sample.mask.any() for sample in train + held_out)
    square = torch.zeros(1, 24, 24, dtype=torch.bool)
    square[:, 4:10, 8:12] = True
    for sample in test:
        assert sample.image.shape == (3, 24, 24)
        assert 0 <= sample.image.min() <= sample.image.max() <= 1
        assert torch.equal(sample.mask, square if sample.label else torch.zeros_like(square))
        assert (sample.kind == "good") == (sample.label == 0)
    assert sum(sample.label for sample in test) == 2


def test_the_command(tmp_path, capsys):
    mvtec(tmp_path / "data")
    arguments = ["--root", str(tmp_path / "data"), "--dataset", "mvtec", "--quick", "--side", "64"]
    arguments += ["--models", "UFlow", "--epochs", "1", "--workers", "1", "--output", str(tmp_path / "out")]
    assert datasets.main(arguments) == 0
    assert "| UFlow |" in (tmp_path / "out" / "mvtec.md").read_text()
    assert (tmp_path / "out" / "mvtec.png").stat().st_size > 1000
    before = (tmp_path / "out" / "mvtec.csv").read_text()
    assert len(before.splitlines()) == 5
    assert "bottle" in before
    capsys.readouterr()
    assert datasets.main(arguments) == 0  # nothing is left to measure
    assert "4 of 4 are in" in capsys.readouterr().out
    assert (tmp_path / "out" / "mvtec.csv").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--root", "nowhere", "--dataset", "visa"], "no such folder: nowhere"),
        (["--root", "{}", "--dataset", "btad"], "holds no category of btad"),
        (["--root", "{}/data", "--dataset", "mvtec", "--category", "cable"], "no 'cable'.*it has bottle"),
    ],
)
def test_a_folder_that_does_not_fit(tmp_path, capsys, arguments, found):
    (tmp_path / "data" / "bottle" / "train").mkdir(parents=True)
    with pytest.raises(SystemExit):
        datasets.main([argument.format(tmp_path) for argument in arguments])
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(found, message)
