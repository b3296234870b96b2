"""From annotation JSON to checked numpy columns; every fault is a sentence that names its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.columns import Segmentations, in_full, starts_of, take_rows
from tailseg.data.annotations.masks import pixels_covered
from tailseg.data.annotations.segmentations import MAX_SIDE, segmentation_columns, short
from tailseg.data.annotations.streaming import read_lists
from tailseg.errors import UserError

Row = dict[str, Any]
Columns = dict[str, NDArray[Any]]
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


def positions_of(wanted: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each wanted id its position in ``ids`` (any order), and whether it is there."""
    if ids.size == 0:
        return np.zeros(wanted.shape, np.int64), np.zeros(wanted.shape, np.bool_)
    order = np.argsort(ids, kind="stable")
    places = np.searchsorted(ids, wanted, sorter=order).clip(max=ids.size - 1)
    found = order[places]
    return found, ids[found] == wanted


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
class Report:
    """Counts of the file's content and of what was left out; each annotation is counted once, in this order."""

    annotations: int  # in the file
    crowd: int  # iscrowd: kept in the columns, but out of training
    outside: int  # dropped: the box does not meet the image
    no_area: int  # dropped: area <= 0
    thin: int  # box narrower or lower than one pixel: kept to be scored, as lvis-api does, but out of training
    thin_dropped: int  # of these, dropped because their mask is at fault
    empty_images: int  # images without an instance to train on

    @property
    def dropped(self) -> int:
        """Annotations that are in the file but not in the columns."""
        return self.outside + self.no_area + self.thin_dropped


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
    _require_unique(path, "image", of_images["image_ids"])
    ids, names, groups = category_columns(Table(path, "category", categories))
    stated = [row.get("image_count") for row in categories]
    stated_counts = np.array([count if type(count) is int else -1 for count in stated], np.int64)
    faults = faults if masks else {}
    kept, report = _kept(path, of_annotations, of_images, ids, faults, derive_areas_from_masks=masks)
    rle_hws = of_annotations.pop("rle_hws")
    if masks:
        _require_sound_segmentations(path, of_annotations, of_images, kept, faults, rle_hws)
    columns = _sorted(of_annotations, kept)
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
    _require_unique(categories.path, "category", ids)
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


def _kept(
    path: Path,
    annotations: Columns,
    images: Columns,
    category_ids: NDArray[np.int64],
    faults: dict[int, str],
    *,
    derive_areas_from_masks: bool,
) -> tuple[NDArray[np.int64], Report]:
    """The annotations that are kept, sorted by image; and what was left out.

    ``annotations`` gains the columns ``images``, positions, ``labels``, ``boxes`` and ``trained``; areas that the file
    does not state are filled in.
    """
    ids = annotations["annotation_ids"]
    _require_unique(path, "annotation", ids)
    for name, key, of, known in (
        ("images", "image_id", "image", images["image_ids"]),
        ("labels", "category_id", "category", category_ids),
    ):
        wanted = annotations.pop(key)
        annotations[name], found = positions_of(wanted, known)
        if not found.all():
            bad = int(np.argmin(found))
            problem = f"there is no {of} with the {key} {wanted[bad]}; add it or remove this annotation"
            raise UserError(f"{path}: annotation {ids[bad]}: {problem}")
    x, y, w, h = annotations["boxes_xywh"].T
    _fill_areas(annotations, images, from_masks=derive_areas_from_masks)
    height, width = images["image_sizes"][annotations["images"]].T
    inter_w = np.minimum(x + w, width) - np.maximum(x, 0)
    inter_h = np.minimum(y + h, height) - np.maximum(y, 0)
    outside = (inter_w <= 0) | (inter_h <= 0)
    no_area = ~outside & (annotations["areas"] <= 0)
    thin = ~outside & ~no_area & ((w < 1) | (h < 1))
    annotations["boxes"] = np.stack([x, y, x + w, y + h], axis=1)
    annotations["trained"] = ~thin & ~annotations["crowd"]
    at_fault = np.zeros(len(ids), np.bool_)
    at_fault[list(faults)] = True
    dropped = outside | no_area | (thin & at_fault)

    kept = np.flatnonzero(~dropped)
    kept = kept[np.argsort(annotations["images"][kept], kind="stable")]
    trained = annotations["images"][kept][annotations["trained"][kept]]
    instances = np.bincount(trained, minlength=len(images["image_ids"]))
    report = Report(
        annotations=len(ids),
        crowd=int(annotations["crowd"][kept].sum()),
        outside=int(outside.sum()),
        no_area=int(no_area.sum()),
        thin=int(thin.sum()),
        thin_dropped=int((thin & at_fault).sum()),
        empty_images=int((instances == 0).sum()),
    )
    return kept, report


