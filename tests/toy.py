"""A model and data with the contract of the real ones, small enough to train in milliseconds."""

import os
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from usf_kernels.training import fit


class ToyFlow(nn.Module):
    """z = W x + b per position, with dropout in front so that a lost generator state would show."""

    def __init__(self, channels, dropout=0.1):
        super().__init__()
        self.config = {"channels": channels, "dropout": dropout}
        self.backbone = nn.Conv2d(3, channels, 1).requires_grad_(False)
        with torch.no_grad():
            self.backbone.weight.copy_(torch.linspace(-1, 1, self.backbone.weight.numel()).view(-1, 3, 1, 1))
            self.backbone.bias.zero_()
        self.weight = nn.Parameter(torch.eye(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.norm = nn.BatchNorm2d(channels)  # buffers that move with training
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def loss(self, batch):
        x = batch[0] if isinstance(batch, (list, tuple)) else self.backbone(batch)
        z = torch.einsum("ij,bjhw->bihw", self.weight, self.dropout(self.norm(x))) + self.bias[:, None, None]
        return 0.5 * z.square().mean() - self.weight.diagonal().abs().log().mean()


class Found(NamedTuple):
    """Fields of a prediction."""

    score: torch.Tensor
    anomaly_map: torch.Tensor
    log_nfa: torch.Tensor
    mask: torch.Tensor
    regions: list


class ToyDetector(ToyFlow):
    """Finds what is bright; trained, calibrated, saved and asked like the real models."""

    def __init__(self, backbone=None, *, coupling="additive", linear="lu"):
        super().__init__(4, dropout=0.0)
        nn.init.normal_(self.norm.bias, std=0.1)
        self.config = {"coupling": coupling, "linear": linear}
        self.register_buffer("level", torch.tensor(0.0))

    def features(self, images):
        return [self.backbone(images)]

    def initialize(self, features):
        with torch.no_grad():
            self.bias.copy_(-features[0].mean((0, 2, 3)))

    def calibrate(self, features, *, false_alarms=0.1):
        self.level.fill_(0.75)

    def fuse(self, dtype=None):
        return self

    @torch.no_grad()
    def predict(self, images, *, log_epsilon=0.0):
        bright = images.mean(1, keepdim=True)
        log_nfa = 10 * (self.level - bright)
        mask = log_nfa <= log_epsilon
        regions = [
            [BrightRegion(log_nfa[i].min().item())] if mask[i].any() else [] for i in range(len(images))
        ]
        return Found(bright.amax((1, 2, 3)), bright, log_nfa, mask, regions)


@dataclass
class BrightRegion:
    log_nfa: float

    def image_box(self, size):
        return 0, 0, *size


class NoisyImages(Dataset):
    """Images with augmentation noise from the global generator, as torchvision's transforms have it."""

    pause = 0.0  # seconds that an image takes

    def __init__(self, count, seed=0, noise=0.1):
        self.images = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        self.noise = noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        time.sleep(self.pause)
        return self.images[index] + self.noise * torch.randn(3, 4, 4)


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def train(run_dir=None, *, model=None, **options):
    """Train a toy model with settings that the options may replace."""
    torch.manual_seed(0)
    model = ToyFlow(4) if model is None else model
    settings = {
        "max_epochs": 6,
        "lr": 0.05,
        "batch_size": 4,
        "ema_decay": 0.9,
        "accelerator": "cpu",
        "checkpoint_every": 1,
    } | options
    history = fit(model, NoisyImages(22), NoisyImages(7, seed=1), run_dir=run_dir, progress=False, **settings)
    return model, history


def train_rank(rank, port, run_dir, **options):
    """One of two processes that train together, started as torchrun would start it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    train(run_dir, devices=2, **options)


def train_slowly(run_dir):
    """`train` with resume, in a process of its own and with time to be killed in."""
    NoisyImages.pause = 0.005
    train(run_dir, resume=True)
