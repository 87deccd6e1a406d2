"""Small sequences of FrEIA's blocks, as they are and replaced."""

import copy

import pytest
import torch
from torch import nn

import usf_kernels as usf

framework = pytest.importorskip("FrEIA.framework")
modules = pytest.importorskip("FrEIA.modules")


def dense(c_in, c_out):
    return nn.Sequential(nn.Linear(c_in, 5), nn.Tanh(), nn.Linear(5, c_out))


def sequence(blocks=3, channels=6, subnet=dense, **options):
    model = framework.SequenceINN(channels)
    for _ in range(blocks):
        model.append(modules.AllInOneBlock, subnet_constructor=subnet, **options)
    return model.eval()


def replaced(model, **options):
    model = copy.deepcopy(model)
    usf.replace_blocks(model, **options)
    return model


def assert_same(found, expected):
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other.detach(), rtol=1e-4, atol=1e-4)
