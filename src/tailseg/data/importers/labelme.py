"""labelme's files, one JSON for each image: polygons and rectangles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.image_files import files_below
from tailseg.data.importers.foreign import (
    AnnotatedImage,
    LeftOut,
    Shape,
    Source,
    image_size,
    read_object,
    rectangle,
    source_by_names,
)
from tailseg.data.importers.layouts import split_folders
from tailseg.data.importers.writer import require_inside
from tailseg.errors import UserError


def read_labelme(source: Path) -> Source:
    """A folder of labelme's files beside their images, or its folders `train` and `val`."""
    objects = {
        split: [_labelme(path, source) for path in files_below(folder, (".json",))]
        for split, folder in split_folders(source).items()
    }
    if not any(objects.values()):
        raise UserError(f"{source}: there is no labelme file (.json) in it; check the folder")
    return source_by_names(objects, source, LeftOut())


def _labelme(path: Path, root: Path) -> AnnotatedImage:
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
    shapes: list[Shape] = [*polygons]
    return AnnotatedImage(file, image_hw, names, shapes)


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
        return shape["label"], rectangle(*corners.min(axis=0), *corners.max(axis=0))
    return shape["label"], corners
