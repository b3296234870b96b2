"""From annotation JSON to checked numpy columns; what is odd is made plain or left out, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.columns import Columns, in_full, starts_of
from tailseg.data.annotations.filtering import Report, add_repeated, in_order, keep
from tailseg.data.annotations.oddities import Tally, oddities_of, require_sound
from tailseg.data.annotations.repair import FARTHEST, meant, plain_annotation, plain_category, plain_image
from tailseg.data.annotations.segmentations import MAX_SIDE, Fault, segmentation_columns
from tailseg.data.annotations.streaming import read_lists
from tailseg.data.images import MAX_PIXELS
from tailseg.errors import UserError
from tailseg.wording import short

Row = dict[str, Any]
Frequency = Literal["r", "c", "f"]
KINDS = {"images": "image", "annotations": "annotation", "categories": "category"}
_BATCHES = 200  # joined at once: some 25 MB of coordinates
_EXPECTED = "an LVIS or COCO file has a list of"


class _NotPlainError(Exception):
    """Some row of a batch is not as rows should be; `repair` looks at each of them then."""


@dataclass(frozen=True, slots=True)
class Table:
    """Some rows of one list of the file."""

    path: Path
    kind: str  # "image", "annotation" or "category"
    rows: list[Row]
    first: int = 0  # the number of the first row in the file's list

    def place(self, position: int) -> str:
        """Name of a row: by its id, or else by its number in the list."""
        number = self.rows[position].get("id")
        named = type(number) in (int, float, str)
        return f"{self.kind} {number!r}" if named else f"{self.kind} number {self.first + position + 1} of the list"

    def objects(self, met: Tally) -> Table:
        """The same without entries that are no objects, which are counted."""
        if set(map(type, self.rows)) <= {dict}:
            return self
        odd = [(self.first + i, row) for i, row in enumerate(self.rows) if type(row) is not dict]
        met.add("no_object", [f"{self.kind} number {place + 1} of the list: {short(row)}" for place, row in odd])
        return Table(self.path, self.kind, [row for row in self.rows if type(row) is dict], self.first)

    def repaired(self, met: Tally) -> Table:
        """The rows that can be made plain; the rest is counted."""
        places = list(map(self.place, range(len(self.rows))))
        if self.kind == "annotation":
            rows = [
                plain_annotation(row, place, self.first + i, met)
                for i, (row, place) in enumerate(zip(self.rows, places, strict=True))
            ]
        else:
            plain = plain_image if self.kind == "image" else plain_category
            rows = [plain(row, place, met) for row, place in zip(self.rows, places, strict=True)]
        return Table(self.path, self.kind, [row for row in rows if row is not None], self.first)


def read_tables(path: Path, kinds: dict[str, str] = KINDS) -> Iterator[Table]:
    """The lists of a file that are keys of ``kinds``, in the file's order, some rows at a time.

    Each list begins with a table whose ``first`` is 0, also where it is empty. A file with images may lack the list of
    annotations, as those of test servers do: it counts as empty. Among annotations there may be entries that are no
    objects (see `Table.objects`).

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
        if kind != "annotation" and not set(map(type, rows)) <= {dict}:
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


