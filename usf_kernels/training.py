"""Maximum-likelihood training with Lightning Fabric, resumable after a kill at any moment.

Nothing random is carried from one step to the next: the order of an epoch, the augmentation of a sample and
the noise inside a step are functions of the seed and of their own number. So a checkpoint needs no generator
states, a run may be resumed with another number of loading workers, and on a CPU the resumed run ends with
the same bits as the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from usf_kernels.extras import needs_extra
from usf_kernels.nn.capture import check_capturable
from usf_kernels.ops.checks import check_int
from usf_kernels.optimization import Settings
from usf_kernels.run_folder import RunFolder
from usf_kernels.training_run import History, Run

__all__ = ["CachedFeatures", "History", "fit"]


class CachedFeatures(Dataset[list[Tensor]]):
    """Feature maps computed once: item i is the list of (C_l, H_l, W_l) maps of image i.

    Args:
        features: one (N, C_l, H_l, W_l) tensor per scale.

    Raises:
        ValueError: when the scales hold different numbers of images, or there are none.
    """

    def __init__(self, features: list[Tensor]) -> None:
        if not features or len({len(maps) for maps in features}) != 1:
            shapes = [tuple(maps.shape) for maps in features]
            raise ValueError(f"features: expected as many images at each scale, found {shapes}")
        self.features = list(features)

    def __len__(self) -> int:
        return len(self.features[0])

    def __getitem__(self, index: int) -> list[Tensor]:
        return [maps[index] for maps in self.features]


def fit(
    model: nn.Module,
    train_data: Dataset[Any],
    validation_data: Dataset[Any] | None = None,
    *,
    max_epochs: int,
    lr: float = 1e-3,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    patience: int | None = None,
    warmup: float = 0.05,
    clip_norm: float | None = 1.0,
    ema_decay: float | None = None,
    precision: str = "32-true",
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    capture: bool = False,
    workers: int = 0,
    progress: bool = True,
    title: str = "training",
    extra: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> History:
    """Minimise `model.loss(batch)`; the model ends with its best held-out weights, in evaluation mode, on the
    device that it was on. A model that was calibrated has to be calibrated again.

    AdamW trains the parameters that require a gradient, with linear warm-up, then a cosine down to 1 % of
    `lr`. Vectors, and parameters named by `model.no_weight_decay()` if it exists, have no weight decay.

    >>> flow = usf.models.USFlow(2, blocks=1)
    >>> data = torch.randn(64, 2)
    >>> history = fit(flow, data[:48], data[48:], max_epochs=2, accelerator="cpu", progress=False)
    >>> [row["epoch"] for row in history.rows]
    [1, 2]

    Args:
        model: module with `loss(batch) -> scalar`; with `run_dir` it must also suit `save_checkpoint`.
        train_data: yields the elements of batches of `model.loss`: images (3, H, W), lists of feature maps,
            or `Sample`s, whose images are taken. Random augmentation must draw from the global generators of
            PyTorch, NumPy or Python, which are seeded per epoch and sample. A last batch that is not full is
            left out of an epoch.
        validation_data: held-out normal data in the same form; None keeps the last weights.
        max_epochs: passes over the training data.
        lr: the highest learning rate.
        batch_size: samples per step and process.
        weight_decay: weight decay of AdamW.
        seed: seed of the order of the samples, their augmentation and the noise in steps; the model's initial
            weights are those that it has.
        run_dir: folder for `last.pt` (to resume), `best.pt` (to use; both are checkpoints that
            `load_checkpoint` reads) and `history.csv`; made when missing. Without `validation_data`,
            `best.pt` is written at the end.
        resume: continue from `run_dir/last.pt` if it exists; without it a run there is overwritten.
        checkpoint_every: steps between two writes of `last.pt`; None writes one a minute. Every epoch ends
            with one in any case.
        patience: stop after this many epochs without a better held-out loss; None never stops early.
        warmup: share of the steps spent on reaching `lr`, in [0, 1).
        clip_norm: largest norm of the gradient; None for no limit.
        ema_decay: average the weights over the steps with this decay; held-out losses and the result are then
            those of the average.
        precision: Fabric's precision: "32-true", "bf16-mixed" or "16-mixed".
        accelerator: Fabric's accelerator: "auto", "cpu", "cuda", ...
        devices: Fabric's number of devices; with more than one, DistributedDataParallel.
        num_nodes: Fabric's number of nodes.
        capture: replay forward and backward passes as a CUDA graph (`usf.nn.CapturedGradients`), for maps so
            small that the GPU waits for launches. Needs the memory of memory="standard", batches of one shape
            and one device; not for "16-mixed", whose loss scale changes between steps.
        workers: number of processes that load data.
        progress: show a bar, or print lines without rich or a terminal.
        title: name of the run in its progress.
        extra: JSON-able facts to keep in the checkpoints, such as a description of the data; a run can be
            resumed only with equal ones.
        dry_run: only check the settings and `run_dir`, which is made when missing, and return an empty
            history; `range(count)` is then enough as data.

    Raises:
        ImportError: without lightning.
        TypeError: for data without a length or samples by index, such as a DataLoader.
        ValueError: for a setting out of range, empty data, or a `run_dir` that holds a different run.
        FloatingPointError: when a loss or its gradient is not finite; `run_dir` keeps the best weights.
        OSError: naming the file, when a checkpoint cannot be written; the previous one stays.
    """
    check_int("devices", devices, 1)
    if checkpoint_every is not None:
        check_int("checkpoint_every", checkpoint_every, 1)
    for name, data in (("train_data", train_data), ("validation_data", validation_data)):
        if data is None:
            continue
        indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        if not indexed or isinstance(data, IterableDataset):
            raise TypeError(
                f"{name}: expected a dataset with a length and samples by index, found {type(data).__name__}"
            )
        if len(data) == 0:
            raise ValueError(f"{name}: expected at least one sample, found none")
    with needs_extra("train", "training"):
        from lightning.fabric import Fabric
        from lightning.pytorch.utilities.seed import isolate_rng

    settings = Settings(
        max_epochs=max_epochs,
        lr=lr,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
        patience=patience,
        warmup=warmup,
        clip_norm=clip_norm,
        ema_decay=ema_decay,
        precision=precision,
        world_size=devices * num_nodes,
        train_samples=len(train_data),
        validation_samples=0 if validation_data is None else len(validation_data),
    )
    if capture and (settings.world_size > 1 or precision == "16-mixed"):
        raise ValueError(
            f"capture: expected one device and no 16-mixed, found {settings.world_size} with {precision}"
        )
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=precision)
    if capture:
        check_capturable("capture", [fabric.device])
    folder = None if run_dir is None else Path(run_dir)
    files = RunFolder(fabric, folder, model, settings, extra)
    run = Run(fabric, model, settings, History(), files, checkpoint_every, capture=capture)
    if dry_run:
        files.check(resume)
        return run.history
    fabric.launch()
    device = next(iter(run.trainable.values())).device
    try:
        with isolate_rng():  # leave the caller's random generators as they are
            return run.fit(
                train_data, validation_data, resume=resume, workers=workers, progress=progress, title=title
            )
    finally:
        model.to(device)
