"""YOLO's text labels: one line an object, its class and one polygon in shares of the image's width and height."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from tailseg.data.exporters.folder import ExportFolder
from tailseg.data.exporters.outlines import as_one_polygon
from tailseg.data.exporters.records import WITHOUT_MASK, ExportImage, ExportSet, class_names, single_objects

_DECIMALS = 9  # of the largest image, 65,535 pixels, these are less than a thousandth of a pixel


class YoloWriter:
    """`data.yaml`, `images/SPLIT/` and `labels/SPLIT/`."""

    def __init__(self, folder: ExportFolder, data: ExportSet) -> None:
        """Write `data.yaml`."""
        self._folder = folder
        content: dict[str, Any] = {split or "train": _images(split) for split in data.splits}
        content["names"] = dict(enumerate(class_names(data)))
        folder.write("data.yaml", yaml.safe_dump(content, allow_unicode=True, sort_keys=False).encode())

    def add(self, split: str, image: ExportImage) -> int:
        """Write an image; returns the number of objects."""
        name = self._folder.place(image, _images(split), rename=_without_images)
        lines = []
        for item in single_objects(image, name, self._folder.found):
            polygon = as_one_polygon(item.segmentation, image.image_hw)
            if not len(polygon):
                self._folder.found.add(WITHOUT_MASK, name)
                continue
            lines.append(label_line(item.label, polygon, image.image_hw))
        label = PurePosixPath("labels", split, name).with_suffix(".txt")
        self._folder.write(str(label), "".join(lines).encode())
        return len(lines)

    def finish(self) -> None:
        """Nothing is left to do."""


def label_line(label: int, polygon: NDArray[np.float64], image_hw: tuple[int, int]) -> str:
    """The line of an object: its class and its polygon, (2k,) in pixels, as shares of width and height."""
    shares = (polygon.reshape(-1, 2) / image_hw[::-1]).ravel().tolist()
    numbers = [f"{share:.{_DECIMALS}f}".rstrip("0").rstrip(".") for share in shares]
    return " ".join([str(label), *numbers]) + "\n"


def _images(split: str) -> str:
    return f"images/{split}" if split else "images"


def _without_images(name: str) -> str:
    """A name without folders `images`: the format's readers take the last one of a path for the one beside `labels`."""
    *folders, last = name.split("/")
    return "/".join([*(folder for folder in folders if folder.lower() != "images"), last])
