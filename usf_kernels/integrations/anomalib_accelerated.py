"""Base of the faster classes for anomalib's models."""

from __future__ import annotations

import torch
from anomalib.data import InferenceBatch
from torch import Tensor

from usf_kernels.integrations.faster import Faster, is_heard
from usf_kernels.models.native_layers import use_extension_, use_pytorch_


class Accelerated(Faster):
    """Mixin for subclasses of anomalib's classes, listed before them in the bases.

    Attributes:
        exact: keep the original's values where `accelerate` would correct them.
        one_step: train Cflow with one optimiser step per batch of images.
        network: attribute name of the frozen network before the flows; empty for none.
    """

    exact = False
    one_step = False
    network = ""

    def begin_fast(self, *, exact: bool, one_step: bool) -> None:
        """Set the options and run the frozen network in the extension. Undone by `end_fast`."""
        self.exact, self.one_step = exact, one_step
        if self.network and use_extension_(network := getattr(self, self.network)):
            network.to(memory_format=torch.channels_last)

    def end_fast(self) -> None:
        """Undo `begin_fast`."""
        for name in ("exact", "one_step"):
            self.__dict__.pop(name, None)
        if self.network:
            use_pytorch_(getattr(self, self.network).to(memory_format=torch.contiguous_format))

    def maps_itself(self, *generators: type) -> bool:
        """Whether the model's `anomaly_map_generator` is of one of these classes and without hooks, so that
        its maps may be computed in another way."""
        generator = self.anomaly_map_generator
        return type(generator) in generators and not is_heard(generator)


def prediction(maps: Tensor, mask: Tensor | None = None) -> InferenceBatch:
    """Return maps (B, H, W) or (B, 1, H, W) as anomalib's result; an image's score is its map's maximum."""
    return InferenceBatch(pred_score=maps.amax(dim=(-2, -1)), anomaly_map=maps, pred_mask=mask)


def is_recorded() -> bool:
    """Whether a compiler or a tracer records a graph, which gets neither masks nor sizes found at a call."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
