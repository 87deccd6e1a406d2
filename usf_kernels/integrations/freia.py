"""FrEIA's modules on this package's operations, and this package's modules under FrEIA's contract.

All are `InvertibleModule`s for `SequenceINN`, `GraphINN` and `ReversibleGraphNet`, beside FrEIA's own. A
class named `Fast...` takes the arguments of the class that it is named after and has its parameters, results
and state_dict keys. All are importable by name, so that they pickle.
"""

from __future__ import annotations

from usf_kernels.extras import needs_extra
from usf_kernels.integrations.all_in_one import AllInOneMixin
from usf_kernels.integrations.couplings import GLOWMixin, NICEMixin, RNVPMixin
from usf_kernels.integrations.sequence import SequenceMixin

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
    """`FrEIA.modules.AllInOneBlock`, faster."""


class FastGLOWCouplingBlock(GLOWMixin, GLOWCouplingBlock):
    """`FrEIA.modules.GLOWCouplingBlock`, faster."""


class FastNICECouplingBlock(NICEMixin, NICECouplingBlock):
    """`FrEIA.modules.NICECouplingBlock`, faster."""


class FastRNVPCouplingBlock(RNVPMixin, RNVPCouplingBlock):
    """`FrEIA.modules.RNVPCouplingBlock`, faster."""


class FastSequenceINN(SequenceMixin, SequenceINN):
    """`FrEIA.framework.SequenceINN`, faster."""


CLASSES = {
    AllInOneBlock: FastAllInOneBlock,
    GLOWCouplingBlock: FastGLOWCouplingBlock,
    NICECouplingBlock: FastNICECouplingBlock,
    RNVPCouplingBlock: FastRNVPCouplingBlock,
    SequenceINN: FastSequenceINN,
}
