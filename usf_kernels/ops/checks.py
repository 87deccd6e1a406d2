"""Argument checks shared by the operations and modules, and the dtype rule.

Every public function validates once, here, with exceptions (`python -O` strips asserts). A message names
the argument, says what was found, and what was expected.
"""

from __future__ import annotations

import math
import sys
from functools import reduce

import numpy as np
import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def promoted_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype in which results are returned: PyTorch's promotion of the dtypes of all tensors."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype in which sums are accumulated: the promoted one, but at least float32."""
    dtype = promoted_dtype(*tensors)
    return dtype if dtype == torch.float64 else torch.float32


def count_positions(x: Tensor) -> int:
    """Number of positions P of a (B, C, *spatial) tensor; 1 where there are no spatial dimensions."""
    return math.prod(x.shape[2:])


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)


def check_float(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a dense tensor of one of the four supported dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, found {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, found layout {value.layout}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, found {value.dtype}")


def check_unmasked(name: str, array: np.ndarray) -> None:
    """Raise TypeError for an array of `numpy.ma`, whose masked values would count like all others."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, found a {type(array).__name__}")


def check_dtype(dtype: object) -> None:
    """Raise TypeError unless `dtype` is None or one of the four supported dtypes."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, found {dtype}")


def check_features(name: str, x: object, channels: int | None = None) -> None:
    """Raise unless `x` is a floating (B, C, *spatial) tensor, with C = `channels` where that is given."""
    check_float(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name}: expected shape (B, C, *spatial), found {tuple(x.shape)}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels in dimension 1, found shape {tuple(x.shape)}")


def check_shape(name: str, value: object, expected: tuple[int, ...], meaning: str) -> None:
    """Raise unless `value` is a floating tensor of shape `expected`; `meaning` says where that comes from."""
    check_float(name, value)
    if value.shape != expected:
        raise ValueError(f"{name}: expected shape {tuple(expected)} = {meaning}, found {tuple(value.shape)}")


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as a Python int, or unchanged if it is symbolic; raise unless it is an integer in
    [low, high]. There is no upper end if `high` is None."""
    if isinstance(value, Tensor) and torch.jit.is_tracing():
        return value  # a size: to compare it would make it a constant of the graph
    if not _is_int(value):
        raise TypeError(f"{name}: expected an int, found {type(value).__name__}")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name}: expected an int {span}, found {value}")
    return int(value) if isinstance(value, np.integer) else value


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False: any text would count as True."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, found {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a real number of Python or NumPy, and ValueError for an int that no
    float holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, found {type(value).__name__}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(
            f"{name}: expected a number that a float holds, found one of {value.bit_length()} bits"
        )


def to_double(x: Tensor) -> Tensor:
    """Cast to float64, on the CPU if the device has none, as Apple's."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def check_positive(name: str, value: object) -> None:
    """Raise unless `value` is a positive finite number."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, found {value}")


def check_between(name: str, value: object, low: float, high: float, brackets: str = "()") -> None:
    """Raise unless `value` is a number between `low` and `high`; `brackets` say whether these count."""
    check_number(name, value)
    above = low <= value if brackets[0] == "[" else low < value
    below = value <= high if brackets[1] == "]" else value < high
    if not (above and below):
        span = f"{brackets[0]}{low:g}, {high:g}{brackets[1]}"
        raise ValueError(f"{name}: expected a number in {span}, found {value!r}")


def check_clamp(clamp: object) -> float:
    """Return `clamp` as a Python float; raise unless it is a positive finite number."""
    check_positive("clamp", clamp)
    return float(clamp)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, found {value!r}")


def check_size(size: object, *, name: str = "size") -> tuple[int, int]:
    """Return `size` as (height, width): one positive int for a square, or two."""
    pair = (size, size) if _is_int(size) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: expected an int or a pair (height, width), found {size!r}")
    return check_int(f"{name}[0]", pair[0], 1), check_int(f"{name}[1]", pair[1], 1)
