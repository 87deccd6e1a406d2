"""This package's models under anomalib's engine: fit, validate, test, predict, export."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models import Cflow, Fastflow, Uflow
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor, nn
from torchvision.transforms.v2 import Resize

from usf_kernels.integrations.anomalib_accelerated import is_recorded
from usf_kernels.models import CFlow, FastFlow, UFlow, create_backbone, image_score
from usf_kernels.models.backbones import EMBEDDED
from usf_kernels.models.feature_flow import FeatureFlow
from usf_kernels.nn.weights import Weights
from usf_kernels.ops import anomaly_map
from usf_kernels.optimization import learning_rate, parameter_groups

# A validation epoch predicts before the calibration at its end, so this warning would be noise.
warnings.filterwarnings("ignore", "predict: the model is not calibrated", UserWarning, __name__)

WARM_UP = 0.05  # share of the steps
HELD_OUT = 256  # normal images per process and validation epoch after which no more are kept to calibrate


class Detector(nn.Module):
    """A `FeatureFlow` that returns results in the form of anomalib's models.

    Args:
        flow: a model of `usf_kernels.models`.
    """

    def __init__(self, flow: FeatureFlow) -> None:
        super().__init__()
        self.flow = flow
        self.register_buffer("initialized", torch.tensor(False))
        # In a tuple, so as not to be a submodule: the inference form, and the weights that it was made of.
        self._fused: tuple[()] | tuple[FeatureFlow, Weights] = ()

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images (B, 3, H, W) in [0, 1]; compiled, exported and traced graphs leave out the masks."""
        if is_recorded():
            latents = self.flow.scored_latents(self.flow.features(images))
            maps = anomaly_map(latents, tuple(images.shape[-2:]))
            return InferenceBatch(pred_score=image_score(maps), anomaly_map=maps)
        return self.predict(images)

    def predict(self, images: Tensor, features: Sequence[Tensor] | None = None) -> InferenceBatch:
        """Return scores, maps and the automatic segmentation; an image with a non-empty mask is anomalous."""
        if self._fused and self._fused[1].outdated:  # left behind by a test that was interrupted
            self.unfuse()
        flow = self._fused[0] if self._fused else self.flow
        found = flow.predict(images, features)
        return InferenceBatch(
            pred_score=found.score,
            pred_label=found.mask.flatten(1).any(1),
            anomaly_map=found.anomaly_map,
            pred_mask=found.mask,
        )

    def fuse(self) -> None:
        """Predict with the inference form of the current flow, until `unfuse`."""
        self._fused = (self.flow.fuse(), Weights(self.flow.modules()))

    def unfuse(self) -> None:
        """Predict with the flow itself."""
        self._fused = ()


