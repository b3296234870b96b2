"""Parts that all readers of other tools' data share: texts of files, what was left out, conversion to LVIS rows."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.oddities import Tally, counted
from tailseg.data.annotations.packed import MARK, open_unpacked
from tailseg.data.annotations.repair import meant
from tailseg.data.annotations.segmentations import LONGEST_OUTLINE, is_too_long
from tailseg.data.images import read_header, require_whole
from tailseg.data.importers.writer import Part, Row, new_names
from tailseg.errors import UserError

HEAD = 4096  # bytes at the beginning and end of a file that tell its format
DECIMALS = 3  # of written coordinates, in pixels
TOO_LONG = f"objects with an outline of more than {LONGEST_OUTLINE:,} pixels: left out"

# An object: polygons, each (K, 2) x, y in pixels, which it is the union of; or a compressed RLE of the whole image.
Shape = list[NDArray[np.float64]] | bytes


def id_of(value: object) -> Any:
    """An id as a key, in whatever form: 1, 1.0 and "1" are the same; any number or text may be one; else None."""
    number = meant(value)
    if number is not None:
        return number
    sound = type(value) in (int, str) or (type(value) is float and math.isfinite(value))
    return value if sound else None


class LeftOut:
    """Odd things that a reader met and left out or made good, counted by kind, with the first places of each."""

    def __init__(self) -> None:
        self._met = Tally()

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind was met."""
        return self._met.counts

    def add(self, kind: str, *places: str) -> None:
        """Count what stands at ``places``: a file and the line, shape or object in it.

        ``kind`` is a phrase in the plural and says what became of them: "lines without a class: left out".
        """
        self._met.add(kind, places)

    def first(self, kind: str) -> str:
        """The first place of a kind that was met."""
        return self._met.places[kind][0]

    def notes(self) -> list[str]:
        """A sentence a kind, in the order in which they were met."""
        return [counted(count, kind, self._met.places[kind]) for kind, count in self.counts.items()]


@dataclass(frozen=True, slots=True)
class Source:
    """A reader's result."""

    categories: list[Row]  # id and name
    parts: dict[str, Part]  # "train", and "val" if the source has one
    notes: list[str] = field(default_factory=list)  # what the user should know about the result


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """One foreign image with its objects."""

    path: Path  # of its file; of the file that it would have, if it stands inside of an annotation file
    image_hw: tuple[int, int]
    names: list[str]  # class of each object
    shapes: list[Shape]  # of each object
    content: Callable[[], bytes] | None = None  # reads the file's bytes, if it stands inside of an annotation file


def source_of(images: dict[str, list[AnnotatedImage]], root: Path, names: Sequence[str], found: LeftOut) -> Source:
    """LVIS rows of foreign images.

    Args:
        images: of each split.
        root: folder that all of them lie in.
        names: of the categories in id order, ids from 1.
        found: whose notes the source carries; objects without extent in their image are added to it.
    """
    ids = {name: number for number, name in enumerate(names, start=1)}
    files = [image.path for part in images.values() for image in part]
    if not files:
        raise UserError(f"{root}: there is no image in it; check the folder")
    new = dict(zip(files, new_names(files, root), strict=True))
    parts: dict[str, Part] = {}
    image_id = annotation_id = 0
    for split, split_images in images.items():
        part = parts[split] = Part()
        for image in split_images:
            image_id += 1
            height, width = image.image_hw
            part.images.append({"id": image_id, "file_name": new[image.path], "height": height, "width": width})
            part.files.append(image.path if image.content is None else image.content)
            for name, shape in zip(image.names, image.shapes, strict=True):
                if not isinstance(shape, bytes) and any(is_too_long(polygon.ravel()) for polygon in shape):
                    found.add(TOO_LONG, str(image.path))
                    continue
                columns = mask_columns(shape, image.image_hw)
                if columns is None:
                    found.add("objects without extent in their image: left out", str(image.path))
                    continue
                annotation_id += 1
                row = {"id": annotation_id, "image_id": image_id, "category_id": ids[name], "iscrowd": 0}
                part.annotations.append(row | columns)
    return Source([{"id": number, "name": name} for name, number in ids.items()], parts, found.notes())


