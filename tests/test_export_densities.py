"""Export of density models, DeepSVDD and VAEUSFlow: in ONNX Runtime and OpenVINO, for any batch."""

import math
from unittest import mock

import pytest
import torch
from exporting import DYNAMIC, assert_same, onnx_program, run, run_openvino
from helpers import max_error, randomise_
from test_fastflow import Pyramid
from torch import nn
from torch.distributions import Gamma, StudentT

from usf_kernels.models import Backbone, DeepSVDD, NonUSFlow, USFlow, VAEUSFlow
from usf_kernels.models.traceable import TraceableGamma, TraceableStudentT, log_gamma


@pytest.mark.parametrize("exporting", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distributions_are_those_of_torch(exporting, dtype):
    x = torch.logspace(-3, 4, 500, dtype=torch.float64)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    truth = torch.lgamma(x)
    with mock.patch("torch.compiler.is_exporting", return_value=exporting):
        assert ((log_gamma(x.to(dtype)) - truth) / (1 + truth.abs())).abs().max() < tolerance
        shape, rate, df = torch.tensor([0.3, 4.0, 70.0], dtype=dtype).split(1)
        value = torch.linspace(0.1, 9, 50, dtype=dtype)
        pairs = [
            (TraceableGamma(shape, rate, validate_args=False), Gamma(shape.double(), rate.double())),
            (TraceableStudentT(df, rate, shape), StudentT(df.double(), rate.double(), shape.double())),
        ]
        for ours, theirs in pairs:
            assert max_error(ours.log_prob(value), theirs.log_prob(value.double())) < 100 * tolerance


class Density(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[0], self.model.log_prob(x)


SHAPE = (4, 3, 5)


def assert_exports(module, path):
    onnx_program(module, torch.randn(2, *SHAPE), {0: DYNAMIC})[1].save(path)
    for batch in (1, 3):
        x = torch.randn(batch, *SHAPE)
        expected = module(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for runtime in (run, run_openvino):
            assert_same(runtime(path, x.numpy()), expected)


@pytest.mark.parametrize(
    ("kind", "fused", "base"),
    [(USFlow, False, "normal"), (USFlow, True, "student_t"), (NonUSFlow, True, "laplace")],
)
def test_density_models_in_onnx_runtime_and_openvino(kind, fused, base, tmp_path):
    model = kind(SHAPE, blocks=1, mask="checkerboard", hidden=6, layers=1, base=base)
    model = randomise_(model).eval().requires_grad_(False)
    assert_exports(Density(model.fuse() if fused else model), tmp_path / "flow.onnx")


class LogProb(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, z):
        return self.base.log_prob(z)


BASES = [
    {"name": "radial", "components": 3},
    {"name": "radial", "p": math.inf, "norm": "log_normal"},
    {"name": "normal_mixture"},
]


# Behind the same flow as above: what a density adds to an export is its base distribution's.
@pytest.mark.parametrize("base", BASES)
def test_base_distributions_in_onnx_runtime_and_openvino(base, tmp_path):
    model = USFlow(SHAPE, blocks=0, base=base)
    assert_exports(LogProb(randomise_(model.base).eval().requires_grad_(False)), tmp_path / "base.onnx")


class Prediction(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return tuple(self.model.predict(images))


@pytest.mark.parametrize("name", ["deep_svdd", "vae", "fused vae"])
def test_other_models_in_onnx_runtime_and_openvino(name, tmp_path):
    if name == "deep_svdd":
        module, x = DeepSVDD((3, 16, 16), latent=5, hidden=8), torch.randn(4, 3, 16, 16)
        module.initialize(x)
    else:
        encoder = Backbone(Pyramid(), {"name": "pyramid"}, mean=(0.5,) * 3, std=(0.5,) * 3)
        vae = VAEUSFlow(encoder, image_size=(16, 16), latent=6, blocks=2, hidden=8, layers=1, width=4)
        vae = randomise_(vae).eval()
        module, x = Prediction(vae.fuse() if name == "fused vae" else vae), torch.rand(4, 3, 16, 16)
    module.eval().requires_grad_(False)
    onnx_program(module, x, {0: DYNAMIC})[1].save(tmp_path / "model.onnx")
    for images in (x, x[:1]):
        expected = module(images)
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert_same(run(tmp_path / "model.onnx", images.numpy()), expected)
        assert_same(run_openvino(tmp_path / "model.onnx", images.numpy()), expected)
