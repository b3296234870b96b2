"""Objects of Supervisely's annotation files, as polygons and pixels.

Whole numbers count pixels there. A polygon's corner is the pixel that it lies in, whose middle stands for it, as in the
area that Supervisely tells; a rectangle reaches from its first pixel to the end of its last one: [0, 0] and [9, 9] are
10 x 10 pixels. These are the shifts of Supervisely's own upload. Numbers with decimals are places in the image already.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tailseg.data.annotations.masks import Bitmap, bitmap_of
from tailseg.data.images import open_content
from tailseg.data.importers.foreign import LeftOut, rectangle
from tailseg.data.importers.shapes import (
    ObjectList,
    OddObjectError,
    Piece,
    label_of,
    number_of,
    polygon_of,
    require_mask_fits,
    rotated,
)

BYTES = 4  # of a bitmap's PNG for each pixel of its image, at most,
MORE_BYTES = 1 << 20  # and for all else in it
NEAR = 2, 0.05  # pixels, and share of its longer side, by which a rectangle may be off the outline that it surrounds

_BOXES = ("rectangle", "oriented_bbox")
_BITMAPS = ("bitmap", "alpha_mask")
_NO_AREA = ("point", "line", "polyline", "graph", "cuboid", "cuboid_2d")
_NO_PNG = "masks that are no PNG: left out"

Shapes = Mapping[str, object]  # types of the objects of a class, which old files do not state, by its name


def objects_of(
    rows: Sequence[Any], where: str, shapes: Shapes, image_hw: tuple[int, int], found: LeftOut
) -> ObjectList:
    """The objects of an image of the given size; outlines of one class that are bound together are one.

    A rectangle around an outline of its class, or around those that it is bound to, is none: sets of Dataset Ninja and
    Supervisely's import of COCO state both of each object.
    """
    objects = ObjectList(image_hw)
    boxes: list[tuple[str, str, object, Piece]] = []
    bounds: dict[object, NDArray[np.float64]] = {}  # of outlines that are bound together, or of one
    keys: dict[str, dict[object, None]] = {}  # those of each class
    for number, row in enumerate(rows, start=1):
        place = f"{where}: object {number}"
        try:
            name, kind, pieces = parse_supervisely_object(row, shapes, image_hw)
        except OddObjectError as odd:
            found.add(str(odd), place)
            continue
        key = row.get("instance")
        key = key if isinstance(key, str) and key else number
        if kind in _BOXES:
            boxes.append((place, name, key, pieces[0]))
            continue
        bounds[key] = _bounds([*pieces, bounds[key]] if key in bounds else pieces)
        keys.setdefault(name, {})[key] = None
        for piece in pieces:
            objects.add(name, piece, key)
    of_class = {name: np.array([bounds[key] for key in own]) for name, own in keys.items()}
    none = np.empty((0, 2, 2))
    for place, name, key, box in boxes:
        near = [of_class.get(name, none), bounds[key][None] if key in bounds else none]
        if _surrounds_one(_bounds([box]), np.concatenate(near)):
            found.add("rectangles around an outline of the same object: left out", place)
        else:
            objects.add(name, box)
    return objects


def _bounds(pieces: Sequence[Piece]) -> NDArray[np.float64]:
    """The upper left and the lower right corner of the rectangle around an object (2, 2)."""
    corners = [np.reshape(piece.box, (2, 2)) if isinstance(piece, Bitmap) else piece for piece in pieces]
    points = np.concatenate(corners).astype(np.float64)
    return np.array([points.min(axis=0), points.max(axis=0)])


def _surrounds_one(box: NDArray[np.float64], outlines: NDArray[np.float64]) -> bool:
    """Return whether a rectangle is that around one of some outlines, of bounds (N, 2, 2)."""
    off = max(NEAR[0], NEAR[1] * float((box[1] - box[0]).max()))
    return bool((np.abs(outlines - box).max(axis=(1, 2)) <= off).any())


def parse_supervisely_object(row: Any, shapes: Shapes, image_hw: tuple[int, int]) -> tuple[str, str, list[Piece]]:
    """Class, type and pieces of one object, in an image of the given size.

    Raises:
        OddObjectError: it has no class, no area, or cannot be read.
    """
    row = row if isinstance(row, dict) else {}
    name = label_of(row.get("classTitle"))
    stated = (row.get("geometryType"), row.get("shape"), "bitmap" if row.get("bitmap") else None, shapes.get(name))
    kind = next((kind for kind in stated if isinstance(kind, str) and kind != "any"), None)
    if kind is None:
        raise OddObjectError("objects whose type neither they nor meta.json state: left out")
    if kind in _NO_AREA:
        raise OddObjectError("points, lines, keypoints and cuboids, which are no areas: left out")
    if kind in _BITMAPS:
        return name, kind, [_bitmap(row.get("bitmap"), image_hw)]
    if kind in ("polygon", "multipolygon"):
        return name, kind, _polygons(row.get("parts") if kind == "multipolygon" else [row.get("points")], image_hw)
    if kind in _BOXES:
        return name, kind, [_box(row, kind)]
    raise OddObjectError("objects of an unknown type: left out")


def _is_of_pixels(points: NDArray[np.float64]) -> bool:
    return bool((points == np.floor(points)).all())


def _box(row: Mapping[str, Any], kind: str) -> NDArray[np.float64]:
    """The corners of a rectangle, which may be turned clockwise, by radians."""
    points = row.get("points")
    points = polygon_of(points.get("exterior") if isinstance(points, dict) else points, least=2)
    end = points.max(axis=0) + _is_of_pixels(points)
    corners = rectangle(*points.min(axis=0), *end)
    angle = number_of(row.get("angle", 0)) if kind == "oriented_bbox" else 0.0
    return polygon_of(rotated(corners, float(np.rad2deg(angle)))) if angle else corners


def _polygons(parts: object, image_hw: tuple[int, int]) -> list[Piece]:
    """The outlines of an object's parts; its pixels where a part has holes."""
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise OddObjectError("objects with too few points: left out")
    outlines = [_outline(part.get("exterior")) for part in parts]
    interiors = [inner if isinstance(inner := part.get("interior"), list) else [] for part in parts]
    holes = [[_outline(hole) for hole in inner if not isinstance(hole, list) or len(hole) > 2] for inner in interiors]
    if not any(holes):
        return list(outlines)
    pixels = np.zeros(image_hw, np.uint8)
    for outline, own in zip(outlines, holes, strict=True):
        drawn = bitmap_of([outline.ravel()], image_hw)
        x, y, right, low = drawn.box
        for hole in own:
            _take_out(bitmap_of([hole.ravel()], image_hw), drawn)
        pixels[y:low, x:right] |= drawn.pixels
    return [Bitmap(pixels, 0, 0).tight()]


