"""FrEIA's blocks in small: options, conditioners, parameters off their initial values."""

import torch
from FrEIA import modules
from torch import nn

from usf_kernels.integrations import freia

LAYERS = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]
COUPLINGS = [
    (modules.GLOWCouplingBlock, freia.FastGLOWCouplingBlock),
    (modules.RNVPCouplingBlock, freia.FastRNVPCouplingBlock),
    (modules.NICECouplingBlock, freia.FastNICECouplingBlock),
]
ALL_IN_ONE = [
    {},
    {"gin_block": True, "permute_soft": True},
    {"learned_householder_permutation": 2},
    {"learned_householder_permutation": 2, "permute_soft": True, "reverse_permutation": True},
    {"global_affine_type": "SIGMOID", "global_affine_init": 0.8, "reverse_permutation": True},
    {"global_affine_type": "EXP", "affine_clamping": 1.0, "gin_block": True},
]
CLAMPS = ["ATAN", "TANH", "SIGMOID", lambda raw: raw / (1 + raw.abs())]


def subnet_of(rank):
    layer, options = LAYERS[rank], {} if rank == 0 else {"kernel_size": 3, "padding": 1}
    return lambda c_in, c_out: nn.Sequential(layer(c_in, 5, **options), nn.Tanh(), layer(5, c_out, **options))


def trained(module):
    """In float64, parameters off their initial values, rotations more orthogonal than float32 has them."""
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith(("w_perm", "w_0")):
                u, _, v = torch.linalg.svd(parameter.flatten(1))
                parameter.copy_((u @ v).view_as(parameter))
        for block in module.modules():
            if getattr(block, "w_perm_inv", None) is not None:
                block.w_perm_inv.copy_(block.w_perm.transpose(0, 1))
    return module
