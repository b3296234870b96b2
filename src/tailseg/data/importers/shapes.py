"""Shapes as people draw them, turned into polygons or pixels, and the objects that they form."""

from __future__ import annotations

import base64
from collections.abc import Hashable, Sequence
from unicodedata import normalize

import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.masks import Bitmap, encode_bitmap, run_lengths
from tailseg.data.annotations.segmentations import MAX_SIDE, is_too_long
from tailseg.data.importers.foreign import TOO_LONG, Shape
from tailseg.errors import UserError

TOLERANCE = 0.05  # pixels between a curve and the polygon that stands for it, at most

Piece = NDArray[np.float64] | Bitmap  # of an object: a polygon (K, 2), x, y in pixels; or pixels


class OddObjectError(UserError):
    """One object cannot be read and is left out; the message is its kind for `LeftOut.add`."""


def label_of(value: object) -> str:
    """A class's name in one Unicode form; numbers become text.

    Raises:
        OddObjectError: it is no name.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or not _is_unicode(value):
        raise OddObjectError("objects without a label: left out")
    return normalize("NFC", value)


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written: JSON may have half of a pair of surrogates."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def number_of(value: object) -> float:
    """A number of a file, given as a number or as text; NaN if it is none."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    return float("nan")


def size_of(height: object, width: object) -> tuple[int, int] | None:
    """The (height, width) that a file states of its image; None if it states none."""
    sides = number_of(height), number_of(width)
    known = all(0 < side <= MAX_SIDE and side.is_integer() for side in sides)
    return (int(sides[0]), int(sides[1])) if known else None


def polygon_of(points: object, least: int = 3) -> NDArray[np.float64]:
    """Points as an array (K, 2), checked.

    Args:
        points: a list of [x, y] in pixels, or an array.
        least: the number of points that the shape needs.

    Raises:
        OddObjectError: there are too few, a coordinate is no number or far from any image, or the outline too long.
    """
    if not isinstance(points, (list, np.ndarray)) or len(points) < least:
        raise OddObjectError("objects with too few points: left out")
    if isinstance(points, list) and not all(map(_is_pair, points)):
        raise _no_numbers()
    try:
        corners = np.array(points, np.float64)
    except OverflowError:
        raise _no_numbers() from None
    if not np.isfinite(corners).all():
        raise _no_numbers()
    if np.abs(corners).max() > MAX_SIDE:
        raise OddObjectError(f"objects with a coordinate beyond {MAX_SIDE:,} pixels: left out")
    if is_too_long(corners.ravel()):
        raise OddObjectError(TOO_LONG)
    return corners


def _is_pair(row: object) -> bool:
    return isinstance(row, list) and len(row) == 2 and all(type(value) in (int, float) for value in row)


def _no_numbers() -> OddObjectError:
    return OddObjectError("objects with coordinates that are not numbers: left out")


def decoded(text: object, most: int) -> bytes | None:
    """The bytes of a text in base64, also of a data URL; None if it is none, or has more than ``most`` characters."""
    if not isinstance(text, str) or not 0 < len(text) <= most:
        return None
    try:
        return base64.b64decode(text.rpartition("base64,")[2]) or None
    except ValueError:
        return None


def rotated(
    corners: NDArray[np.float64], degrees: float, pivot: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Points (K, 2) turned clockwise, as seen on the image, about a point (2,), else the middle of their bounds."""
    if not np.isfinite(degrees):
        raise _no_numbers()
    angle = np.deg2rad(degrees)
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2 if pivot is None else pivot
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.asarray((corners - middle) @ turn + middle)


def ellipse(centre: NDArray[np.float64], radii: tuple[float, float]) -> NDArray[np.float64]:
    """A polygon (K, 2) whose corners lie on an ellipse and whose edges are at most `TOLERANCE` pixels from it.

    Args:
        centre: (2,) x, y in pixels.
        radii: along x and y, at least 0.
    """
    # The edge of a regular polygon of K corners lies r (1 - cos(pi / K)) inside of its circle of radius r.
    half_angle = np.arccos(max(1 - TOLERANCE / max(*radii, TOLERANCE), 0.0))
    count = max(8, int(np.ceil(np.pi / half_angle)))
    angles = np.arange(count) * (2 * np.pi / count)
    return np.asarray(centre + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii)


def require_mask_fits(height: int, width: int, image_hw: tuple[int, int]) -> None:
    """Check the size of a mask before its pixels are decoded.

    Raises:
        OddObjectError: it is empty, or larger than its image by more than a pixel, from rounding.
    """
    if min(height, width) < 1 or height > image_hw[0] + 1 or width > image_hw[1] + 1:
        raise OddObjectError("masks that do not fit into their image: left out")


class ObjectList:
    """The objects of one image; pieces of one label and one group are one object."""

    def __init__(self, image_hw: tuple[int, int]) -> None:
        self.image_hw = image_hw
        self.names: list[str] = []
        self._pieces: list[list[NDArray[np.float64] | bytes]] = []  # pixels as run lengths, which take little memory
        self._groups: dict[tuple[str, Hashable], int] = {}  # places of objects in several pieces

    def add(self, name: str, piece: Piece, group: Hashable = None) -> None:
        """Add an object, or a piece to the object of this name and group; None is no group."""
        place = len(self.names) if group is None else self._groups.setdefault((name, group), len(self.names))
        if place == len(self.names):
            self.names.append(name)
            self._pieces.append([])
        self._pieces[place].append(encode_bitmap(piece, self.image_hw) if isinstance(piece, Bitmap) else piece)

    def shapes(self) -> list[Shape]:
        """The union of each object's pieces: polygons, or pixels if one of them is pixels."""
        return [_union(pieces, self.image_hw) for pieces in self._pieces]


def _union(pieces: Sequence[NDArray[np.float64] | bytes], image_hw: tuple[int, int]) -> Shape:
    polygons = [piece for piece in pieces if not isinstance(piece, bytes)]
    codes = [piece for piece in pieces if isinstance(piece, bytes)]
    if not codes:
        return polygons
    if polygons:
        codes.append(run_lengths([polygon.ravel() for polygon in polygons], image_hw).encode())
    if len(codes) == 1:
        return codes[0]
    union: bytes = rle.merge([{"size": list(image_hw), "counts": code} for code in codes])["counts"]
    return union