def parse(path: Path, *, masks: bool = True, tolerant: bool = False) -> Parsed:
    """Read an annotation file, piece by piece.

    Args:
        path: the file.
        masks: every object needs one; otherwise broken or missing masks count as empty.
        tolerant: errors in images and annotations are no more than counted, and these left out.

    Raises:
        UserError: the file is missing or no file of annotations, or it has errors (see `oddities`).
    """
    met = Tally()
    images, annotations = _Batches(), _Batches()
    categories: list[Row] = []
    faults: dict[int, Fault] = {}  # of segmentations, by the annotation's place in the columns
    read = done = 0
    for table in read_tables(path):
        if table.kind == "image":
            images.add(_columns_of(table, _image_columns, met))
        elif table.kind == "category":
            categories += table.rows
        else:
            read += len(table.rows)
            columns, faulty = _columns_of(table.objects(met), partial(_annotation_columns, met=met), met)
            faults |= {done + i: fault for i, fault in faulty.items()}
            done += len(columns["annotation_ids"])
            annotations.add(columns)
    of_images, of_annotations = images.joined(), annotations.joined()
    ids, names, groups = category_columns(Table(path, "category", categories), met)
    if tolerant:  # but nothing can be said of classes that are not known
        require_sound(path, (odd for odd in oddities_of(met) if odd.kind in ("category_id", "category_name")), hint="")
    if not categories or not (len(of_images["image_ids"]) or met.counts):
        missing = "images" if categories else "categories"
        raise UserError(f"{path}: the list of {missing} is empty; fill it, or remove the file")
    negative = int((of_images["image_ids"] < 0).sum())
    if "unsigned_id" in met.counts and negative > met.counts["unsigned_id"]:
        met.add("image_id_signs", [f"image {of_images['image_ids'].min()}: its id is below 0"], negative)
    add_repeated(met, "image", of_images["image_ids"])
    kept = keep(of_annotations, of_images, ids, faults, met, with_masks=masks)
    oddities = oddities_of(met)
    if not tolerant:
        require_sound(path, oddities)
    columns = in_order(of_annotations, kept)
    columns["stated_image_counts"] = _stated_counts(categories, ids)
    positions = columns.pop("images")
    columns["first_annotation"] = starts_of(np.bincount(positions, minlength=len(of_images["image_ids"])))
    for name, column in of_images.items():
        flat = name.endswith("_lengths")
        columns[name.replace("_lengths", "_starts")] = starts_of(column) if flat else column
    trained = columns["trained"]
    counted = _count(ids, names, groups, positions[trained], columns["labels"][trained])
    instances = np.bincount(positions[trained], minlength=len(of_images["image_ids"]))
    report = Report(
        annotations=read,
        crowd=int(columns["crowd"].sum()),
        ignored=int(columns["ignored"].sum()),
        thin=int((~trained & ~columns["crowd"] & ~columns["ignored"]).sum()),
        empty_images=int((instances == 0).sum()),
        oddities=oddities,
    )
    return Parsed(columns, counted, groups is not None, report)


T = TypeVar("T")


def _columns_of(table: Table, columns: Callable[[Table], T], met: Tally) -> T:
    """The columns of some rows; of those that are not plain, what can be made of them."""
    try:
        return columns(table)
    except _NotPlainError:
        return columns(table.repaired(met))


def category_columns(
    categories: Table, met: Tally | None = None
) -> tuple[NDArray[np.int64], list[str], list[Frequency] | None]:
    """Ids in order, with their names, and frequency groups where the file states all of them.

    Args:
        categories: all rows of the list.
        met: where odd rows are counted; by default an error among them is raised.
    """
    tally = met or Tally()
    try:
        ids, names = _integers(categories, "id"), _values(categories, "name", (str,))
        if not all(names):
            raise _NotPlainError
        rows = categories.rows
    except _NotPlainError:
        rows = categories.repaired(tally).rows
        ids, names = np.array([row["id"] for row in rows], np.int64), [row["name"] for row in rows]
    names = [normalize("NFC", name) for name in names]
    rows_of = Counter(zip(ids.tolist(), names, strict=True))
    for (number, name), count in rows_of.items():
        tally.add("category_again", [f"category {number}: {name!r}"], count - 1)
    add_repeated(tally, "category", np.array([number for number, _ in rows_of], np.int64))
    if met is None:
        require_sound(categories.path, oddities_of(tally))
    order = np.unique(ids, return_index=True)[1]
    stated = [rows[i].get("frequency") for i in order]
    groups = stated if stated and all(group in ("r", "c", "f") for group in stated) else None
    return ids[order], told_apart(ids[order].tolist(), [names[i] for i in order], tally), groups


def told_apart(ids: Sequence[object], names: list[str], met: Tally) -> list[str]:
    """The names, those that an earlier category has with a number behind them: ``bolt``, ``bolt (2)``."""
    taken, met_names = set(names), set[str]()
    counts: dict[str, int] = {}
    apart = []
    for number, name in zip(ids, names, strict=True):
        own, count = name, counts.get(name, 1)
        while own in met_names or (own != name and own in taken):
            count += 1
            own = f"{name} ({count})"
        if own != name:
            met.add("same_name", [f"category {number}: {name!r} is now {own!r}"])
            counts[name] = count
        met_names.add(own)
        apart.append(own)
    return apart


