"""CVAT's own format, "CVAT for images 1.1": one XML of a whole task or project, with polygons, masks and boxes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize
from xml.etree.ElementTree import Element

import numpy as np

from tailseg.data.annotations.image_files import files_below
from tailseg.data.annotations.masks import Bitmap
from tailseg.data.annotations.segmentations import MAX_SIDE
from tailseg.data.importers.foreign import AnnotatedImage, LeftOut, Source, rectangle, source_by_names
from tailseg.data.importers.layouts import Split, split_of, split_of_path
from tailseg.data.importers.shapes import (
    ObjectList,
    OddObjectError,
    Piece,
    ellipse,
    label_of,
    number_of,
    polygon_of,
    require_mask_fits,
    rotated,
    size_of,
)
from tailseg.data.importers.source_images import SourceImages, recognised
from tailseg.data.importers.xml_files import children_of_root, head_of, root_of
from tailseg.errors import UserError

ROOT = "annotations"

_SHAPES = ("polygon", "box", "ellipse", "mask")
_NO_AREA = ("polyline", "points", "skeleton", "cuboid", "tag")
_PARTS = ("<version", "<meta", "<image", "<track")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One <image> of a file."""

    where: str
    name: str
    folders: list[Path]  # that may hold it
    near: Path  # of the file, and of the subset in it: to choose among images of one name
    stated: tuple[int, int] | None  # height and width
    shapes: list[tuple[str, str, dict[str, str]]]  # place, tag and attributes of each


def is_cvat(path: Path) -> bool:
    """Return whether a file looks like CVAT's, by its first 4 KB: XML whose root <annotations> has CVAT's elements."""
    return root_of(path) == ROOT and any(part in head_of(path) for part in _PARTS)


def read_cvat(source: Path) -> Source:
    """A file of "CVAT for images 1.1", or a folder with such files, with the images in `images` or beside them.

    Splits are told by the images' `subset`, or else by the names of the files and of their folders.
    """
    root = source.parent if source.is_file() else source
    found = LeftOut()
    images = SourceImages(root, found, "image entries")
    labels: dict[str, None] = {}
    told: list[tuple[_Entry, Split | None]] = []
    for path in _files(source, found):
        of_file = split_of_path(path, root) or split_of(path.stem)
        for entry, subset in _entries(path, root, labels):
            told.append((entry, split_of(subset) or of_file))
    read = images.read(
        told, lambda entry: _read(entry, images, found), lambda entry: entry.where, lambda entry: entry.name
    )
    used = {name for part in read.values() for image in part for name in image.names}
    found.add("labels without an object: left out", *(name for name in labels if name not in used))
    return source_by_names(read, root, found)


def _files(source: Path, found: LeftOut) -> list[Path]:
    if source.is_file():
        return [source]
    own = recognised(files_below(source, (".xml",)), is_cvat, "XML files that are not CVAT's: left out", found)
    if not own:
        raise UserError(f"{source}: there is no annotations.xml of CVAT in it; give the folder that holds it")
    return own


def _entries(path: Path, root: Path, labels: dict[str, None]) -> Iterator[tuple[_Entry, str]]:
    """The images of a file with their subsets; ``labels`` gets the names of its classes."""
    for element in children_of_root(path, ROOT):
        if element.tag == "track":
            raise UserError(
                f"{path}: it is 'CVAT for video', which has tracks; export the task as 'CVAT for images' or COCO"
            )
        if element.tag == "meta":
            labels |= dict.fromkeys(normalize("NFC", label.findtext("name") or "") for label in element.iter("label"))
        elif element.tag == "image":
            yield _entry(element, path, root), element.get("subset") or ""


def _entry(element: Element, path: Path, root: Path) -> _Entry:
    name, subset = element.get("name") or "", element.get("subset") or ""
    where = f"{path}: image {name!r}"
    bases = [path.parent] if path.parent == root else [path.parent, root]
    subsets = [subset] if subset and "/" not in subset and subset not in (".", "..") else []
    folders = [base / "images" / part for base in bases for part in (*subsets, "")]
    folders += [base / part for base in bases for part in (*subsets, "")]
    shapes = [
        (f"{where}: shape {number}", child.tag, dict(child.attrib)) for number, child in enumerate(element, start=1)
    ]
    near = path.parent.joinpath(*subsets)
    return _Entry(where, name, folders, near, size_of(element.get("height"), element.get("width")), shapes)


