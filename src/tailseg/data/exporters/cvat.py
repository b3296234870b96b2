"""CVAT's own XML for images, version 1.1: polygons, and masks as run lengths where they have holes."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np

from tailseg.data.annotations.masks import Bitmap, Segmentation, bitmap_of
from tailseg.data.exporters.folder import ExportFolder
from tailseg.data.exporters.outlines import as_polygons, outlines_of
from tailseg.data.exporters.records import WITHOUT_MASK, ExportImage, ExportSet, class_names, single_objects


class CvatWriter:
    """`annotations.xml` and `images/`."""

    def __init__(self, folder: ExportFolder, data: ExportSet) -> None:
        """Begin the file."""
        self._folder = folder
        self._names = class_names(data)
        self._images = self._groups = 0
        self._file = folder.open("annotations.xml")
        meta = ElementTree.Element("meta")
        labels = ElementTree.SubElement(ElementTree.SubElement(meta, "task"), "labels")
        for name in self._names:
            label = ElementTree.SubElement(labels, "label")
            ElementTree.SubElement(label, "name").text = name
            ElementTree.SubElement(label, "attributes")
        self._file.write(b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
        self._write(meta)

    def add(self, split: str, image: ExportImage) -> int:
        """Write an image; returns the number of objects."""
        name = self._folder.place(image, f"images/{split}" if split else "images")
        height, width = image.image_hw
        about = {"id": str(self._images), "name": name, "width": str(width), "height": str(height)}
        if split:
            about["subset"] = split
        root = ElementTree.Element("image", about)
        self._images += 1
        written = 0
        for item in single_objects(image, name, self._folder.found):
            shapes = self._shapes(item.segmentation, image.image_hw)
            if not shapes:
                self._folder.found.add(WITHOUT_MASK, name)
            written += bool(shapes)
            common = {"label": self._names[item.label], "source": "auto", "occluded": "0", "z_order": "0"}
            for tag, attributes in shapes:
                ElementTree.SubElement(root, tag, common | attributes)
        self._write(root)
        return written

    def finish(self) -> None:
        """Complete the file."""
        self._file.write(b"</annotations>\n")

    def _shapes(self, segmentation: Segmentation, image_hw: tuple[int, int]) -> list[tuple[str, dict[str, str]]]:
        """The element, or elements of a group, of one object."""
        if isinstance(segmentation, bytes):
            bitmap = bitmap_of(segmentation, image_hw)
            if outlines_of(bitmap).holes:
                return [("mask", _mask(bitmap))]
        polygons = as_polygons(segmentation, image_hw)
        group = {}
        if len(polygons) > 1:
            self._groups += 1
            group = {"group_id": str(self._groups)}
        rows = [";".join(f"{x:.10g},{y:.10g}" for x, y in polygon.reshape(-1, 2)) for polygon in polygons]
        return [("polygon", {"points": row} | group) for row in rows]

    def _write(self, element: ElementTree.Element) -> None:
        ElementTree.indent(element)
        self._file.write(ElementTree.tostring(element, encoding="utf-8") + b"\n")


def _mask(bitmap: Bitmap) -> dict[str, str]:
    """A mask's attributes: its rectangle, and run lengths along the rows in it, of empty pixels first."""
    flat = np.concatenate([[0], bitmap.pixels.ravel(), [2]])
    runs = np.diff(np.flatnonzero(np.diff(flat)), prepend=0)
    height, width = bitmap.pixels.shape
    box = {"left": bitmap.x, "top": bitmap.y, "width": width, "height": height}
    return {"rle": ", ".join(map(str, runs.tolist()))} | {key: str(value) for key, value in box.items()}
