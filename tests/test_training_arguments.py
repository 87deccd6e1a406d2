"""What `fit` refuses."""

import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("lightning")

from toy import NoisyImages, ToyFlow, train

from usf_kernels.training import fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 0}, "max_epochs: expected an int at least 1, found 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"lr": 0.0}, "lr: expected a positive finite number, found 0"),
        ({"lr": float("inf")}, "lr: expected a positive finite number, found inf"),
        ({"weight_decay": -1.0}, r"weight_decay: expected a number in \[0, inf\), found -1"),
        (
            {"precision": "64-true"},
            "precision: expected one of '32-true', 'bf16-mixed', '16-mixed', found '64-true'",
        ),
        ({"seed": -1}, "seed"),
        ({"warmup": 1.0}, "warmup"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"clip_norm": -1.0}, r"clip_norm: expected a number in \(0, inf\], found -1"),
        ({"patience": 0}, "patience: expected an int at least 1, found 0"),
        ({"capture": True}, r"capture: expected tensors on one CUDA device, found \['cpu'\]"),
        (
            {"capture": True, "devices": 2},
            "capture: expected one device and no 16-mixed, found 2 with 32-true",
        ),
        (
            {"capture": True, "precision": "16-mixed"},
            "capture: expected one device and no 16-mixed, found 1 wi",
        ),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


@pytest.mark.parametrize("name", ["max_epochs", "batch_size", "patience"])
def test_counts_are_whole(name):
    with pytest.raises(TypeError, match=f"{name}: expected an int, found float"):
        train(**{name: 2.5})


def test_numbers_of_numpy_are_numbers(tmp_path):
    options = {"max_epochs": np.int64(2), "lr": np.float64(1e-3), "seed": np.int64(3)}
    train(tmp_path, **options)
    _, history = train(tmp_path, resume=True, **options)
    assert len(history.rows) == 2


def test_data_that_cannot_be_indexed_are_refused():
    images = NoisyImages(4)
    streams = DataLoader(images), (image for image in range(4)), Streamed()
    for wrong in streams:
        with pytest.raises(TypeError, match=f"train_data: .*samples by index, found {type(wrong).__name__}"):
            fit(ToyFlow(2), wrong, max_epochs=1)
    with pytest.raises(TypeError, match=r"validation_data: .*found DataLoader"):
        fit(ToyFlow(2), images, DataLoader(images), max_epochs=1)


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(NoisyImages(4))

    def __len__(self):
        return 4


def test_empty_data_and_frozen_models_are_refused():
    with pytest.raises(ValueError, match="validation_data: expected at least one sample, found none"):
        fit(ToyFlow(2), NoisyImages(4), NoisyImages(0), max_epochs=1)
    with pytest.raises(ValueError, match="model: expected parameters that require a gradient, found none"):
        fit(ToyFlow(2).requires_grad_(False), NoisyImages(4), max_epochs=1, accelerator="cpu")
