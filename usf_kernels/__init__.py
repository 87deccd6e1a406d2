"""Fast uniformly scaling flows for image anomaly detection, with a threshold that can be trusted."""

try:
    import usf_kernels._core  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"usf_kernels: its C++ extension is missing, or does not load ({error}). `pip install .` makes it"
    ) from error

from usf_kernels import models, nn
from usf_kernels.calibration import calibrate
from usf_kernels.integrations import replace_blocks, restore_blocks
from usf_kernels.integrations.accelerate import accelerate
from usf_kernels.max_tree import ComponentTree, component_tree, component_trees
from usf_kernels.memory import keep_freed_memory
from usf_kernels.null import Null
from usf_kernels.number_of_tests import log_number_of_tests
from usf_kernels.ops import (
    additive_coupling,
    affine_coupling,
    anomaly_map,
    linear_squared_norm,
    lu_conv1x1,
    lu_log_det,
    masked_additive_coupling,
    residual_mlp,
    squared_norm,
)
from usf_kernels.segmentation import Region, log_nfa, regions, segment

__version__ = "0.1.0"

__all__ = [
    "ComponentTree",
    "Null",
    "Region",
    "accelerate",
    "additive_coupling",
    "affine_coupling",
    "anomaly_map",
    "calibrate",
    "component_tree",
    "component_trees",
    "keep_freed_memory",
    "linear_squared_norm",
    "log_nfa",
    "log_number_of_tests",
    "lu_conv1x1",
    "lu_log_det",
    "masked_additive_coupling",
    "models",
    "nn",
    "regions",
    "replace_blocks",
    "residual_mlp",
    "restore_blocks",
    "segment",
    "squared_norm",
]
