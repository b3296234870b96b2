"""From the `segmentation` entries of annotations to flat columns, whole batches at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.masks import rle_runs
from tailseg.data.annotations.oddities import Tally
from tailseg.wording import short

_OF_BYTES = ("b'", 'b"')  # how str() of Python's bytes begins; no run lengths do
MAX_SIDE = 65_535  # pixels; no JPEG is larger, and a wild number must not make us allocate its square
LONGEST_OUTLINE = 10_000_000  # pixels of a polygon: drawing takes time and memory for each of them


@dataclass(frozen=True, slots=True)
class Fault:
    """A segmentation that cannot be used."""

    kind: Literal["no_mask", "bad_mask"]
    problem: str  # what it is, for a message


def segmentation_columns(
    rows: list[dict[str, Any]], place: Callable[[int], str], met: Tally
) -> tuple[dict[str, NDArray[Any]], dict[int, Fault]]:
    """The segmentations of some annotations, flat, and what is wrong with some of them.

    Args:
        rows: the annotations.
        place: name of a row.
        met: where polygons that are left out, or taken as something else, are counted.

    Returns:
        Columns: ``coordinates`` of all polygons in a row (see `Segmentations`), ``polygon_lengths`` (P,) numbers in
        each, ``polygon_counts`` (N,), ``rle_bytes`` in a row, ``rle_lengths`` (N,), ``rle_hws`` (N, 2), the size that
        an RLE states and zeros elsewhere. And a fault for each row whose segmentation cannot be used, and is then
        empty. Whether an RLE has its image's size is left to the caller.
    """
    values = [row.get("segmentation") for row in rows]
    faults: dict[int, Fault] = {}
    for i, value in enumerate(values):
        if not value or (type(value) is not list and type(value) is not dict):
            found = f"is {short(value)}" if "segmentation" in rows[i] else "is missing"
            faults[i] = Fault("bad_mask" if value else "no_mask", f"segmentation {found}")
    lists = [value if type(value) is list else [] for value in values]
    packed = _pack(lists)
    if packed is None:  # find the rows at fault, leave out what is broken of them, do the rest again
        for i, polygons in enumerate(lists):
            sound, fault = _sound(polygons, partial(place, i), met)
            if fault is not None:
                faults[i] = fault
            lists[i], values[i] = ([], sound) if type(sound) is dict else (sound, values[i])
        packed = _pack(lists)
        assert packed is not None
    sizes = np.zeros((len(rows), 2), np.int32)
    codes = [b""] * len(rows)
    objects = [(i, value) for i, value in enumerate(values) if value and type(value) is dict]
    for i, value in objects:
        try:
            codes[i], sizes[i] = _compressed(value)
        except ValueError:
            sound, fault = _sound(value, partial(place, i), met)
            if fault is not None:
                faults[i] = fault
            else:
                codes[i], sizes[i] = _compressed(sound)
    if objects:
        for i, problem in rle_faults(codes, sizes).items():
            faults.setdefault(i, Fault("bad_mask", problem))
            codes[i], sizes[i] = b"", 0
    about_codes: dict[str, NDArray[Any]] = {
        "rle_bytes": np.frombuffer(b"".join(codes), np.uint8),
        "rle_lengths": np.fromiter(map(len, codes), np.int64, len(codes)),
        "rle_hws": sizes,
    }
    return packed | about_codes, faults


def sound_segmentation(value: Any, place: str, met: Tally) -> tuple[Any, Fault | None]:
    """One ``segmentation`` as it should be, and its fault if it cannot be used; see `segmentation_columns`."""
    if not value or type(value) not in (list, dict):
        return None, Fault("bad_mask" if value else "no_mask", f"segmentation is {short(value)}")
    sound, fault = _sound(value, lambda: place, met)
    if fault is None and type(sound) is dict:
        code, size = _compressed(sound)
        problems = rle_faults([code], np.array([size], np.int32))
        fault = Fault("bad_mask", problems[0]) if problems else None
    return sound, fault


def _sound(value: Any, place: Callable[[], str], met: Tally) -> tuple[Any, Fault | None]:
    """A segmentation in the usual form and without its broken polygons; and its fault, if nothing sound is left.

    Of an RLE only size and type of the counts are looked at.
    """
    if type(value) is list and not any(map(_polygon_fault, value)):
        return value, None
    usual = _usual_form(value)
    sound: Any
    if type(usual) is dict:
        try:
            _compressed(usual)
        except ValueError as error:
            return [], Fault("bad_mask", str(error))
        sound, wrong = usual, []
    else:
        problems = list(map(_polygon_fault, usual))
        sound = [polygon for polygon, problem in zip(usual, problems, strict=True) if problem is None]
        wrong = [problem for problem in problems if problem is not None]
    if wrong and not sound:
        return [], Fault("bad_mask" if any(usual) else "no_mask", wrong[0])
    if usual != value:
        met.add("form", [place()])
    met.add("ring", [f"{place()}: {problem}" for problem in wrong])
    return sound, None


def _usual_form(value: Any) -> Any:
    """A segmentation in COCO's form, if it is written in another whose meaning is certain; else itself.

    That is: an RLE in a list; an RLE with the text of Python's bytes, or with 60.0 for 60; a polygon in no list; points
    as pairs; numbers as texts.
    """
    if type(value) is list and len(value) == 1 and type(value[0]) is dict:
        value = value[0]
    if type(value) is dict:
        return value | {key: _usual_counts(value[key]) for key in ("size", "counts") if key in value}
    polygons = [value] if _is_polygon(value) else value
    return [
        [number_meant(number) for number in _flat(polygon)] if _is_polygon(polygon) else polygon for polygon in polygons
    ]


def _usual_counts(value: Any) -> Any:
    if type(value) is str and value[:2] in _OF_BYTES:
        return value[2:-1].replace("\\\\", "\\")
    if type(value) is list:
        return [int(n) if type(n) is float and n.is_integer() else n for n in value]
    return value


def _is_polygon(value: Any) -> bool:
    """Return whether a value can only be meant as one polygon: a list of numbers, or of three pairs or more of them."""
    if type(value) is not list or not value:
        return False
    if all(type(pair) is list and len(pair) == 2 for pair in value):
        return len(value) >= 3 and all(type(number_meant(number)) in (int, float) for pair in value for number in pair)
    return all(type(number_meant(number)) in (int, float) for number in value)


def _flat(polygon: list[Any]) -> list[Any]:
    return list(chain.from_iterable(polygon)) if type(polygon[0]) is list else polygon


def number_meant(value: Any) -> Any:
    """The number that a text stands for; other values as they are."""
    if type(value) is str:
        with contextlib.suppress(ValueError):
            return float(value) if math.isfinite(float(value)) else value
    return value


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
    farthest = max(coordinates.max(), -coordinates.min()) if coordinates.size else 0
    if not farthest <= MAX_SIDE:
        return None
    if lengths.max(initial=0) * farthest > LONGEST_OUTLINE:  # it may be: half as many corners, each twice as far
        stops = np.cumsum(lengths)
        if any(is_too_long(coordinates[stop - n : stop]) for stop, n in zip(stops, lengths, strict=True)):
            return None
    if (np.rint(coordinates * 100) / 100 == coordinates).all():
        coordinates = coordinates.astype(np.float32)
    counts = np.fromiter(map(len, values), np.int64, len(values))
    return {"coordinates": coordinates, "polygon_lengths": lengths, "polygon_counts": counts}


def _polygon_fault(value: Any) -> str | None:
    """Say what is wrong with one polygon."""
    if type(value) is not list or not set(map(type, value)) <= {int, float, bool}:
        return f"a polygon is {short(value)}, no flat list of numbers x0, y0, x1, y1, ..."
    if len(value) < 6 or len(value) % 2:
        return f"a polygon has {len(value)} coordinates, not three points or more of an x and a y each"
    if not max(map(abs, value)) <= MAX_SIDE:
        return f"a polygon has a coordinate beyond {MAX_SIDE} pixels"
    if is_too_long(np.array(value, np.float64)):
        return f"a polygon's outline is longer than {LONGEST_OUTLINE:,} pixels"
    return None


def is_too_long(coordinates: NDArray[np.floating[Any]]) -> bool:
    """Whether the outline of a polygon, x0, y0, x1, y1, ... in pixels, has more pixels than can be drawn."""
    corners = coordinates.reshape(-1, 2)
    return bool(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1, initial=0).sum() > LONGEST_OUTLINE)


def _compressed(value: dict[str, Any]) -> tuple[bytes, list[int]]:
    """The compressed counts and the size of an RLE object; ValueError says what is wrong with it."""
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or not set(map(type, size)) <= {int} or len(size) != 2:
        raise ValueError(f"the RLE's size is {short(size)}, not the image's height and width")
    height, width = size
    if not 0 < min(size) <= max(size) <= MAX_SIDE:
        raise ValueError(f"the RLE's size is {size}, not sides of 1 to {MAX_SIDE} pixels")
    if isinstance(counts, list):
        if not set(map(type, counts)) <= {int} or min(counts, default=0) < 0 or sum(counts) != height * width:
            raise ValueError(f"the RLE's counts are not whole numbers that sum to {height} x {width} pixels")
        code: bytes = rle.frPyObjects({"size": size, "counts": counts}, height, width)["counts"]
        return code, size
    if not isinstance(counts, str) or not counts or counts[:2] in _OF_BYTES:
        raise ValueError(f"the RLE's counts are {short(counts)}, no string and no list of run lengths")
    return counts.encode(), size


def rle_faults(codes: list[bytes], sizes: NDArray[np.int32]) -> dict[int, str]:
    """Faults of compressed RLEs by index: broken ones, and those that do not cover ``sizes`` (N, 2)."""
    pixels = sizes.astype(np.int64).prod(axis=1)
    try:
        runs, first = rle_runs(codes)
    except ValueError as error:
        if len(codes) == 1:
            return {0: str(error)}
        parts = (rle_faults(codes[i : i + 1], sizes[i : i + 1]) for i in range(len(codes)))
        return {i: fault[0] for i, fault in enumerate(parts) if fault}
    totals = np.diff(np.concatenate([[0], np.cumsum(runs)])[first])
    return {
        int(i): f"the RLE covers {totals[i]} pixels but its size is {sizes[i, 0]} x {sizes[i, 1]}"
        for i in np.flatnonzero(totals != pixels)
    }
