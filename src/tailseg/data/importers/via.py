"""Files of the VGG Image Annotator (VIA), versions 1 and 2: exported annotations or projects, as JSON.

makesense.ai's "VGG JSON" has the same form. A file lists images, each with its regions; the class of a region is one
of its attributes, whose name people choose (see `class_attribute`).
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.image_files import candidate_names, files_below
from tailseg.data.importers.foreign import (
    AnnotatedImage,
    LeftOut,
    Source,
    ends_of,
    read_json,
    rectangle,
    source_by_names,
)
from tailseg.data.importers.layouts import Split, split_of, split_of_path, words_of
from tailseg.data.importers.shapes import (
    ObjectList,
    OddObjectError,
    ellipse,
    label_of,
    number_of,
    polygon_of,
    rotated,
)
from tailseg.data.importers.source_images import SourceImages, recognised
from tailseg.errors import UserError

ONE_CLASS = "object"  # of a set whose regions have no attribute with a value

_PROJECT = re.compile(rb'"_via_(?:settings|img_metadata)"\s*:')
_KEYS = re.compile(rb'"(?:shape_attributes|region_attributes|file_attributes)"\s*:')
_OTHER_KEYS = re.compile(rb'"(?:images|annotations|categories|shapes)"\s*:\s*\[')  # COCO's and labelme's
_CSV = re.compile(rb"#?filename,file_size,file_attributes,region_count,")
_VERSION_3 = re.compile(rb'\{\s*"project"\s*:\s*\{\s*"pid"\s*:|# Exported using VGG Image Annotator')
_NO_AREA = ("point", "polyline", "line")
_CLASS_WORDS = ("class", "label", "name", "category", "object", "type", "species")
_MENU = "Annotation > Export Annotations (as json)"

_Region = tuple[str, dict[str, Any], dict[str, list[str]]]  # place, shape, and the values of each attribute


@dataclass(frozen=True, slots=True)
class _Entry:
    """One image of a file."""

    where: str
    name: str
    folders: list[Path]  # that may hold it
    near: Path  # of the file, and of its split in it: to choose among images of one name
    regions: list[_Region] | None  # None if the file has no list of them


def is_via(path: Path) -> bool:
    """Return whether a file looks like VIA's, by its first and last 4 KB.

    Also one of VIA 3 and a CSV, which `read_via` answers with the way out.
    """
    ends = ends_of(path)
    is_own = _PROJECT.search(ends) or (_KEYS.search(ends) and not _OTHER_KEYS.search(ends))
    return bool(_way_out(ends) or (ends.startswith(b"{") and is_own))


def read_via(source: Path) -> Source:
    """A file of VIA 1 or 2, or a folder with such files, with the images beside them or in any folder of it.

    Splits are told by the names of the folders or else of the files.
    """
    root = source.parent if source.is_file() else source
    found = LeftOut()
    images = SourceImages(root, found, "image entries")
    told: list[tuple[_Entry, Split | None]] = []
    for path in _files(source, found):
        split = split_of_path(path, root) or split_of(path.stem)
        told += [(entry, split) for entry in _entries(path, root, split, found)]
    attribute = _attribute([region for entry, _ in told for region in entry.regions or ()], found)
    read = images.read(
        told, lambda entry: _read(entry, attribute, images, found), lambda entry: entry.where, lambda entry: entry.name
    )
    return source_by_names(read, root, found)


def _way_out(ends: bytes) -> str | None:
    """The fix for a file of VIA in a form that is not read; None for any other file."""
    if _VERSION_3.match(ends):
        return "it is of VIA 3, which is not read; export COCO from VIA 3 instead and give that"
    return f"it is VIA's CSV, which is not read; export JSON instead, in VIA by {_MENU}" if _CSV.match(ends) else None


def _files(source: Path, found: LeftOut) -> list[Path]:
    """The files of a source; projects first, as they have the names of options."""
    if source.is_file():
        return [source]
    own = recognised(files_below(source, (".json",)), is_via, "JSON files that are not VIA's: left out", found)
    others = [path for path in (*own, *files_below(source, (".csv",))) if _way_out(ends_of(path))]
    own = [path for path in own if path not in others]
    if not own and not others:
        raise UserError(f"{source}: there is no JSON file of VIA in it; give the folder that holds it")
    if own:
        found.add("CSV files of VIA and projects of VIA 3: left out", *map(str, others))
    return sorted(own, key=lambda path: _PROJECT.search(ends_of(path)) is None) or others[:1]


def _entries(path: Path, root: Path, split: Split | None, found: LeftOut) -> Iterator[_Entry]:
    """The images of a file."""
    if way_out := _way_out(ends_of(path)):
        raise UserError(f"{path}: {way_out}")
    content = read_json(path)
    rows = _inner(content, "_via_img_metadata") or _inner(content)
    if not any("regions" in _inner(row) for row in rows.values()):
        found.add("files in which VIA has listed no image: left out", str(path))
        return
    options = _options(content)
    bases = [path.parent] if path.parent == root else [path.parent, root]
    folders = [folder for base in bases for folder in (base, base / "images")]
    for key, row in rows.items():
        stated = _inner(row).get("filename")
        name = stated if isinstance(stated, str) and stated else key
        where = f"{path}: image {name!r}"
        listed = _inner(row).get("regions")
        listed = list(listed.values()) if isinstance(listed, dict) else listed  # an object in version 1
        regions = [
            (f"{where}: region {number}", _inner(region, "shape_attributes"), _values(region, options))
            for number, region in enumerate(listed if isinstance(listed, list) else (), start=1)
        ]
        yield _Entry(where, name, folders, path.parent / (split or ""), regions if isinstance(listed, list) else None)


def _inner(content: Any, *keys: str) -> dict[str, Any]:
    """The object that stands in an object at the end of these keys, or an empty one."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _options(content: Any) -> dict[str, dict[str, str]]:
    """The descriptions of options by their ids, of each attribute of a project whose ids are plain numbers.

    Other ids are names by themselves.
    """
    attributes = _inner(content, "_via_attributes", "region")
    options = {name: _inner(attributes, name, "options") for name in attributes}
    return {
        name: {number: text for number, value in own.items() for text in _texts(value)}
        for name, own in options.items()
        if all(map(str.isdecimal, own))
    }


