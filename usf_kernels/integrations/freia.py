"""FrEIA's modules on this package's operations, and this package's modules under FrEIA's contract.

All are `InvertibleModule`s for `SequenceINN`, `GraphINN` and `ReversibleGraphNet`, beside FrEIA's own. Those
named `Fast...` take the arguments of the class that they are named after and have its parameters, results
and state_dict keys. They have names of their own, so they pickle.
"""

from __future__ import annotations

from usf_kernels.extras import needs_extra
from usf_kernels.integrations.all_in_one import AllInOneMixin, SequenceMixin
from usf_kernels.integrations.couplings import GLOWMixin, NICEMixin, RNVPMixin

with needs_extra("anomalib", "FrEIA's modules"):
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock, GLOWCouplingBlock, NICECouplingBlock, RNVPCouplingBlock

    from usf_kernels.integrations.flow_modules import FlowModule, FlowStep, LUConv1x1, USFBlock

__all__ = [
    "CLASSES",
    "FastAllInOneBlock",
    "FastGLOWCouplingBlock",
    "FastNICECouplingBlock",
    "FastRNVPCouplingBlock",
    "FastSequenceINN",
    "FlowModule",
    "FlowStep",
    "LUConv1x1",
    "USFBlock",
]


class FastAllInOneBlock(AllInOneMixin, AllInOneBlock):
    """`FrEIA.modules.AllInOneBlock`."""


class FastGLOWCouplingBlock(GLOWMixin, GLOWCouplingBlock):
    """`FrEIA.modules.GLOWCouplingBlock`."""


class FastNICECouplingBlock(NICEMixin, NICECouplingBlock):
    """`FrEIA.modules.NICECouplingBlock`."""


class FastRNVPCouplingBlock(RNVPMixin, RNVPCouplingBlock):
    """`FrEIA.modules.RNVPCouplingBlock`."""


class FastSequenceINN(SequenceMixin, SequenceINN):
    """`FrEIA.framework.SequenceINN`."""


CLASSES = {
    AllInOneBlock: FastAllInOneBlock,
    GLOWCouplingBlock: FastGLOWCouplingBlock,
    NICECouplingBlock: FastNICECouplingBlock,
    RNVPCouplingBlock: FastRNVPCouplingBlock,
    SequenceINN: FastSequenceINN,
}
