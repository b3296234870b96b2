"""labelme's files, one JSON for each image, also those of X-AnyLabeling: polygons, rectangles, circles and masks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tailseg.data.annotations.image_files import files_below
from tailseg.data.annotations.masks import Bitmap
from tailseg.data.images import open_content, read_header
from tailseg.data.importers.foreign import (
    AnnotatedImage,
    LeftOut,
    Source,
    ends_of,
    read_json,
    rectangle,
    source_by_names,
)
from tailseg.data.importers.layouts import split_of_path
from tailseg.data.importers.shapes import (
    ObjectList,
    OddObjectError,
    Piece,
    decoded,
    ellipse,
    label_of,
    polygon_of,
    require_mask_fits,
    size_of,
)
from tailseg.data.importers.source_images import SourceImages, recognised
from tailseg.errors import UserError

MAX_BYTES = 2**29  # of a file; labelme's may hold a photograph
MAX_MASK = 2**26  # characters of a mask
MAX_NAME = 200  # bytes of an image's name, of which file systems take 255

COCO_KEYS = re.compile(rb'"(?:images|annotations|categories)"\s*:\s*\[')
_KEYS = re.compile(rb'"(?:shapes"\s*:\s*\[|imagePath"\s*:|imageData"\s*:)')
_OUTLINES = ("polygon", "oriented_rectangle", "rotation", "quadrilateral")  # the latter two are X-AnyLabeling's
_NO_OBJECT = ("__ignore__", "_background_")  # names that labelme keeps for what is not to be learnt
_NO_AREA = ("point", "points", "line", "linestrip", "line_strip")


def is_labelme(path: Path) -> bool:
    """Return whether a file looks like labelme's, by its first and last 4 KB.

    It is an object in JSON with one of the keys `shapes`, `imagePath` and `imageData`, and without COCO's. Of the long
    values (the shapes, the photograph) one begins in the first 4 KB, whatever the order of the keys.
    """
    ends = ends_of(path)
    return ends.startswith(b"{") and _KEYS.search(ends) is not None and COCO_KEYS.search(ends) is None


def read_labelme(source: Path) -> Source:
    """A folder of labelme's files and their images, in any folders in it; those called train and val are splits."""
    if source.is_file():
        raise UserError(f"{source}: labelme writes one file for each image; give the folder that holds all of them")
    found = LeftOut()
    images = SourceImages(source, found, "annotation files")
    files = list(files_below(source, (".json",)))
    own = recognised(files, is_labelme, "JSON files that are not labelme's: left out", found)
    if not own:
        problem = f"none of its {len(files)} JSON files is labelme's" if files else "there is no JSON file in it"
        raise UserError(f"{source}: {problem}; give the folder that holds labelme's files")
    own.sort(key=lambda path: images.of_stem(path.stem, [path.parent]) is None)  # before copies, which state its name
    told = [(path, split_of_path(path, source)) for path in own]
    return source_by_names(images.read(told, lambda path: _read(path, images, found)), source, found)


def _read(path: Path, images: SourceImages, found: LeftOut) -> AnnotatedImage | None:
    """The image of a file with its objects; None, and counted, if there is no such thing."""
    where = str(path)
    try:
        content = _content(path)
    except UserError as error:
        images.fault("JSON files that cannot be read: left out", str(error))
        return None
    located = _locate(path, content, images)
    if located is None:
        return None
    file, photograph = located
    stated = size_of(content.get("imageHeight"), content.get("imageWidth"))
    image_hw = images.use(file, where, stated, photograph)
    if image_hw is None:
        return None
    objects = ObjectList(image_hw)
    for number, shape in enumerate(content["shapes"], start=1):
        try:
            name, piece = parse_shape(shape, image_hw)
        except OddObjectError as odd:
            found.add(str(odd), f"{where}: shape {number}")
        else:
            objects.add(name, piece, _group(shape.get("group_id")))
    reader = None if photograph is None else partial(read_photograph, path)
    return AnnotatedImage(file, image_hw, objects.names, objects.shapes(), reader)


def _content(path: Path) -> dict[str, Any]:
    """The object in a file, with a list of shapes.

    Raises:
        UserError: the file is too large, not JSON or of another kind.
    """
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: it has more than {MAX_BYTES >> 20} MB; save it without the photograph")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise UserError(f"{path}: it has no list 'shapes'; check the file")
    return content


