"""Export: every module and model, in both forms, as a torch program and in ONNX Runtime, for any size."""

import importlib.util
import json

import numpy as np
import pytest
import snippets
import torch
from exporting import DYNAMIC, assert_same, onnx_program, run, run_openvino
from helpers import conv_subnet, randomise_
from test_fastflow import Pyramid, perturbed
from torch import nn

import usf_kernels as usf
from usf_kernels.checkpoint import save_checkpoint
from usf_kernels.cli import main
from usf_kernels.models import (
    Backbone,
    CFlow,
    FastFlow,
    Mahalanobis,
    UFlow,
    create_backbone,
    export,
    export_onnx,
)
from usf_kernels.models.timm_networks import same_padding
from usf_kernels.nn import FlowSequence, FlowStep, LUConv1x1, USFBlock
from usf_kernels.ops.matrices import triangular_inverse

onnxruntime = pytest.importorskip("onnxruntime")

SHAPES = [(1, 7, 6, 5), (3, 7, 7, 9), (2, 7, 1, 1)]
IMAGES = [(1, 24, 16), (3, 33, 26)]


class BothWays(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        return *self.flow(x), *self.flow.inverse(x)


def pointwise(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, 5, 1), nn.ReLU(), nn.Conv2d(5, c_out, 1))


AFFINE_STEP = FlowStep(7, subnet=conv_subnet, coupling="affine", linear="permutation")
FLOWS = {
    "glow": FlowSequence([LUConv1x1(7), AFFINE_STEP, FlowStep(7, subnet=pointwise)]),
    "conjugated": FlowSequence(
        [USFBlock(7, subnet=conv_subnet, mask=mask) for mask in ("channel", "checkerboard")]
    ),
}


# An export takes ten seconds: the inference form of the first is that of models, below.
@pytest.mark.parametrize(("name", "fused"), [("glow", False), ("conjugated", False), ("conjugated", True)])
def test_flows_in_onnx_runtime_and_openvino(name, fused, tmp_path):
    flow = randomise_(FLOWS[name]).eval().requires_grad_(False)
    module = BothWays(flow.fuse() if fused else flow)
    dims = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
    program, exported = onnx_program(module, torch.randn(2, 7, 6, 5), dims)
    exported.save(tmp_path / "flow.onnx")
    assert {node.domain for node in exported.model.graph} == {""}
    for shape in SHAPES:
        x = torch.randn(shape)
        expected = module(x)
        assert_same([value.numpy() for value in program.module()(x)], expected)
        for runtime in (run, run_openvino):
            assert_same(runtime(tmp_path / "flow.onnx", x.numpy()), expected)


