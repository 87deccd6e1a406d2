"""Conjugated blocks with any coupling and linear map, and reflections and affine checkerboards for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from usf_kernels.kernels.plain import full_precision
from usf_kernels.nn.coupling import Conditioned, Subnet
from usf_kernels.nn.fusible import Fusible
from usf_kernels.nn.usf_block import checkerboard
from usf_kernels.ops import affine_coupling
from usf_kernels.ops.checks import check_choice, check_clamp, check_features, check_int, compute_dtype
from usf_kernels.ops.linear import linear


class Householder(Fusible, nn.Module):
    """A product of reflections along channels, `y = H_1 ... H_k x` with `H = I - 2 v v^T / |v|^2`; log-det 0.

    The inverse is the transpose. J. Tomczak and M. Welling, arXiv:1611.09630, section 3.

    Args:
        channels: C.
        reflections: k; k = C reaches every orthogonal matrix of determinant (-1)^C.

    The parameter `vectors` (k, C) is drawn from torch's global generator. `forward(x, cond=None) -> (y, 0)`
    and `inverse(y, cond=None) -> (x, 0)` take (B, C, *spatial); `cond` is ignored.

    Raises:
        TypeError, ValueError: a bad argument, an x of the wrong shape or dtype.
    """

    def __init__(self, channels: int, *, reflections: int = 4) -> None:
        super().__init__()
        check_int("channels", channels, 1)
        check_int("reflections", reflections, 1)
        self.channels = channels
        self.vectors = nn.Parameter(torch.randn(reflections, channels))

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """The product of the reflections, (C, C)."""
        vectors = self.vectors if dtype is None else self.vectors.to(dtype)
        product = torch.eye(self.channels, dtype=vectors.dtype, device=vectors.device)
        for v in vectors:
            product = product - torch.outer(product @ v, 2 * v / v.square().sum())
        return product

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (y, 0)."""
        return self._run(x, "x", inverse=False)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, 0)."""
        return self._run(z, "z", inverse=True)

    def _run(self, x: Tensor, name: str, *, inverse: bool) -> tuple[Tensor, Tensor]:
        check_features(name, x, self.channels)
        wide = compute_dtype(x, self.vectors)
        with full_precision(x):
            matrix = self.matrix(wide)
        y = linear(x, matrix.mT if inverse else matrix, None)
        y = y.to(torch.promote_types(x.dtype, self.vectors.dtype))
        return y, y.new_zeros((), dtype=compute_dtype(y))

    def extra_repr(self) -> str:
        """Channels and reflections, for print."""
        return f"{self.channels}, reflections={self.vectors.shape[0]}"


class AffineCheckerboard(Conditioned):
    """Affine coupling on a checkerboard: `y = x` on one colour, `x * exp(s) + t` on the other, with s and t
    from the first. RealNVP (arXiv:1605.08803), section 3.4; s is clamped as in `affine_coupling`.

    Args:
        channels: C, at least 1.
        subnet: called once as `subnet(C + cond_channels, 2 C)`; see `AdditiveCoupling`.
        odd: condition on the positions whose indices have an odd sum.
        clamp: bound on |s|, positive.
        cond_channels, zero_init: see `AdditiveCoupling`.

    `forward(x, cond=None) -> (y, log_det)` and `inverse(y, cond=None) -> (x, log_det)` take (B, C, *spatial)
    with at least one spatial dimension; log_det is (B,).

    Raises:
        TypeError, ValueError: a bad argument, an x or cond of the wrong shape or dtype.
    """

    def __init__(
        self,
        channels: int,
        *,
        subnet: Subnet,
        odd: bool = False,
        clamp: float = 2.0,
        cond_channels: int = 0,
        zero_init: bool = True,
    ) -> None:
        check_int("channels", channels, 1)
        check_choice("odd", odd, (False, True))
        clamp = check_clamp(clamp)
        super().__init__(
            channels, channels, 2 * channels, subnet=subnet, cond_channels=cond_channels, zero_init=zero_init
        )
        self.odd, self.clamp = odd, clamp

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (y, log_det)."""
        return self._run(x, cond, "x", inverse=False)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, log_det)."""
        return self._run(z, cond, "z", inverse=True)

    def _run(self, x: Tensor, cond: Tensor | None, name: str, *, inverse: bool) -> tuple[Tensor, Tensor]:
        check_features(name, x, self.channels)
        passive = checkerboard(x, odd=self.odd)
        # With zeros for s and t, the coupling leaves the passive positions as they are.
        params = self.condition(x * passive, cond) * ~passive
        return affine_coupling(x, params, split=0, clamp=self.clamp, inverse=inverse)


class Conjugated(Fusible, nn.Module):
    """A coupling between a linear map and its inverse, `B = A^-1 . C . A`; its log-det is the coupling's.

    For an additive coupling and an LU map, `USFBlock` is faster.

    Args:
        linear: A, a flow module whose log-det depends on no data: `LUConv1x1`, `Householder`, `Permutation`,
            or a `FlowSequence` of these.
        coupling: C, a flow module.

    `forward(x, cond=None) -> (z, log_det)` and `inverse(z, cond=None) -> (x, log_det)` take (B, C, *spatial);
    the condition goes to the coupling.
    """

    def __init__(self, linear: nn.Module, coupling: nn.Module) -> None:
        super().__init__()
        self.linear, self.coupling = linear, coupling

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (z, log_det)."""
        h, _ = self.linear(x)
        h, log_det = self.coupling(h, cond)
        return self.linear.inverse(h)[0], log_det

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, log_det)."""
        h, _ = self.linear(z)
        h, log_det = self.coupling.inverse(h, cond)
        return self.linear.inverse(h)[0], log_det
