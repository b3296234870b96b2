"""COCO's instance files: polygons and RLE as they stand, ids, crowds, and LVIS's entries beside COCO's own."""

from __future__ import annotations

from typing import Any, BinaryIO

import orjson

from tailseg.data.annotations.annotations import Category
from tailseg.data.annotations.masks import Segmentation
from tailseg.data.exporters.folder import ExportFolder
from tailseg.data.exporters.records import ExportImage, ExportSet


class CocoWriter:
    """`annotations/instances_SPLIT.json`, with `default` for a set without splits, and `images/SPLIT/`."""

    def __init__(self, folder: ExportFolder, data: ExportSet) -> None:
        """Begin the files."""
        self._folder = folder
        self._category_ids = [category.id for category in data.categories]
        rows = [_category(category, data.frequencies) for category in data.categories]
        head = orjson.dumps({"info": {"description": "written by tailseg"}, "licenses": [], "categories": rows})
        self._files: dict[str, BinaryIO] = {}
        self._images: dict[str, list[dict[str, Any]]] = {split: [] for split in data.splits}
        self._objects = dict.fromkeys(data.splits, 0)
        for split in data.splits:
            self._files[split] = folder.open(f"annotations/instances_{split or 'default'}.json")
            self._files[split].write(head[:-1] + b',"annotations":[')

    def add(self, split: str, image: ExportImage) -> int:
        """Write an image; returns the number of objects."""
        name = self._folder.place(image, f"images/{split}" if split else "images")
        height, width = image.image_hw
        image_id = len(self._images[split]) + 1 if image.id is None else image.id
        row: dict[str, Any] = {"id": image_id, "file_name": name, "height": height, "width": width}
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if (ids := getattr(image, key)) is not None:
                row[key] = ids
        self._images[split].append(row)
        for item in image.objects:
            self._objects[split] += 1
            annotation: dict[str, Any] = {
                "id": self._objects[split] if item.id is None else item.id,
                "image_id": image_id,
                "category_id": self._category_ids[item.label],
                "bbox": item.box,
                "area": item.area,
                "iscrowd": int(item.crowd),
                "segmentation": _segmentation(item.segmentation, image.image_hw),
            }
            if item.ignored:
                annotation["ignore"] = 1
            if item.score is not None:
                annotation["score"] = item.score
            content = orjson.dumps(annotation, option=orjson.OPT_SERIALIZE_NUMPY)
            self._files[split].write((b",\n" if self._objects[split] > 1 else b"\n") + content)
        return len(image.objects)

    def finish(self) -> None:
        """Complete the files."""
        for split, file in self._files.items():
            file.write(b'],"images":' + orjson.dumps(self._images[split]) + b"}\n")


def _category(category: Category, frequencies: bool) -> dict[str, Any]:
    row = {"id": category.id, "name": category.name}
    return row | {"frequency": category.frequency} if frequencies else row


def _segmentation(segmentation: Segmentation, image_hw: tuple[int, int]) -> Any:
    if isinstance(segmentation, bytes):
        return {"size": list(image_hw), "counts": segmentation.decode("ascii")}
    return list(segmentation)
