"""Replaced models inside Lightning, DistributedDataParallel and torch.compile."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import usf_kernels as usf

pytest.importorskip("FrEIA")
from FrEIA import framework, modules

from usf_kernels.integrations.uniform import UniformBlock


def flow():
    """A sequence of two blocks and one coupling for (4, 3, 2)."""
    subnet = {"subnet_constructor": lambda c_in, c_out: nn.Conv2d(c_in, c_out, 1)}
    net = framework.SequenceINN(4, 3, 2)
    net.append(modules.AllInOneBlock, **subnet)
    net.append(modules.AllInOneBlock, gin_block=True, **subnet)
    net.append(modules.GLOWCouplingBlock, **subnet)
    return net


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        atol = 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)


def train_step(net, x):
    net.zero_grad()
    z, log_det = net(x)
    (0.5 * z.square().sum() - log_det.sum()).backward()
    return [z, log_det, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_torch_compile(when):
    torch._dynamo.reset()
    net, x = flow(), torch.randn(2, 4, 3, 2)
    expected = train_step(copy.deepcopy(net), x)
    if when == "before":
        usf.replace_blocks(net)
    compiled = torch.compile(net, backend="aot_eager" if when == "before" else "eager")
    assert_same(train_step(compiled, x), expected)
    if when == "after":  # the program that was compiled is not used for what has another class now
        assert usf.replace_blocks(compiled).count == 4
        assert_same(train_step(compiled, x), expected)
        usf.restore_blocks(compiled)
        report = usf.replace_blocks(compiled, to="usf")
        assert list(report.notes) == ["_orig_mod.module_list.0"]
        assert_same(train_step(compiled, x), train_step(copy.deepcopy(net), x))
        assert any(isinstance(module, UniformBlock) for module in net.modules())
    with torch.no_grad():
        assert_same(compiled.eval()(x), net.eval()(x))


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("no gloo")
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("to", ["exact", "usf"])
def test_distributed_data_parallel(process_group, to):
    net, x = flow(), torch.randn(2, 4, 3, 2)
    if to == "usf":
        usf.replace_blocks(net, to="usf")
    expected = train_step(copy.deepcopy(net), x)
    # A GIN block's scales have no gradients.
    wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    if to == "exact":  # which may also come later
        assert usf.replace_blocks(wrapped).count == 4
    for _ in range(2):
        assert_same(train_step(wrapped, x), expected)
    assert list(wrapped.module.state_dict()) == list(net.state_dict())


@pytest.mark.parametrize("to", ["exact", "usf"])
def test_lightning(to, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.flow = flow()

        def training_step(self, batch, index):
            z, log_det = self.flow(batch[0])
            return (0.5 * z.square().sum() - log_det.sum()) / z.numel()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(model):
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, DataLoader(TensorDataset(data), batch_size=4))
        return trainer

    data, original = torch.randn(8, 4, 3, 2), Module()
    model = copy.deepcopy(original)
    usf.replace_blocks(model, to=to)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = fit(model)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    if to == "exact":  # the same training as without us, and a checkpoint for the original
        fit(original)
        assert_same(model.parameters(), original.parameters())
        original.load_state_dict(checkpoint)
    else:
        other = Module()
        usf.replace_blocks(other, to="usf")
        other.load_state_dict(checkpoint)
        with torch.no_grad():
            assert_same(other.eval().flow(data), model.eval().flow(data))
