"""Tools that write one file for each image: labelme (JSON, polygons and rectangles), Pascal VOC (XML, boxes)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from tailseg.data.foreign import (
    IMAGE_SUFFIXES,
    Objects,
    Source,
    files_below,
    image_size,
    read_bytes,
    read_object,
    read_text,
    source_of,
    split_folders,
)
from tailseg.data.new_folder import require_inside
from tailseg.errors import UserError


def _source(objects: dict[str, list[Objects]], root: Path, notes: list[str]) -> Source:
    """The source with the categories that occur, in the order of their names."""
    names = sorted({name for found in objects.values() for item in found for name in item.names})
    if not names:
        raise UserError(f"{root}: no file in it has an object; check the folder")
    return source_of(objects, root, names, notes)


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float64]:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


# ---------------------------------------------------------------------------------------------------------
# labelme


def read_labelme(source: Path) -> Source:
    """A folder of labelme's files beside their images, or its folders `train` and `val`."""
    objects = {
        split: [_labelme(path, source) for path in files_below(folder, (".json",))]
        for split, folder in split_folders(source).items()
    }
    if not any(objects.values()):
        raise UserError(f"{source}: there is no labelme file (.json) in it; check the folder")
    return _source(objects, source, [])


def _labelme(path: Path, root: Path) -> Objects:
    content = read_object(path)
    shapes, image = content.get("shapes"), content.get("imagePath")
    if not isinstance(shapes, list) or not isinstance(image, str) or not image:
        raise UserError(f"{path}: it has no 'shapes' or no 'imagePath'; leave only labelme's files in the folder")
    file = require_inside(path.parent / image.replace("\\", "/"), root, str(path))
    height, width = content.get("imageHeight"), content.get("imageWidth")
    stated = (height, width) if isinstance(height, int) and isinstance(width, int) else None
    image_hw = image_size(file, str(path), stated)
    names: list[str] = []
    polygons: list[list[NDArray[np.float64]]] = []
    groups: dict[tuple[str, Any], int] = {}  # of objects in several pieces: where they are in the lists
    for number, shape in enumerate(shapes, start=1):
        name, points = parse_shape(shape, f"{path}: shape {number}")
        group = (name, shape.get("group_id"))
        if isinstance(group[1], int) and group in groups:
            polygons[groups[group]].append(points)
            continue
        groups[group] = len(names)
        names.append(name)
        polygons.append([points])
    return Objects(file, image_hw, names, polygons)


def parse_shape(shape: Any, where: str) -> tuple[str, NDArray[np.float64]]:
    """Label and (K, 2) polygon of one of labelme's shapes; a fault begins with ``where``."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"]:
        raise UserError(f"{where}: it has no label; give it one")
    kind = shape.get("shape_type", "polygon")
    if kind not in ("polygon", "rectangle"):
        raise UserError(f"{where}: it is a {kind!r}; only polygons and rectangles have a mask, so draw one of these")
    points = shape.get("points")
    rows = points if isinstance(points, list) else []
    numbers = all(
        isinstance(row, list) and len(row) == 2 and all(type(value) in (int, float) for value in row) for row in rows
    )
    least = 2 if kind == "rectangle" else 3
    if not numbers or len(rows) < least or not np.isfinite(np.array(rows, np.float64)).all():
        raise UserError(f"{where}: a {kind} needs at least {least} points, each [x, y]; draw it again")
    corners = np.array(rows, np.float64)
    if kind == "rectangle":
        return shape["label"], _rectangle(*corners.min(axis=0), *corners.max(axis=0))
    return shape["label"], corners


# ---------------------------------------------------------------------------------------------------------
# Pascal VOC


def read_voc(source: Path) -> Source:
    """`Annotations/`, `JPEGImages/` and `ImageSets/Main/` (train.txt, val.txt), or XML files beside their images."""
    if (source / "Annotations").is_dir():
        files = _voc_lists(source)
    else:
        files = {split: list(files_below(folder, (".xml",))) for split, folder in split_folders(source).items()}
    objects = {split: [_voc(path, source) for path in paths] for split, paths in files.items()}
    if not any(objects.values()):
        raise UserError(f"{source}: there is no annotation (.xml) in it; check the folder")
    return _source(objects, source, ["Pascal VOC has boxes only: the masks are rectangles, so mask AP means box AP"])


def _voc_lists(source: Path) -> dict[str, list[Path]]:
    """The annotation files of each split, by the lists of image names."""
    lists = {split: source / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val")}
    if not lists["train"].exists():
        return {"train": list(files_below(source / "Annotations", (".xml",)))}
    found: dict[str, list[Path]] = {}
    for split, path in lists.items():
        if path.exists():
            found[split] = []
            for number, line in enumerate(read_text(path).split("\n"), start=1):
                if words := line.split():
                    file = source / "Annotations" / f"{words[0]}.xml"
                    found[split].append(require_inside(file, source, f"{path}: line {number}"))
    return found


def _voc(path: Path, root: Path) -> Objects:
    tree = parse_xml(read_bytes(path), str(path))
    file = _voc_image(path, root, tree.findtext("filename") or "")
    width, height = (_number(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    stated = (int(height), int(width)) if width and height else None
    image_hw = image_size(file, str(path), stated)
    names, polygons = [], []
    for number, item in enumerate(tree.findall("object"), start=1):
        name, box = parse_voc_object(item, f"{path}: object {number}")
        names.append(name)
        polygons.append([box])
    return Objects(file, image_hw, names, polygons)


def parse_xml(content: bytes, where: str) -> ElementTree.Element:
    """The root of an XML file without document type, whose entities could grow without end."""
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise UserError(f"{where}: it declares a document type; remove the line with <!DOCTYPE")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{where}: not valid XML: {error}; write it again".replace("\n", " ")) from None


def parse_voc_object(item: ElementTree.Element, where: str) -> tuple[str, NDArray[np.float64]]:
    """Name and rectangle of an object; its pixels count from 1, and the last one belongs to it."""
    name = (item.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{where}: it has no name; give it one")
    sides = [_number(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
    x0, y0, x1, y1 = (np.nan if side is None else side for side in sides)
    if not (x0 <= x1 and y0 <= y1):  # also refuses what is missing or not a number
        raise UserError(f"{where}: its bndbox needs the numbers xmin <= xmax and ymin <= ymax; correct it")
    return name, _rectangle(x0 - 1, y0 - 1, x1, y1)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _voc_image(path: Path, root: Path, name: str) -> Path:
    """The image of an annotation file, by the name it states or its own; in `JPEGImages` or beside it."""
    names = [name] if name else []
    names += [path.stem + suffix for suffix in IMAGE_SUFFIXES]
    for file in _places(path, root, names):
        if file.is_file():
            return require_inside(file, root, str(path))
    raise UserError(f"{path}: its image {names[0]!r} is not in JPEGImages or beside it; put it there")


def _places(path: Path, root: Path, names: Iterable[str]) -> Iterable[Path]:
    return (folder / name for name in names for folder in (root / "JPEGImages", path.parent, root / "images"))
