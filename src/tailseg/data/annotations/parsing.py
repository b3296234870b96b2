"""From annotation JSON to checked numpy columns; every fault is a sentence that names its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.columns import Columns, in_full, starts_of
from tailseg.data.annotations.filtering import Report, in_order, keep, require_sound_segmentations, require_unique
from tailseg.data.annotations.segmentations import MAX_SIDE, segmentation_columns, short
from tailseg.data.annotations.streaming import read_lists
from tailseg.errors import UserError

Row = dict[str, Any]
Frequency = Literal["r", "c", "f"]
KINDS = {"images": "image", "annotations": "annotation", "categories": "category"}
_BATCHES = 200  # joined at once: some 25 MB of coordinates
_EXPECTED = "an LVIS or COCO file has a list of"


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one list of the file, with columns that are checked as they are taken."""

    path: Path
    kind: str  # "image", "annotation" or "category"
    rows: list[Row]
    first: int = 0  # the number of the first row in the file's list

    def fault(self, position: int, problem: str) -> UserError:
        """The error for a row: file, row and ``problem``, which includes the fix."""
        row = self.rows[position]
        named = isinstance(row, dict) and isinstance(row.get("id"), (int, str))
        place = f"{self.kind} {row['id']!r}" if named else f"{self.kind} number {self.first + position + 1} of the list"
        return UserError(f"{self.path}: {place}: {problem}")

    def values(self, key: str, types: tuple[type, ...], expected: str) -> list[Any]:
        """The values under ``key``, each of one of ``types`` (exactly: a bool is no int)."""
        values = [row.get(key) for row in self.rows]
        if not set(map(type, values)) <= set(types):
            position = next(i for i, value in enumerate(values) if type(value) not in types)
            value = values[position]
            found = "is missing" if key not in self.rows[position] else f"is {short(value)}"
            raise self.fault(position, f"{key} {found}; it must be {expected}")
        return values

    def integers(self, key: str) -> NDArray[np.int64]:
        """A column of whole numbers."""
        values = self.values(key, (int,), "a whole number")
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            position = next(i for i, value in enumerate(values) if abs(value) >= 2**63)
            problem = f"{key} {values[position]} is too large; use a number below 2^63"
            raise self.fault(position, problem) from None

    def boxes(self) -> NDArray[np.float64]:
        """The ``bbox`` column: (N, 4) x, y, width, height."""
        boxes = self.values("bbox", (list,), "a list of four numbers: x, y, width, height")
        if not (set(map(len, boxes)) <= {4} and set(map(type, chain.from_iterable(boxes))) <= {int, float}):
            bad = next(i for i, b in enumerate(boxes) if len(b) != 4 or not set(map(type, b)) <= {int, float})
            found = short(boxes[bad])
            raise self.fault(bad, f"bbox is {found}; it must be four numbers: x, y, width, height")
        return np.fromiter(chain.from_iterable(boxes), np.float64, 4 * len(boxes)).reshape(-1, 4)


def read_tables(path: Path, kinds: dict[str, str] = KINDS) -> Iterator[Table]:
    """The lists of a file that are keys of ``kinds``, in the file's order, some rows at a time.

    Each list begins with a table whose ``first`` is 0, also where it is empty. A file with images may lack the list of
    annotations, as those of test servers do: it counts as empty.

    Raises:
        UserError: the file cannot be read or is not valid JSON; a list is missing or no list of objects.
    """
    found: set[str] = set()
    has_images = False
    for key, first, rows in read_lists(path, kinds):
        kind = kinds[key]
        if first == 0 and key in found:
            raise UserError(f"{path}: {key!r} occurs twice; keep one of them")
        if not isinstance(rows, list):
            raise UserError(f"{path}: {key!r} is {short(rows)}; {_EXPECTED} {kind} objects there")
        if not set(map(type, rows)) <= {dict}:
            position = next(i for i, row in enumerate(rows) if type(row) is not dict)
            raise UserError(f"{path}: {key}[{first + position}] is {short(rows[position])}; it must be an object")
        found.add(key)
        has_images |= key == "images" and bool(rows)
        yield Table(path, kind, rows, first)
    for key, kind in kinds.items():
        if key == "annotations" and key not in found and has_images:
            yield Table(path, kind, [], 0)
        elif key not in found:
            raise UserError(f"{path}: {key!r} is missing; {_EXPECTED} {kind} objects there")


