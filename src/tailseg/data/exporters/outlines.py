"""From the pixels of an object to polygons from which COCO's rasteriser makes the same pixels again.

An outline runs along the borders of pixels, so its corners are whole numbers. The rasteriser (`rleFrPoly`) rounds to
fifths of a pixel and asks at the centre of each column, by the even-odd rule, which rows lie inside: a border at a
whole number comes out where it went in. A bridge, there and back on one line, adds every crossing twice, which is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.masks import Bitmap, Segmentation, bitmap_of, run_lengths

Ring = NDArray[Any]  # (K, 2) x, y in pixels, of any number type; closed, the first corner is not repeated at the end
_NEAR = 4096  # earlier corners among which a bridge seeks the nearest: bounds the time for noise
_TOLERANCE = 1.25  # pixels that a simplified outline may be off: steps of one pixel vanish; of a small object less,
_SMALL = 32  # the side of a square of its area over this


@dataclass(frozen=True, slots=True, eq=False)
class Outlines:
    """The borders of an object. Pixels that touch at a corner are of one piece."""

    pieces: list[Ring]  # of each piece, its holes joined to it by bridges
    holes: int  # in all pieces


def outlines_of(bitmap: Bitmap) -> Outlines:
    """The exact outlines of an object, int64 in pixels of the image."""
    pixels = np.pad(bitmap.pixels != 0, 1)
    chain, columns = _borders(pixels)
    pieces: list[int] = []  # the first corner of each
    holes: list[int] = []
    for first in chain.firsts():  # in the order of rows, so a hole comes after what surrounds it
        x, y = chain.points[first]
        (pieces if pixels[y, x] else holes).append(first)
    for first in holes:
        x, y = chain.points[first]
        left = int(np.flatnonzero(~pixels[y, :x])[-1]) + 1  # where the row of pixels before the hole begins
        lower = columns.below(left, y)
        chain.join(chain.insert((left, y), after=lower), first)
    offset = np.array([bitmap.x - 1, bitmap.y - 1])
    return Outlines([chain.ring(first) + offset for first in pieces], len(holes))


def joined(rings: Sequence[Ring]) -> Ring:
    """Rings as one, each joined to an earlier one by a bridge between near corners; (0, 2) where there is none.

    By the even-odd rule it covers what an odd number of the rings covers.
    """
    if not rings:
        return np.zeros((0, 2))
    points = np.concatenate(rings)
    starts = np.cumsum([0, *map(len, rings)])
    following = np.arange(1, len(points) + 1)
    following[starts[1:] - 1] = starts[:-1]
    chain = _Chain([(x, y) for x, y in points.tolist()], following.tolist())
    for start, stop in zip(starts[1:-1].tolist(), starts[2:].tolist(), strict=True):
        earlier, own = max(0, start - _NEAR), start
        for _ in range(2):
            near = earlier + _nearest(points[earlier:start], points[own])
            own = start + _nearest(points[start:stop], points[near])
        chain.join(near, own)
    return chain.ring(0)


def as_polygons(segmentation: Segmentation, image_hw: tuple[int, int]) -> list[NDArray[np.float64]]:
    """Polygons whose union is the object: those given, or the exact outlines of an RLE's pieces.

    Returns:
        (2k,) each, k >= 3, in thousandths of pixels. Holes are joined to what surrounds them by bridges.
    """
    if isinstance(segmentation, bytes):
        return [_flat(piece) for piece in outlines_of(bitmap_of(segmentation, image_hw)).pieces]
    return [in_thousandths(polygon) for polygon in segmentation]


def as_one_polygon(segmentation: Segmentation, image_hw: tuple[int, int]) -> NDArray[np.float64]:
    """One polygon inside of the image that has the mask of a segmentation.

    Polygons keep their corners; several are joined by bridges. Where that gives another mask, because they overlap or
    reach beyond the image, it is the exact outline of the mask, as for an RLE.

    Returns:
        (2k,), k >= 3, in thousandths of pixels; (0,) where an RLE covers nothing.
    """
    given = as_polygons(segmentation, image_hw)
    inside = [polygon.reshape(-1, 2).clip(0, image_hw[::-1]).ravel() for polygon in given]
    if len(given) == 1 and np.array_equal(inside[0], given[0]):
        return given[0]
    one = _flat(joined([polygon.reshape(-1, 2) for polygon in inside]))
    if len(one) >= 6 and run_lengths([one], image_hw) == run_lengths(segmentation, image_hw):
        return one
    return _flat(joined(outlines_of(bitmap_of(segmentation, image_hw)).pieces))


def in_thousandths(polygon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coordinates with three decimals that COCO's rasteriser takes for the same as those given: (2k,), in pixels.

    It cuts 5 x + 0.5 to a whole number. Where rounding crosses such a step, the thousandth before it is taken.
    """
    rounded = np.round(polygon, 3)
    crossed = np.trunc(5 * rounded + 0.5) != np.trunc(5 * polygon + 0.5)
    return np.where(crossed, np.round(rounded + np.sign(polygon - rounded) / 1000, 3), rounded)


