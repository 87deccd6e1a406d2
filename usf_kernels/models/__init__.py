"""Reference models: frozen backbones, normalizing flows on their features, and the baseline beside them."""

from usf_kernels.models.backbones import Backbone, create_backbone

__all__ = ["Backbone", "create_backbone"]
