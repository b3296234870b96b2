"""Positions in a row of objects, from every kind of index that arrays and lists take."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from tailseg.wording import short

_TAKES = "an integer, a slice, or a list, array or tensor of integers or of one bool an object"


def positions(index: Any, length: int) -> Tensor:
    """The positions (K,) int64 in [0, length) that an index selects, in its order.

    Args:
        index: integer or slice; or a one-dimensional list, array or tensor of integers, or of ``length`` bools.
            Negative integers count from the end.
        length: number of objects.

    Raises:
        IndexError: an integer is out of range, or the number of bools is not ``length``.
        TypeError: the index is of another kind.
    """
    if isinstance(index, slice):
        return torch.arange(length)[_slice(index, length)]
    values = _values(index)
    if values.dtype == bool and values.ndim == 1:
        if len(values) != length:
            raise IndexError(f"{length} objects take a mask of {length} bools, received {len(values)}")
        return torch.from_numpy(np.flatnonzero(values))
    if values.dtype.kind not in "iu" or values.ndim > 1:
        _refuse(index)
    if ((values < -length) | (values >= length)).any():
        wrong = values[(values < -length) | (values >= length)].flat[0]
        valid = f"valid are 0 to {length - 1} and -1 to -{length}" if length else "there are none"
        raise IndexError(f"object {wrong} of {length} does not exist: {valid}")
    numbers = values.astype(np.int64).reshape(-1)
    return torch.from_numpy(np.where(numbers < 0, numbers + length, numbers))


def _slice(index: slice, length: int) -> list[int]:
    try:
        return list(range(*index.indices(length)))
    except (TypeError, ValueError):
        _refuse(index)


def _values(index: Any) -> np.ndarray[Any, Any]:
    """A list, array, tensor or integer as an array; an empty list holds integers."""
    if isinstance(index, Tensor):
        return index.detach().cpu().numpy()
    if isinstance(index, list) and not index:
        return np.zeros(0, np.int64)
    if not isinstance(index, list | np.ndarray | np.generic | int):
        _refuse(index)
    try:
        return np.asarray(index)
    except (ValueError, OverflowError):  # lists of unequal lengths
        _refuse(index)


def _refuse(index: Any) -> NoReturn:
    if isinstance(index, np.ndarray | Tensor):
        received = f"{type(index).__name__} of {index.dtype} {tuple(index.shape)}"
    else:
        received = f"{type(index).__name__} {short(index)}"
    raise TypeError(f"objects are selected by {_TAKES}, received {received}")
