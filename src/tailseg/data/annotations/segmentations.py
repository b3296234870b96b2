"""From the `segmentation` entries of annotations to flat columns, whole batches at a time."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.masks import rle_runs

MAX_SIDE = 65_535  # pixels; no JPEG is larger, and a wild number must not make us allocate its square


def segmentation_columns(rows: list[dict[str, Any]]) -> tuple[dict[str, NDArray[Any]], dict[int, str]]:
    """The segmentations of some annotations, flat, and what is wrong with some of them.

    Returns:
        Columns: ``coordinates`` of all polygons in a row (see `Segmentations`), ``polygon_lengths`` (P,) numbers in
        each, ``polygon_counts`` (N,), ``rle_bytes`` in a row, ``rle_lengths`` (N,), ``rle_hws`` (N, 2), the size that
        an RLE states and zeros elsewhere. And a sentence for each row at fault, whose segmentation is then empty.
        Whether an RLE has its image's size is left to the caller.
    """
    values = [row.get("segmentation") for row in rows]
    faults: dict[int, str] = {}
    for i, value in enumerate(values):
        if type(value) is not list and type(value) is not dict:
            found = f"is {short(value)}" if "segmentation" in rows[i] else "is missing"
            faults[i] = f"segmentation {found}; it must be a list of polygons or an RLE object"
        elif type(value) is list and not value:
            faults[i] = "segmentation is empty; give at least one polygon, or remove the annotation"
    lists = [value if type(value) is list else [] for value in values]
    packed = _pack(lists)
    if packed is None:  # find the rows at fault, leave them out, do the rest again
        for i, polygons in enumerate(lists):
            if fault := next(filter(None, map(_polygon_fault, polygons)), None):
                faults[i] = fault
                lists[i] = []
        packed = _pack(lists)
        assert packed is not None
    sizes = np.zeros((len(rows), 2), np.int32)
    codes = [b""] * len(rows)
    objects = [(i, value) for i, value in enumerate(values) if type(value) is dict]
    for i, value in objects:
        try:
            codes[i], sizes[i] = _compressed(value)
        except ValueError as error:
            faults[i] = str(error)
    if objects:
        faults |= {i: fault for i, fault in _rle_faults(codes, sizes).items() if i not in faults}
    about_codes: dict[str, NDArray[Any]] = {
        "rle_bytes": np.frombuffer(b"".join(codes), np.uint8),
        "rle_lengths": np.fromiter(map(len, codes), np.int64, len(codes)),
        "rle_hws": sizes,
    }
    return packed | about_codes, faults


def _pack(values: list[list[Any]]) -> dict[str, NDArray[Any]] | None:
    """The polygons of all rows in a row; None where any is at fault (`_polygon_fault` says which)."""
    polygons = list(chain.from_iterable(values))
    if not set(map(type, polygons)) <= {list}:
        return None
    lengths = np.fromiter(map(len, polygons), np.int64, len(polygons))
    if (lengths < 6).any() or (lengths % 2).any():
        return None
    try:
        sum(chain.from_iterable(polygons))  # the fastest way to see that all are numbers
    except (TypeError, OverflowError):
        return None
    coordinates = np.fromiter(chain.from_iterable(polygons), np.float64, int(lengths.sum()))
    if coordinates.size and not max(coordinates.max(), -coordinates.min()) <= MAX_SIDE:
        return None
    if (np.rint(coordinates * 100) / 100 == coordinates).all():
        coordinates = coordinates.astype(np.float32)
    counts = np.fromiter(map(len, values), np.int64, len(values))
    return {"coordinates": coordinates, "polygon_lengths": lengths, "polygon_counts": counts}


def _polygon_fault(value: Any) -> str | None:
    """Say what is wrong with one polygon."""
    if type(value) is not list or not set(map(type, value)) <= {int, float}:
        return f"a polygon is {short(value)}; it must be a flat list of numbers x0, y0, x1, y1, ..."
    if len(value) < 6 or len(value) % 2:
        return f"a polygon has {len(value)} coordinates; it needs at least three points, an x and a y each"
    if not max(map(abs, value)) <= MAX_SIDE:
        return f"a polygon has a coordinate beyond {MAX_SIDE} pixels; give pixels of the image"
    return None


def _compressed(value: dict[str, Any]) -> tuple[bytes, list[int]]:
    """The compressed counts and the size of an RLE object; ValueError says what is wrong with it."""
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or not set(map(type, size)) <= {int} or len(size) != 2:
        raise ValueError(f"the RLE's size is {short(size)}; it must be the image's height and width")
    height, width = size
    if not 0 < min(size) <= max(size) <= MAX_SIDE:
        raise ValueError(f"the RLE's size is {size}; sides must be 1 to {MAX_SIDE} pixels")
    if isinstance(counts, list):
        if not set(map(type, counts)) <= {int} or min(counts, default=0) < 0 or sum(counts) != height * width:
            message = f"the RLE's counts must be whole numbers that sum to {height} x {width} pixels"
            raise ValueError(f"{message}; encode the mask again")
        code: bytes = rle.frPyObjects({"size": size, "counts": counts}, height, width)["counts"]
        return code, size
    if not isinstance(counts, str) or not counts:
        raise ValueError(f"the RLE's counts are {short(counts)}; they must be a string or a list of run lengths")
    return counts.encode(), size


def _rle_faults(codes: list[bytes], sizes: NDArray[np.int32]) -> dict[int, str]:
    """Faults of compressed RLEs by index: broken ones, and those that do not cover ``sizes`` (N, 2)."""
    pixels = sizes.astype(np.int64).prod(axis=1)
    try:
        runs, first = rle_runs(codes)
    except ValueError as error:
        if len(codes) == 1:
            return {0: f"{error}; encode the mask again"}
        parts = (_rle_faults(codes[i : i + 1], sizes[i : i + 1]) for i in range(len(codes)))
        return {i: fault[0] for i, fault in enumerate(parts) if fault}
    totals = np.diff(np.concatenate([[0], np.cumsum(runs)])[first])
    return {
        int(i): f"the RLE covers {totals[i]} pixels but the image has {sizes[i, 0]} x {sizes[i, 1]}; "
        "encode the mask again"
        for i in np.flatnonzero(totals != pixels)
    }


def short(value: object) -> str:
    """A value from a file as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
