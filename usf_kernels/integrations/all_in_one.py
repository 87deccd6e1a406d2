"""The `AllInOneBlock` of FrEIA and anomalib on this package's operations.

Instances keep their parameters, buffers, hooks and place; only their class changes, and so their `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from usf_kernels.integrations.couplings import may_overwrite, scale_and_shift
from usf_kernels.integrations.faster import Faster
from usf_kernels.nn import AffineCoupling
from usf_kernels.nn.conditioner_layers import evaluate
from usf_kernels.nn.folding import WIDE, Coupling, LinearMap
from usf_kernels.ops import affine_coupling
from usf_kernels.ops.checks import count_positions
from usf_kernels.ops.matrices import apply_matrix
from usf_kernels.ops.native import is_observed
from usf_kernels.ops.step import coupling_step


class AllInOneMixin(Faster):
    """Mixin for `AllInOneBlock`, to stand before it in a class's bases.

    A hard permutation is applied as an index, in one operation with coupling and ActNorm. Where the
    permutation is a general matrix, scale and offset are merged into it.

    Attributes:
        compact: save a hard permutation in the state_dict as a (C,) int32 index `w_perm` instead of the two
            dense matrices `w_perm` and `w_perm_inv`. Either value loads both forms.
    """

    compact = False
    uniform = False
    needs = (
        *("in_channels", "splits", "input_rank", "sum_dims", "clamp", "GIN", "reverse_pre_permute"),
        *("householder", "condition_channels", "global_scale", "global_offset", "global_scale_activation"),
        *("w_perm", "w_perm_inv", "subnet"),
    )

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.begin_fast()

    def begin_fast(self) -> None:
        if self.householder:  # results of the original's last forward, which do not copy or pickle
            self.w_perm = self.w_perm_inv = None
        self._find_order()

    def end_fast(self) -> None:
        for name in ("compact", "_order", "_inverse_order", "_found_in"):
            self.__dict__.pop(name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AllInOneMixin:
        known = self._knows_order()
        super()._apply(fn, recurse)
        if not known:
            self._find_order()
            return self
        self._order, self._inverse_order = (
            None if index is None else _moved_to(index, self.w_perm.device)
            for index in (self._order, self._inverse_order)
        )
        self._found_in = self.w_perm, _version(self.w_perm)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.compact and self._is_indexed():
            destination[prefix + "w_perm"] = self._order.to(torch.int32)
            del destination[prefix + "w_perm_inv"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: object, **options: object
    ) -> None:
        index = state_dict.get(prefix + "w_perm")
        if index is not None and _is_index(index):
            eye = torch.eye(len(index), device=index.device, dtype=self.global_scale.dtype)
            shape = (*eye.shape, *[1] * self.input_rank)
            # This state_dict is a copy of the caller's.
            state_dict[prefix + "w_perm"] = eye[index.long()].view(shape)
            state_dict[prefix + "w_perm_inv"] = eye[:, index.long()].view(shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)
        self._find_order()

    @torch.inference_mode(False)  # inference tensors cannot take part in training
    def _find_order(self) -> None:
        """Set the permutation and its inverse as indices; None for a general rotation. They are not buffers,
        since averaging of models would take their mean."""
        self._order = None if self.householder else index_of(self.w_perm.detach().flatten(1))
        self._inverse_order = None if self._order is None else torch.argsort(self._order)
        self._found_in = self.w_perm, _version(self.w_perm)

    def _knows_order(self) -> bool:
        """Whether `w_perm` is what the index was found in, and has not been written to since."""
        matrix, version = self._found_in
        return self._order is None or (self.w_perm is matrix and _version(matrix) == version)

    def _is_indexed(self) -> bool:
        """Whether the permutation may be applied as an index; finds it anew after a write to `w_perm`, as by
        the broadcast of DistributedDataParallel."""
        if self._order is None:
            return False
        if torch.compiler.is_compiling() or self._knows_order():
            return True
        if is_observed():  # for example by `torch.func.vmap`, which replaces it for a call
            return False
        self._find_order()
        return self._order is not None

    def _orders(self) -> tuple[Tensor, Tensor]:
        """Return the permutation and its inverse as indices; call it where `_is_indexed`."""
        if not torch.compiler.is_compiling():
            return self._order, self._inverse_order
        # A graph outlives writes to the matrix, and may be given another one.
        matrix = self.w_perm.flatten(1)
        return matrix.argmax(1), matrix.argmax(0)

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Same as the original: ((y,), log_det (B,))."""
        (x,) = x
        scale, offset = self._scale(), self.global_offset.flatten()
        c = list(c or ()) if self.conditional else []
        if self.GIN:
            return (self._volume_preserving(x, c, offset, rev),), x.new_zeros(x.shape[0], dtype=scale.dtype)
        couple = self._by_index if self._is_indexed() else self._by_matrix
        y, log_det = couple(x, c, scale, offset, rev)
        constant = count_positions(x) * scale.log().sum()
        return (y,), log_det - constant if rev else log_det + constant

    def _scale(self) -> Tensor:
        return self.global_scale_activation(self.global_scale).flatten()

    def _by_index(
        self, x: Tensor, c: list[Tensor], scale: Tensor, offset: Tensor, rev: bool
    ) -> tuple[Tensor, Tensor]:
        (order, inverse_order), split = self._orders(), self.splits[0]
        if self.reverse_pre_permute and not rev:
            x = x.index_select(1, inverse_order)
        passive = x[:, :split]
        if rev:
            passive = x.index_select(1, inverse_order[:split])
            shape = (-1, *[1] * self.input_rank)
            passive = (passive - offset[:split].view(shape)) / scale[:split].view(shape)
        params = self._params(passive, c)
        y, log_det = coupling_step(
            x,
            params,
            split=split,
            clamp=self.clamp,
            index=order,
            scale=scale,
            bias=offset,
            inverse=rev,
        )
        return (y.index_select(1, order) if self.reverse_pre_permute and rev else y), log_det

    def _by_matrix(
        self, x: Tensor, c: list[Tensor], scale: Tensor, offset: Tensor, rev: bool
    ) -> tuple[Tensor, Tensor]:
        rotation, split = self._rotation(), self.splits[0]
        if rev:
            # The original divides by the scale outside of autocast.
            x = apply_matrix(rotation.mT / scale[:, None], x, -offset / scale).to(scale.dtype)
        elif self.reverse_pre_permute:
            x = apply_matrix(rotation.mT, x, None)
        params = self._params(x[:, :split], c)
        y, log_det = affine_coupling(x, params, split=split, clamp=self.clamp, inverse=rev)
        if not rev:
            y = apply_matrix(rotation * scale, y, rotation @ offset)
        elif self.reverse_pre_permute:
            y = apply_matrix(rotation, y, None)
        return y, log_det

    def _volume_preserving(self, x: Tensor, c: list[Tensor], offset: Tensor, rev: bool) -> Tensor:
        """Run a GIN block: its log scales have mean 0 over channels and positions, so its log-det is 0.

        Sorrenson et al. (arXiv:2001.04872), in FrEIA's form: the mean is subtracted from every log scale, and
        there is no global scale.
        """
        offset = offset.view(-1, *[1] * self.input_rank)
        if rev or self.reverse_pre_permute:
            x = self._permuted(x, inverse=True)
        if rev:
            x = _offset_by(x, offset, -1)  # the permuted x is a copy
        passive, active = x.split(self.splits, dim=1)
        raw, shift = self._params(passive, c).split([self.splits[1]] * 2, dim=1)
        overwrite, bounded = may_overwrite(raw, active, shift), torch.mul(raw, 0.1).tanh_()
        log_scale = bounded.mul_(self.clamp) if overwrite else bounded * self.clamp
        log_scale -= log_scale.mean(dim=self.sum_dims, keepdim=True)
        active = scale_and_shift(active, log_scale, shift, 0.1, inverse=rev, overwrite=overwrite)
        y = torch.cat([passive, active], dim=1)
        if not rev:
            y = _offset_by(y, offset, 1)
        return self._permuted(y, inverse=False) if not rev or self.reverse_pre_permute else y

    def _permuted(self, x: Tensor, *, inverse: bool) -> Tensor:
        if not self._is_indexed():
            rotation = self._rotation()
            rotation = rotation.mT if inverse else rotation
            return self.permute_function(x, rotation.reshape(*rotation.shape, *[1] * self.input_rank))
        order, inverse_order = self._orders()
        return x.index_select(1, inverse_order if inverse else order)

    def _params(self, passive: Tensor, c: list[Tensor]) -> Tensor:
        return evaluate(self.subnet, torch.cat([passive, *c], dim=1) if c else passive)

    def _rotation(self) -> Tensor:
        """Return the orthogonal matrix of the permutation, (C, C)."""
        if not self.householder:
            return self.w_perm.flatten(1)
        rotation = self.w_0
        for v in self.vk_householder:  # reflect vectors: C^2 multiplications each, not C^3
            rotation = rotation - torch.outer(rotation @ v, 2 * v / v.dot(v))
        return rotation

    @property
    def folds(self) -> bool:
        """Whether `flow_parts` can describe this block."""
        # GIN's log scales depend on all positions; a single channel has none to be coupled to.
        return not self.GIN and self.in_channels > 1

    def flow_parts(self) -> Iterator[LinearMap | Coupling]:
        """Yield the parts of this block, like `usf_kernels.nn.folding.parts`."""
        wide = {"device": "cpu", "dtype": WIDE}
        rotation = self._rotation().detach().to(**wide)
        nothing = torch.zeros(len(rotation), **wide)
        if self.reverse_pre_permute:
            yield LinearMap(rotation.mT, nothing)
        yield AffineCoupling(
            self.in_channels,
            subnet=lambda c_in, c_out: self.subnet,
            clamp=self.clamp,
            cond_channels=self.condition_channels,
            zero_init=False,
        )
        scale, offset = self._scale().detach().to(**wide), self.global_offset.detach().flatten().to(**wide)
        yield LinearMap(rotation * scale, rotation @ offset)


