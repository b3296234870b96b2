"""From COCO, YOLO and the formats of labelling tools to a data folder in LVIS format.

A reader turns a source into its categories and one `Part` (LVIS rows and image files) for each split that it has. A
source without a validation split is divided as by `tailseg data split`. Nothing of the source is changed or moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tailseg.data.annotations.image_files import files_below
from tailseg.data.importers.coco import read_coco
from tailseg.data.importers.coco_files import is_coco, json_files, unreadable
from tailseg.data.importers.cvat import is_cvat, read_cvat
from tailseg.data.importers.foreign import Source
from tailseg.data.importers.labelme import is_labelme, read_labelme
from tailseg.data.importers.labelstudio import is_labelstudio, read_labelstudio
from tailseg.data.importers.split import divide
from tailseg.data.importers.supervisely import is_supervisely, read_supervisely
from tailseg.data.importers.via import is_via, read_via
from tailseg.data.importers.voc import is_voc, read_voc
from tailseg.data.importers.writer import Part, Row, write_parts
from tailseg.data.importers.yolo import has_names, is_yolo, read_yolo
from tailseg.data.importers.yolo_config import entries_of
from tailseg.errors import UserError

READERS: dict[str, Callable[..., Source]] = {
    "coco": read_coco,
    "yolo": read_yolo,
    "labelme": read_labelme,
    "voc": read_voc,
    "cvat": read_cvat,
    "labelstudio": read_labelstudio,
    "supervisely": read_supervisely,
    "via": read_via,
}
NAMES = {
    "coco": "COCO",
    "yolo": "YOLO",
    "labelme": "labelme",
    "voc": "Pascal VOC",
    "cvat": "CVAT for images",
    "labelstudio": "Label Studio",
    "supervisely": "Supervisely",
    "via": "VIA (VGG Image Annotator)",
}
_TOLD: dict[str, tuple[Callable[[Path], bool], str]] = {  # formats that one file tells, and its suffix
    "cvat": (is_cvat, ".xml"),
    "voc": (is_voc, ".xml"),
    "labelme": (is_labelme, ".json"),
    "labelstudio": (is_labelstudio, ".json"),
    "supervisely": (is_supervisely, ".json"),
}
SHARE = 0.2  # of a source without validation split that is set aside for it
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
LOOKED_AT = 20  # XML and JSON files of a folder, to tell its format
MOST_LOOKED_AT = 2000  # where these do not tell it


def recognise(source: Path) -> str | None:
    """The format of a file or folder of another tool, a key of `READERS`; None if it is none of them.

    A folder is looked through once; of its files the beginnings of a few are read.
    """
    if source.is_file():  # of labelme, VOC and Supervisely too, whose readers say what to give instead
        kinds: list[tuple[str, Callable[[Path], bool]]] = [("yolo", is_yolo), ("coco", is_coco)]
        kinds += [(kind, told) for kind, (told, _) in _TOLD.items()]
        kinds += [("via", is_via)]
        return next((kind for kind, told in kinds if told(source)), None)
    if is_yolo(source, inner=False):  # without names where they are made of COCO's file, as Ultralytics' are
        return "yolo" if has_names(source) or not any(map(is_coco, json_files(source))) else "coco"
    if kind := _of_files(source, LOOKED_AT):
        return kind
    if is_yolo(source):
        return "yolo"
    if any(map(is_coco, json_files(source))):  # also beside VIA's files, from which it may have been made
        return "coco"
    if kind := _of_files(source, MOST_LOOKED_AT):
        return kind
    return "via" if any(map(is_via, islice(files_below(source, (".json", ".csv")), MOST_LOOKED_AT))) else None


def _of_files(source: Path, most: int) -> str | None:
    """The format that one of the first ``most`` XML or JSON files of a folder tells."""
    for kind, (told, suffix) in _TOLD.items():
        if any(map(told, islice(files_below(source, (suffix,)), most))):
            return kind
    return None


def unrecognised(source: Path) -> UserError:
    """What to say of a file or folder that is no data set."""
    if source.is_file() and source.name.lower().endswith(ARCHIVES):
        return UserError(f"{source}: it is an archive; extract it and give the folder that it makes")
    if source.is_dir():
        archive = next((path for path in entries_of(source)[1] if path.name.lower().endswith(ARCHIVES)), None)
        if archive is not None:
            return UserError(f"{source}: there is no data set in it, but {archive.name} may hold one; extract that")
        for error in unreadable(source):
            return error
    return UserError(
        f"{source}: there is no data set in it; give a folder with train.json, val.json and images/, a YAML file with "
        f"the entries train, val and images, or a set of {', '.join(NAMES.values())}"
    )


def read_set(source: Path) -> tuple[list[Row], Part, list[str]]:
    """The categories and the images of a data folder without validation split, or of an annotation file; and notes.

    Raises:
        UserError: something is missing or broken, or the folder has a validation split already.
    """
    if not source.exists():
        raise UserError(f"{source}: no such folder or file; check the path")
    path = source / "train.json" if source.is_dir() else source
    if source.is_dir() and (source / "val.json").exists():
        raise UserError(f"{source}: it has a val.json already; name the file to divide, such as {path}")
    if not (path.is_file() and path.name.lower().endswith((".json", ".json.gz"))):
        kind = recognise(source)
        if kind is None:
            raise unrecognised(source)
        raise UserError(f"{source}: it is a set of {NAMES[kind]}; first run `tailseg data convert {kind} {source} OUT`")
    found = read_coco(path)
    return found.categories, found.parts["train"], found.notes


def read_source(
    kind: str,
    source: Path,
    *,
    crowds_are_objects: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Source:
    """A source with both splits, and notes for the user.

    Args:
        kind: of `READERS`.
        source: folder or file.
        crowds_are_objects: of COCO files: take ``iscrowd`` as 0.
        progress: called with the number of images read.

    Raises:
        UserError: the source is broken or not of this kind; the sentence names file and place.
    """
    if not source.exists():
        raise UserError(f"{source}: no such folder or file; check the path")
    options: dict[str, Any] = {}
    if kind == "coco":
        options["crowds_are_objects"] = crowds_are_objects
    if kind in ("coco", "yolo"):
        options["progress"] = progress
    try:
        found = READERS[kind](source, **options)
    except UserError as error:
        raise unrecognised(source) if _is_packed(source) else error from None
    parts, notes = dict(found.parts), list(found.notes)
    if not parts["train"].images:
        raise UserError(f"{source}: no training image can be used{_reason(notes)}")
    if "val" in parts and not parts["val"].images:
        del parts["val"]
        notes.append("no validation image can be used: the set counts as one without a validation split")
    if "val" in parts:
        notes += _without_leaks(parts)
    if "val" not in parts:
        try:
            division = divide(parts["train"], found.categories, share=SHARE, seed=0, source=source)
        except UserError as error:
            raise UserError(f"{error}{_reason(notes)}") from None
        parts = division.parts
        notes.append("the source has no validation split: a fifth of the images was set aside, rare classes first")
        notes += only_train_note(division.only_train)
    return replace(found, parts=parts, notes=notes)


def convert(
    kind: str,
    source: Path,
    out: Path,
    *,
    crowds_are_objects: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Part], list[str]]:
    """Write ``source`` as a data folder; returns its parts and notes for the user.

    Arguments and errors are those of `read_source`; ``progress`` is called with the number of images read,
    then written.
    """
    found = read_source(kind, source, crowds_are_objects=crowds_are_objects, progress=progress)
    linked = write_parts(out, found.categories, found.parts, progress)
    return found.parts, [*found.notes, image_note(linked)]


def _without_leaks(parts: dict[str, Part]) -> list[str]:
    """Take images that are in training too out of validation; all of them: there is no validation split."""
    train = {path.resolve() for path in parts["train"].files if isinstance(path, Path)}
    val = parts["val"]
    kept = [i for i, path in enumerate(val.files) if not (isinstance(path, Path) and path.resolve() in train)]
    count = len(val.files) - len(kept)
    if not count:
        return []
    if not kept:
        del parts["val"]
        return ["all validation images are training images too: they count as one set"]
    ids = {val.images[i]["id"] for i in kept}
    parts["val"] = Part(
        images=[val.images[i] for i in kept],
        files=[val.files[i] for i in kept],
        annotations=[row for row in val.annotations if row["image_id"] in ids],
    )
    return [f"{count} images are in both splits: left out of validation"]


def _reason(notes: Sequence[str]) -> str:
    """What was left out first, for the end of a sentence."""
    return next((f" ({note})" for note in notes if "left out" in note), "")


def _is_packed(source: Path) -> bool:
    """Return whether there is no data set in a folder but an archive, or a file is one."""
    files = entries_of(source)[1] if source.is_dir() else [source]
    return any(path.name.lower().endswith(ARCHIVES) for path in files) and recognise(source) is None


def image_note(linked: bool) -> str:
    """The note on the images of the new folder: hard links or copies."""
    return "images are hard links to the source's files" if linked else "images are copies"


def only_train_note(names: Sequence[str]) -> list[str]:
    """A sentence on classes that could not reach validation, if there are any."""
    return [f"{len(names)} classes could not reach validation: {_some(names)}"] if names else []


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
