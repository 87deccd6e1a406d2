"""anomalib's engine with this package's models and with accelerated ones, on a folder of images."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import usf_kernels as usf

pytest.importorskip("anomalib")
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.models import Cflow, Fastflow, Uflow
from anomalib.models.image.cflow.torch_model import CflowModel
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.callbacks import Callback
from torchvision.transforms.v2 import Resize

from usf_kernels.integrations.anomalib import UsfCflow, UsfFastflow, UsfUflow

DOCUMENT = Path(__file__).parent.parent / "docs" / "anomalib.md"
SIDE = 64
OPTIONS = {"pre_processor": PreProcessor(transform=Resize((SIDE, SIDE))), "visualizer": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise, in MVTec AD's layout; what is broken has a bright square."""
    root, rng = tmp_path_factory.mktemp("data") / "bottle", np.random.default_rng(0)
    for where, count in (("train/good", 10), ("test/good", 3), ("test/broken", 3)):
        (root / where).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(90, 130, (SIDE, SIDE, 3), dtype=np.uint8)
            if where == "test/broken":
                image[16:40, 24:48] += 120
            Image.fromarray(image).save(root / where / f"{i}.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:40, 24:48] = 255
    (root / "ground_truth/broken").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(mask).save(root / f"ground_truth/broken/{i}.png")
    return root


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def data_of(folder):
    return Folder(
        name="bottle",
        root=folder,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/broken",
        mask_dir="ground_truth/broken",
        train_batch_size=4,
        eval_batch_size=3,
        num_workers=0,
        val_split_mode="from_train",
        val_split_ratio=0.4,
    )


def engine_in(folder, **options):
    return Engine(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, **options
    )


@pytest.mark.parametrize("model_class", [UsfFastflow, UsfCflow, UsfUflow])
def test_fit_test_predict_and_checkpoints(model_class, folder, tmp_path):
    data, engine = data_of(folder), engine_in(tmp_path, max_epochs=1)
    model = model_class(steps=1, **OPTIONS)
    engine.fit(model, datamodule=data)
    assert model.model.initialized
    assert model.model.flow.null is not None
    (metrics,) = engine.test(model, datamodule=data, verbose=False)
    assert metrics["image_AUROC"] == 1.0
    assert metrics["pixel_AUROC"] > 0.9
    batches = engine.predict(model, datamodule=data)
    masks = torch.cat([batch.pred_mask for batch in batches])
    labels = torch.cat([batch.pred_label for batch in batches])
    scores = torch.cat([batch.pred_score for batch in batches])
    truth = torch.cat([batch.gt_label for batch in batches])
    assert scores[truth.bool()].min() > scores[~truth.bool()].max()
    assert ((scores > 0.01) & (scores <= 1)).all()  # not normalised
    assert masks.shape == (6, SIDE, SIDE)
    assert masks.dtype == torch.bool
    assert labels[truth.bool()].all()
    assert torch.equal(labels, masks.flatten(1).any(1))
    assert model.model._fused == ()

    images = torch.rand(2, 3, SIDE, SIDE)
    again = model_class.load_from_checkpoint(engine.best_model_path)
    exported = torch.load(model.to_torch(tmp_path), weights_only=False)["model"]
    expected = model.eval().model(images)
    for other in (again.eval(), exported.eval()):
        found = other.model(images)
        assert torch.equal(found.anomaly_map, expected.anomaly_map)
        assert torch.equal(found.pred_mask, expected.pred_mask)
    assert again.model.initialized
    assert model(images).pred_mask is None  # as in an exported graph


class Stop(Callback):
    """Interrupts at the first batch of one kind of epoch."""

    def __init__(self, hook):
        setattr(self, f"on_{hook}_batch_end", self.stop)

    def stop(self, *args, **options):
        raise ZeroDivisionError


def test_nothing_is_left_of_an_interrupted_epoch(folder, tmp_path):
    """Lightning does not call what would clean up."""
    data, model = data_of(folder), UsfFastflow(steps=1, **OPTIONS)
    engine_in(tmp_path, max_epochs=1).fit(model, datamodule=data)
    expected = model.model.flow.null
    for method in ("test", "validate"):
        hook = method.replace("validate", "validation")
        engine = engine_in(tmp_path, callbacks=[Stop(hook)])
        with pytest.raises(ZeroDivisionError):
            getattr(engine, method)(model, datamodule=data)
    engine_in(tmp_path).validate(model, datamodule=data, verbose=False)
    assert model.model.flow.null == expected
    images = torch.rand(2, 3, SIDE, SIDE)
    stale = model.eval().model(images).anomaly_map
    with torch.no_grad():
        model.model.flow.flows[0][0].upper.mul_(2)
    found = model.model(images).anomaly_map
    model.model.unfuse()
    assert torch.equal(found, model.model(images).anomaly_map)
    assert not torch.allclose(found, stale)


def test_the_first_batch_initialises_once(folder, tmp_path):
    data, model = data_of(folder), UsfFastflow(steps=1, lr=1e-12, **OPTIONS)
    engine_in(tmp_path, max_epochs=1).fit(model, datamodule=data)
    first = {name: p.clone() for name, p in model.model.flow.named_parameters()}
    engine_in(tmp_path, max_epochs=1).fit(model, datamodule=data)
    for name, parameter in model.model.flow.named_parameters():
        torch.testing.assert_close(parameter, first[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("model_class", [Cflow, Uflow])
def test_accelerated_models_train_and_predict(model_class, folder, tmp_path, offline):
    options = {"layers": ("layer2",), "coupling_blocks": 2} if model_class is Cflow else {"flow_steps": 1}
    model = model_class(backbone="resnet18", **options, **OPTIONS)
    usf.accelerate(model)
    data, engine = data_of(folder), engine_in(tmp_path, max_epochs=1)
    engine.fit(model, datamodule=data)
    batches = engine.predict(model, datamodule=data)
    maps = torch.cat([batch.anomaly_map for batch in batches])
    assert maps.shape == (6, SIDE, SIDE)
    assert maps.isfinite().all()
    if model_class is Uflow:
        images = torch.cat([batch.image for batch in batches])
        expected = usf.segment(
            model.model.eval().latents(images), SIDE, tail="exact", tests="per_size", upsample="nearest"
        )
        assert torch.equal(torch.cat([batch.pred_mask for batch in batches]), expected.squeeze(1))
    usf.restore_blocks(model)
    assert type(model) is model_class


def ours():
    return UsfFastflow(steps=1, out_indices=(2,), **OPTIONS)


def accelerated_cflow():
    model = CflowModel("resnet18", ("layer1",), pre_trained=False, coupling_blocks=1)
    usf.accelerate(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [ours, accelerated_cflow])
def test_graphs_are_exported_without_the_tree(make):
    model, images = make().eval(), torch.rand(2, 3, SIDE, SIDE)
    batches = ({0: torch.export.Dim.DYNAMIC},)
    graph = torch.export.export(model, (images,), dynamic_shapes=batches, strict=False).module()
    for some in (images, torch.rand(3, 3, SIDE, SIDE)):
        with torch.no_grad():
            found, expected = graph(some), model(some)
        torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=1e-4, atol=1e-5)


def test_what_is_wrong():
    with pytest.raises(ValueError, match="linear: expected"):
        UsfFastflow(linear="dense")
    with pytest.raises(TypeError, match="unexpected keyword argument 'flow_steps'"):
        UsfFastflow(flow_steps=3)


def test_the_document(folder, tmp_path, monkeypatch, capsys):
    """Its code runs as it is but for the size and number of epochs; first without, then with accelerate."""
    monkeypatch.chdir(folder.parent)
    plain = Fastflow(pre_trained=False, flow_steps=1, visualizer=False)
    usf.accelerate(plain)
    engine = engine_in(tmp_path, max_epochs=1)
    engine.fit(plain, datamodule=data_of(folder))
    engine.trainer.save_checkpoint("fastflow.ckpt")
    loaded = Fastflow.load_from_checkpoint("fastflow.ckpt")  # by anomalib, as it is

    first, second = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    names = {}
    exec(first, names)
    assert "modules replaced" in capsys.readouterr().out
    images = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        for found, expected in zip(names["model"].eval()(images), loaded.eval()(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    quick = second.replace("max_epochs=10", "max_epochs=1, accelerator='cpu', logger=False")
    quick = quick.replace("steps=4", "steps=1, pre_processor=OPTIONS['pre_processor']")
    assert quick.count("OPTIONS") == 1
    assert "max_epochs=1," in quick
    exec(quick.replace('    name="bottle"', '    num_workers=0, name="bottle"'), {"OPTIONS": OPTIONS})
    assert "image_AUROC" in capsys.readouterr().out


def test_only_normal_images_are_held_out(monkeypatch):
    model = ours().eval()
    monkeypatch.setattr(model, "log", lambda *arguments, **options: None)
    batch = ImageBatch(image=torch.rand(4, 3, SIDE, SIDE), gt_label=torch.tensor([0, 1, 0, 1]))
    expected = [maps[::2] for maps in model.model.flow.features(batch.image)]
    model.validation_step(batch)
    assert all(torch.equal(a, b) for a, b in zip(model._held_out[0], expected, strict=True))
    assert model.trainer_arguments["gradient_clip_val"] == 1.0


def test_processes_calibrate_to_the_images_of_all(monkeypatch):
    """Of which some may have none."""
    model, other = (UsfFastflow(steps=1, **OPTIONS) for _ in range(2))
    other.load_state_dict(model.state_dict())
    flow, images = model.model.flow, torch.rand(6, 3, SIDE, SIDE)
    features = flow.features(images)
    expected = flow.calibrate(features)
    flow.forget_calibration()
    there = [flow.squared_norms([maps[4:] for maps in features]), None]

    def gather(found, ours):
        found[:] = [ours, *there]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    model._trainer = SimpleNamespace(world_size=3)
    model._held_out = [[maps[:3] for maps in features], [maps[3:4] for maps in features]]
    model.on_validation_epoch_end()
    assert flow.null == expected
    there[:] = [None, flow.squared_norms(features)]
    other._trainer = model._trainer
    other.on_validation_epoch_end()
    assert other.model.flow.null == expected
