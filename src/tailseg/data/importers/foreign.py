"""Parts that all readers of other tools' data share: text and JSON, image sizes, conversion of objects to LVIS rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.images import read_header
from tailseg.data.importers.writer import Part, Row, new_names, require_inside
from tailseg.errors import UserError

SPLIT_FOLDERS = {"train": ("train", "training", "train2017"), "val": ("val", "valid", "validation", "val2017")}
DECIMALS = 3  # of written coordinates, in pixels


@dataclass(frozen=True, slots=True)
class Source:
    """A reader's result."""

    categories: list[Row]  # id and name
    parts: dict[str, Part]  # "train", and "val" if the source has one
    notes: list[str] = field(default_factory=list)  # what the user should know about the result


@dataclass(frozen=True, slots=True)
class Objects:
    """The annotated objects of one foreign image."""

    path: Path
    image_hw: tuple[int, int]
    names: list[str]
    polygons: list[list[NDArray[np.float64]]]  # of each object, each (K, 2) x, y in pixels


def source_of(objects: dict[str, list[Objects]], root: Path, names: Sequence[str], notes: list[str]) -> Source:
    """LVIS rows of foreign images; ``names`` are the categories in id order, ids from 1."""
    ids = {name: number for number, name in enumerate(names, start=1)}
    files = [item.path for found in objects.values() for item in found]
    if not files:
        raise UserError(f"{root}: there is no image in it; check the folder")
    new = dict(zip(files, new_names(files, root), strict=True))
    parts: dict[str, Part] = {}
    image_id = annotation_id = 0
    for split, found in objects.items():
        part = parts[split] = Part()
        for item in found:
            image_id += 1
            height, width = item.image_hw
            part.images.append({"id": image_id, "file_name": new[item.path], "height": height, "width": width})
            part.files.append(item.path)
            for name, polygons in zip(item.names, item.polygons, strict=True):
                annotation_id += 1
                row = {"id": annotation_id, "image_id": image_id, "category_id": ids[name], "iscrowd": 0}
                part.annotations.append(row | _mask_columns(polygons, item.image_hw))
    return Source([{"id": number, "name": name} for name, number in ids.items()], parts, notes)


def source_by_names(objects: dict[str, list[Objects]], root: Path, notes: list[str]) -> Source:
    """The source with the categories that occur, in the order of their names."""
    names = sorted({name for found in objects.values() for item in found for name in item.names})
    if not names:
        raise UserError(f"{root}: no file in it has an object; check the folder")
    return source_of(objects, root, names, notes)


def rectangle(x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float64]:
    """The corners (4, 2) of a rectangle."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def _mask_columns(polygons: list[NDArray[np.float64]], image_hw: tuple[int, int]) -> Row:
    """Segmentation, box and area (pixels of the mask) of an object."""
    flat = [np.round(polygon, DECIMALS).ravel().tolist() for polygon in polygons]
    points = np.concatenate(polygons).clip(0, image_hw[::-1])
    low, high = points.min(axis=0), points.max(axis=0)
    area = float(rle.area(rle.merge(rle.frPyObjects(flat, *image_hw))))
    return {"segmentation": flat, "bbox": np.round([*low, *(high - low)], DECIMALS).tolist(), "area": area}


def image_size(path: Path, where: str, stated: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) of an image as it is shown, or ``stated`` if its pixels are stored in that size.

    Raises:
        UserError: it cannot be read, or has another size than stated.
    """
    if not path.exists():
        raise UserError(f"{where}: {path} does not exist; put the image there")
    try:
        header = read_header(path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    shown, stored = header.shown_hw, header.stored_hw
    if stated in (None, shown):
        return shown
    if stated == stored:
        return stored
    assert stated is not None
    found, expected = f"{shown[1]} x {shown[0]}", f"{stated[1]} x {stated[0]}"
    raise UserError(f"{where}: it says {expected} pixels but {path} has {found}; correct one of them")


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits below ``root``, or ``root`` itself for training if it has none."""
    found = {
        split: root / name
        for split, names in SPLIT_FOLDERS.items()
        for name in reversed(names)
        if (root / name).is_dir()
    }
    return found if "train" in found else {"train": root}


def files_below(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """The files with one of ``suffixes`` (lower case), sorted; links to folders are not followed."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and path.is_file():
            yield require_inside(path, folder, f"{folder}")


def read_bytes(path: Path) -> bytes:
    """A file's bytes; UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None


def read_text(path: Path) -> str:
    """A text file; UserError if it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: it is not a UTF-8 text; save it as one") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if there is none."""
    content = read_bytes(path)
    try:
        data = orjson.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not valid JSON: {error.msg} at {place}; write it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(data).__name__}; check the file")
    return data
