"""Rows of a results file, column by column, every value checked; a fault is told with the number of its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hotcoco import mask as rle_codec
from numpy.typing import NDArray

from tailseg.data.annotations.masks import rle_pixels
from tailseg.data.annotations.repair import whole, wrapped
from tailseg.data.annotations.segmentations import LONGEST_OUTLINE, is_too_long, rle_faults
from tailseg.errors import UserError
from tailseg.layers.paste import Rle
from tailseg.wording import short

Row = dict[str, Any]
LONGEST = 40  # letters of a value in a message
_AT_ONCE = 1024  # masks whose run lengths are added up at once: as many as a processor's cache holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A stretch of rows of a results file, of which faults are told by number."""

    rows: list[Row]
    source: str  # the file's name, for messages
    first: int = 0  # number of the first row

    def place(self, index: int) -> str:
        """Name of the row at position ``index``: its file and number."""
        return f"{self.source}: row {self.first + index}"

    def whole_numbers(self, key: str) -> NDArray[np.int64]:
        """(N,) one key of all rows, ids for instance; from 2^63 on they are negative, as in `Annotations`."""
        column = self._column(key, "a whole number", lambda value: whole(value) is not None, "iuf")
        if column.dtype.kind != "i":  # one by one: a float does not hold every number of 64 bits
            numbers = [whole(row[key]) for row in self.rows]
            wrong = next((i for i, number in enumerate(numbers) if number is None), None)
            if wrong is not None:
                place = f"{self.source}: {key} of row {self.first + wrong}"
                raise UserError(f"{place} is {short(self.rows[wrong][key], LONGEST)}, expected a whole number")
            column = np.array([wrapped(number) for number in numbers if number is not None], np.int64)
        return column.astype(np.int64)

    def numbers(self, key: str) -> NDArray[np.float64]:
        """(N,) one key of all rows, finite."""
        return self._column(key, "a finite number", _is_number, "if").astype(np.float64)

    def boxes(self) -> NDArray[np.float64]:
        """(N, 4) xywh in pixels."""
        return self._column("bbox", "four finite numbers x, y, width, height", _is_box, "if", 4).astype(np.float64)

    def _column(
        self, key: str, expected: str, valid: Callable[[Any], bool], kinds: str, width: int = 0
    ) -> NDArray[Any]:
        """One key of all rows as an array (N,), or (N, width); one by one only to name a fault."""
        if not self.rows:
            return np.zeros((0, width) if width else 0)
        try:
            array = np.asarray([row[key] for row in self.rows])
        except (KeyError, TypeError, ValueError, IndexError):
            array = np.empty(0, dtype=object)
        shape = (len(self.rows), width) if width else (len(self.rows),)
        if array.shape == shape and array.dtype.kind in kinds and np.isfinite(array).all():
            return array
        for index, row in enumerate(self.rows):
            if not isinstance(row, dict):
                raise UserError(f"{self.place(index)} is {kind_of(row)}, not an object with image_id, category_id, ...")
            if key not in row:
                raise UserError(f"{self.place(index)} has no {key!r}; every row needs one here")
            if not valid(row[key]):
                place = f"{self.source}: {key} of row {self.first + index}"
                raise UserError(f"{place} is {short(row[key], LONGEST)}, expected {expected}")
        raise UserError(f"{self.source}: {key} must be {expected} in every row")

    def masks(
        self, image_sizes: NDArray[np.int64]
    ) -> tuple[NDArray[np.object_], NDArray[np.float64], NDArray[np.bool_]]:
        """The segmentations' run lengths (polygons are rasterised), their areas in pixels, and a flag for each that is
        no mask: no run lengths, or not one polygon of three corners.
        """
        outlined = None
        try:
            masks = [row["segmentation"] for row in self.rows]
            sizes = np.asarray([mask["size"] for mask in masks]).reshape(-1, 2)
            counts = [mask["counts"] for mask in masks]
            sound = sizes.dtype.kind == "i" and bool((sizes == image_sizes).all())
        except (KeyError, TypeError, ValueError):
            sound = not self.rows
        if not sound:  # polygons, or a fault to be named
            masks = []
            for index, (row, image_hw) in enumerate(zip(self.rows, image_sizes.tolist(), strict=True)):
                if "segmentation" not in row:
                    raise UserError(f"{self.place(index)} has no 'segmentation'; score boxes alone or add masks")
                masks.append(_to_rle(row["segmentation"], image_hw, self._mask_place(index)))
            counts = [mask["counts"] for mask in masks]
            outlined = [_has_outline(row["segmentation"]) for row in self.rows]
        areas = self._mask_areas(masks)
        self._require_whole(image_sizes)
        there = np.array([len(count) > 0 for count in counts] if outlined is None else outlined, np.bool_)
        return np.fromiter(counts, dtype=object, count=len(counts)), areas, ~there & (areas == 0)

    def _mask_place(self, index: int) -> str:
        return f"{self.source}: segmentation of row {self.first + index}"

    def _mask_areas(self, masks: list[Rle]) -> NDArray[np.float64]:
        try:
            return np.asarray(rle_codec.area(masks) if masks else (), dtype=np.float64)
        except (ValueError, TypeError):
            for index, mask in enumerate(masks):
                try:
                    rle_codec.area(mask)
                except (ValueError, TypeError) as error:
                    raise UserError(f"{self._mask_place(index)} is malformed ({error})") from error
            raise

    def _require_whole(self, image_sizes: NDArray[np.int64]) -> None:
        """Raise UserError unless the run lengths that stand in the rows cover their images; empty ones are no mask."""
        pixels = image_sizes.prod(axis=1)
        counts: list[Any] = [
            one["counts"] if isinstance(one := row["segmentation"], dict) else None for row in self.rows
        ]
        for index, count in enumerate(counts):
            if isinstance(count, list) and count and sum(count) != pixels[index]:
                height, width = image_sizes[index].tolist()
                found = f"the RLE covers {sum(count)} pixels but its size is {height} x {width}"
                raise UserError(f"{self._mask_place(index)} is malformed ({found})")
        texts = [index for index, count in enumerate(counts) if isinstance(count, str | bytes) and count]
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            codes = [text.encode() if isinstance(text := counts[index], str) else bytes(text) for index in some]
            try:
                sound = np.array_equal(rle_pixels(codes), pixels[some])
            except ValueError:
                sound = False
            if not sound:
                index, fault = next(iter(rle_faults(codes, image_sizes[some].astype(np.int32)).items()))
                raise UserError(f"{self._mask_place(some[index])} is malformed ({fault})")


