"""labelme's files, one JSON beside each image: polygons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import orjson

from tailseg.data.exporters.folder import ExportFolder
from tailseg.data.exporters.outlines import as_polygons
from tailseg.data.exporters.records import WITHOUT_MASK, ExportImage, ExportSet, class_names, single_objects
from tailseg.data.importers.foreign import LeftOut

_VERSION = "5.5.0"  # of labelme, whose files these are like


def labelme_content(image: ExportImage, name: str, names: Sequence[str], found: LeftOut) -> tuple[dict[str, Any], int]:
    """The JSON of an image: an object of several pieces becomes several polygons of one group.

    Args:
        image: with its objects.
        name: of the image, opens sentences about it; the last part is written as ``imagePath``.
        names: name of each label.
        found: counts objects that the format cannot hold.

    Returns:
        The content, plain values but for the points, (K, 2) float64 each; the number of objects in it.
    """
    shapes: list[dict[str, Any]] = []
    written = groups = 0
    for item in single_objects(image, name, found):
        polygons = as_polygons(item.segmentation, image.image_hw)
        if not polygons:
            found.add(WITHOUT_MASK, name)
            continue
        written += 1
        groups += len(polygons) > 1
        shape: dict[str, Any] = {"label": names[item.label], "shape_type": "polygon", "flags": {}}
        shape |= {"group_id": groups if len(polygons) > 1 else None, "description": ""}
        shape |= {} if item.score is None else {"score": item.score}
        shapes += [shape | {"points": polygon.reshape(-1, 2)} for polygon in polygons]
    height, width = image.image_hw
    content: dict[str, Any] = {"version": _VERSION, "flags": {}, "shapes": shapes}
    content |= {"imagePath": PurePosixPath(name).name, "imageData": None}
    return content | {"imageHeight": height, "imageWidth": width}, written


class LabelmeWriter:
    """Images with their JSON files, in `SPLIT/`, or directly in the folder for a set without splits."""

    def __init__(self, folder: ExportFolder, data: ExportSet) -> None:
        """Begin."""
        self._folder = folder
        self._names = class_names(data)

    def add(self, split: str, image: ExportImage) -> int:
        """Write an image; returns the number of objects."""
        name = self._folder.place(image, split)
        content, written = labelme_content(image, name, self._names, self._folder.found)
        target = PurePosixPath(split, name).with_suffix(".json")
        options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_INDENT_2
        self._folder.write(str(target), orjson.dumps(content, option=options))
        return written

    def finish(self) -> None:
        """Nothing is left to do."""
