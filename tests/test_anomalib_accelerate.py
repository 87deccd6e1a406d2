"""anomalib's models accelerated: the same values where they are right, on images of any size, and back."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

import usf_kernels as usf
from usf_kernels.integrations.accelerate import accelerate

pytest.importorskip("anomalib")
from anomalib.models import Cflow
from anomalib.models.image.cflow.torch_model import CflowModel
from anomalib.models.image.fastflow.torch_model import FastflowModel
from anomalib.models.image.uflow.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.uflow.loss import UFlowLoss
from anomalib.models.image.uflow.torch_model import UflowModel
from FrEIA import framework, modules

SIZE = (64, 96)
pytestmark = pytest.mark.usefixtures("offline")


def fastflow(size=SIZE):
    return trained(FastflowModel(size, "resnet18", pre_trained=False, flow_steps=3))


def uflow(size=SIZE):
    return trained(UflowModel(size, flow_steps=2, backbone="resnet18"))


def cflow(size=SIZE):
    options = {"layers": ("layer2", "layer3"), "condition_vector": 16, "coupling_blocks": 3}
    return trained(CflowModel("resnet18", pre_trained=False, **options))


def trained(model):
    """With parameters as training moves them, in evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "global_" in name or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


MODELS = pytest.mark.parametrize("make", [fastflow, uflow, cflow])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@torch.no_grad()
def predict(model, images):
    prediction = model(images)
    return prediction.pred_score, prediction.anomaly_map


