"""The demonstration's recipe: FastFlow-USF and its baseline on one embedded texture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from usf_kernels import metrics
from usf_kernels.data import Sample, TextureDataset
from usf_kernels.models import Backbone, FastFlow, Mahalanobis, Prediction, create_backbone
from usf_kernels.training import CachedFeatures, History, fit


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the result, besides the seed.

    Attributes:
        stages: stages of the backbone. Strides 8 and 16: the texture has too few independent patches to learn
            the 320 channels of stride 32, and stride 4 sees scratches but little else.
        side: side of a crop, in pixels.
        train, validation, test: numbers of crops.
        epochs, batch_size, lr, weight_decay: options of the training.
        steps, hidden_ratio, noise: options of the flow. Noise of 0.4 on whitened features keeps the held-out
            z^2 near 1; without noise, it grows with every epoch.
    """

    stages: tuple[int, ...] = (2, 3)
    side: int = 128
    train: int = 1000
    validation: int = 64
    test: int = 200
    epochs: int = 24
    batch_size: int = 16
    lr: float = 2e-3
    weight_decay: float = 1e-4
    steps: int = 4
    hidden_ratio: float = 2.0
    noise: float = 0.4


QUICK = Recipe(train=160, validation=32, test=40, epochs=5)


@dataclass(frozen=True)
class Result:
    """Results of `run_texture`.

    Attributes:
        model: the trained and calibrated FastFlow.
        baseline: the Mahalanobis baseline, fitted to the same features.
        history: history of the training.
        images: (N, 3, H, W), the test crops.
        targets: (N, 1, H, W) bool, their ground truth.
        kinds: the kind of defect of each, "good" for none.
        predictions: predictions of the model for all test crops.
        metrics, baseline_metrics: results of `usf_kernels.metrics.evaluate`.
        z2: mean of z^2 on held-out normal crops per scale, by stride; near 1 where the flow generalises.
        extra: facts to keep in a checkpoint.
    """

    model: FastFlow
    baseline: Mahalanobis
    history: History
    images: Tensor
    targets: Tensor
    kinds: list[str]
    predictions: Prediction
    metrics: dict[str, float]
    baseline_metrics: dict[str, float]
    z2: dict[str, float]
    extra: dict[str, Any]


class Split(NamedTuple):
    """A set of crops and their features."""

    images: Tensor
    targets: Tensor
    kinds: list[str]
    features: list[Tensor]


def run_texture(
    name: str,
    *,
    seed: int = 0,
    run_dir: str | Path | None = None,
    progress: bool = False,
    quick: bool = False,
    recipe: Recipe | None = None,
) -> Result:
    """Train FastFlow-USF on a texture, test it on rendered defects, and its baseline beside it.

    Args:
        name: "brick", "grass" or "gravel".
        seed: seed of the crops, the defects, the initial weights and the training.
        run_dir: folder in which the training keeps its checkpoints; None keeps none.
        progress: show the progress of the training.
        quick: use fewer crops and epochs.
        recipe: overrides the one that `quick` chooses.

    Raises:
        ValueError: for an unknown texture.
        ImportError: without the extras `demo`.
    """
    recipe = recipe or (QUICK if quick else Recipe())
    backbone = create_backbone(out_indices=recipe.stages)
    train, validation, test = (
        extract(
            backbone, TextureDataset(name, split, count=count, crop=recipe.side, size=recipe.side, seed=seed)
        )
        for split, count in (
            ("train", recipe.train),
            ("validation", recipe.validation),
            ("test", recipe.test),
        )
    )
    baseline = Mahalanobis(backbone).fit(train.features)
    baseline.calibrate(validation.features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FastFlow(
            backbone,
            steps=recipe.steps,
            hidden_ratio=recipe.hidden_ratio,
            noise=recipe.noise,
            memory="standard",  # 16 x 16 maps take little memory, so nothing needs to be computed twice
        ).initialize(train.features)
    history = fit(
        model,
        CachedFeatures(train.features),
        CachedFeatures(validation.features),
        max_epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        seed=seed,
        run_dir=run_dir,
        checkpoint_every=max(1, recipe.train // recipe.batch_size),
        accelerator="cpu",
        progress=progress,
        title=name,
    )
    model.calibrate(validation.features)
    predictions = model.predict(test.images, test.features)
    return Result(
        model=model,
        baseline=baseline,
        history=history,
        images=test.images,
        targets=test.targets,
        kinds=test.kinds,
        predictions=predictions,
        metrics=metrics.evaluate(predictions, test.targets),
        baseline_metrics=metrics.evaluate(baseline.predict(test.images, test.features), test.targets),
        z2={
            f"stride {stride}": value
            for stride, value in zip(backbone.strides, model.mean_square(validation.features), strict=True)
        },
        extra={"image_size": [recipe.side, recipe.side], "texture": name, "seed": seed},
    )


def extract(backbone: Backbone, data: Dataset[Sample], batch_size: int = 16) -> Split:
    """Return all samples of a dataset, with the backbone's features."""
    backbone = backbone.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    samples: list[Sample] = [data[i] for i in range(len(data))]
    images = torch.stack([sample.image for sample in samples])
    parts = [backbone(batch.to(memory_format=torch.channels_last)) for batch in images.split(batch_size)]
    return Split(
        images=images,
        targets=torch.stack([sample.mask for sample in samples]),
        kinds=[sample.kind for sample in samples],
        features=[torch.cat(maps).contiguous() for maps in zip(*parts, strict=True)],
    )