def _is_index(values: Tensor) -> bool:
    """Whether values are a permutation of 0..n-1; `load_state_dict` complains about any others."""
    if values.ndim != 1 or values.is_floating_point():
        return False
    return torch.equal(values.sort().values.long(), torch.arange(len(values), device=values.device))


def _version(matrix: Tensor | None) -> int | None:
    """Return the number of writes to a permutation's matrix; inference tensors count none."""
    return None if matrix is None or matrix.is_inference() else matrix._version


def _moved_to(index: Tensor, device: torch.device) -> Tensor:
    """Move an index to a device. From "meta" it comes without values; weights are to be loaded then."""
    return torch.empty_like(index, device=device) if index.is_meta else index.to(device)


def _offset_by(fresh: Tensor, offset: Tensor, sign: int) -> Tensor:
    if may_overwrite(fresh, offset):
        return fresh.add_(offset, alpha=sign)
    return torch.add(fresh, offset, alpha=sign)


def index_of(matrix: Tensor) -> Tensor | None:
    """Return the index of a permutation matrix, `(matrix @ x)[i] = x[index[i]]`; None for other matrices. The
    index of a matrix without values has none either."""
    if matrix.is_meta:
        return torch.empty(len(matrix), dtype=torch.int64, device="meta")
    index = matrix.argmax(1)
    eye = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
    return index if torch.equal(matrix, eye[index]) else None
