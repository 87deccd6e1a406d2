"""Batch norms folded into convolutions: the same maps, or the network as it was."""

import pytest
import torch
from torch import nn

from usf_kernels.models import create_backbone
from usf_kernels.models.batch_norms import fold_batch_norms

timm = pytest.importorskip("timm")
NETWORKS = ["test_resnet.r160_in1k", "test_efficientnet.r160_in1k", "test_byobnet.r160_in1k"]


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def randomise_norms_(network):
    for norm in norms(network):
        for values, low, high in ((norm.weight, 0.5, 1.5), (norm.running_var, 0.5, 2.0)):
            values.data.uniform_(low, high)
        norm.bias.data.normal_(0, 0.2)
        norm.running_mean.normal_(0, 0.2)
    return network


def assert_close(found, expected):
    for ours, truth in zip(found, expected, strict=True):
        assert (ours - truth).abs().max() <= 1e-4 * truth.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_backbone_without_norms(name):
    backbone = create_backbone(name, weights=None)
    randomise_norms_(backbone.network)
    fused = backbone.fuse()
    assert norms(backbone.network)
    assert not norms(fused.network)
    images = torch.rand(2, 3, 64, 96)
    assert_close(fused(images), backbone(images))


def test_embedded_backbone():
    backbone = create_backbone()
    fused = backbone.fuse()
    assert not norms(fused.network)
    images = torch.rand(1, 3, 128, 128)
    assert_close(fused(images), backbone(images))


def test_several_backbones():
    backbone = create_backbone(NETWORKS[:2], out_indices=(1, 2), weights=None, input_size=(64, 96))
    fused = backbone.fuse()
    assert not norms(fused.network)
    images = torch.rand(2, 3, 50, 40)
    assert_close(fused(images), backbone(images))


def test_transformer_stays():
    backbone = create_backbone("test_vit.r160_in1k", weights=None)
    images = torch.rand(1, 3, 160, 160)
    assert_close(backbone.fuse()(images), backbone(images))


class Branches(nn.Module):
    """A norm behind a convolution, whose result may be needed without the norm, too."""

    def __init__(self, alone):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.convolution = nn.Conv2d(3, 4, 3)
        self.alone = alone

    def forward(self, x):
        maps = self.convolution(x)
        return [self.norm(maps)] if self.alone else [self.norm(maps), maps]


@pytest.mark.parametrize("alone", [True, False])
def test_only_where_it_changes_nothing(alone):
    network = randomise_norms_(Branches(alone)).eval().requires_grad_(False)
    folded = fold_batch_norms(network, torch.rand(1, 3, 8, 8))
    assert bool(norms(folded)) != alone
    x = torch.rand(2, 3, 9, 7)
    assert_close(folded(x), network(x))
    assert norms(network)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.skipif(not timm.is_model("test_coatnet"), reason="a newer timm has this network")
def test_norms_on_a_branch_stay():
    backbone = create_backbone("test_coatnet", weights=None)
    randomise_norms_(backbone.network)
    fused = backbone.fuse()
    assert len(norms(fused.network)) == len(norms(backbone.network))
    images = torch.rand(1, 3, 160, 160)
    assert_close(fused(images), backbone(images))
