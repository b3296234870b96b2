"""Supervisely's projects, also those that Dataset Ninja offers: a JSON file for each image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from tailseg.data.annotations.image_files import files_below
from tailseg.data.importers.foreign import AnnotatedImage, LeftOut, Source, ends_of, read_object, source_by_names
from tailseg.data.importers.labelme import COCO_KEYS, MAX_BYTES, is_labelme
from tailseg.data.importers.layouts import split_of_path
from tailseg.data.importers.shapes import size_of
from tailseg.data.importers.source_images import SourceImages, recognised
from tailseg.data.importers.supervisely_objects import Shapes, objects_of
from tailseg.errors import UserError

META, ANNOTATIONS, IMAGES = "meta.json", "ann", "img"

_OBJECTS = re.compile(rb'"objects"\s*:\s*\[')
_SIZE = re.compile(rb'"size"\s*:\s*\{\s*"(?:height|width)"\s*:\s*\d+\s*,\s*"(?:height|width)"\s*:\s*\d+\s*\}')
_BESIDE = (META, "key_id_map.json", "obj_class_to_machine_color.json")  # JSON files that are no annotations,
_FOLDERS_BESIDE = ("meta", "img_info")  # and folders of such
_OTHERS = {"video": "videos", "pointcloud": "point clouds", "volume": "volumes"}  # folders in the place of `img`


def is_supervisely(path: Path) -> bool:
    """Return whether a file looks like the annotations of an image, by its first and last 4 KB.

    It is an object in JSON with a list `objects` and a `size` of height and width, without keys of COCO and labelme.
    """
    ends = ends_of(path)
    told = ends.startswith(b"{") and _OBJECTS.search(ends) and _SIZE.search(ends) and not COCO_KEYS.search(ends)
    return bool(told) and not is_labelme(path)


def read_supervisely(source: Path) -> Source:
    """A project, a folder of several, or one dataset: folders with annotations in `ann` and images in `img`.

    Splits are datasets whose names tell them.
    """
    if source.is_file():
        raise UserError(f"{source}: Supervisely writes one file for each image; give the folder of the whole project")
    found = LeftOut()
    images = SourceImages(source, found, "annotation files")
    files = list(files_below(source, (".json",)))
    _require_images(files)
    above = meta_above(source)
    shapes = {} if above is None else {source: _classes(above, found)}
    shapes |= {path.parent: _classes(path, found) for path in files if path.name == META and _is_beside(path)}
    rest = [path for path in files if not _is_beside(path)]
    own = recognised(rest, is_supervisely, "JSON files that are not Supervisely's: left out", found)
    if not own:
        problem = f"none of its {len(files)} JSON files has annotations" if files else "there is no JSON file in it"
        raise UserError(f"{source}: {problem}; give the folder of a Supervisely project, which holds {META}")

    def read(path: Path) -> AnnotatedImage | None:
        near = next((shapes[folder] for folder in path.parents if folder in shapes), {})
        return _read(path, near, images, found)

    parts = images.read([(path, split_of_path(path, source)) for path in own], read, name=lambda path: path.stem)
    used = {name for part in parts.values() for image in part for name in image.names}
    titles = dict.fromkeys(title for classes in shapes.values() for title in classes)
    found.add("classes without an object: left out", *(title for title in titles if title not in used))
    return source_by_names(parts, source, found)


def meta_above(source: Path) -> Path | None:
    """The meta.json beside a dataset's folder, which is not in it; None of anything else."""
    path = source.resolve().parent / META
    return path if (source / ANNOTATIONS).is_dir() and path.is_file() else None


def _is_beside(path: Path) -> bool:
    """Return whether a JSON file is one of those beside the annotations."""
    folder = path.parent.name
    return folder != ANNOTATIONS and (path.name in _BESIDE or folder in _FOLDERS_BESIDE)


def _require_images(files: Sequence[Path]) -> None:
    """Refuse datasets of videos, point clouds and volumes."""
    datasets = [path.parent.parent for path in files if path.parent.name == ANNOTATIONS]
    datasets += [path.parent for path in files if path.name == "annotation.json"]  # of episodes of point clouds
    for dataset in dict.fromkeys(datasets):
        kind = next((kind for kind in _OTHERS if (dataset / kind).is_dir()), None)
        if kind is not None and not (dataset / IMAGES).is_dir():
            fix = "turn it into a project of images in Supervisely and export that"
            raise UserError(f"{dataset}: it is a Supervisely dataset of {_OTHERS[kind]}; {fix}")


def _classes(path: Path, found: LeftOut) -> Shapes:
    """The shapes of a project's classes, which old annotation files do not state, by title."""
    try:
        rows = read_object(path).get("classes")
    except UserError as error:
        found.add("files meta.json that cannot be read: left out", str(error).rpartition("; ")[0])
        rows = None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {normalize("NFC", row["title"]): row.get("shape") for row in rows if isinstance(row.get("title"), str)}


def _read(path: Path, shapes: Shapes, images: SourceImages, found: LeftOut) -> AnnotatedImage | None:
    """The image of a file with its objects; None, and counted, if there is no such thing."""
    where = str(path)
    try:
        content = _content(path)
    except UserError as error:
        images.fault("JSON files that cannot be read: left out", str(error))
        return None
    name, folder = path.stem, path.parent.parent / IMAGES
    inside = folder.is_relative_to(images.root)
    elsewhere = not (inside and folder.is_dir())  # else an image elsewhere is another dataset's
    file = images.stated(name, [folder], where) or images.of_stem(name, [folder])  # old files leave out the suffix
    file = file or (images.anywhere(name, folder.parent if inside else path.parent) if elsewhere else None)
    if file is None:
        absence = images.absence(name) if elsewhere else f"is not in {folder}"
        fix = f"put it into {folder}, or give the folder that holds both"
        images.missing(f"{where}: its image {name!r} {absence}; {fix}")
        return None
    size = content.get("size")
    stated = size_of(size.get("height"), size.get("width")) if isinstance(size, dict) else None
    image_hw = images.use(file, where, stated)
    if image_hw is None:
        return None
    objects = objects_of(content["objects"], where, shapes, image_hw, found)
    return AnnotatedImage(file, image_hw, objects.names, objects.shapes())


def _content(path: Path) -> dict[str, Any]:
    """The object in a file, with a list of objects; UserError if the file is too large or another."""
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: it has more than {MAX_BYTES >> 20} MB; export it again")
    content = read_object(path)
    if not isinstance(content.get("objects"), list):
        raise UserError(f"{path}: it has no list 'objects'; check the file")
    return content