def read_categories(path: Path) -> Table:
    """The categories of a file, which needs no images or annotations.

    Raises:
        UserError: as `read_tables`.
    """
    rows = [row for table in read_tables(path, {"categories": "category"}) for row in table.rows]
    return Table(path, "category", rows)


@dataclass(frozen=True, slots=True)
class Category:
    """One class; counts are of this file's instances after the filter, without crowds."""

    id: int
    name: str
    frequency: Frequency  # rare, common or frequent, by the number of training images
    image_count: int
    instance_count: int


@dataclass(frozen=True, slots=True)
class Parsed:
    """A file's content: numpy columns, and what is small enough to be objects."""

    columns: Columns
    categories: tuple[Category, ...]  # in id order; all of them "f" where the file does not state groups
    frequency_stated: bool
    report: Report


def parse(path: Path, *, masks: bool = True) -> Parsed:
    """Read an annotation file, piece by piece.

    Args:
        path: the file.
        masks: every object needs a sound one; otherwise faulty or missing masks count as empty.

    Raises:
        UserError: the file is missing, broken or contradicts itself.
    """
    images, annotations = _Batches(), _Batches()
    categories: list[Row] = []
    faults: dict[int, str] = {}  # of segmentations, by the annotation's number: no matter where it is dropped
    for table in read_tables(path):
        if table.kind == "image":
            images.add(_image_columns(table))
        elif table.kind == "category":
            categories += table.rows
        else:
            columns, faulty = _annotation_columns(table)
            annotations.add(columns)
            faults |= {table.first + i: fault for i, fault in faulty.items()}
    of_images, of_annotations = images.joined(), annotations.joined()
    if not len(of_images["image_ids"]) or not categories:
        missing = "images" if categories else "categories"
        raise UserError(f"{path}: the list of {missing} is empty; there is nothing to work on")
    require_unique(path, "image", of_images["image_ids"])
    ids, names, groups = category_columns(Table(path, "category", categories))
    stated = [row.get("image_count") for row in categories]
    stated_counts = np.array([count if type(count) is int else -1 for count in stated], np.int64)
    faults = faults if masks else {}
    kept, report = keep(path, of_annotations, of_images, ids, faults, derive_areas_from_masks=masks)
    rle_hws = of_annotations.pop("rle_hws")
    if masks:
        require_sound_segmentations(path, of_annotations, of_images, kept, faults, rle_hws)
    columns = in_order(of_annotations, kept)
    columns["stated_image_counts"] = stated_counts[np.argsort([row["id"] for row in categories])]
    positions = columns.pop("images")
    columns["first_annotation"] = starts_of(np.bincount(positions, minlength=len(of_images["image_ids"])))
    for name, column in of_images.items():
        flat = name.endswith("_lengths")
        columns[name.replace("_lengths", "_starts")] = starts_of(column) if flat else column
    trained = columns["trained"]
    counted = _count(ids, names, groups, positions[trained], columns["labels"][trained])
    return Parsed(columns, counted, groups is not None, report)


def category_columns(
    categories: Table,
) -> tuple[NDArray[np.int64], list[str], list[Frequency] | None]:
    """Ids in order, with their names, and frequency groups where the file states all of them."""
    ids = categories.integers("id")
    require_unique(categories.path, "category", ids)
    names = categories.values("name", (str,), "a string")
    order = np.argsort(ids)
    stated = [row.get("frequency") for row in categories.rows]
    groups = [stated[i] for i in order] if all(group in ("r", "c", "f") for group in stated) else None
    return ids[order], [names[i] for i in order], groups


