"""A variational autoencoder whose prior is a uniformly scaling flow.

It extends autoencoders with a Deep SVDD term in the latent space, as arXiv:2510.09452 does: the distance from
a centre becomes the likelihood of a flow, which comes with the term that forbids collapse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from usf_kernels.models.backbones import Backbone, create_backbone
from usf_kernels.models.checks import check_samples, check_trainable
from usf_kernels.models.usflow import USFlow
from usf_kernels.nn.modes import in_mode, makes_weights
from usf_kernels.ops.checks import check_int, check_positive, check_size, compute_dtype

LOG_VARIANCE_RANGE = (-12.0, 8.0)
REDUCED, WIDEST = 32, 256  # channels of the encoder's head, most channels of the decoder


class VAEPrediction(NamedTuple):
    """Scores of images, in nats; each depends on its own image only.

    Attributes:
        score: (B,), reconstruction + latent.
        reconstruction: (B,), `-log p(x | z)` at the posterior's mean z.
        latent: (B,), `-log p(z)` at that z.
        anomaly_map: (B, 1, H, W), squared error of the reconstruction, summed over colours.
    """

    score: Tensor
    reconstruction: Tensor
    latent: Tensor
    anomaly_map: Tensor


class VAEUSFlow(nn.Module):
    """A VAE on a timm encoder, with transposed convolutions as decoder and a `USFlow` as prior.

    The posterior q(z | x) is a normal with diagonal covariance, computed from the last map of the backbone;
    the likelihood p(x | z) is a normal around the decoded image with standard deviation `sigma`. Since sigma
    is fixed and the Kullback-Leibler divergence not negative, the objective is bounded.

    Args:
        backbone: from `create_backbone`; the last of its maps is used.
        image_size: side or (height, width) of the images, multiples of that map's stride, a power of 2.
        trainable: train the encoder too, starting from the backbone's weights; otherwise it stays frozen,
            and checkpoints do not hold it.
        latent: dimensions of z, at least 2.
        sigma: standard deviation of the likelihood.
        width: channels of the decoder at full resolution; doubled with every halving, up to 256.
        blocks, hidden, layers: options of the flow, see `DensityFlow`.

    `model(images) -> (latents, log_det)`: the flow's results at the posterior's mean, (B, latent) and 0-d.

    Raises:
        TypeError, ValueError: for a bad argument, or images that are not floating or have another shape.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        image_size: int | Sequence[int],
        trainable: bool = False,
        latent: int = 64,
        sigma: float = 0.1,
        width: int = 32,
        blocks: int = 4,
        hidden: int = 64,
        layers: int = 2,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(f"backbone: expected one from create_backbone, found {type(backbone).__name__}")
        size = check_size(
            tuple(image_size) if isinstance(image_size, Sequence) else image_size, name="image_size"
        )
        latent, width = check_int("latent", latent, 2), check_int("width", width, 1)
        check_positive("sigma", sigma)
        if trainable and backbone.input_size is not None:
            raise ValueError(
                f"backbone: expected no input_size for a trainable encoder, found {backbone.input_size}"
            )
        self.image_size = size
        self.options = {
            "image_size": list(size),
            "trainable": bool(trainable),
            "latent": latent,
            "sigma": float(sigma),
            "width": width,
            "blocks": blocks,
            "hidden": hidden,
            "layers": layers,
        }
        self._backbone_config = backbone.config
        channels, stride = backbone.channels[-1], backbone.strides[-1]
        halvings = int(math.log2(stride))
        grid = tuple(backbone(torch.zeros(1, 3, *size))[-1].shape[2:])
        if 2**halvings != stride or grid != tuple(side // stride for side in size) or min(grid) < 1:
            raise ValueError(
                f"image_size: expected multiples of the last map's stride, a power of 2, found {size} for "
                f"stride {stride} and a map of {grid}"
            )
        if trainable:
            self.encoder = deepcopy(backbone.network).requires_grad_(True)
            self.register_buffer("mean", backbone.mean.clone(), persistent=False)
            self.register_buffer("std", backbone.std.clone(), persistent=False)
        else:
            self.backbone = backbone
        self.head = nn.Sequential(
            nn.Conv2d(channels, REDUCED, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(REDUCED * math.prod(grid), 2 * latent),
        )
        self.decoder = _decoder(latent, grid, halvings, width)
        self.prior = USFlow(latent, blocks=blocks, hidden=hidden, layers=layers)
        self.fused = False

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of `from_config`, as plain JSON values."""
        return {"backbone": self._backbone_config, **self.options}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the untrained model described by `config`; raise as `create_backbone` and the class do."""
        options = dict(config)
        return cls(create_backbone(**options.pop("backbone")), **options)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), (B, latent) each, for images (B, 3, H, W) in [0, 1]."""
        check_samples("images", images, (3, *self.image_size))
        if self.options["trainable"]:
            images = images.to(next(self.encoder.parameters()).dtype)
            features = self.encoder((images - self.mean) / self.std)[-1]
        else:
            features = self.backbone(images)[-1].to(self.head[0].weight.dtype)
        mean, log_variance = self.head(features).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (B, latent) to the mean of p(x | z), images (B, 3, H, W) in [0, 1]."""
        return self.decoder(z.to(next(self.decoder.parameters()).dtype))  # a fused prior may have another

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to the flow's latents and log-determinant, at the posterior's mean."""
        return self.prior(self.posterior(images)[0])

    def elbo(self, images: Tensor) -> Tensor:
        """`E_q[log p(x | z) + log p(z)] + H[q]` in nats, (B,): a lower bound of log p(x).

        The expectation is over one z per image, from torch's global generator; the entropy is exact.
        """
        mean, log_variance = self.posterior(images)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        entropy = 0.5 * (1 + math.log(2 * math.pi) + log_variance).sum(1)
        return self._log_likelihood(images, z) + self.prior.log_prob(z) + entropy

    def loss(self, batch: Tensor) -> Tensor:
        """`-mean ELBO / (3 H W)`, in nats per value: 0-d.

        Raises:
            TypeError: on the inference form.
        """
        check_trainable(self, "loss")
        return -self.elbo(batch).mean() / math.prod((3, *self.image_size))

    @torch.no_grad()
    def predict(self, batch: Tensor) -> VAEPrediction:
        """Score images (B, 3, H, W) in [0, 1] at the posterior's mean, without sampling."""
        with in_mode(self, training=False):
            z, _ = self.posterior(batch)
            latent, error = -self.prior.log_prob(z), (batch - self.decode(z)).square()
        reconstruction = -self._log_density(error)
        return VAEPrediction(reconstruction + latent, reconstruction, latent, error.sum(1, keepdim=True))

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Draw n images (n, 3, H, W): latents from the prior (torch's global generator), decoded."""
        return self.decode(self.prior.sample(n))

    @makes_weights
    def fuse(self, dtype: torch.dtype | None = None) -> Self:
        """Return a copy for inference, with the flow and a frozen backbone in their inference forms, see
        `DensityFlow.fuse`.

        Args:
            dtype: dtype of the flow's weights; None keeps it.

        Returns:
            A copy in evaluation mode, without a loss; this model stays as it is.
        """
        fused = deepcopy(self).eval().requires_grad_(False)
        if not fused.fused and not self.options["trainable"]:
            fused.backbone = fused.backbone.fuse()
        fused.prior, fused.fused = fused.prior.fuse(dtype), True
        return fused

    def _log_likelihood(self, images: Tensor, z: Tensor) -> Tensor:
        return self._log_density((images - self.decode(z)).square())

    def _log_density(self, squared_error: Tensor) -> Tensor:
        """Return log p(x | z), (B,), from the squared errors (B, 3, H, W)."""
        variance = self.options["sigma"] ** 2
        values = math.prod(squared_error.shape[1:])
        total = squared_error.flatten(1).sum(1, dtype=compute_dtype(squared_error))
        return -0.5 * (total / variance + values * math.log(2 * math.pi * variance))


def _decoder(latent: int, grid: tuple[int, ...], halvings: int, width: int) -> nn.Module:
    """Make the network from latents to images: a linear layer to the coarsest map, then transposed
    convolutions."""
    widths = [min(WIDEST, width * 2**i) for i in range(halvings, -1, -1)]
    layers: list[nn.Module] = [
        nn.Linear(latent, widths[0] * math.prod(grid)),
        nn.Unflatten(1, (widths[0], *grid)),
    ]
    for c_in, c_out in pairwise(widths):
        layers += [nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1), nn.Sigmoid())