def assert_close(found, expected, dtype):
    """Up to rounding; maps are differences of likelihoods that are 1 at most."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@DTYPES
@MODELS
def test_the_values_that_are_right_are_kept(make, dtype):
    original = make().to(dtype)
    fast = copy.deepcopy(original)
    report = accelerate(fast, exact=True)
    assert report.count > 6
    assert not report.left
    images = torch.rand(2, 3, *SIZE, dtype=dtype)
    assert_close(predict(fast, images), predict(original, images), dtype)
    assert fast(images).pred_mask is None
    if make is not cflow:
        corrected = copy.deepcopy(original)
        accelerate(corrected)
        assert_close(predict(corrected, images), predict(original, images), dtype)
    with torch.no_grad():  # a change is noticed
        for model in (original, fast):
            next(p for n, p in model.named_parameters() if "global_offset" in n).add_(1.0)
    assert_close(predict(fast, images), predict(original, images), dtype)


@torch.no_grad()
@pytest.mark.parametrize("exact", [True, False])
def test_fastflow_ranks_strong_anomalies(exact):
    """Where a likelihood is far below the rounding error of 1."""
    model, images = fastflow(), torch.rand(1, 3, *SIZE)
    ours = copy.deepcopy(model)
    usf.accelerate(ours, exact=exact)
    for scale in (5.0, 6.0, 7.0):
        for norm in (*model.norms, *ours.norms):
            norm.weight.fill_(scale)
        expected = model(images).pred_score
        assert -1e-6 < expected.item() < 0
        torch.testing.assert_close(ours(images).pred_score, expected, rtol=1e-3, atol=0)


def test_what_is_left_is_said():
    model = fastflow()
    known = type(next(module for module in model.modules() if type(module).__name__ == "AllInOneBlock"))

    class Own(known):
        pass

    for module in model.modules():
        if type(module) is known:
            module.__class__ = Own
    blocks = [name for name, module in model.named_modules() if type(module) is Own]
    report = accelerate(model)
    assert "FastflowModel" in report.replaced
    assert not report.notes
    assert blocks
    assert set(report.left) >= set(blocks)
    assert report.left[blocks[0]] == "a subclass of AllInOneBlock, which may compute something else"


@pytest.mark.parametrize("make", [fastflow, uflow])
def test_training_is_the_same(make):
    original = make().double().train()
    fast = copy.deepcopy(original)
    accelerate(fast)
    images = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    results = []
    for model in (fast, original):
        latents, log_dets = model(images)
        loss = sum(z.square().sum() for z in latents) - sum(log_dets).sum()
        parameters = [p for p in model.parameters() if p.requires_grad]
        results.append([*latents, *log_dets, *torch.autograd.grad(loss, parameters)])
    assert_close(*results, torch.float64)


@MODELS
def test_checkpoints_go_both_ways_and_restoring_leaves_nothing(make):
    original, other = make(), make()
    fast = copy.deepcopy(original)
    before = {name: (type(module), set(module.__dict__)) for name, module in fast.named_modules()}
    accelerate(fast)
    assert list(fast.state_dict()) == list(original.state_dict())
    images = torch.rand(1, 3, *SIZE)
    fast.load_state_dict(other.state_dict())
    original.load_state_dict(fast.state_dict())
    assert_close(predict(original, images), predict(other, images), torch.float32)
    again = copy.deepcopy(fast)
    assert_close(predict(again, images), predict(fast, images), torch.float32)
    usf.restore_blocks(fast)
    assert {name: (type(module), set(module.__dict__)) for name, module in fast.named_modules()} == before
    assert all(map(torch.equal, predict(fast, images), predict(other, images)))


@MODELS
def test_accelerated_models_pickle(make):
    model = make()
    accelerate(model)
    images = torch.rand(1, 3, *SIZE)
    expected = predict(model, images)
    again = pickle.loads(pickle.dumps(model))
    assert_close(predict(again, images), expected, torch.float32)


@pytest.mark.parametrize("size", [(50, 83), (66, 67)])
@MODELS
def test_sizes_off_the_grid(make, size):
    model = make(size) if make is fastflow else make()
    accelerate(model)
    images = torch.rand(2, 3, *size)
    score, anomaly_map = predict(model, images)
    assert anomaly_map.shape[-2:] == size
    assert anomaly_map.isfinite().all()
    assert_close([score], [anomaly_map.amax((-2, -1))], torch.float32)
    if make is not cflow:
        latents, _ = model.train()(images)
        assert len(latents) == 3


def test_cflow_scores_images_one_by_one():
    model = cflow()
    images = torch.rand(4, 3, *SIZE)
    theirs = predict(model, images)[1]
    accelerate(model)
    score, maps = predict(model, images)
    alone = [predict(model, image[None]) for image in images]
    assert_close([score, maps], [torch.cat(parts) for parts in zip(*alone, strict=True)], torch.float32)
    assert (maps > 0).all()
    assert (maps < 1).all()
    likelihoods = [scale.mean(0) for scale in model.log_likelihoods(images)]  # theirs is a function of these
    assert [tuple(scale.shape) for scale in likelihoods] == [(8, 12), (4, 6)]
    order = torch.corrcoef(torch.stack([theirs.flatten(), maps.flatten()]))[0, 1]
    assert order > 0.9


def test_uflow_finds_what_does_not_belong_there():
    model = uflow()
    accelerate(model)
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        model.null = usf.calibrate(model.latents(torch.rand(16, 3, *SIZE)))
        clean = model(images).pred_mask
        images[1, :, 20:44, 30:60] *= 6
        mask = model(images).pred_mask
    assert mask.shape == (2, 1, *SIZE)
    assert mask.dtype == torch.bool
    assert clean.float().mean() < 0.05
    assert mask[1, :, 20:44, 30:60].float().mean() > 0.3
    assert torch.equal(mask[0], clean[0])


def test_uflow_mask_of_the_generator_is_what_is_anomalous():
    latents = [torch.randn(1, 32, 16, 16), torch.randn(1, 32, 8, 8)]
    latents[0][:, :, 4:8, 4:8] *= 3
    generator = AnomalyMapGenerator((32, 32))
    complement = generator.compute_anomaly_mask(latents)
    accelerate(generator)
    mask = generator.compute_anomaly_mask(latents)
    assert mask[..., 8:16, 8:16].float().mean() > 0.5
    assert mask.float().mean() < 0.15 < complement.float().mean()
    with pytest.raises(TypeError, match="exact=True"):
        generator.compute_anomaly_mask(latents, window_size=5)
    usf.restore_blocks(generator)
    accelerate(generator, exact=True)
    assert torch.equal(generator.compute_anomaly_mask(latents, window_size=7), complement)


def test_uflow_loss_does_not_depend_on_how_images_are_batched():
    latents, log_det = [torch.randn(3, 4, 5, 6), torch.randn(3, 2, 3, 3)], torch.randn(3)
    loss = UFlowLoss()
    theirs = loss(latents, log_det)
    accelerate(loss)
    alone = [loss([z[i : i + 1] for z in latents], log_det[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(loss(latents, log_det), torch.stack(alone).mean())
    usf.restore_blocks(loss)
    accelerate(loss, exact=True)
    assert torch.equal(loss(latents, log_det), theirs)


def test_what_is_wrong():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, found int"):
        accelerate(3)
    with pytest.raises(ValueError, match=r"found none"):
        accelerate(torch.nn.Linear(2, 2))
    model = fastflow()
    accelerate(model)
    with pytest.raises(ValueError, match=r"restore_blocks"):
        accelerate(model)


def test_cflow_trains_with_one_step_per_batch(monkeypatch):
    model = Cflow("resnet18", ("layer2", "layer3"), pre_trained=False, coupling_blocks=2, condition_vector=16)
    accelerate(model, one_step=True)
    losses, steps = [], []
    optimizer = torch.optim.Adam(model.model.decoders.parameters(), lr=0.01)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    monkeypatch.setattr(model, "log", lambda name, value, **options: losses.append(value))
    monkeypatch.setattr(model, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(model, "optimizers", lambda: optimizer)
    batch = SimpleNamespace(image=torch.rand(2, 3, *SIZE))
    with torch.no_grad():
        likelihoods = torch.cat([scale.flatten() for scale in model.model.log_likelihoods(batch.image)])
    for _ in range(4):
        model.training_step(batch)
    assert len(steps) == 4
    assert losses[0] == pytest.approx(-logsigmoid(likelihoods).sum().item(), rel=1e-4)
    assert losses == sorted(losses, reverse=True)


def test_what_is_corrected_is_said():
    model = Cflow("resnet18", ("layer2",), pre_trained=False, coupling_blocks=1, condition_vector=16)
    name = model.name
    assert accelerate(model).notes == {"model": "scores from 0 to 1, each of one image alone"}
    assert model.name == name  # anomalib's folder for its results
    usf.restore_blocks(model)
    model.post_processor.image_min.fill_(0.5)  # as after a validation
    with pytest.warns(UserWarning, match=r"fitted to scores on another scale.*Engine.validate"):
        accelerate(model)
    assert type(model.model).__name__ == "FastCflowModel"  # all of it, also where warnings are errors
    usf.restore_blocks(model)
    assert not accelerate(model, exact=True).notes


def test_a_decoder_that_was_left_runs_by_itself():
    model, images = cflow(), torch.rand(2, 3, *SIZE)
    whole = copy.deepcopy(model)
    accelerate(whole)
    accelerate(model)
    usf.restore_blocks(model.decoders)
    torch.testing.assert_close(predict(model, images), predict(whole, images), rtol=1e-4, atol=1e-4)


def test_a_graph_whose_inner_results_are_used_twice():
    nodes = [framework.InputNode(6)]
    for _ in range(3):
        options = {"subnet_constructor": lambda c_in, c_out: torch.nn.Linear(c_in, c_out)}
        nodes.append(framework.Node(nodes[-1], modules.AllInOneBlock, options))
    graph = framework.GraphINN(
        [*nodes, framework.OutputNode(nodes[3]), framework.OutputNode(nodes[2])]
    ).eval()
    x = torch.randn(2, 6)
    (first, second), log_det = graph(x)
    accelerate(graph)
    with torch.no_grad():
        (found, other), total = graph(x)
    torch.testing.assert_close((found, other, total), (first.detach(), second.detach(), log_det.detach()))
    with torch.no_grad():
        assert not graph(x, jac=False)[1].any()


def test_copies_leave_the_trainer_where_it_is():
    options = {"pre_trained": False, "coupling_blocks": 1, "visualizer": False, "evaluator": False}
    model = Cflow(backbone="resnet18", layers=["layer1"], **options)
    model._trainer = object()
    accelerate(model)
    assert copy.deepcopy(model)._trainer is None


@torch.no_grad()
@pytest.mark.parametrize("exact", [True, False])
@MODELS
def test_another_generator_of_maps_is_asked(make, exact):
    """One of the user's, or one with a hook."""

    class Sevens(torch.nn.Module):
        def forward(self, *latents, **options):
            return torch.full((2, 1, *SIZE), 7.0)

    model, images, calls = make(), torch.rand(2, 3, *SIZE), []
    accelerate(model, exact=exact)
    if exact or make is not cflow:  # whose corrected scores are none of the original generator
        expected = predict(model, images)
        handle = model.anomaly_map_generator.register_forward_hook(lambda *_: calls.append(1))
        assert_close(predict(model, images), expected, torch.float32)
        assert len(calls) == 1
        handle.remove()
    model.anomaly_map_generator = Sevens()
    found = model(images)
    assert (found.anomaly_map == 7).all()
    assert (found.pred_mask is None) == (exact or make is not uflow)


