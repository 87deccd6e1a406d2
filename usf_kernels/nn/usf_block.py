"""The conjugated block of uniformly scaling flows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from usf_kernels.kernels.plain import full_precision
from usf_kernels.nn.capture import is_capturing
from usf_kernels.nn.conditioner_layers import overwrites
from usf_kernels.nn.coupling import AdditiveCoupling, Conditioned, Subnet
from usf_kernels.nn.fusible import Fusible
from usf_kernels.nn.linear import LUConv1x1
from usf_kernels.ops import eager, masked_additive_coupling
from usf_kernels.ops.checks import check_choice, check_features, check_int, compute_dtype, promoted_dtype
from usf_kernels.ops.linear import linear
from usf_kernels.ops.matrices import accurate_inverse, lu_inverse, matrix_gradient

if TYPE_CHECKING:
    from usf_kernels.nn.tape import Tape


class CheckerboardCoupling(Conditioned):
    """Additive coupling `y = x + (1 - m) * subnet(m * x)`, where m is 1 if the sum of the spatial indices is
    even (or odd); log-det 0. RealNVP (arXiv:1605.08803), section 3.4.

    Args:
        channels: C, at least 1.
        subnet: called once as `subnet(C + cond_channels, C)`; see `AdditiveCoupling`.
        odd: m is 1 where the sum is odd. Alternate it along a flow, so that every position is shifted.
        cond_channels, zero_init: see `AdditiveCoupling`.

    `forward(x, cond=None) -> (y, log_det)` and `inverse(y, cond=None) -> (x, log_det)` take (B, C, *spatial)
    with at least one spatial dimension; log_det is a 0-d zero.

    Raises:
        TypeError, ValueError: a bad argument, an x or cond of the wrong shape or dtype.
    """

    def __init__(
        self,
        channels: int,
        *,
        subnet: Subnet,
        odd: bool = False,
        cond_channels: int = 0,
        zero_init: bool = True,
    ) -> None:
        check_int("channels", channels, 1)
        check_choice("odd", odd, (False, True))
        super().__init__(
            channels, channels, channels, subnet=subnet, cond_channels=cond_channels, zero_init=zero_init
        )
        self.odd = odd

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (y, 0)."""
        return self._run(x, cond, "x", inverse=False)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, 0)."""
        return self._run(z, cond, "z", inverse=True)

    def _run(self, x: Tensor, cond: Tensor | None, name: str, *, inverse: bool) -> tuple[Tensor, Tensor]:
        check_features(name, x, self.channels)
        mask = checkerboard(x, odd=self.odd)
        y = masked_additive_coupling(x, self.condition(x * mask, cond), mask, inverse=inverse)
        return y, y.new_zeros((), dtype=compute_dtype(y))


def checkerboard(x: Tensor, *, odd: bool = False) -> Tensor:
    """Return bool (*spatial), True where the sum of the indices is even, or odd if `odd`.

    Raises:
        ValueError: an x without spatial dimensions.
    """
    if x.ndim < 3:
        raise ValueError(
            "mask: a checkerboard needs spatial dimensions, expected x of shape (B, C, *spatial), found "
            f"{tuple(x.shape)}"
        )
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for size in x.shape[2:]:
        total = total[..., None] + torch.arange(size, device=x.device)
    return total % 2 == int(odd)


class USFBlock(Fusible, nn.Module):
    """A coupling between a linear map and its inverse, `B = A^-1 . C . A`: log-det 0. The block of the
    uniformly scaling flows of arXiv:2510.09452.

    It is evaluated as a residual block: with Q the rows of A that feed the conditioner f, b their bias, and R
    the columns of A^-1 that its output reaches, `B(x) = x + R f(Q x + b)`. Because Q R = 0, Q reads the same
    from B(x), so the inverse is `y - R f(Q y + b)` and costs the same. No half is ever split off or written
    back, and for a mask of channels both products together have the size of one C x C product.

    Args:
        channels: C, at least 2; at least 1 for a checkerboard.
        subnet: makes the conditioner: `subnet(c_in, c_out) -> nn.Module` with c_in = C - C//2 +
            cond_channels and c_out = C//2; C + cond_channels and C for a checkerboard.
        mask: which values of A x condition the others: "half" the first C - C//2 channels, "channel" the
            even ones, "checkerboard" the positions whose indices have an even sum.
        odd: for a checkerboard, condition on the positions whose indices have an odd sum instead.
        cond_channels: channels of the condition, concatenated to the conditioner's input.
        zero_init: start as the identity (see `AdditiveCoupling`).
        prior_scale: scale of the prior on A (see `LUConv1x1`).

    A is the `LUConv1x1` named `linear`, C the module `coupling`; with "channel", that gets the even channels,
    then the odd ones. `forward(x, cond=None) -> (z, log_det)` and `inverse(z, cond=None) -> (x, log_det)`
    take (B, C, *spatial); log_det is a 0-d zero.

    Raises:
        TypeError, ValueError: a bad argument; an x or cond of the wrong shape or dtype; a checkerboard for an
            x without spatial dimensions.
    """

    def __init__(
        self,
        channels: int,
        *,
        subnet: Subnet,
        mask: str = "half",
        odd: bool = False,
        cond_channels: int = 0,
        zero_init: bool = True,
        prior_scale: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("mask", mask, ("half", "checkerboard", "channel"))
        check_int("channels", channels, 1 if mask == "checkerboard" else 2)
        if odd and mask != "checkerboard":
            raise ValueError(f"odd: expected False for mask={mask!r}, found True")
        self.channels, self.mask = channels, mask
        self.linear = LUConv1x1(channels, init="orthogonal", prior_scale=prior_scale)
        options = {"subnet": subnet, "cond_channels": cond_channels, "zero_init": zero_init}
        self.coupling: Conditioned
        if mask == "checkerboard":
            self.coupling = CheckerboardCoupling(channels, odd=odd, **options)
        else:
            self.coupling = AdditiveCoupling(channels, **options)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (z, 0)."""
        return self._run(x, cond, "x", 1)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, 0)."""
        return self._run(z, cond, "z", -1)

    def _run(self, x: Tensor, cond: Tensor | None, name: str, sign: int) -> tuple[Tensor, Tensor]:
        check_features(name, x, self.channels)
        enter, bias, leave = self._maps(x)
        passive, active = self._masks(x)
        inputs = self._product(enter, x, bias)
        shift = self.coupling.condition(inputs if passive is None else inputs * passive, cond)
        shift = shift if active is None else shift * active
        out, update = promoted_dtype(inputs, shift), self._product(leave, shift)
        y = torch.add(x.to(update.dtype), update, alpha=sign).to(out)
        return y, y.new_zeros((), dtype=compute_dtype(y))

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, b and R in the compute dtype."""
        wide = compute_dtype(x, self.linear.upper)
        if self.mask == "half":
            rows, columns = self.linear.conjugation(wide, self.coupling.split)
            return rows, self.linear.bias[: self.coupling.split].to(wide), columns
        with full_precision(x):
            matrix, bias, _ = self.linear.map(wide)
            if torch.compiler.is_exporting() or is_capturing():  # neither supports a general inverse
                inverse = lu_inverse(*(t.double() for t in self.linear.factors()[:2])).to(wide)
            else:
                inverse = accurate_inverse(matrix)
        if self.mask == "checkerboard":
            return matrix, bias, inverse
        return matrix[::2], bias[::2], inverse[:, 1::2]

    def _masks(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Masks of the positions of A x that condition, and that are shifted; None if the maps select."""
        if self.mask != "checkerboard":
            return None, None
        mask = checkerboard(x, odd=self.coupling.odd)
        return mask, ~mask

    def _product(self, matrix: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`matrix @ x + bias` in full precision; given a bias, in the dtype of the conditioner's input."""
        y = linear(x.to(matrix.dtype), matrix, bias)
        return y if bias is None else y.to(promoted_dtype(x, self.linear.upper))

    def pull_back(self, z: Tensor, grad_z: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """Return (x, its gradient) given those of z = forward(x); see `usf_kernels.nn.reversible`."""
        with torch.enable_grad():
            maps = self._maps(z)
        enter, bias, leave = (t.detach() for t in maps)
        passive, active = self._masks(z)
        inputs = self._product(enter, z, bias)  # z and x share it: one evaluation serves both
        inputs = (inputs if passive is None else inputs * passive).requires_grad_()
        with tape.replay():
            given = inputs.clone() if overwrites(self.coupling.subnet) else inputs
            shift = self.coupling.condition(given, tape.cond)
            shift = shift if active is None else shift * active
        grad_z, wide_shift = grad_z.to(leave.dtype), shift.detach().to(leave.dtype)
        x = z.sub_(self._product(leave, wide_shift))
        grad_inputs = tape.pull([shift], [self._product(leave.mT, grad_z)], inputs)
        grads = [None, None, matrix_gradient(grad_z, wide_shift)]
        if grad_inputs is not None:
            grad_inputs = (grad_inputs if passive is None else grad_inputs * passive).to(enter.dtype)
            grads[0] = matrix_gradient(grad_inputs, x.to(enter.dtype))
            grads[1] = eager.channel_sums(grad_inputs)
            grad_z.add_(self._product(enter.mT, grad_inputs))
        pairs = [(value, grad) for value, grad in zip(maps, grads, strict=True) if grad is not None]
        tape.pull(*zip(*pairs, strict=True))
        return x, grad_z

    def extra_repr(self) -> str:
        """The options, for print."""
        return f"{self.channels}, mask={self.mask!r}"