def _locate(path: Path, content: dict[str, Any], images: SourceImages) -> tuple[Path, bytes | None] | None:
    """The image of a file: where it lies, or the path that it would have and its bytes, or None.

    In this order: as stated; of the stated name beside the file; of the file's own name beside it; inside of the file;
    of the stated name anywhere in the source.
    """
    stated = content.get("imagePath")
    name = stated.replace("\\", "/") if isinstance(stated, str) else ""
    base = name.rpartition("/")[2]
    folder = path.parent
    file = images.stated(name, [folder], str(path)) or images.stated(base, [folder], str(path))
    file = file or images.of_stem(path.stem, [folder])
    if file is not None:
        return file, None
    photograph = decoded(content.get("imageData"), MAX_BYTES)
    if photograph is not None:
        with contextlib.suppress(UserError):
            kind = read_header(path, BytesIO(photograph)).format
            return _path_of_photograph(path, base, kind, images), photograph
    file = images.anywhere(name, folder)
    if file is None:
        shown = name or f"{path.stem}.jpg"
        fix = "put it there, or give the folder that holds both"
        images.missing(f"{path}: its image {shown!r} {images.absence(shown)}; {fix}")
        return None
    return file, None


def _path_of_photograph(path: Path, base: str, kind: str, images: SourceImages) -> Path:
    """The path that a photograph inside of a file would have beside it: by the name it states, or else the file's own.

    Args:
        path: of the file.
        base: the name it states.
        kind: Pillow's name of the photograph's format.
        images: that are used already.
    """
    try:
        usable = "\0" not in base and len(base.encode()) <= MAX_NAME
    except UnicodeEncodeError:
        usable = False
    suffixes = Image.registered_extensions()
    if usable and suffixes.get(Path(base).suffix.lower()) == kind and not images.is_used(path.parent / base):
        return path.parent / base
    return path.with_suffix(next(suffix for suffix, name in {".jpg": "JPEG", **suffixes}.items() if name == kind))


def read_photograph(path: Path) -> bytes:
    """The bytes of the image that stands inside of a labelme file; UserError if there is none."""
    photograph = decoded(_content(path).get("imageData"), MAX_BYTES)
    if photograph is None:
        raise UserError(f"{path}: its 'imageData' is no image; write it again")
    return photograph


def _group(value: object) -> Hashable:
    """The group of a shape, or None; tools also write lists and the like, which stand for none."""
    known = isinstance(value, (int, str)) and not isinstance(value, bool) and value != ""
    return value if known and isinstance(value, Hashable) else None


def parse_shape(shape: Any, image_hw: tuple[int, int]) -> tuple[str, Piece]:
    """Label and polygon (K, 2) or pixels of one of labelme's shapes, in an image of the given size.

    Raises:
        OddObjectError: it has no label or one that is no class, no area, or cannot be read.
    """
    if not isinstance(shape, dict):
        raise OddObjectError("objects without a label: left out")
    name = label_of(shape.get("label"))
    if name in _NO_OBJECT:
        raise OddObjectError(f"shapes called {name}, which labelme keeps for what is no object: left out")
    kind = shape.get("shape_type") or "polygon"
    points = shape.get("points")
    if kind in _NO_AREA:
        raise OddObjectError("points and lines, which have no area: left out")
    if kind in _OUTLINES:
        return name, polygon_of(points)
    if kind == "rectangle":
        corners = polygon_of(points, least=2)
        return name, rectangle(*corners.min(axis=0), *corners.max(axis=0))
    if kind == "circle":
        centre, edge = polygon_of(points, least=2)[:2]
        radius = float(np.hypot(*(edge - centre)))
        return name, polygon_of(ellipse(centre, (radius, radius)))
    if kind == "mask":
        return name, _mask(polygon_of(points, least=2), shape.get("mask"), image_hw)
    raise OddObjectError("shapes of an unknown type: left out")


def _mask(points: Any, text: object, image_hw: tuple[int, int]) -> Bitmap:
    """The pixels of a mask: a PNG in base64 that fills the rectangle between its first and its last pixel.

    labelme has written rectangles that end a pixel behind the last one, and of several decimals after a move.
    """
    (x, y), (right, low) = np.rint([points.min(axis=0), points.max(axis=0)]).astype(int).tolist()
    require_mask_fits(low - y + 1, right - x + 1, image_hw)
    content = decoded(text, MAX_MASK)
    try:
        with open_content(content or b"", "PNG") as image:
            if abs(image.width - (right - x + 1)) > 1 or abs(image.height - (low - y + 1)) > 1:
                raise OddObjectError("masks of another size than their rectangle: left out")
            pixels = np.asarray(image.getchannel(0) if image.mode in ("RGB", "LA") else image) != 0
    except OddObjectError:
        raise
    except Exception:  # Pillow's readers raise many types on broken files
        raise OddObjectError("masks that are no PNG: left out") from None
    if pixels.ndim != 2:
        raise OddObjectError("masks that are no PNG: left out")
    return Bitmap(pixels.astype(np.uint8), x, y)
