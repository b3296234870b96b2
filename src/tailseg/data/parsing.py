"""From annotation JSON to checked numpy columns; every fault is a sentence that names its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.masks import rle_runs
from tailseg.errors import UserError

Row = dict[str, Any]
Frequency = Literal["r", "c", "f"]
MAX_SIDE = 65_535  # pixels; no JPEG is larger, and a wild number must not make us allocate its square


def read_json(path: Path) -> Row:
    """The object that a JSON file holds.

    Raises:
        UserError: the file is missing, unreadable, empty, cut off or not an object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    content = content.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put first
    if not content.strip():
        raise UserError(f"{path}: the file is empty; write or download it again")
    try:
        data = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno} (character {error.pos})"
        cut = "the file is cut off" if "end of data" in error.msg else f"not valid JSON: {error.msg}"
        raise UserError(f"{path}: {cut} at {place}; write or download it again") from None
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise UserError(f"{path}: expected an object with images, annotations and categories, found a {kind}")
    return data


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one list of the file, with columns that are checked as they are taken."""

    path: Path
    kind: str  # "image", "annotation" or "category"
    rows: list[Row]

    def fault(self, position: int, problem: str) -> UserError:
        """The error for a row: file, row and ``problem``, which includes the mend."""
        row = self.rows[position]
        named = isinstance(row, dict) and isinstance(row.get("id"), (int, str))
        place = f"{self.kind} {row['id']!r}" if named else f"{self.kind} number {position + 1} of the list"
        return UserError(f"{self.path}: {place}: {problem}")

    def values(self, key: str, types: tuple[type, ...], expected: str) -> list[Any]:
        """The values under ``key``, each of one of ``types`` (exactly: a bool is no int)."""
        values = [row.get(key) for row in self.rows]
        if not set(map(type, values)) <= set(types):
            position = next(i for i, value in enumerate(values) if type(value) not in types)
            value = values[position]
            found = "is missing" if key not in self.rows[position] else f"is {_short(value)}"
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

    def ids(self) -> NDArray[np.int64]:
        """The ``id`` column, without duplicates."""
        ids = self.integers("id")
        order = np.argsort(ids, kind="stable")
        repeated = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        if repeated.size:
            raise self.fault(int(order[repeated[0] + 1]), "this id occurs more than once; give each its own")
        return ids

    def boxes(self) -> NDArray[np.float64]:
        """The ``bbox`` column: (N, 4) x, y, width, height."""
        boxes = self.values("bbox", (list,), "a list of four numbers: x, y, width, height")
        if not (set(map(len, boxes)) <= {4} and set(map(type, chain.from_iterable(boxes))) <= {int, float}):
            bad = next(i for i, b in enumerate(boxes) if len(b) != 4 or not set(map(type, b)) <= {int, float})
            found = _short(boxes[bad])
            raise self.fault(bad, f"bbox is {found}; it must be four numbers: x, y, width, height")
        return np.array(boxes, dtype=np.float64).reshape(-1, 4)

    def positions(self, key: str, ids: NDArray[np.int64], of: str) -> NDArray[np.int64]:
        """For each row the position of its ``key`` among ``ids``, the ids of the list ``of``."""
        wanted = self.integers(key)
        found, known = positions_of(wanted, ids)
        if not known.all():
            bad = int(np.argmin(known))
            raise self.fault(bad, f"there is no {of} with the {key} {wanted[bad]}; add it or remove this {self.kind}")
        return found


def positions_of(wanted: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each wanted id its position in ``ids`` (any order), and whether it is there."""
    if ids.size == 0:
        return np.zeros(wanted.shape, np.int64), np.zeros(wanted.shape, np.bool_)
    order = np.argsort(ids, kind="stable")
    places = np.searchsorted(ids, wanted, sorter=order).clip(max=ids.size - 1)
    found = order[places]
    return found, ids[found] == wanted


def table(data: Row, path: Path, key: str, kind: str) -> Table:
    """The list under ``key`` of the file's object."""
    rows = data.get(key)
    if not isinstance(rows, list):
        found = "is missing" if key not in data else f"is {_short(rows)}"
        raise UserError(f"{path}: {key!r} {found}; an LVIS or COCO file has a list of {kind} objects there")
    if not set(map(type, rows)) <= {dict}:
        position = next(i for i, row in enumerate(rows) if type(row) is not dict)
        raise UserError(f"{path}: {key}[{position}] is {_short(rows[position])}; it must be an object")
    return Table(path, kind, rows)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, slots=True)
