"""FrEIA's two-sided couplings in fewer passes over memory: NICE, RealNVP and Glow.

Both halves are transformed in turn, each by a function of the other. Instances keep their parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from usf_kernels.integrations.faster import Faster, clamp_atan, named
from usf_kernels.kernels.plain import autocasts
from usf_kernels.nn.conditioner_layers import evaluate

_BASE = ("split_len1", "split_len2", "clamp", "f_clamp")


def may_overwrite(*tensors: Tensor) -> bool:
    """Whether results computed from these tensors may be overwritten: no gradients, and all of one dtype."""
    first = tensors[0]
    return (
        not torch.is_grad_enabled()
        and all(t.dtype == first.dtype for t in tensors)
        and not autocasts(first.device.type)
    )


def scale_and_shift(
    x: Tensor, log_scale: Tensor, shift: Tensor, alpha: float, *, inverse: bool, overwrite: bool
) -> Tensor:
    """Return `x * exp(log_scale) + alpha * shift` or its inverse; `overwrite` may overwrite `log_scale`.

    Overwriting saves fresh memory, which on a CPU costs more than the arithmetic.
    """
    if inverse:
        difference = torch.sub(x, shift, alpha=alpha)
        if overwrite:
            return difference.mul_(log_scale.neg_().exp_())
        return difference * torch.exp(-log_scale)
    if overwrite:
        return log_scale.exp_().mul_(x).add_(shift, alpha=alpha)
    return torch.add(log_scale.exp() * x, shift, alpha=alpha)


class TwoSidedMixin(Faster):
    """Mixin for coupling blocks of FrEIA, to stand before them in a class's bases."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.begin_fast()

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Same as the original: ((y,), log_det (B,))."""
        (x,), c = x, list(c or ()) if self.conditional else []
        halves, log_dets = list(x.split([self.split_len1, self.split_len2], dim=1)), []
        for active in (1, 0) if rev else (0, 1):
            passive = halves[1 - active]
            inputs = torch.cat([passive, *c], dim=1) if c else passive
            halves[active], log_det = self._transform(halves[active], inputs, active, rev)
            log_dets.append(log_det)
        first, second = log_dets
        log_det = x.new_zeros(x.shape[0]) if first is None else first + second
        return (torch.cat(halves, dim=1),), log_det

    def _transform(self, x: Tensor, inputs: Tensor, active: int, rev: bool) -> tuple[Tensor, Tensor | None]:
        """Transform one half (the first if `active` is 0); return it and the log-det (B,), None for 0."""
        raise NotImplementedError


class NICEMixin(TwoSidedMixin):
    """Mixin for `NICECouplingBlock`; arXiv:1410.8516, section 3.2.

    The log-determinant is a tensor of zeros, while the original's is a number.
    """

    needs = (*_BASE, "F", "G")

    def _transform(self, x: Tensor, inputs: Tensor, active: int, rev: bool) -> tuple[Tensor, None]:
        shift = (self.G if active else self.F)(inputs)
        return (x - shift if rev else x + shift), None


class _AffineMixin(TwoSidedMixin):
    """Mixin for couplings `y = x * exp(s) + t` with `s = clamp * f_clamp(raw)`."""

    uniform = False
    _is_atan: bool

    def _coefficients(self, inputs: Tensor, active: int) -> tuple[Tensor, Tensor]:
        """Return (raw, t) of one half."""
        raise NotImplementedError

    def begin_fast(self) -> None:
        self._is_atan = named(self.f_clamp) is clamp_atan

    def end_fast(self) -> None:
        del self._is_atan

    def _transform(self, x: Tensor, inputs: Tensor, active: int, rev: bool) -> tuple[Tensor, Tensor]:
        raw, shift = self._coefficients(inputs, active)
        bound = torch.atan if self._is_atan else self.f_clamp
        factor = 0.636 * self.clamp if self._is_atan else self.clamp
        overwrite, bounded = may_overwrite(raw, x, shift), bound(raw)
        fresh = overwrite and bound in (torch.atan, torch.tanh)  # others may return a view
        log_scale = bounded.mul_(factor) if fresh else bounded * factor
        log_det = log_scale.sum(dim=tuple(range(1, log_scale.ndim)))
        y = scale_and_shift(x, log_scale, shift, 1.0, inverse=rev, overwrite=overwrite)
        return y, -log_det if rev else log_det


class RNVPMixin(_AffineMixin):
    """Mixin for `RNVPCouplingBlock`; arXiv:1605.08803, equations 4 and 5."""

    needs = (*_BASE, "subnet_s1", "subnet_t1", "subnet_s2", "subnet_t2")

    def _coefficients(self, inputs: Tensor, active: int) -> tuple[Tensor, Tensor]:
        if active:
            return evaluate(self.subnet_s1, inputs), evaluate(self.subnet_t1, inputs)
        return evaluate(self.subnet_s2, inputs), evaluate(self.subnet_t2, inputs)


class GLOWMixin(_AffineMixin):
    """Mixin for `GLOWCouplingBlock`; arXiv:1807.03039, table 1."""

    needs = (*_BASE, "subnet1", "subnet2")

    def _coefficients(self, inputs: Tensor, active: int) -> tuple[Tensor, Tensor]:
        channels = self.split_len2 if active else self.split_len1
        params = evaluate(self.subnet1 if active else self.subnet2, inputs)
        return params[:, :channels], params[:, channels:]
