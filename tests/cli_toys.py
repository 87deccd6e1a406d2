"""What the tests of the command line share: toy models, a folder of images, a checkpoint."""

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image
from toy import ToyDetector

from usf_kernels import models
from usf_kernels.checkpoint import save_checkpoint
from usf_kernels.cli import main


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


@pytest.fixture
def train_words(folder, tmp_path):
    """A quick training on the CPU, as the command line has it."""
    pytest.importorskip("lightning")
    words = ["train", folder, "--output", tmp_path / "run", "--image-size", "20x16", "--epochs", "1"]
    return [*map(str, words), "--accelerator", "cpu"]


def fails(capsys, *arguments):
    """The one line on stderr, but for warnings, of a command that must end with exit code 2."""
    assert main([str(a) for a in arguments]) == 2
    error = without_warnings(capsys.readouterr().err)
    assert error.startswith("usf-kernels: error: ")
    assert error.count("\n") == 1
    return error


def without_warnings(text):
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("usf-kernels: warning: "))