class UsfModule(AnomalibModule):
    """Base class of the three models below.

    The first batch of normal images initialises the flow (`FeatureFlow.initialize`), the normal images of
    each validation epoch give "val_loss" and calibrate the threshold (`FeatureFlow.calibrate`), and tests and
    predictions run in the inference form. `pred_mask` and `pred_label` are the automatic segmentation, not
    thresholds fitted to defects; `pred_score` and `anomaly_map` are in [0, 1].

    Args:
        backbone, weights, out_indices: see `usf_kernels.models.create_backbone`.
        coupling: "additive" (uniformly scaling) or "affine".
        linear: "lu" or "permutation".
        lr: largest learning rate of AdamW; linear warm-up, then half a cosine.
        pre_processor, post_processor, evaluator, visualizer: see anomalib. The pre-processor must leave
            images in [0, 1], since the backbone normalises them. True resizes to 256 x 256.
        options: the other arguments of the model, such as `steps`.

    Raises:
        ImportError, TypeError, ValueError: as `create_backbone` and the model.
    """

    flow_class: type[FeatureFlow]

    def __init__(
        self,
        backbone: str = EMBEDDED,
        weights: str | None = "auto",
        out_indices: Sequence[int] | None = None,
        coupling: str = "additive",
        linear: str = "lu",
        lr: float = 1e-3,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        **options: Any,
    ) -> None:
        # Skip the initialisers in between: they make anomalib's own networks.
        super(self.original, self).__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        pyramid = create_backbone(backbone, out_indices=out_indices, weights=weights)
        self.model = Detector(self.flow_class(pyramid, coupling=coupling, linear=linear, **options))
        self.lr = lr
        self._held_out: list[list[Tensor]] = []

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize, to 256 x 256 unless told otherwise."""
        return PreProcessor(transform=Resize(image_size or (256, 256), antialias=True))

    def configure_post_processor(self) -> PostProcessor:
        """Disable anomalib's normalisation and thresholding.

        Scores and maps are in [0, 1] already; normalising would clamp them to the range of the validation
        images, which leaves no ranking among defects. Predictions have labels and masks already, but calling
        the Lightning module itself gives neither, just like an exported graph.
        """
        return PostProcessor(enable_normalization=False, enable_thresholding=False)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of Lightning's trainer."""
        return {"gradient_clip_val": 1.0, "num_sanity_val_steps": 0}

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW without weight decay, with a schedule if the number of steps is known."""
        optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.0), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            return {"optimizer": optimizer}
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(learning_rate, steps=int(steps), lr=1.0, warmup=WARM_UP)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Return the loss of a batch of normal images; the first one initialises the flow."""
        flow = self.model.flow
        features = flow.features(batch.image)
        if not self.model.initialized:
            flow.initialize(features)
            self.model.initialized.fill_(True)
            if self.trainer.world_size > 1:
                self.model.load_state_dict(self.trainer.strategy.broadcast(self.model.state_dict()))
        loss = flow.loss(features)
        self.log("train_loss", loss.item(), on_epoch=True, prog_bar=True, logger=True)
        return {"loss": loss}

    def validation_step(self, batch: Batch, *args: Any, **options: Any) -> Batch:
        """Predict, log the loss of normal images, and keep their features for `on_validation_epoch_end`."""
        features = self.model.flow.features(batch.image)
        if batch.gt_label is not None and not batch.gt_label.all():
            normal = [maps[batch.gt_label == 0] for maps in features]
            loss = self.model.flow.loss(normal)
            self.log("val_loss", loss, on_epoch=True, prog_bar=True, logger=True, batch_size=len(normal[0]))
            if sum(len(maps[0]) for maps in self._held_out) < HELD_OUT:
                self._held_out.append(normal)
        return batch.update(**self.model.predict(batch.image, features)._asdict())

    def on_validation_epoch_start(self) -> None:
        """Forget what a validation that was interrupted has kept."""
        self._held_out = []

    def on_validation_epoch_end(self) -> None:
        """Fit the null model to the normal images, if there were any."""
        features = [torch.cat(maps) for maps in zip(*self._held_out, strict=True)]
        self._held_out = []
        norms = self.model.flow.squared_norms(features) if features else None
        if self.trainer.world_size > 1:  # a process has a share of the images, which may be none
            shares: list[list[Tensor] | None] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, norms and [u.cpu() for u in norms])
            norms = [torch.cat(maps) for maps in zip(*filter(None, shares), strict=True)]
        if norms:
            self.model.flow.calibrate_to(norms)

    def on_test_start(self) -> None:
        """Test in the inference form."""
        self.model.fuse()

    def on_test_end(self) -> None:
        """Leave the inference form."""
        self.model.unfuse()

    def on_predict_start(self) -> None:
        """Predict in the inference form."""
        self.model.fuse()

    def on_predict_end(self) -> None:
        """Leave the inference form."""
        self.model.unfuse()


class UsfFastflow(UsfModule, Fastflow):
    """`usf_kernels.models.FastFlow` as an anomalib model; see `UsfModule`."""

    flow_class, original = FastFlow, Fastflow


class UsfCflow(UsfModule, Cflow):
    """`usf_kernels.models.CFlow` as an anomalib model; see `UsfModule`."""

    flow_class, original = CFlow, Cflow


class UsfUflow(UsfModule, Uflow):
    """`usf_kernels.models.UFlow` as an anomalib model; see `UsfModule`."""

    flow_class, original = UFlow, Uflow
