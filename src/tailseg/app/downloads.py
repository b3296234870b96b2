"""Files that a user can save: the objects as JSON and in COCO's format, and the pictures with the objects."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import orjson

from tailseg.app.pictures import Choice, Seen
from tailseg.results.pictures import image_bytes


@dataclass(frozen=True, slots=True)
class Download:
    """A file."""

    name: str
    kind: str  # MIME type
    content: bytes


def json_file(pictures: Sequence[Seen], choice: Choice) -> Download:
    """A list with what `Detections.to_dict` has of each picture."""
    content = [seen.found[choice.of(seen.found)].to_dict() for seen in pictures]
    return Download("detections.json", "application/json", orjson.dumps(content, option=orjson.OPT_INDENT_2))


def coco_file(pictures: Sequence[Seen], choice: Choice) -> Download:
    """An annotation file in COCO's format with the exact masks; each annotation has its score, too."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, seen) in enumerate(zip(_free_names(pictures), pictures, strict=True), start=1):
        height, width = seen.found.image_hw
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        rows = choice.of(seen.found)
        for row, content in zip(rows.tolist(), seen.found[rows].to_coco(image_id), strict=True):
            own = {"id": len(annotations) + 1, "area": seen.areas[row], "iscrowd": 0}
            annotations.append(own | content)
    categories = [{"id": one.id, "name": one.name} for one in pictures[0].found.categories] if pictures else []
    content = {"images": images, "annotations": annotations, "categories": categories}
    return Download("coco.json", "application/json", orjson.dumps(content))


def picture_files(pictures: Sequence[Seen], choice: Choice) -> Download:
    """The pictures in their full size with the objects: a JPEG file, or a ZIP of several."""
    if len(pictures) == 1:
        name = f"{PurePath(pictures[0].name).stem}.jpg"
        return Download(name, "image/jpeg", _drawn(pictures[0], choice))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:  # JPEG cannot be packed further
        for name, seen in zip(_free_names(pictures, ".jpg"), pictures, strict=True):
            file.writestr(name, _drawn(seen, choice))
    return Download("pictures.zip", "application/zip", archive.getvalue())


DOWNLOADS: dict[str, Callable[[Sequence[Seen], Choice], Download]] = {
    "json": json_file,
    "coco": coco_file,
    "pictures": picture_files,
}


def _drawn(seen: Seen, choice: Choice) -> bytes:
    return image_bytes(seen.whole(choice).plot(), "JPEG")


def _free_names(pictures: Sequence[Seen], suffix: str | None = None) -> list[str]:
    """A name for each picture, numbered where there are several of one; ``suffix`` replaces that of the file."""
    names: list[str] = []
    for seen in pictures:
        path = PurePath(seen.name)
        stem, ending = path.stem, path.suffix if suffix is None else suffix
        name, number = f"{stem}{ending}", 1
        while name in names:
            number += 1
            name = f"{stem}-{number}{ending}"
        names.append(name)
    return names
