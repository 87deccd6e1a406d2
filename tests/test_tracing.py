"""`torch.jit.trace`, which OpenVINO's `convert_model` calls, with gradients recorded, as by default."""

import pytest
import torch
from torch import nn

import usf_kernels as usf
from usf_kernels.integrations.accelerate import accelerate
from usf_kernels.nn import FlowSequence, FlowStep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class MapOf(nn.Module):
    """An anomaly map alone: graphs return tensors, and nothing that is None."""

    def __init__(self, model, of):
        super().__init__()
        self.model, self.of = model, of

    def forward(self, images):
        return self.of(self.model(images))


def subnet(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def assert_traces(module, x, other):
    """The graph, made again without gradients to compare, gives the module's results for other inputs."""
    traced = torch.jit.trace(module, x)
    with torch.no_grad():
        torch.testing.assert_close(traced(other), module(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coupling", ["additive", "affine"])
@pytest.mark.parametrize("linear", ["lu", "permutation", "none"])
def test_sequences_that_train_reversibly(coupling, linear):
    options = {"coupling": coupling, "linear": linear, "subnet": subnet, "zero_init": False}
    flow = FlowSequence([FlowStep(6, **options) for _ in range(5)]).eval()
    assert_traces(flow, torch.randn(2, 6, 5, 4), torch.randn(2, 6, 5, 4))


@pytest.mark.parametrize("options", [{}, {"coupling": "affine", "linear": "permutation"}])
def test_fastflow(options):
    backbone = usf.models.create_backbone("resnet18", weights=None, out_indices=(2, 3))
    model = usf.models.FastFlow(backbone, steps=4, **options).eval()
    module = MapOf(model, lambda found: usf.anomaly_map(found[0], (64, 64)))
    assert_traces(module, torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64))


@pytest.mark.parametrize("name", ["fastflow", "uflow"])
@pytest.mark.parametrize("exact", [True, False])
def test_accelerated_models_of_anomalib(offline, name, exact):
    torch_model = pytest.importorskip(f"anomalib.models.image.{name}.torch_model")
    if name == "uflow":
        model = torch_model.UflowModel((64, 64), flow_steps=2, backbone="resnet18").eval()
    else:
        model = torch_model.FastflowModel((64, 64), "resnet18", pre_trained=False, flow_steps=2).eval()
    accelerate(model, exact=exact)
    module = MapOf(model, lambda found: found.anomaly_map)
    assert_traces(module, torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64))