class Segmentations:
    """Polygons and RLEs of all annotations, flat; an annotation has either polygons or an RLE."""

    coordinates: NDArray[np.float32]  # x0, y0, x1, y1, ... of all polygons in a row
    polygon_starts: NDArray[np.int64]  # (P + 1,) into coordinates
    first_polygon: NDArray[np.int64]  # (N + 1,) into polygon_starts
    rle_bytes: NDArray[np.uint8]  # compressed RLEs in a row
    rle_starts: NDArray[np.int64]  # (N + 1,) into rle_bytes

    def __getitem__(self, row: int) -> list[NDArray[np.float32]] | bytes:
        """The polygons, or the compressed RLE, of annotation ``row``."""
        start, stop = self.rle_starts[row : row + 2]
        if stop > start:
            return self.rle_bytes[start:stop].tobytes()
        bounds = self.polygon_starts[self.first_polygon[row] : self.first_polygon[row + 1] + 1]
        return [self.coordinates[a:b] for a, b in pairwise(bounds)]


def read_segmentations(rows: Table, image_hws: NDArray[np.int64]) -> Segmentations:
    """The ``segmentation`` column; ``image_hws`` is (N, 2), the image size of each row.

    Raises:
        UserError: a polygon with too few, an odd number of, or wild coordinates; an RLE that is broken or
            does not fit the image; anything else that is neither.
    """
    polygons: list[NDArray[np.float32]] = []
    codes: list[bytes] = []
    per_row = np.zeros(len(rows.rows), np.int64)
    expected = "a list of polygons or an RLE object"
    for i, value in enumerate(rows.values("segmentation", (list, dict), expected)):
        try:
            if isinstance(value, dict):
                codes.append(_compressed(value, (int(image_hws[i, 0]), int(image_hws[i, 1]))))
                continue
            codes.append(b"")
            per_row[i] = len(value)
            polygons += map(_polygon, value)
            if not value:
                raise ValueError("segmentation is empty; give at least one polygon, or remove the annotation")
        except ValueError as error:
            raise rows.fault(i, str(error)) from None
    return Segmentations(
        coordinates=np.concatenate(polygons) if polygons else np.zeros(0, np.float32),
        polygon_starts=_starts(polygons, len),
        first_polygon=np.concatenate([[0], np.cumsum(per_row)]),
        rle_bytes=np.frombuffer(b"".join(codes), np.uint8),
        rle_starts=_starts(codes, len),
    )


def _starts(parts: Sequence[Any], length: Callable[[Any], int]) -> NDArray[np.int64]:
    """(n + 1,) where each part starts when all are laid in a row."""
    return np.concatenate([[0], np.cumsum(np.fromiter(map(length, parts), np.int64, len(parts)))])


def _polygon(value: Any) -> NDArray[np.float32]:
    """One polygon's coordinates; ValueError says what is wrong with them."""
    try:
        polygon = np.array(value)
    except (ValueError, OverflowError):
        polygon = np.empty(0, object)
    if polygon.ndim != 1 or (polygon.dtype.kind not in "if" and polygon.size):
        raise ValueError(f"a polygon is {_short(value)}; it must be a flat list of numbers x0, y0, x1, y1, ...")
    if polygon.size < 6 or polygon.size % 2:
        problem = f"a polygon has {polygon.size} coordinates"
        raise ValueError(f"{problem}; it needs at least three points, an x and a y each")
    if not np.abs(polygon).max() <= MAX_SIDE:  # also refuses what is not a number
        raise ValueError(f"a polygon has a coordinate beyond {MAX_SIDE} pixels; give pixels of the image")
    return polygon.astype(np.float32)


def _compressed(value: Row, image_hw: tuple[int, int]) -> bytes:
    """The compressed counts of an RLE object; ValueError says what is wrong with it."""
    size, counts = value.get("size"), value.get("counts")
    height, width = image_hw
    if size != [height, width]:
        raise ValueError(f"the RLE's size is {_short(size)} but the image's is [{height}, {width}]; make them equal")
    if isinstance(counts, list):
        if not set(map(type, counts)) <= {int} or min(counts, default=0) < 0 or sum(counts) != height * width:
            message = f"the RLE's counts must be whole numbers that sum to {height} x {width} pixels"
            raise ValueError(f"{message}; encode the mask again")
        code: bytes = rle.frPyObjects({"size": size, "counts": counts}, height, width)["counts"]
        return code
    if not isinstance(counts, str) or not counts:
        raise ValueError(f"the RLE's counts are {_short(counts)}; they must be a string or a list of run lengths")
    try:
        total = int(rle_runs(counts.encode()).sum())
    except ValueError as error:
        raise ValueError(f"{error}; encode the mask again") from None
    if total != height * width:
        message = f"the RLE covers {total} pixels but the image has {height} x {width}"
        raise ValueError(f"{message}; encode the mask again")
    return counts.encode()