def source_by_names(images: dict[str, list[AnnotatedImage]], root: Path, found: LeftOut) -> Source:
    """The source with the categories that occur, in the order of their names."""
    names = sorted({name for part in images.values() for image in part for name in image.names})
    if not names:
        reason = next((f" ({note})" for note in found.notes() if "left out" in note), "")
        raise UserError(f"{root}: no file in it has an object{reason}; check the folder")
    return source_of(images, root, names, found)


def rectangle(x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float64]:
    """The corners (4, 2) of a rectangle."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def mask_columns(shape: Shape, image_hw: tuple[int, int]) -> Row | None:
    """Segmentation, box and area of an object; None if it has no extent in its image.

    The area is the number of the mask's pixels; that of the polygons where they are so small that they cover none.
    """
    if isinstance(shape, bytes):
        code = {"size": list(image_hw), "counts": shape}
        box, area = np.asarray(rle.toBbox(code), np.float64).tolist(), float(rle.area(code))
        segmentation: Any = {"size": list(image_hw), "counts": shape.decode("ascii")}
        return {"segmentation": segmentation, "bbox": box, "area": area} if area else None
    flat = [polygon.round(DECIMALS).ravel().tolist() for polygon in shape]
    points = (shape[0] if len(shape) == 1 else np.concatenate(shape)).clip(0, image_hw[::-1])
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    if not (x1 > x0 and y1 > y0):
        return None
    codes = [rle.frPoly(polygon, *image_hw) for polygon in flat]
    area = float(rle.area(codes[0] if len(codes) == 1 else rle.merge(codes)))
    area = area or sum(_polygon_area(polygon.clip(0, image_hw[::-1])) for polygon in shape)
    if not area:
        return None
    box = [round(value, DECIMALS) for value in (x0, y0, x1 - x0, y1 - y0)]
    return {"segmentation": flat, "bbox": box, "area": area}


def _polygon_area(polygon: NDArray[np.float64]) -> float:
    """The area of a polygon (K, 2) in pixels, by the shoelace formula."""
    x, y = polygon.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def image_size(
    path: Path, where: str, stated: tuple[int, int] | None = None, content: bytes | None = None
) -> tuple[int, int]:
    """(height, width) of an image as it is shown, or ``stated`` if its pixels are stored in that size.

    Args:
        path: of its file; of the file that it would have, if it stands inside of an annotation file.
        where: the place that asks for it, with which a sentence begins.
        stated: height and width according to that place.
        content: the image, if it stands inside of an annotation file.

    Raises:
        UserError: it cannot be read, or has another size than stated.
    """
    if content is None and not path.exists():
        raise UserError(f"{where}: {path} does not exist; put the image there")
    try:
        header = read_header(path, None if content is None else BytesIO(content))
        require_whole(path, header, content)
    except UserError as error:
        raise type(error)(f"{where}: {error}") from None
    shown, stored = header.shown_hw, header.stored_hw
    if stated in (None, shown):
        return shown
    if stated == stored:
        return stored
    assert stated is not None
    found, expected = f"{shown[1]} x {shown[0]}", f"{stated[1]} x {stated[0]}"
    raise UserError(f"{where}: it says {expected} pixels but {path} has {found}; correct one of them")


def read_bytes(path: Path) -> bytes:
    """A file's bytes; UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None


def read_text(path: Path) -> str:
    """A text file, without byte order mark; UserError if it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: it is not a UTF-8 text; save it as one") from None


def ends_of(path: Path) -> bytes:
    """The first and last 4 KB of a file, without a byte order mark; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            file.seek(max(path.stat().st_size - HEAD, 0))
            return head.removeprefix(b"\xef\xbb\xbf").lstrip() + b"\n" + file.read(HEAD)
    except OSError:
        return b""


def read_json(path: Path) -> Any:
    """The content of a JSON file, in which numbers may be NaN; UserError if it is none."""
    text = read_text(path)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(text)  # also takes NaN, which Python's own writer writes
        except (ValueError, RecursionError):
            place = f"line {error.lineno}, column {error.colno}"
            raise UserError(f"{path}: not valid JSON: {error.msg} at {place}; write it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which may be packed with gzip; UserError if there is none."""
    content = read_bytes(path)
    if content.startswith(MARK):
        try:
            with open_unpacked(path) as file:
                content = file.read()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a whole gzip file ({error}); write or download it again") from None
    try:
        data = orjson.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not valid JSON: {error.msg} at {place}; write it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(data).__name__}; check the file")
    return data
