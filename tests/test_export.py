"""Export: every module and model, in both forms, as a torch program and in ONNX Runtime, for any size."""

import warnings

import numpy as np
import pytest
import torch
from helpers import conv_subnet, randomise_
from test_fastflow import Pyramid, perturbed
from torch import nn

import usf_kernels as usf
from usf_kernels.models import Backbone, CFlow, FastFlow, UFlow, export_onnx
from usf_kernels.nn import FlowSequence, FlowStep, LUConv1x1, USFBlock
from usf_kernels.ops.reference import triangular_inverse

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SHAPES = [(1, 7, 6, 5), (3, 7, 7, 9), (2, 7, 1, 1)]
IMAGES = [(1, 24, 16), (3, 33, 26)]


def run(content, *arrays):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))


def assert_same(found, expected):
    """Equal to 1e-4, relative to the largest value of each output."""
    for ours, truth in zip(found, expected, strict=True):
        assert ours.shape == tuple(truth.shape)
        scale = max(1.0, truth.abs().max().item())
        np.testing.assert_allclose(ours / scale, truth.numpy() / scale, rtol=0, atol=1e-4)


class BothWays(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        return *self.flow(x), *self.flow.inverse(x)


def pointwise(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, 5, 1), nn.ReLU(), nn.Conv2d(5, c_out, 1))


def flows():
    affine = FlowStep(7, subnet=conv_subnet, coupling="affine", linear="permutation")
    yield "glow", FlowSequence([LUConv1x1(7), affine, FlowStep(7, subnet=pointwise)])
    yield (
        "conjugated",
        FlowSequence(
            [USFBlock(7, subnet=conv_subnet, mask=mask) for mask in ("half", "channel", "checkerboard")]
        ),
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("flow", [pytest.param(flow, id=name) for name, flow in flows()])
def test_flows_in_onnx_runtime(flow, fused, tmp_path):
    flow = randomise_(flow).eval().requires_grad_(False)
    module = BothWays(flow.fuse() if fused else flow)
    size = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module, (torch.randn(2, 7, 6, 5),), dynamic_shapes=({0: size, 2: size, 3: size},)
        )
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
    exported.save(tmp_path / "flow.onnx")
    assert {node.domain for node in exported.model.graph} == {""}
    for shape in SHAPES:
        x = torch.randn(shape)
        expected = module(x)
        assert_same([value.numpy() for value in program.module()(x)], expected)
        assert_same(run(tmp_path / "flow.onnx", x.numpy()), expected)


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
    model = kind(backbone(), **{"steps": 2, **options})
    model.initialize(model.features(torch.rand(8, 3, 16, 24)))
    return perturbed(model)


MODELS = [
    (FastFlow, {"coupling": "additive", "linear": "lu"}),
    (FastFlow, {"coupling": "affine", "linear": "permutation"}),
    (UFlow, {"coupling": "additive", "linear": "lu"}),
    (UFlow, {"coupling": "affine", "linear": "permutation"}),
    (CFlow, {"coupling": "additive", "linear": "lu", "encoding_channels": 8}),
    (CFlow, {"coupling": "affine", "linear": "permutation", "encoding_channels": 8}),
]


def scores(model, images):
    """What the file computes, by the model's public methods."""
    features = model.features(images)
    latents = [z[..., : m.shape[2], : m.shape[3]] for z, m in zip(model(images)[0], features, strict=True)]
    return usf.anomaly_map(latents, tuple(images.shape[2:])), *(usf.squared_norm(z) for z in latents)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "options"), MODELS)
def test_models_in_onnx_runtime(kind, options, fused, tmp_path):
    model = model_of(kind, **options)
    model = model.fuse() if fused else model
    export_onnx(model, tmp_path / "model.onnx", image_size=(16, 16))
    for batch, height, width in IMAGES:
        images = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            assert_same(run(tmp_path / "model.onnx", images.numpy()), scores(model, images))
