"""The linear map between couplings that mixes the channels: the LU 1x1 convolution."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from usf_kernels.kernels.plain import full_precision
from usf_kernels.nn.act_norm import ActNorm
from usf_kernels.nn.fusible import Fusible
from usf_kernels.ops import lu_conv1x1
from usf_kernels.ops.checks import (
    check_choice,
    check_features,
    check_int,
    check_number,
    check_positive,
    check_shape,
    compute_dtype,
    count_positions,
    promoted_dtype,
)
from usf_kernels.ops.conjugation import conjugation
from usf_kernels.ops.eager import by_hand, channel_sums
from usf_kernels.ops.linear import linear
from usf_kernels.ops.lu_map import apply_factors, lu_map
from usf_kernels.ops.matrices import accurate_inverse, apply_matrix, factors_pay, matrix_gradient
from usf_kernels.ops.triangles import diagonal_of

if TYPE_CHECKING:
    from usf_kernels.nn.tape import Tape


class LUConv1x1(Fusible, nn.Module):
    """Invertible 1x1 convolution `y = L U x + b`. Glow (arXiv:1807.03039), section 3.2, and the uniformly
    scaling flows of arXiv:2510.09452.

    L is unit lower triangular, U upper triangular with the diagonal `signs * exp(log_diagonal)`. Only the
    strict lower triangle of the parameter `lower` and the strict upper triangle of `upper` are read; all
    other entries get no gradient.

    Args:
        channels: C.
        bias: add a bias b.
        diagonal: "free" trains `log_diagonal`; "fixed" keeps |u_ii| = 1, so the log-det is 0.
        init: "identity", or "orthogonal". The second draws a random rotation from torch's global generator,
            factorises it with pivoting, and drops the permutation: reordering its rows keeps a matrix
            orthogonal, and pivoting keeps the triangles well conditioned. With a fixed diagonal no rotation
            can be reached, and with a prior none is likely; then the triangles are drawn from
            N(0, 1 / (4 C)), which gives the product a condition number of about 4 at any C.
        prior_scale: s of the log-normal prior on |u_ii|, see `log_prior`; None for no prior.

    `forward(x, cond=None) -> (y, log_det)` and `inverse(y, cond=None) -> (x, log_det)` take (B, C, *spatial);
    log_det is 0-d, P * sum_i log|u_ii| or its negative. `cond` is ignored.

    Raises:
        TypeError, ValueError: a bad argument, an x of the wrong shape or dtype.
    """

    def __init__(
        self,
        channels: int,
        *,
        bias: bool = True,
        diagonal: str = "free",
        init: str = "identity",
        prior_scale: float | None = None,
    ) -> None:
        super().__init__()
        check_int("channels", channels, 1)
        check_choice("diagonal", diagonal, ("free", "fixed"))
        check_choice("init", init, ("identity", "orthogonal"))
        if prior_scale is not None:
            check_positive("prior_scale", prior_scale)
        self.channels, self.diagonal, self.prior_scale = channels, diagonal, prior_scale
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        self.register_buffer("signs", torch.ones(channels))
        self.register_parameter(
            "log_diagonal", nn.Parameter(torch.zeros(channels)) if diagonal == "free" else None
        )
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if bias else None)
        if init == "orthogonal":
            self._init_orthogonal()

    @torch.no_grad()
    def _init_orthogonal(self) -> None:
        if self.log_diagonal is None or self.prior_scale is not None:
            self.lower.normal_(std=0.5 / math.sqrt(self.channels)).tril_(-1)
            self.upper.normal_(std=0.5 / math.sqrt(self.channels)).triu_(1)
            return
        # On the CPU, because not every device has float64, and so that the draw is the same for all devices.
        gaussian = torch.randn(self.channels, self.channels, dtype=torch.float64, device="cpu")
        rotation, _ = torch.linalg.qr(gaussian)
        _, lower, upper = torch.linalg.lu(rotation)
        self.set_triangles(lower, upper)

    @torch.no_grad()
    def set_triangles(self, lower: Tensor, upper: Tensor) -> None:
        """Set the map to L U, of which `lower` holds L below its diagonal, and `upper` U: (C, C) each."""
        diagonal = torch.diagonal(upper)
        self.lower.copy_(torch.tril(lower, -1))
        self.upper.copy_(torch.triu(upper, 1))
        self.signs.copy_(diagonal.sign())
        self.log_diagonal.copy_(diagonal.abs().log())

    @torch.no_grad()
    def whiten_(self, mean: Tensor, covariance: Tensor, *, eps: float = 1e-6) -> LUConv1x1:
        """Set the map so that it takes data with this mean and covariance to mean 0 and covariance I.

        L becomes I and U the Cholesky factor of the precision (U^T U = covariance^-1), computed in float64
        without inverting the covariance.

        Args:
            mean: (C,).
            covariance: (C, C), symmetric; only the lower triangle is read.
            eps: ridge added to the covariance's diagonal, in units of the mean variance, so that dead or
                collinear channels do not get an unbounded scale.

        Returns:
            self.

        Raises:
            ValueError: a wrong shape; a mean that is not finite; a covariance that is not positive definite
                even with the ridge; a module without a bias or with diagonal="fixed", which cannot whiten.
            TypeError: not a floating tensor, or an eps that is no number.
        """
        check_number("eps", eps)
        check_shape("mean", mean, (self.channels,), "(C,)")
        check_shape("covariance", covariance, (self.channels, self.channels), "(C, C)")
        if self.log_diagonal is None:
            raise ValueError(
                "diagonal: expected 'free' for whiten_ (|u_ii| = 1 cannot rescale), found 'fixed'"
            )
        if self.bias is None:
            raise ValueError("bias: expected True for whiten_ (the mean has to be removed), found False")
        mean, covariance = (t.detach().to("cpu", torch.float64) for t in (mean, covariance))
        if not mean.isfinite().all():
            raise ValueError("mean: expected finite numbers, found others among them")
        eye = torch.eye(self.channels, dtype=torch.float64, device="cpu")
        covariance = torch.tril(covariance) + torch.tril(covariance, -1).mT
        covariance = covariance + eps * torch.diagonal(covariance).mean() * eye
        # covariance = V V^T with V upper (a Cholesky from the last row up), and U = V^-1 is upper too.
        factor, info = torch.linalg.cholesky_ex(covariance.flip(0, 1))
        if int(info) != 0 or not bool(torch.isfinite(factor).all()):
            raise ValueError(
                "covariance: expected a finite, positive definite matrix, found one that is not; "
                "raise eps or use more samples than channels"
            )
        upper = torch.linalg.solve_triangular(factor.flip(0, 1), eye, upper=True)
        self.set_triangles(eye, upper)
        self.bias.copy_(-(upper @ mean))
        return self

    def factors(self, act_norm: ActNorm | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (lower, upper, bias) as `lu_conv1x1` takes them.

        With `act_norm`, they are those of the ActNorm followed by this map: scaling the inputs scales U's
        columns, which leaves it upper triangular, so both together cost one map.
        """
        diagonal = diagonal_of(self.signs, self.log_diagonal)
        upper, bias = torch.triu(self.upper, 1) + torch.diag(diagonal), self.bias
        if act_norm is not None:
            offset = torch.mv(upper, act_norm.bias)
            offset = offset + torch.mv(torch.tril(self.lower, -1), offset)
            bias = offset if bias is None else offset + bias
            upper = upper * act_norm.log_scale.exp()
        return self.lower, upper, bias

    def log_det(self, positions: int) -> Tensor:
        """log|det| of the forward map on an input of this many positions: 0-d, in nats.

        Raises:
            TypeError, ValueError: `positions` that are no count.
        """
        check_int("positions", positions, 0)
        if self.log_diagonal is None:
            return self.upper.new_zeros((), dtype=compute_dtype(self.upper))
        return positions * self.log_diagonal.to(compute_dtype(self.log_diagonal)).sum()

    def log_prior(self, positions: int) -> Tensor:
        """Log density of the log-normal prior on the diagonal: 0-d, in nats.

        It is the density of |u_ii| for independent `ln|u_ii| ~ N(0, s0^2)`, with `s0 = prior_scale / (C *
        positions)`. It is 0 without a prior (`prior_scale=None`) and for a fixed diagonal.

        Args:
            positions: number of positions P = H * W of the inputs, at least 1.

        Raises:
            TypeError, ValueError: `positions` that are no such number.
        """
        check_int("positions", positions, 1)
        if self.prior_scale is None or self.log_diagonal is None:
            return self.upper.new_zeros((), dtype=compute_dtype(self.upper))
        s0 = self.prior_scale / (self.channels * positions)
        log_u = self.log_diagonal.to(compute_dtype(self.log_diagonal))
        return (-0.5 * (log_u / s0).square() - log_u - math.log(s0 * math.sqrt(2 * math.pi))).sum()

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply: (y, log_det)."""
        return self.run(x, inverse=False)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo: (x, log_det)."""
        return self.run(z, inverse=True)

    def map(self, wide: torch.dtype, act_norm: ActNorm | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (matrix, bias, log-det per position) of this map, or of `act_norm` followed by it, in
        float32 or float64: see `usf_kernels.ops.lu_map`."""
        return lu_map(*(None if v is None else v.to(wide) for v in self._given(act_norm)))

    def _given(self, act_norm: ActNorm | None) -> tuple[Tensor | None, ...]:
        exit_values = (None, None) if act_norm is None else (act_norm.log_scale, act_norm.bias)
        return self.lower, self.upper, self.signs, self.log_diagonal, self.bias, *exit_values

    def conjugation(self, wide: torch.dtype, split: int) -> tuple[Tensor, Tensor]:
        """Return the first `split` rows of this map's matrix and the last C - `split` columns of its inverse,
        in float32 or float64: see `usf_kernels.ops.conjugation`."""
        given = (self.lower, self.upper, self.signs, self.log_diagonal)
        return conjugation(*(None if v is None else v.to(wide) for v in given), split)

    def run(self, x: Tensor, *, inverse: bool, act_norm: ActNorm | None = None) -> tuple[Tensor, Tensor]:
        """Run this map, or `act_norm` followed by it, in either direction."""
        check_features("z" if inverse else "x", x, self.channels)
        if not inverse and not factors_pay(x, self.channels):
            matrix, bias, log_det = self.map(compute_dtype(x, self.upper), act_norm)
            matrix = matrix.to(promoted_dtype(x, self.upper))
            return linear(x, matrix, bias), count_positions(x) * log_det
        log_det = self.log_det(count_positions(x))
        if act_norm is not None:
            log_det = log_det + act_norm.log_det(count_positions(x))
        given = self._given(act_norm)
        if not inverse and by_hand(x, *given):
            return apply_factors(x, *given), log_det
        with full_precision(x):
            lower, upper, bias = self.factors(act_norm)
        return lu_conv1x1(x, lower, upper, bias, inverse=inverse), -log_det if inverse else log_det

    def pull_back(
        self, z: Tensor, grad_z: Tensor, tape: Tape, *, act_norm: ActNorm | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (x, its gradient) given those of z = run(x, inverse=False, act_norm=act_norm); see
        `usf_kernels.nn.reversible`."""
        out, wide = z.dtype, compute_dtype(z, self.upper)
        z, grad_z = z.to(wide), grad_z.to(wide)
        with full_precision(z):
            with torch.enable_grad():
                matrix, bias, log_det = self.map(wide, act_norm)
                log_det = count_positions(z) * log_det
            inverse = accurate_inverse(matrix.detach())
            offset = None if bias is None else -torch.mv(inverse, bias.detach())
            x = apply_matrix(inverse, z, offset).to(out)
            outputs, grads = [matrix, log_det], [matrix_gradient(grad_z, x.to(wide)), tape.grad_log_det]
            if bias is not None:
                outputs.append(bias)
                grads.append(channel_sums(grad_z))
            tape.pull(outputs, grads)
            return x, apply_matrix(matrix.detach().mT, grad_z, None).to(out)

    def extra_repr(self) -> str:
        """The options, for print."""
        prior = "" if self.prior_scale is None else f", prior_scale={self.prior_scale}"
        return f"{self.channels}, bias={self.bias is not None}, diagonal={self.diagonal!r}{prior}"
