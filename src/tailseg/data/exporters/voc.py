"""Pascal VOC's files: one XML for each image, with boxes only."""

from __future__ import annotations

from pathlib import PurePosixPath
from xml.etree import ElementTree

from tailseg.data.exporters.folder import ExportFolder
from tailseg.data.exporters.records import ExportImage, ExportObject, ExportSet, class_names, single_objects


class VocWriter:
    """`Annotations/`, `JPEGImages/`, the lists of names `ImageSets/Main/SPLIT.txt`, and CVAT's list of classes."""

    def __init__(self, folder: ExportFolder, data: ExportSet) -> None:
        """Begin."""
        self._folder = folder
        self._names = class_names(data)
        self._listed: dict[str, list[str]] = {split: [] for split in data.splits}
        classes = dict.fromkeys(["background", *self._names])
        lines = ["# label:color_rgb:parts:actions", *(f"{name}:::" for name in classes)]
        folder.write("labelmap.txt", "".join(f"{line}\n" for line in lines).encode())

    def add(self, split: str, image: ExportImage) -> int:
        """Write an image; returns the number of objects."""
        name = self._folder.place(image, "JPEGImages", rename=_without_spaces)
        objects = single_objects(image, name, self._folder.found)
        root = ElementTree.Element("annotation")
        _texts(root, folder="JPEGImages", filename=name)
        height, width = image.image_hw
        _texts(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
        _texts(root, segmented=0)
        for item in objects:
            element = ElementTree.SubElement(root, "object")
            _texts(element, name=self._names[item.label], pose="Unspecified", truncated=0, difficult=0)
            _texts(ElementTree.SubElement(element, "bndbox"), **self._sides(item, image.image_hw, name))
        ElementTree.indent(root)
        stem = str(PurePosixPath(name).with_suffix(""))
        self._folder.write(f"Annotations/{stem}.xml", ElementTree.tostring(root, encoding="utf-8"))
        self._listed[split].append(stem)
        return len(objects)

    def finish(self) -> None:
        """Write the lists of names."""
        for split, names in self._listed.items():
            self._folder.write(f"ImageSets/Main/{split}.txt", "".join(f"{name}\n" for name in names).encode())

    def _sides(self, item: ExportObject, image_hw: tuple[int, int], name: str) -> dict[str, str]:
        """A box as the format has it: inside of the image, pixels counted from 1, the last one part of it."""
        x, y, w, h = item.box
        thin = False
        sides: dict[str, float] = {}
        for axis, start, end, limit in (("x", x, x + w, image_hw[1]), ("y", y, y + h, image_hw[0])):
            low, high = max(start, 0.0), min(end, float(limit))
            if high - low < 1:
                low = min(low, limit - 1.0)
                high, thin = low + 1, True
            sides |= {f"{axis}min": low + 1, f"{axis}max": high}
        if thin:
            self._folder.found.add("boxes narrower or lower than a pixel widened to one", name)
        return {key: f"{value:.3f}".rstrip("0").rstrip(".") for key, value in sides.items()}


def _without_spaces(name: str) -> str:
    """A name for the lists, where it ends at a space."""
    return "_".join(name.split())


def _texts(parent: ElementTree.Element, **values: object) -> None:
    for tag, value in values.items():
        ElementTree.SubElement(parent, tag).text = str(value)
