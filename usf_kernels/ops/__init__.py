"""Operations: plain functions on tensors, each with its checks and a choice of implementation."""

import usf_kernels.ops.cpu  # noqa: F401 (it registers the CPU implementations)
from usf_kernels.ops.block import residual_mlp
from usf_kernels.ops.coupling import additive_coupling, affine_coupling, masked_additive_coupling
from usf_kernels.ops.linear import linear_squared_norm
from usf_kernels.ops.lu_conv import lu_conv1x1, lu_log_det
from usf_kernels.ops.score import anomaly_map, squared_norm

__all__ = [
    "additive_coupling",
    "affine_coupling",
    "anomaly_map",
    "linear_squared_norm",
    "lu_conv1x1",
    "lu_log_det",
    "masked_additive_coupling",
    "residual_mlp",
    "squared_norm",
]