def _image_columns(images: Table) -> Columns:
    """Some rows of the list of images; texts and lists laid flat beside their lengths."""
    ids, heights, widths = images.integers("id"), images.integers("height"), images.integers("width")
    hws = np.stack([heights, widths], axis=1)
    bad = np.flatnonzero(((hws < 1) | (hws > MAX_SIDE)).any(axis=1))
    if bad.size:
        size = f"height {heights[bad[0]]} and width {widths[bad[0]]}"
        raise images.fault(int(bad[0]), f"it has {size}; sides must be 1 to {MAX_SIDE} pixels")
    columns: Columns = {"image_ids": ids, "image_sizes": hws}
    for key in ("file_name", "coco_url"):
        texts = [(text or "").encode() for text in images.values(key, (str, type(None)), "a string")]
        columns[f"{key}_utf8"] = np.frombuffer(b"".join(texts), np.uint8)
        columns[f"{key}_lengths"] = _lengths(texts)
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        values = [value or [] for value in images.values(key, (list, type(None)), "a list of category ids")]
        lengths = _lengths(values)
        try:
            if not set(map(type, chain.from_iterable(values))) <= {int}:
                raise OverflowError
            columns[f"{key}_ids"] = np.fromiter(chain.from_iterable(values), np.int64, int(lengths.sum()))
        except OverflowError:
            position = next(i for i, v in enumerate(values) if any(type(x) is not int or x >= 2**63 for x in v))
            problem = f"{key} must be a list of whole numbers, the ids of categories"
            raise images.fault(position, problem) from None
        columns[f"{key}_lengths"] = lengths
    columns["neg_stated"] = np.array([row.get("neg_category_ids") is not None for row in images.rows], np.bool_)
    return columns


def _annotation_columns(annotations: Table) -> tuple[Columns, dict[int, str]]:
    """Some rows of the list of annotations, as they stand there; and faults of segmentations, by row."""
    flags = annotations.values("iscrowd", (int, bool, type(None)), "0 or 1")
    columns = {
        "annotation_ids": annotations.integers("id"),
        "image_id": annotations.integers("image_id"),
        "category_id": annotations.integers("category_id"),
        "boxes_xywh": annotations.boxes(),
        "areas": np.array(annotations.values("area", (int, float, type(None)), "a number, in pixels"), np.float64),
        "crowd": np.fromiter(map(bool, flags), np.bool_, len(flags)),
    }
    segmentations, faults = segmentation_columns(annotations.rows)
    return columns | segmentations, faults


def _count(
    ids: NDArray[np.int64],
    names: list[str],
    groups: list[Frequency] | None,
    images: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> tuple[Category, ...]:
    """The categories with their counts over instances, given by image and label."""
    instances = np.bincount(labels, minlength=len(ids))
    pairs = np.unique(images * len(ids) + labels) % len(ids)  # each (image, class) once
    in_images = np.bincount(pairs, minlength=len(ids))
    rows = zip(ids, names, groups or ["f"] * len(ids), in_images, instances, strict=True)
    return tuple(Category(int(i), name, group, int(m), int(n)) for i, name, group, m, n in rows)  # type: ignore[arg-type]


class _Batches:
    """Columns that grow by batches.

    Many small arrays become one now and then: left alone they would keep the memory between them from the system.
    """

    def __init__(self) -> None:
        self._large: list[Columns] = []
        self._small: list[Columns] = []

    def add(self, batch: Columns) -> None:
        self._small.append(batch)
        if len(self._small) == _BATCHES:
            self._large.append(_joined(self._small))
            self._small = []

    def joined(self) -> Columns:
        """The columns of all batches, which are used up."""
        return _joined(self._large + self._small)


def _joined(batches: list[Columns]) -> Columns:
    joined = {}
    for name in list(batches[0]):
        parts = [batch.pop(name) for batch in batches]
        if name == "coordinates" and len({part.dtype for part in parts}) > 1:
            parts = [in_full(part) for part in parts]
        joined[name] = np.concatenate(parts)
    return joined


def _lengths(values: list[Any]) -> NDArray[np.int64]:
    return np.fromiter(map(len, values), np.int64, len(values))