def _stated_counts(categories: list[Row], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """(C,) each category's ``image_count`` in the file, -1 where it has none."""
    stated = {meant(row.get("id")): row.get("image_count") for row in categories}
    counts = (stated.get(number) for number in ids.tolist())
    return np.array([count if type(count) is int and 0 <= count < 2**63 else -1 for count in counts], np.int64)


def _values(table: Table, key: str, types: tuple[type, ...]) -> list[Any]:
    """The values under ``key``, each of one of ``types`` (exactly: a bool is no int)."""
    values = [row.get(key) for row in table.rows]
    if not set(map(type, values)) <= set(types):
        raise _NotPlainError
    return values


def _integers(table: Table, key: str) -> NDArray[np.int64]:
    """A column of whole numbers."""
    try:
        return np.array(_values(table, key, (int,)), dtype=np.int64)
    except OverflowError:
        raise _NotPlainError from None


def _boxes(table: Table) -> NDArray[np.float64]:
    """The ``bbox`` column: (N, 4) x, y, width, height; NaN where there is none."""
    boxes = _values(table, "bbox", (list,))
    if not (set(map(len, boxes)) <= {4} and set(map(type, chain.from_iterable(boxes))) <= {int, float}):
        raise _NotPlainError
    column = np.fromiter(chain.from_iterable(boxes), np.float64, 4 * len(boxes)).reshape(-1, 4)
    if (np.abs(column) > FARTHEST).any():
        raise _NotPlainError
    return column


def _image_columns(images: Table) -> Columns:
    """Some rows of the list of images; texts and lists laid flat beside their lengths."""
    ids, heights, widths = (_integers(images, key) for key in ("id", "height", "width"))
    hws = np.stack([heights, widths], axis=1)
    if ((hws < 1) | (hws > MAX_SIDE)).any() or (hws.prod(axis=1) > MAX_PIXELS).any():
        raise _NotPlainError
    columns: Columns = {"image_ids": ids, "image_sizes": hws}
    for key in ("file_name", "coco_url"):
        texts = [(text or "").encode() for text in _values(images, key, (str, type(None)))]
        columns[f"{key}_utf8"] = np.frombuffer(b"".join(texts), np.uint8)
        columns[f"{key}_lengths"] = _lengths(texts)
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        values = [value or [] for value in _values(images, key, (list, type(None)))]
        lengths = _lengths(values)
        try:
            if not set(map(type, chain.from_iterable(values))) <= {int}:
                raise _NotPlainError
            columns[f"{key}_ids"] = np.fromiter(chain.from_iterable(values), np.int64, int(lengths.sum()))
        except OverflowError:
            raise _NotPlainError from None
        columns[f"{key}_lengths"] = lengths
    columns["neg_stated"] = np.array([row.get("neg_category_ids") is not None for row in images.rows], np.bool_)
    return columns


def _annotation_columns(annotations: Table, met: Tally) -> tuple[Columns, dict[int, Fault]]:
    """Some rows of the list of annotations, as they stand there; and faults of segmentations, by row."""
    flags = [_values(annotations, key, (int, bool, type(None))) for key in ("iscrowd", "ignore")]
    if not set(chain.from_iterable(flags)) <= {0, 1, None}:
        raise _NotPlainError
    columns = {
        "annotation_ids": _integers(annotations, "id"),
        "image_id": _integers(annotations, "image_id"),
        "category_id": _integers(annotations, "category_id"),
        "boxes_xywh": _boxes(annotations),
        "areas": np.array(_values(annotations, "area", (int, float, type(None))), np.float64),
        "crowd": np.fromiter(map(bool, flags[0]), np.bool_, len(flags[0])),
        "ignored": np.fromiter(map(bool, flags[1]), np.bool_, len(flags[1])),
    }
    segmentations, faults = segmentation_columns(annotations.rows, annotations.place, met)
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