def _to_rle(segmentation: Any, image_hw: Sequence[int], place: str) -> Rle:
    """A segmentation as it stands in a file, as a run-length code of the image's size.

    Args:
        segmentation: run-length code, or polygons [[x, y, x, y, ...], ...] in pixels.
        image_hw: (height, width) of the image in pixels.
        place: file and row, for messages.

    Raises:
        UserError: it is neither of the two, or its size is not the image's. Counts are not looked into. Polygons with
            a number that is not finite are left out.
    """
    if isinstance(segmentation, dict):
        if list(image_hw) != segmentation.get("size"):
            found = short(segmentation.get("size"), LONGEST)
            raise UserError(f"{place} has the size {found}, expected [height, width] = {list(image_hw)}")
        if not isinstance(segmentation.get("counts"), str | bytes | list):
            raise UserError(f"{place} has no run-length counts")
        return segmentation
    try:
        for polygon in segmentation:
            if len(polygon) > 300 and is_too_long(np.array(polygon, np.float64)):
                raise UserError(f"{place} has a polygon whose outline is longer than {LONGEST_OUTLINE:,} pixels")
        finite = [polygon for polygon in segmentation if np.isfinite(np.asarray(polygon, np.float64)).all()]
        rle = rle_codec.merge([rle_codec.frPoly(polygon, *image_hw) for polygon in finite])
    except (ValueError, TypeError) as error:
        raise UserError(f"{place} is neither a run-length code nor a list of polygons ({error})") from error
    return {"size": list(image_hw), "counts": rle["counts"].decode("ascii")}


def _has_outline(segmentation: Any) -> bool:
    """Return whether a segmentation that `_to_rle` takes has run lengths, or a polygon that can have an area."""
    if isinstance(segmentation, dict):
        return len(segmentation["counts"]) > 0
    return any(len(one) >= 6 and len(one) % 2 == 0 and bool(np.isfinite(one).all()) for one in segmentation)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float reaches
        return False


def _is_box(value: Any) -> bool:
    """Return whether a value read from a file is four finite numbers."""
    return isinstance(value, list | tuple | np.ndarray) and len(value) == 4 and all(map(_is_number, value))


def kind_of(value: Any) -> str:
    """The kind of a JSON value, as a sentence calls it."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")
