"""From a data set or detections to a folder in another tool's format, complete or not there at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.exporters.coco import CocoWriter
from tailseg.data.exporters.cvat import CvatWriter
from tailseg.data.exporters.folder import ExportFolder
from tailseg.data.exporters.labelme import LabelmeWriter
from tailseg.data.exporters.records import ExportImage, ExportSet, images_of
from tailseg.data.exporters.voc import VocWriter
from tailseg.data.exporters.yolo import YoloWriter
from tailseg.data.importers.convert import image_note
from tailseg.data.importers.foreign import LeftOut
from tailseg.files import new_folder


class Writer(Protocol):
    """Writes one format."""

    def __init__(self, folder: ExportFolder, data: ExportSet) -> None: ...

    def add(self, split: str, image: ExportImage) -> int:
        """Write an image; returns the number of objects."""

    def finish(self) -> None:
        """Write what comes after the last image."""


WRITERS: dict[str, type[Writer]] = {
    "coco": CocoWriter,
    "yolo": YoloWriter,
    "voc": VocWriter,
    "labelme": LabelmeWriter,
    "cvat": CvatWriter,
}


@dataclass(frozen=True, slots=True)
class Exported:
    """Counts of what was written, by split, and what the user should know about it."""

    images: dict[str, int]
    objects: dict[str, int]
    notes: list[str]


def export(kind: str, data: ExportSet, out: Path, progress: Callable[[int], None] = lambda done: None) -> Exported:
    """Write a set to a new folder.

    Args:
        kind: the format: coco, yolo, voc, labelme or cvat.
        data: its images are asked for one by one, as they are written.
        out: the folder; images are hard links, or copies where the file system has none.
        progress: told the number of images done.

    Raises:
        UserError: ``out`` is not empty, an image cannot be read, or the format cannot hold the classes' names.
    """
    images, objects = (dict.fromkeys(data.splits, 0) for _ in range(2))
    found, federated = LeftOut(), False
    with new_folder(out) as root, ExportFolder(root, found) as folder:
        writer = WRITERS[kind](folder, data)
        for split, split_images in data.splits.items():
            for image in split_images:
                objects[split] += writer.add(split, image)
                images[split] += 1
                federated |= image.neg_category_ids is not None
                progress(sum(images.values()))
        writer.finish()
    lost = ["Pascal VOC has boxes only: the masks are not in it"] if kind == "voc" else []
    if federated and kind != "coco":
        lost.append(
            "LVIS's lists of verified absent classes are not in it: a class without an object in an image "
            "counts as absent there"
        )
    return Exported(images, objects, [*lost, *found.notes(), image_note(folder.linked)])


def annotated_set(splits: dict[str, Annotations]) -> ExportSet:
    """A data set as a record; ``splits`` has the same categories in all of them, and at least one."""
    first = next(iter(splits.values()))
    stated = all(annotations.frequency_stated for annotations in splits.values())
    images = {split: images_of(annotations) for split, annotations in splits.items()}
    return ExportSet(str(first.path), first.categories, images, frequencies=stated)
