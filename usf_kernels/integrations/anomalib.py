"""anomalib: faster classes for its modules, and this package's models under its engine."""

from __future__ import annotations

from usf_kernels.extras import needs_extra
from usf_kernels.integrations.accelerate import accelerate
from usf_kernels.integrations.all_in_one import AllInOneMixin

with needs_extra("anomalib", "anomalib's models"):
    from anomalib.models.components.flow import AllInOneBlock

    from usf_kernels.integrations.anomalib_usf import UsfCflow, UsfFastflow, UsfUflow

__all__ = ["CLASSES", "FastAllInOneBlock", "UsfCflow", "UsfFastflow", "UsfUflow", "accelerate"]


class FastAllInOneBlock(AllInOneMixin, AllInOneBlock):
    """`anomalib.models.components.flow.AllInOneBlock`, faster."""


CLASSES = {AllInOneBlock: FastAllInOneBlock}