def _fill_areas(annotations: Columns, images: Columns, *, from_masks: bool) -> None:
    """Areas that the file does not state: those of the masks, or of the boxes where there is no mask."""
    rows = np.flatnonzero(np.isnan(annotations["areas"]))
    if not rows.size:
        return
    annotations["areas"][rows] = annotations["boxes_xywh"][rows, 2:].prod(axis=1)
    segmentations = Segmentations(
        annotations["coordinates"],
        starts_of(annotations["polygon_lengths"]),
        starts_of(annotations["polygon_counts"]),
        annotations["rle_bytes"],
        starts_of(annotations["rle_lengths"]),
    )
    for row in rows if from_masks else ():
        segmentation = segmentations[int(row)]
        if segmentation:
            height, width = images["image_sizes"][annotations["images"][row]].tolist()
            annotations["areas"][row] = pixels_covered(segmentation, (height, width))


def _require_sound_segmentations(
    path: Path,
    annotations: Columns,
    images: Columns,
    kept: NDArray[np.int64],
    faults: dict[int, str],
    rle_hws: NDArray[np.int32],
) -> None:
    """Raise UserError where a kept annotation's segmentation is at fault or has not its image's size."""
    stated = rle_hws[kept]
    hws = images["image_sizes"][annotations["images"][kept]]
    wrong = np.flatnonzero((stated > 0).all(axis=1) & (stated != hws).any(axis=1))
    sizes = {
        int(kept[i]): f"the RLE's size is {stated[i].tolist()} but the image's is {hws[i].tolist()}; make them equal"
        for i in wrong[:1]
    }
    at_fault = kept[np.isin(kept, list(faults | sizes))]
    if len(at_fault):
        first = int(min(at_fault))
        problem = (faults | sizes)[first]
        raise UserError(f"{path}: annotation {annotations['annotation_ids'][first]}: {problem}")


def _sorted(annotations: Columns, kept: NDArray[np.int64]) -> Columns:
    """The kept annotations in their order, the flat columns with starts for lengths. ``annotations`` is used up."""
    names = ("annotation_ids", "labels", "images", "crowd", "trained", "boxes_xywh", "areas")
    columns: Columns = {name: annotations.pop(name)[kept] for name in names}
    columns["boxes"] = annotations.pop("boxes")[kept].astype(np.float32)
    lengths, first_polygon = annotations.pop("polygon_lengths"), starts_of(annotations.pop("polygon_counts"))
    coordinate_starts = starts_of(lengths)[first_polygon]  # of each annotation
    columns["coordinates"] = take_rows(annotations.pop("coordinates"), coordinate_starts, kept)
    columns["polygon_starts"] = starts_of(take_rows(lengths, first_polygon, kept))
    columns["first_polygon"] = starts_of(np.diff(first_polygon)[kept])
    rle_starts = starts_of(annotations.pop("rle_lengths"))
    columns["rle_bytes"] = take_rows(annotations.pop("rle_bytes"), rle_starts, kept)
    columns["rle_starts"] = starts_of(np.diff(rle_starts)[kept])
    return columns


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


def _require_unique(path: Path, kind: str, ids: NDArray[np.int64]) -> None:
    """Raise UserError where an id occurs twice."""
    in_order = np.sort(ids)
    repeated = np.flatnonzero(in_order[1:] == in_order[:-1])
    if repeated.size:
        problem = "this id occurs more than once; give each its own"
        raise UserError(f"{path}: {kind} {in_order[repeated[0]]}: {problem}")