@pytest.mark.parametrize(("make", "flows"), [(cflow, "decoders"), (fastflow, "fast_flow_blocks")])
def test_hooks_of_flows_are_called(make, flows):
    model, images, calls = make(), torch.rand(2, 3, *SIZE), []
    accelerate(model)
    expected = predict(model, images)
    getattr(model, flows)[0].register_forward_hook(lambda *_: calls.append(1))
    assert_close(predict(model, images), expected, torch.float32)
    assert calls == [1]


def test_decoders_left_in_training_mode_are_fused(monkeypatch):
    """The original leaves them so after every forward pass."""
    model, images = cflow(), torch.rand(2, 3, *SIZE)
    model(images)
    assert model.decoders[0].training
    accelerate(model)
    fused, run = [], type(model)._fused_likelihood
    monkeypatch.setattr(type(model), "_fused_likelihood", lambda *given: fused.append(1) or run(*given))
    model(images)
    assert len(fused) == len(model.decoders)
    assert model.decoders[0].training


def test_subclasses_are_left_and_said():
    class Own(Cflow):
        pass

    model = Own("resnet18", ("layer2",), pre_trained=False, coupling_blocks=1, condition_vector=16)
    report = accelerate(model)
    assert type(model) is Own
    assert report.left == {"Own": "a subclass of Cflow, which may compute something else"}
    assert "model" in report.replaced
