"""From COCO, YOLO, labelme or Pascal VOC to a data folder in LVIS format.

A reader turns a source into its categories and one `Part` (LVIS rows and image files) for each split that it has. A
source without a validation split is divided as by `tailseg data split`. Nothing of the source is changed or moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tailseg.data.importers.coco import read_coco
from tailseg.data.importers.labelme import read_labelme
from tailseg.data.importers.split import divide
from tailseg.data.importers.voc import read_voc
from tailseg.data.importers.writer import Part, write_parts
from tailseg.data.importers.yolo import read_yolo
from tailseg.errors import UserError


def convert(
    kind: str, source: Path, out: Path, *, progress: Callable[[int], None] = lambda done: None
) -> tuple[dict[str, Part], list[str]]:
    """Write ``source`` as a data folder; returns its parts and notes for the user.

    Raises:
        UserError: the source is broken or not of this kind; the sentence names file and place.
    """
    readers = {"coco": read_coco, "yolo": read_yolo, "labelme": read_labelme, "voc": read_voc}
    if not source.exists():
        raise UserError(f"{source}: no such folder or file; check the path")
    found = readers[kind](source)
    parts, notes = found.parts, list(found.notes)
    if "val" not in parts:
        division = divide(parts["train"], found.categories, share=0.2, seed=0, source=source)
        parts = division.parts
        notes.append("the source has no validation split: a fifth of the images was set aside, rare classes first")
        notes += only_train_note(division.only_train)
    linked = write_parts(out, found.categories, parts, progress)
    notes.append(image_note(linked))
    return parts, notes


def image_note(linked: bool) -> str:
    """The note on the images of the new folder: hard links or copies."""
    return "images are hard links to the source's files" if linked else "images are copies"


def only_train_note(names: Sequence[str]) -> list[str]:
    """A sentence on classes that could not reach validation, if there are any."""
    return [f"{len(names)} classes could not reach validation: {_some(names)}"] if names else []


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