@pytest.mark.parametrize("channels", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("upper", [False, True])
def test_triangular_inverse(channels, upper):
    matrix = torch.randn(channels, channels, dtype=torch.float64) / channels**0.5
    matrix = matrix.tril(-1) + torch.diag(torch.rand(channels, dtype=torch.float64) + 0.5)
    matrix = matrix.mT if upper else matrix
    expected = torch.linalg.inv(matrix)
    assert torch.allclose(triangular_inverse(matrix), expected, rtol=1e-10, atol=1e-10)


def backbone(channels=(5, 8), strides=(2, 4)):
    return Backbone(Pyramid(channels, strides), {"name": "pyramid"}, mean=(0.5,) * 3, std=(0.5,) * 3)


def model_of(kind, **options):
    model = kind(backbone(), **{"steps": 1, **options})
    model.initialize(model.features(torch.rand(8, 3, 16, 24)))
    return perturbed(model)


AFFINE = {"coupling": "affine", "linear": "permutation"}
MODELS = [
    (FastFlow, AFFINE, True),  # its plain form: `exported`
    (UFlow, {}, False),
    (UFlow, AFFINE, True),
    (CFlow, {"encoding_channels": 8}, False),
    (CFlow, {"encoding_channels": 8, **AFFINE}, True),
]


def scores(model, images):
    """What the file computes, by the model's public methods."""
    features = model.features(images)
    latents = [z[..., : m.shape[2], : m.shape[3]] for z, m in zip(model(images)[0], features, strict=True)]
    return usf.anomaly_map(latents, tuple(images.shape[2:])), *(usf.squared_norm(z) for z in latents)


@pytest.mark.parametrize(("kind", "options", "fused"), MODELS)
def test_models_in_onnx_runtime_and_openvino(kind, options, fused, tmp_path):
    model = model_of(kind, **options)
    model = model.fuse() if fused else model
    export_onnx(model, tmp_path / "model.onnx", image_size=(16, 16))
    for batch, height, width in IMAGES:
        images = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            for runtime in (run, run_openvino):
                assert_same(runtime(tmp_path / "model.onnx", images.numpy()), scores(model, images))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A calibrated model, its checkpoint and the file that the command line makes of that."""
    pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    network = create_backbone("tf_efficientnet_lite0", out_indices=(0, 1))
    model = FastFlow(network, steps=1)
    images = torch.rand(4, 3, 64, 96)
    model.initialize(model.features(images))
    model = perturbed(model)
    model.calibrate(model.features(images))
    save_checkpoint(folder / "model.pt", model, extra={"image_size": [64, 96]})
    assert main(["export", str(folder / "model.pt"), str(folder / "bottle.onnx")]) == 0
    return model, folder


def test_command_line_exports_the_embedded_backbone(exported):
    """Its padding depends on the images' size."""
    model, folder = exported
    images = torch.rand(1, 3, 250, 333)
    with torch.no_grad():
        assert_same(run(folder / "bottle.onnx", images.numpy()), scores(model, images))


def test_the_file_names_everything_and_has_standard_operators_only(exported):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(exported[1] / "bottle.onnx")
    onnx.checker.check_model(graph)
    assert {opset.domain for opset in graph.opset_import} == {""}
    assert not graph.functions

    def shape(value):
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    assert {value.name: shape(value) for value in (*graph.graph.input, *graph.graph.output)} == {
        "images": ["batch", 3, "height", "width"],
        "anomaly_map": ["batch", 1, "height", "width"],
        "squared_norm_0": ["batch", "height_0", "width_0"],
        "squared_norm_1": ["batch", "height_1", "width_1"],
    }
    kinds = {node.op_type for node in graph.graph.node}
    assert not kinds & {"Loop", "If", "Scan", "Trilu"}  # products of weights are in the file


PAGE = "docs/export.md"


def test_masks_from_the_file_alone(exported, monkeypatch):
    model, folder = exported
    monkeypatch.chdir(folder)
    images = torch.rand(2, 3, 64, 96)
    images[0, :, 20:40, 30:50] = 1.0
    prediction = model.predict(images)
    assert prediction.mask.any()

    names = snippets.run(PAGE, "import json", {"images": images.numpy()})
    anomaly_map, squared_norms = names["anomaly_map"], names["squared_norms"]
    assert np.abs(anomaly_map - prediction.anomaly_map.numpy()).max() < 1e-4
    assert torch.equal(names["mask"], prediction.mask)
    assert [len(found) for found in names["regions"]] == [len(found) for found in prediction.regions]
    channels = json.loads(names["metadata"]["usf_kernels.channels"])
    assert channels == list(model.latent_channels)
    white = usf.log_nfa(squared_norms, 8, channels=channels)
    assert torch.allclose(
        white, usf.log_nfa([torch.from_numpy(u) for u in squared_norms], 8, channels=channels)
    )


def test_openvino(exported, monkeypatch):
    pytest.importorskip("openvino")
    model, folder = exported
    monkeypatch.chdir(folder)
    for shape in ((1, 3, 64, 96), (3, 3, 50, 67)):
        images = torch.rand(shape)
        with torch.no_grad():
            expected = scores(model, images)
        names = snippets.run(PAGE, "import openvino", {"images": images.numpy()})
        assert_same([names["anomaly_map"], *names["squared_norms"]], expected)


def test_one_size_and_the_baseline(tmp_path):
    model = Mahalanobis(backbone()).fit([torch.randn(4, c, 6, 6) for c in (5, 8)])
    export_onnx(model, tmp_path / "model.onnx", image_size=(24, 16), dynamic_size=False)
    images = torch.rand(3, 3, 24, 16)
    found = run(tmp_path / "model.onnx", images.numpy())
    assert_same(found[:1], [model.predict(images).anomaly_map])
    assert_same(found[1:], [usf.squared_norm(z) for z in model.latents(model.backbone(images))])


class OneSize(Pyramid):
    """As transformers with a fixed number of positions."""

    def forward(self, images):
        if images.shape[2:] != (16, 24):
            raise AssertionError("Input height doesn't match model (16)")
        return super().forward(images)


def test_errors_leave_the_file_as_it_is(tmp_path, monkeypatch):
    path, model = tmp_path / "model.onnx", model_of(FastFlow, steps=0)
    path.write_bytes(b"before")

    def refuses(error, message, model=model, size=(16, 24), **options):
        with pytest.raises(error, match=message):
            export_onnx(model, path, image_size=size, **options)
        assert path.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [path]

    refuses(TypeError, "model: expected a FastFlow, .*, found Linear", nn.Linear(2, 2))
    refuses(TypeError, "model: expected float32 weights, found torch.bfloat16", model.fuse(torch.bfloat16))
    refuses(TypeError, r"image_size: expected a pair \(height, width\), found 16", size=16)
    refuses(ValueError, r"image_size\[1\]: expected an int at least 1, found 0", size=(16, 0))
    refuses(ValueError, "image_size: the model does not take 1x1 images", size=(1, 1))
    model.backbone.network = OneSize()
    refuses(ValueError, "does not take 16x16 images: Input height doesn't match", size=(16, 16))
    refuses(RuntimeError, "cannot be exported; dynamic_size=False exports it for image_size alone")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuses(ImportError, r"export needs onnx and onnxscript: pip install 'usf-kernels\[export\]'")


def test_a_file_with_other_results_is_not_written(tmp_path, monkeypatch):
    model = Mahalanobis(backbone()).fit([torch.randn(4, c, 6, 6) for c in (5, 8)])
    monkeypatch.setattr(export, "TOLERANCE", -1.0)  # nothing agrees so well
    with pytest.raises(RuntimeError, match="ONNX Runtime computes another anomaly_map than the model"):
        export_onnx(model, tmp_path / "model.onnx", image_size=(16, 24), dynamic_size=False)
    assert not list(tmp_path.iterdir())


def test_command_line_errors(exported, tmp_path, capsys):
    model, _ = exported
    save_checkpoint(tmp_path / "model.pt", model)
    assert main(["export", str(tmp_path / "model.pt"), str(tmp_path / "model.onnx")]) == 2
    assert "does not say its images' size, pass --image-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (1, 2, 1), (2, 3, 1), (3, 2, 2)]
)
def test_padding_is_that_of_timm(kernel, stride, dilation):
    padding = pytest.importorskip("timm.layers.padding")
    for size in range(1, 40):
        expected = padding.get_same_padding(size, kernel, stride, dilation)
        assert same_padding(size, kernel, stride, dilation) == expected