def _values(region: Any, options: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """The values of each attribute of a region: none, one, or all that are ticked."""
    return {
        name: [options.get(name, {}).get(text, text) for text in _texts(value)]
        for name, value in _inner(region, "region_attributes").items()
    }


def _texts(value: object) -> list[str]:
    """A text or number, or the ticked options of a checkbox, without spaces around them; nothing for anything else."""
    texts: list[str] = []
    for text in [option for option, ticked in value.items() if ticked] if isinstance(value, dict) else [value]:
        with contextlib.suppress(OddObjectError):
            texts.append(label_of(text).strip())
    return texts


def class_attribute(counts: Mapping[str, int]) -> str:
    """The attribute that is the class, of those that some regions have set, given the number of these regions.

    The first of `_CLASS_WORDS` that is the name of one, in any case and also before "name" (`Class_Name`); else the
    attribute that most regions have set.
    """

    def rank(attribute: str) -> tuple[int, int]:
        name = "".join(words_of(attribute))
        places = (place for place, word in enumerate(_CLASS_WORDS) if name in (word, f"{word}name"))
        return next(places, len(_CLASS_WORDS)), -counts[attribute]

    return min(counts, key=rank)


def _attribute(regions: Sequence[_Region], found: LeftOut) -> str | None:
    """The attribute that is the class in the whole set; None if no region has one with a value."""
    counts = Counter(name for *_, values in regions for name, texts in values.items() if texts)
    if not counts:
        kind = f"regions, none of which has an attribute with a value: all are of one class, {ONE_CLASS!r}"
        found.add(kind, *(where for where, *_ in regions))
        return None
    taken = class_attribute(counts)
    others = dict.fromkeys(name for *_, values in regions for name in values if name != taken)
    found.add(f"attributes of regions beside {taken!r}, which is the class: not used", *map(repr, others))
    return taken


def _read(entry: _Entry, attribute: str | None, images: SourceImages, found: LeftOut) -> AnnotatedImage | None:
    """The image of an entry with its objects; None, and counted, if there is no such thing."""
    if entry.regions is None:
        images.fault("image entries without a list of regions: left out", f"{entry.where} has none; export it again")
        return None
    names = [name.replace("\\", "/") for name in candidate_names(entry.name, None)] or [entry.name]
    stated = [*names, *(name.rpartition("/")[2] for name in names)]
    file = next(filter(None, (images.stated(name, entry.folders, entry.where) for name in stated)), None)
    file = file or next(filter(None, (images.anywhere(name, entry.near) for name in reversed(names))), None)
    if file is None:
        fix = "put it beside the file, or give the folder that holds both"
        images.missing(f"{entry.where} {images.absence(names[-1])}; {fix}")
        return None
    image_hw = images.use(file, entry.where, None)
    if image_hw is None:
        return None
    objects = ObjectList(image_hw)
    for where, shape, values in entry.regions:
        texts = [ONE_CLASS] if attribute is None else values.get(attribute, [])
        try:
            piece = parse_via_shape(shape)
            objects.add(label_of(texts[0] if texts else None), piece)
        except OddObjectError as odd:
            found.add(str(odd), where)
        else:
            found.add("regions with several classes ticked: the first is taken", *[where] * (len(texts) > 1))
    return AnnotatedImage(file, image_hw, objects.names, objects.shapes())


def parse_via_shape(shape: Mapping[str, Any]) -> NDArray[np.float64]:
    """The polygon (K, 2) of a region's shape.

    Raises:
        OddObjectError: it has no area, or cannot be read.
    """
    kind = shape.get("name")
    if kind in _NO_AREA:
        raise OddObjectError("points and lines, which have no area: left out")
    if kind == "polygon":
        across, down = (shape.get(key) for key in ("all_points_x", "all_points_y"))
        if not isinstance(across, list) or not isinstance(down, list):
            raise OddObjectError("objects with too few points: left out")
        if len(across) != len(down):
            raise OddObjectError("polygons whose lists of x and of y differ in length: left out")
        corners = [[number_of(x), number_of(y)] for x, y in zip(across, down, strict=True)]
        is_closed = len(corners) > 1 and corners[0] == corners[-1]  # as in version 1
        return polygon_of(corners[:-1] if is_closed else corners)
    if kind == "rect":
        x, y, width, height = (number_of(shape.get(key)) for key in ("x", "y", "width", "height"))
        return polygon_of(rectangle(x, y, x + width, y + height))
    if kind in ("circle", "ellipse"):
        keys = ("cx", "cy", "r", "r") if kind == "circle" else ("cx", "cy", "rx", "ry")
        x, y, across_radius, down_radius = (number_of(shape.get(key)) for key in keys)
        angle = number_of(shape.get("theta") or 0)  # in radians, clockwise; not in version 1
        polygon_of([[x, y], [across_radius, down_radius], [angle, 0.0]])
        centre = np.array([x, y])
        outline = ellipse(centre, (abs(across_radius), abs(down_radius)))
        return polygon_of(rotated(outline, np.degrees(angle), centre) if angle else outline)
    raise OddObjectError("shapes of an unknown type: left out")
