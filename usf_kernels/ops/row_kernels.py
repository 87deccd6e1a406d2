"""Operations on chosen columns of rows (N, C), which a fused flow needs around its conditioners.

These run kernels only, and are not differentiable: `usf_kernels.ops.rows` chooses between them and others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usf_kernels.kernels.plain import rounds_to_tf32
from usf_kernels.ops.checks import FLOAT_DTYPES
from usf_kernels.ops.dispatch import HAS_TRITON, define


def runs_kernels(rows: Tensor) -> bool:
    """Whether these operations take `rows`: any floating dtype but float64, on a CUDA or ROCm device, and not
    in exported graphs, which must run anywhere."""
    return (
        HAS_TRITON
        and rows.device.type == "cuda"
        and rows.dtype != torch.float64
        and not torch.compiler.is_exporting()
    )


def multiplies_in_kernels(rows: Tensor) -> bool:
    """Whether two layers and the addition of their result to `rows` are best run as one kernel, on tensor
    cores. Full float32 products are left to the vendor's library."""
    if not runs_kernels(rows):
        return False
    half = rows.dtype in (torch.bfloat16, torch.float16)
    # Compiled graphs must not depend on the setting for TF32.
    return half or (not torch.compiler.is_compiling() and rounds_to_tf32())


def select_rows(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[:, index]`.

    Args:
        rows: (N, C) in float32, bfloat16 or float16, at any strides.
        index: (M,) int64, in 0..C-1 in any order. Its values are not read for checking.

    Returns:
        (N, M), contiguous.

    Raises:
        TypeError: another dtype.
        ValueError: another shape; tensors on several devices.
    """
    _check(rows, index)
    return _select(rows, index)


def add_rows(rows: Tensor, index: Tensor, values: Tensor, factor: int) -> None:
    """`rows[:, index] += factor * values`, computed in float32.

    Args:
        rows: (N, C) in float32, bfloat16 or float16, at any strides; changed.
        index: (M,) int64, in 0..C-1 in any order, none twice. Its values are not read for checking.
        values: (N, M), in any of the dtypes of rows.

    Raises:
        TypeError, ValueError: as `select_rows`.
    """
    _check(rows, index)
    _check_shape("values", values, rows, (rows.shape[0], index.shape[0]))
    _add(rows, index, values, factor)


def affine_rows(
    rows: Tensor, index: Tensor, outputs: Tensor, shift: Tensor, clamp: float, inverse: bool
) -> Tensor:
    """Affine coupling of the columns `index`, in place: `y = (y + shift) * exp(s) + t`, or its inverse.

    Args:
        rows, index: as for `add_rows`.
        outputs: (N, 2 * M), raw, then t; `s = clamp * tanh(raw)`. In any of the dtypes of rows.
        shift: (M,), in any of the dtypes of rows.

    Returns:
        The log-determinant of each row in the direction computed, (N,) float32.

    Raises:
        TypeError, ValueError: as `select_rows`.
    """
    _check(rows, index)
    _check_shape("outputs", outputs, rows, (rows.shape[0], 2 * index.shape[0]))
    _check_shape("shift", shift, rows, (index.shape[0],))
    return _affine(rows, index, outputs, shift, clamp, inverse)


def _check(rows: Tensor, index: Tensor) -> None:
    if rows.ndim != 2:
        raise ValueError(f"rows: expected shape (N, C), found {tuple(rows.shape)}")
    _check_dtype("rows", rows)
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(
            f"index: expected int64 of shape (M,), found {index.dtype} of shape {tuple(index.shape)}"
        )
    _check_device("index", index, rows)


def _check_shape(name: str, value: Tensor, rows: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, found {tuple(value.shape)}")
    _check_dtype(name, value)
    _check_device(name, value, rows)


def _check_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in FLOAT_DTYPES or value.dtype == torch.float64:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, found {value.dtype}")


def _check_device(name: str, value: Tensor, rows: Tensor) -> None:
    """Raise unless both are on one device: a kernel would read wrong memory where PyTorch raises."""
    if value.device != rows.device:
        raise ValueError(f"{name}: expected a tensor on {rows.device} like rows, found one on {value.device}")


# ------------------------------------------------------------------------------------------- as torch ops


def _select_fake(rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], index.shape[0])


def _add_fake(rows: Tensor, index: Tensor, values: Tensor, factor: int) -> None:
    return None


def _affine_fake(
    rows: Tensor, index: Tensor, outputs: Tensor, shift: Tensor, clamp: float, inverse: bool
) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.float32)


_select = define("select_rows(Tensor rows, Tensor index) -> Tensor", _select_fake, "rows.select_rows")
_add = define(
    "add_rows(Tensor(a!) rows, Tensor index, Tensor values, int factor) -> ()", _add_fake, "rows.add_rows"
)
_affine = define(
    "affine_rows(Tensor(a!) rows, Tensor index, Tensor outputs, Tensor shift, float clamp, bool inverse) "
    "-> Tensor",
    _affine_fake,
    "rows.affine_rows",
)