def _flat(ring: Ring) -> NDArray[np.float64]:
    return ring.astype(np.float64).ravel()


def editable(code: bytes, image_hw: tuple[int, int]) -> Segmentation:
    """An object as polygons of few corners, for a person to correct; not exact.

    The corners are some of those of the exact outline, which stays within 1.25 pixels, of a small object within less.
    An object with holes stays as it is.

    Args:
        code: compressed RLE of the whole image.
        image_hw: size of the image in pixels.
    """
    bitmap = bitmap_of(code, image_hw)
    outlines = outlines_of(bitmap)
    if outlines.holes or not outlines.pieces:
        return code
    tolerance = min(_TOLERANCE, float(np.sqrt(bitmap.pixels.sum())) / _SMALL)
    polygons = []
    for piece in outlines.pieces:
        fewer = cv2.approxPolyDP(piece.astype(np.int32)[:, None], tolerance, closed=True)[:, 0]
        polygons.append(_flat(fewer if len(fewer) > 2 else piece))
    return polygons


class _Chain:
    """Rings of corners, each corner with the one that follows it."""

    def __init__(self, points: list[tuple[Any, Any]], following: list[int]) -> None:
        self.points = points
        self.following = following

    def firsts(self) -> list[int]:
        """The first corner of each ring."""
        seen = bytearray(len(self.points))
        found = []
        for first in range(len(self.points)):
            if not seen[first]:
                found.append(first)
                corner = first
                while not seen[corner]:
                    seen[corner] = 1
                    corner = self.following[corner]
        return found

    def insert(self, point: tuple[Any, Any], after: int) -> int:
        """A new corner behind another one."""
        self.points.append(point)
        self.following.append(self.following[after])
        self.following[after] = len(self.points) - 1
        return self.following[after]

    def join(self, one: int, other: int) -> None:
        """Make the rings of two corners one, by a bridge between these."""
        back = self.insert(self.points[one], after=one)
        across = self.insert(self.points[other], after=other)
        self.following[one], self.following[other] = across, back

    def ring(self, first: int) -> Ring:
        """The ring of a corner, no corner twice in a row."""
        corners = [first]
        while (corner := self.following[corners[-1]]) != first:
            corners.append(corner)
        ring = np.array([self.points[corner] for corner in corners])
        moved: Ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
        return moved


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """Vertical borders by column, from the top down."""

    corners: NDArray[np.int64]  # upper and lower corner of each border in turn
    places: NDArray[np.int64]  # of the corners: column * height + row
    height: int

    def below(self, x: int, y: int) -> int:
        """The lower corner of the border that runs beside the pixels of row y, left of column x."""
        upper = int(np.searchsorted(self.places, x * self.height + y, side="right")) - 1
        return int(self.corners[upper + 1])


def _borders(pixels: NDArray[np.bool_]) -> tuple[_Chain, _Columns]:
    """All borders between covered and empty pixels, the covered ones on their right as one walks along.

    ``pixels`` has a margin that is empty. A corner where two covered pixels touch diagonally occurs twice.
    """
    above, below = pixels[:-1], pixels[1:]
    up_left, up_right, low_left, low_right = above[:, :-1], above[:, 1:], below[:, :-1], below[:, 1:]
    crossed = (up_left == low_right) & (up_right == low_left) & (up_left != up_right)
    turns = (up_left ^ up_right ^ low_left ^ low_right) | crossed
    ys, xs = np.nonzero(turns)
    twice = crossed[ys, xs]
    ys, xs, falls = (np.repeat(values, 1 + twice) for values in (ys + 1, xs + 1, twice & up_left[ys, xs]))
    second = np.zeros(len(xs), np.bool_)  # of the two copies of a corner: it begins the border to the right
    second[1:] = (xs[1:] == xs[:-1]) & (ys[1:] == ys[:-1])
    # Borders along a row end and begin at its corners in turn. So do those along a column; there the copy that goes on
    # to the right ends the border from above where the upper left pixel is covered: so the two pixels stay together.
    order = np.lexsort((second ^ falls, ys, xs))
    following = np.empty(len(xs), np.int64)
    left, right = np.arange(0, len(xs), 2), np.arange(1, len(xs), 2)
    onward = pixels[ys[left], xs[left]]
    following[np.where(onward, left, right)] = np.where(onward, right, left)
    upper, lower = order[::2], order[1::2]
    downward = pixels[ys[upper], xs[upper] - 1]
    following[np.where(downward, upper, lower)] = np.where(downward, lower, upper)
    chain = _Chain(list(zip(xs.tolist(), ys.tolist(), strict=True)), following.tolist())
    return chain, _Columns(order, xs[order] * len(pixels) + ys[order], len(pixels))


def _nearest(points: Ring, point: Ring) -> int:
    return int(((points - point) ** 2).sum(axis=1).argmin())
