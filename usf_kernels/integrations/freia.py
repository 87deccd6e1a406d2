"""Faster classes for FrEIA's modules; they pickle, so they have names."""

from __future__ import annotations

from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock

from usf_kernels.integrations.all_in_one import AllInOneMixin, SequenceMixin


class FastAllInOneBlock(AllInOneMixin, AllInOneBlock):
    """`FrEIA.modules.AllInOneBlock`."""


class FastSequenceINN(SequenceMixin, SequenceINN):
    """`FrEIA.framework.SequenceINN`."""


CLASSES = {AllInOneBlock: FastAllInOneBlock, SequenceINN: FastSequenceINN}