@dataclass(frozen=True, slots=True)
class Report:
    """What the file held and what was left out; each annotation is counted once, in this order."""

    annotations: int  # in the file
    crowd: int  # iscrowd: kept in the columns, but out of training
    outside: int  # dropped: the box does not meet the image
    no_area: int  # dropped: area <= 0
    thin: int  # dropped: box narrower or lower than one pixel
    empty_images: int  # images without an instance to train on

    @property
    def dropped(self) -> int:
        """Annotations that are in the file but not in the columns."""
        return self.outside + self.no_area + self.thin


def image_columns(images: Table) -> dict[str, Any]:
    """The image columns of `Annotations`, by name."""
    ids, heights, widths = images.ids(), images.integers("height"), images.integers("width")
    hws = np.stack([heights, widths], axis=1)
    bad = np.flatnonzero(((hws < 1) | (hws > MAX_SIDE)).any(axis=1))
    if bad.size:
        size = f"height {heights[bad[0]]} and width {widths[bad[0]]}"
        raise images.fault(int(bad[0]), f"it has {size}; sides must be 1 to {MAX_SIDE} pixels")
    optional = (str, type(None))
    names = images.values("file_name", optional, "a string")
    urls = images.values("coco_url", optional, "a string")
    for i, (name, url) in enumerate(zip(names, urls, strict=True)):
        if not name and not url:
            raise images.fault(i, "it has no file_name and no coco_url; give one, to say which file it is")
    lists = {}
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        values = images.values(key, (list, type(None)), "a list of category ids")
        if not set(map(type, chain.from_iterable(v or () for v in values))) <= {int}:
            position = next(i for i, v in enumerate(values) if not set(map(type, v or ())) <= {int})
            raise images.fault(position, f"{key} must be a list of whole numbers, the ids of categories")
        lists[key] = tuple(tuple(v or ()) for v in values)
    return {"image_ids": ids, "image_hws": hws, "file_names": tuple(names), "coco_urls": tuple(urls), **lists}


def category_columns(
    categories: Table,
) -> tuple[NDArray[np.int64], list[str], list[Frequency] | None]:
    """Ids in order, with their names, and frequency groups where the file states all of them."""
    ids = categories.ids()
    names = categories.values("name", (str,), "a string")
    order = np.argsort(ids)
    stated = [row.get("frequency") for row in categories.rows]
    groups = [stated[i] for i in order] if all(group in ("r", "c", "f") for group in stated) else None
    return ids[order], [names[i] for i in order], groups


def annotation_columns(
    annotations: Table,
    image_ids: NDArray[np.int64],
    image_hws: NDArray[np.int64],
    category_ids: NDArray[np.int64],
) -> tuple[dict[str, Any], Report]:
    """The annotation columns of `Annotations` by name, filtered, sorted by image; and what was left out."""
    ids = annotations.ids()
    images = annotations.positions("image_id", image_ids, "image")
    labels = annotations.positions("category_id", category_ids, "category")
    boxes = annotations.boxes()
    areas = np.array(annotations.values("area", (int, float), "a number, in pixels"), np.float64)
    flags = annotations.values("iscrowd", (int, bool, type(None)), "0 or 1")
    crowd = np.fromiter(map(bool, flags), np.bool_, len(flags))

    x, y, w, h = boxes.T
    height, width = image_hws[images].T
    inter_w = np.minimum(x + w, width) - np.maximum(x, 0)
    inter_h = np.minimum(y + h, height) - np.maximum(y, 0)
    outside = (inter_w <= 0) | (inter_h <= 0)
    no_area = ~outside & (areas <= 0)
    thin = ~outside & ~no_area & ((w < 1) | (h < 1))

    kept = np.flatnonzero(~(outside | no_area | thin))
    kept = kept[np.argsort(images[kept], kind="stable")]
    rows = Table(annotations.path, annotations.kind, [annotations.rows[i] for i in kept])
    per_image = np.bincount(images[kept], minlength=len(image_ids))
    trained = np.bincount(images[kept][~crowd[kept]], minlength=len(image_ids))
    columns = {
        "first_annotation": np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64),
        "annotation_ids": ids[kept],
        "labels": labels[kept],
        "boxes": np.stack([x, y, x + w, y + h], axis=1)[kept].astype(np.float32),
        "areas": areas[kept].astype(np.float32),
        "crowd": crowd[kept],
        "segmentations": read_segmentations(rows, image_hws[images[kept]]),
    }
    left_out = {"outside": int(outside.sum()), "no_area": int(no_area.sum()), "thin": int(thin.sum())}
    report = Report(
        annotations=len(ids), crowd=int(crowd[kept].sum()), empty_images=int((trained == 0).sum()), **left_out
    )
    return columns, report
