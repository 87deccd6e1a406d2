"""Faster classes for anomalib's modules."""

from __future__ import annotations

from anomalib.models.components.flow import AllInOneBlock

from usf_kernels.integrations.all_in_one import AllInOneMixin


class FastAllInOneBlock(AllInOneMixin, AllInOneBlock):
    """`anomalib.models.components.flow.AllInOneBlock`."""


CLASSES = {AllInOneBlock: FastAllInOneBlock}
