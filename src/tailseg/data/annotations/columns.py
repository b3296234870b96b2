"""Columns whose rows differ in length, laid flat: texts, lists of ids, polygons and run-length codes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]  # by name

_PIECE = 1 << 16  # rows moved at once by `take_rows`


def starts_of(lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """(n + 1,) where each row starts when all are laid end to end."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def take_rows(values: NDArray[Any], starts: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[Any]:
    """The rows ``order`` of a flat column, laid end to end."""
    lengths = np.diff(starts)[order]
    new_starts = starts_of(lengths)
    out = np.empty(new_starts[-1], values.dtype)
    for begin in range(0, len(order), _PIECE):  # the index of one number is as large as the number
        rows = order[begin : begin + _PIECE]
        rows = rows[starts[rows + 1] > starts[rows]]
        if rows.size:
            low = new_starts[begin]
            high = new_starts[min(begin + _PIECE, len(order))]
            steps = np.ones(high - low, np.int64)  # from a number to the next, which is beside it or begins a row
            steps[0] = starts[rows[0]]
            steps[np.cumsum(starts[rows[:-1] + 1] - starts[rows[:-1]])] = starts[rows[1:]] - starts[rows[:-1] + 1] + 1
            out[low:high] = values[np.cumsum(steps, out=steps)]
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """A text, or None, for each row."""

    utf8: NDArray[np.uint8]
    starts: NDArray[np.int64]  # (n + 1,) into utf8; no bytes stand for None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> str | None:
        start, stop = _bounds(self.starts, row)
        return self.utf8[start:stop].tobytes().decode() if stop > start else None


@dataclass(frozen=True, slots=True, eq=False)
class IdLists:
    """A list of whole numbers for each row."""

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]  # (n + 1,) into ids

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        start, stop = _bounds(self.starts, row)
        return self.ids[start:stop]


def _bounds(starts: NDArray[np.int64], row: int) -> tuple[int, int]:
    """Start and stop of a row (IndexError beyond the last, so that one can iterate)."""
    count = len(starts) - 1
    if not -count <= row < count:
        raise IndexError(f"expected a row below {count}, received {row}")
    row %= count
    return int(starts[row]), int(starts[row + 1])


@dataclass(frozen=True, slots=True, eq=False)
class Segmentations:
    """Polygons and RLEs of all annotations, flat; an annotation has either polygons or an RLE.

    Coordinates are float32 if the file states no more than two decimals, else float64: `in_full` gives them as the file
    has them, in half the memory where that can be.
    """

    coordinates: NDArray[np.float32] | NDArray[np.float64]  # x0, y0, x1, y1, ... of all polygons in a row
    polygon_starts: NDArray[np.int64]  # (P + 1,) into coordinates
    first_polygon: NDArray[np.int64]  # (N + 1,) into polygon_starts
    rle_bytes: NDArray[np.uint8]  # compressed RLEs in a row
    rle_starts: NDArray[np.int64]  # (N + 1,) into rle_bytes

    def __len__(self) -> int:
        return len(self.rle_starts) - 1

    def __getitem__(self, row: int) -> list[NDArray[np.float64]] | bytes:
        """The polygons, or the compressed RLE, of annotation ``row``, to the last digit as in the file."""
        start, stop = _bounds(self.rle_starts, row)
        if stop > start:
            return self.rle_bytes[start:stop].tobytes()
        row %= len(self)
        bounds = self.polygon_starts[self.first_polygon[row] : self.first_polygon[row + 1] + 1]
        own = in_full(self.coordinates[bounds[0] : bounds[-1]])
        return [own[a:b] for a, b in pairwise(bounds - bounds[0])]


def in_full(coordinates: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Coordinates as the file states them: float32 ones have two decimals there."""
    if coordinates.dtype == np.float64:
        return np.asarray(coordinates, np.float64)
    return np.rint(coordinates.astype(np.float64) * 100) / 100


def positions_of(wanted: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each wanted id its position in ``ids`` (any order), and whether it is there."""
    if ids.size == 0:
        return np.zeros(wanted.shape, np.int64), np.zeros(wanted.shape, np.bool_)
    order = np.argsort(ids, kind="stable")
    places = np.searchsorted(ids, wanted, sorter=order).clip(max=ids.size - 1)
    found = order[places]
    return found, ids[found] == wanted