def _take_out(hole: Bitmap, drawn: Bitmap) -> None:
    """Make the pixels of a hole empty."""
    x, y = max(hole.x, drawn.x), max(hole.y, drawn.y)
    inside = drawn.pixels[y - drawn.y :, x - drawn.x :]
    taken = hole.pixels[y - hole.y :, x - hole.x :][: inside.shape[0], : inside.shape[1]]
    inside[: taken.shape[0], : taken.shape[1]][taken != 0] = 0


def _outline(points: object) -> NDArray[np.float64]:
    corners = polygon_of(points)
    return corners + 0.5 if _is_of_pixels(corners) else corners


def _bitmap(value: object, image_hw: tuple[int, int]) -> Bitmap:
    """The pixels of a bitmap: those that are not transparent in its PNG, or not black."""
    if not isinstance(value, dict):
        raise OddObjectError(_NO_PNG)
    x, y = np.floor(polygon_of([value.get("origin")], least=1)[0]).astype(int).tolist()
    try:
        with open_content(_png(value.get("data"), image_hw), "PNG") as image:
            require_mask_fits(image.height, image.width, image_hw)
            pixels = np.asarray(_covered(image)) != 0
    except OddObjectError:
        raise
    except Exception:  # base64, zlib and Pillow's readers raise many types on broken files
        raise OddObjectError(_NO_PNG) from None
    covered = pixels if pixels.ndim == 2 else pixels.any(axis=2)
    return Bitmap(covered.astype(np.uint8), x, y)


def _png(text: Any, image_hw: tuple[int, int]) -> bytes:
    """The PNG in a text: base64 of zlib, which is unpacked within bounds, or of the PNG itself.

    Raises:
        OddObjectError: it unpacks to more than any bitmap of the image needs.
        Exception: of many types, if there is no such thing.
    """
    content = base64.b64decode(text)
    if content.startswith(b"\x89PNG"):
        return content
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(content, BYTES * (image_hw[0] + 1) * (image_hw[1] + 1) + MORE_BYTES)
    if unpacker.unconsumed_tail:
        raise OddObjectError("masks that unpack to more than their image has pixels for: left out")
    return unpacked


def _covered(image: Image.Image) -> Image.Image:
    """The channel or channels of a bitmap's PNG that are not 0 where it covers."""
    if image.has_transparency_data:
        return image.convert("RGBA").getchannel("A")
    return image.convert("RGB") if image.mode == "P" else image
