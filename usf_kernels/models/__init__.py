"""Reference models: frozen backbones, normalizing flows on their features, and the baseline beside them."""

from usf_kernels.models.backbones import Backbone, create_backbone
from usf_kernels.models.cflow import CFlow
from usf_kernels.models.deep_svdd import DeepSVDD
from usf_kernels.models.distributions import create_base
from usf_kernels.models.export import export_onnx
from usf_kernels.models.fastflow import FastFlow
from usf_kernels.models.mahalanobis import Mahalanobis
from usf_kernels.models.scoring import Prediction, image_score
from usf_kernels.models.uflow import UFlow
from usf_kernels.models.usflow import DensityFlow, NonUSFlow, USFlow
from usf_kernels.models.vae_usflow import VAEUSFlow

__all__ = [
    "Backbone",
    "CFlow",
    "DeepSVDD",
    "DensityFlow",
    "FastFlow",
    "Mahalanobis",
    "NonUSFlow",
    "Prediction",
    "UFlow",
    "USFlow",
    "VAEUSFlow",
    "create_backbone",
    "create_base",
    "export_onnx",
    "image_score",
]
