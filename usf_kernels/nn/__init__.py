"""Modules: couplings, linear maps, flow steps and their sequences, all with exact inverses; scores."""

from usf_kernels.nn.act_norm import ActNorm
from usf_kernels.nn.captured_gradients import CapturedGradients
from usf_kernels.nn.conjugation import AffineCheckerboard, Conjugated, Householder
from usf_kernels.nn.coupling import AdditiveCoupling, AffineCoupling
from usf_kernels.nn.flow import FlowSequence, FlowStep
from usf_kernels.nn.fused import FusedFlow
from usf_kernels.nn.linear import LUConv1x1
from usf_kernels.nn.permutation import Permutation
from usf_kernels.nn.scoring import AnomalyMap, SquaredNorm
from usf_kernels.nn.usf_block import CheckerboardCoupling, USFBlock

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCheckerboard",
    "AffineCoupling",
    "AnomalyMap",
    "CapturedGradients",
    "CheckerboardCoupling",
    "Conjugated",
    "FlowSequence",
    "FlowStep",
    "FusedFlow",
    "Householder",
    "LUConv1x1",
    "Permutation",
    "SquaredNorm",
    "USFBlock",
]