def _read(entry: _Entry, images: SourceImages, found: LeftOut) -> AnnotatedImage | None:
    """The image of an entry with its objects; None, and counted, if there is no such thing."""
    name = entry.name.replace("\\", "/")
    base = name.rpartition("/")[2]
    file = images.stated(name, entry.folders, entry.where) or images.stated(base, entry.folders, entry.where)
    # Frames of videos are named without suffix; the files that CVAT writes have one.
    file = file or images.of_stem(base, entry.folders) or images.anywhere(name, entry.near)
    if file is None:
        fix = "put it into the folder images beside the file, or export again with 'Save images'"
        images.missing(f"{entry.where} {images.absence(name)}; {fix}")
        return None
    image_hw = images.use(file, entry.where, entry.stated)
    if image_hw is None:
        return None
    objects = ObjectList(image_hw)
    for place, tag, attributes in entry.shapes:
        try:
            name, piece = parse_cvat_shape(tag, attributes, image_hw)
        except OddObjectError as odd:
            found.add(str(odd), place)
        else:
            group = attributes.get("group_id", "0").strip()
            objects.add(name, piece, group if group not in ("", "0") else None)
    return AnnotatedImage(file, image_hw, objects.names, objects.shapes())


def parse_cvat_shape(tag: str, attributes: Mapping[str, str], image_hw: tuple[int, int]) -> tuple[str, Piece]:
    """Label and polygon (K, 2) or pixels of one shape, in an image of the given size.

    Raises:
        OddObjectError: it has no label, no area, or cannot be read.
    """
    if tag in _NO_AREA:
        raise OddObjectError("tags, skeletons, cuboids, lines and points, which are no areas: left out")
    if tag not in _SHAPES:
        raise OddObjectError("shapes of an unknown type: left out")
    name = label_of(attributes.get("label"))
    if tag == "mask":
        return name, _mask(attributes, image_hw)
    if tag == "polygon":
        pairs = [pair.split(",") for pair in attributes.get("points", "").split(";") if pair.strip()]
        return name, polygon_of([[number_of(value) for value in pair] for pair in pairs])
    keys = ("xtl", "ytl", "xbr", "ybr") if tag == "box" else ("cx", "cy", "rx", "ry")
    sides = [number_of(attributes.get(key)) for key in keys]
    polygon_of([sides[:2], sides[2:]], least=2)
    outline = rectangle(*sides) if tag == "box" else ellipse(np.array(sides[:2]), (abs(sides[2]), abs(sides[3])))
    degrees = number_of(attributes.get("rotation", "0"))
    return name, polygon_of(rotated(outline, degrees) if degrees else outline)


def _mask(attributes: Mapping[str, str], image_hw: tuple[int, int]) -> Bitmap:
    """The pixels of a mask: row by row within its rectangle, runs of zeros and ones in turn, zeros first."""
    numbers = [number_of(attributes.get(key)) for key in ("left", "top", "width", "height")]
    if not all(abs(number) <= MAX_SIDE and number.is_integer() for number in numbers):
        raise OddObjectError("objects with coordinates that are not numbers: left out")
    left, top, width, height = map(int, numbers)
    require_mask_fits(height, width, image_hw)
    try:
        runs = np.array([int(run) for run in attributes.get("rle", "").split(",")], np.int64)
    except (ValueError, OverflowError):
        runs = np.zeros(0, np.int64)
    if runs.size == 0 or runs.min() < 0 or runs.max() > width * height or runs.sum() != width * height:
        raise OddObjectError("masks whose runs do not fill their rectangle: left out")
    pixels = np.repeat(np.arange(runs.size, dtype=np.int64) % 2, runs).astype(np.uint8)
    return Bitmap(pixels.reshape(height, width), left, top)
