"""The `AllInOneBlock` of FrEIA and anomalib on this package's operations, and sequences of them.

Instances keep their parameters, buffers, hooks and place; what changes is their class, so their `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from usf_kernels.nn import AffineCoupling
from usf_kernels.nn.folding import WIDE, Coupling, LinearMap
from usf_kernels.nn.fused import FusedFlow, fuse_parts
from usf_kernels.ops import affine_coupling
from usf_kernels.ops.checks import count_positions
from usf_kernels.ops.reference import apply_matrix
from usf_kernels.ops.step import coupling_step

_ORDERS = ("_order", "_inverse_order")  # buffers that a replaced block has beside its own


class AllInOneMixin:
    """In front of `AllInOneBlock` in a class's bases: the same function, parameters and checkpoints.

    A hard permutation is an index, coupling and ActNorm and permutation are one operation, and scale and
    offset go into the matrix where the permutation is one.
    """

    def begin_fast(self) -> None:
        """What an instance needs beyond the original's attributes. Undone by `end_fast`."""
        for name in _ORDERS:
            self.register_buffer(name, None, persistent=False)
        self._find_order()

    def end_fast(self) -> None:
        """Leave nothing behind."""
        for name in _ORDERS:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)

    def _load_from_state_dict(self, *args: object, **options: object) -> None:
        super()._load_from_state_dict(*args, **options)
        self._find_order()

    def _find_order(self) -> None:
        """The permutation as indices, both ways; None where it is a general rotation."""
        self._order = self._inverse_order = None
        if not self.householder:
            weight = self.w_perm.detach().flatten(1)
            index = weight.argmax(1)
            if torch.equal(weight, torch.eye(len(weight), device=weight.device, dtype=weight.dtype)[index]):
                self._order, self._inverse_order = index, torch.argsort(index)

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """As the original: ((y,), log_det (B,))."""
        (x,) = x
        scale, offset = self._scale(), self.global_offset.flatten()
        couple = self._by_matrix if self._order is None else self._by_index
        y, log_det = couple(x, list(c or ()), scale, offset, rev)
        constant = count_positions(x) * scale.log().sum()
        return (y,), log_det - constant if rev else log_det + constant

    def _scale(self) -> Tensor:
        return self.global_scale_activation(self.global_scale).flatten()

    def _by_index(
        self, x: Tensor, c: list[Tensor], scale: Tensor, offset: Tensor, rev: bool
    ) -> tuple[Tensor, Tensor]:
        order, split = self._order, self.splits[0]
        if self.reverse_pre_permute and not rev:
            x = x.index_select(1, self._inverse_order)
        passive = x[:, :split]
        if rev:
            passive = x.index_select(1, self._inverse_order[:split])
            shape = (-1, *[1] * self.input_rank)
            passive = (passive - offset[:split].view(shape)) / scale[:split].view(shape)
        params = self._params(passive, c)
        y, log_det = coupling_step(
            x,
            params,
            split=split,
            clamp=self.clamp,
            index=order,
            scale=scale[order],
            bias=offset[order],
            inverse=rev,
        )
        return (y.index_select(1, order) if self.reverse_pre_permute and rev else y), log_det

    def _by_matrix(
        self, x: Tensor, c: list[Tensor], scale: Tensor, offset: Tensor, rev: bool
    ) -> tuple[Tensor, Tensor]:
        rotation, split = self._rotation(), self.splits[0]
        if rev:
            x = apply_matrix(rotation.mT / scale[:, None], x, -offset / scale)
        elif self.reverse_pre_permute:
            x = apply_matrix(rotation.mT, x, None)
        params = self._params(x[:, :split], c)
        y, log_det = affine_coupling(x, params, split=split, clamp=self.clamp, inverse=rev)
        if not rev:
            y = apply_matrix(rotation * scale, y, rotation @ offset)
        elif self.reverse_pre_permute:
            y = apply_matrix(rotation, y, None)
        return y, log_det

    def _params(self, passive: Tensor, c: list[Tensor]) -> Tensor:
        return self.subnet(torch.cat([passive, *c], dim=1) if c else passive)

    def _rotation(self) -> Tensor:
        """(C, C), orthogonal."""
        return (self._construct_householder_permutation() if self.householder else self.w_perm).flatten(1)

    def flow_parts(self) -> Iterator[LinearMap | Coupling]:
        """As `usf_kernels.nn.folding.parts`."""
        wide = {"device": "cpu", "dtype": WIDE}
        rotation = self._rotation().detach().to(**wide)
        nothing = torch.zeros(len(rotation), dtype=WIDE)
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


class SequenceMixin:
    """In front of FrEIA's `SequenceINN`: where nothing is trained or recorded, it runs in its inference form.

    That form is made at the first call and again whenever a parameter has changed since.
    """

    _fused: tuple[tuple, FusedFlow] | None = None

    def forward(
        self, x_or_z: Tensor, c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """As the original."""
        alone = torch.is_tensor(x_or_z) and not self.force_tuple_output
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if self.training or recorded or not alone or not self._one_condition():
            return super().forward(x_or_z, c, rev, jac)
        cond = None if self.conditions[0] is None else c[self.conditions[0]]
        fused = self._inference_form(x_or_z.dtype)
        z, log_det = (fused.inverse if rev else fused)(x_or_z, cond)
        return z, log_det.expand(len(z))

    def _one_condition(self) -> bool:
        """Whether all blocks see the same one, or none."""
        return len(set(self.conditions)) == 1 and all(hasattr(b, "flow_parts") for b in self.module_list)

    def _inference_form(self, dtype: torch.dtype) -> FusedFlow:
        state = [*self.parameters(), *self.buffers()]
        key = (dtype, *((t.data_ptr(), t._version) for t in state))
        if self._fused is None or self._fused[0] != key:
            parts = [part for block in self.module_list for part in block.flow_parts()]
            self._fused = (key, fuse_parts(parts, dtype, state[0].device))
        return self._fused[1]

    def begin_fast(self) -> None:
        """Nothing to prepare."""

    def end_fast(self) -> None:
        """Leave nothing behind."""
        self.__dict__.pop("_fused", None)

    def __getstate__(self) -> dict:
        """Without the inference form, which is made again where it is needed."""
        return {name: value for name, value in self.__dict__.items() if name != "_fused"}
