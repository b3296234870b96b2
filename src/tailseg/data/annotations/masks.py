"""Masks as small grids laid over the image: from polygons or RLE to the form that `Instances` holds.

An object's bitmap is computed inside its own pixel rectangle only. A rectangle of at most ``grid`` pixels on
an axis is kept pixel by pixel; a longer one is area-averaged into ``grid`` cells. RoIAlign over the grid then
gives what RoIAlign over the full bitmap gives (Mask R-CNN, section 3.1), at a fixed cost per object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray

Polygons = Sequence[NDArray[np.float64]]  # each (2k,): x0, y0, x1, y1, ... in pixels
Segmentation = Polygons | bytes  # bytes: compressed RLE of the whole image, COCO's encoding


@dataclass(frozen=True, slots=True, eq=False)
class Bitmap:
    """An object pixel by pixel, within the rectangle around it."""

    pixels: NDArray[np.uint8]  # (h, w), 1 = covered, of at least one pixel
    x: int  # of the rectangle's left column and upper row in the image
    y: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The rectangle, xyxy in pixels."""
        return self.x, self.y, self.x + self.pixels.shape[1], self.y + self.pixels.shape[0]

    def tight(self) -> Bitmap:
        """These pixels in the smallest rectangle; one that covers nothing becomes a single empty pixel."""
        rows, columns = np.flatnonzero(self.pixels.any(axis=1)), np.flatnonzero(self.pixels.any(axis=0))
        if rows.size == 0:
            return Bitmap(np.zeros((1, 1), np.uint8), self.x, self.y)
        y, x = int(rows[0]), int(columns[0])
        pixels = np.ascontiguousarray(self.pixels[y : rows[-1] + 1, x : columns[-1] + 1])
        return Bitmap(pixels, self.x + x, self.y + y)


def rle_runs(codes: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The run lengths of compressed RLEs, in COCO's encoding.

    Each number is written in groups of five bits, low group first, with 48 added; bit 5 says that the number
    goes on, bit 4 of its last group is its sign. From the fourth number on, the difference to the one before
    the previous is written.

    Returns:
        The runs of all codes in a row, and (len(codes) + 1,) where those of each code start.

    Raises:
        ValueError: the bytes are not such a code, or a run is negative.
    """
    values, first = _written_numbers(codes)
    if values.size == 0:
        return values, first
    # Sum up the differences: the odd numbers of a code are one chain, the even ones from the third on another.
    counts = np.diff(first)
    numbers = np.arange(values.size) - np.repeat(first[:-1], counts)
    chains = 3 * np.repeat(np.arange(len(codes)), counts) + np.where(numbers == 0, 0, 1 + numbers % 2)
    order = np.argsort(chains, kind="stable")
    sums = np.cumsum(values[order])
    begins = np.flatnonzero(np.diff(chains[order], prepend=-1))
    before = np.concatenate([[0], sums])[begins]  # what was summed before the chain
    values[order] = sums - np.repeat(before, np.diff(begins, append=values.size))
    if values.min() < 0:
        raise ValueError("a run of the RLE is negative")
    return values, first


def rle_pixels(codes: Sequence[bytes]) -> NDArray[np.int64]:
    """The pixels that compressed RLEs cover, with and without their object: the sums of `rle_runs`, at less cost.

    Raises:
        ValueError: the bytes are not such a code.
    """
    values, first = _written_numbers(codes)
    counts = np.diff(first)
    after = np.repeat(first[1:], counts) - np.arange(1, values.size + 1)  # numbers of the same code
    weights = (after >> 1) + 1  # a difference is in every second run from its own on
    weights[first[:-1][counts > 0]] = 1
    sums = np.concatenate([[0], np.cumsum(values * weights)])
    return np.asarray(sums[first[1:]] - sums[first[:-1]])


def _written_numbers(codes: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers in compressed RLEs as they are written, and where those of each code start; see `rle_runs`."""
    groups = np.frombuffer(b"".join(codes), dtype=np.uint8) - np.uint8(48)  # those below it become large
    stops = np.cumsum(np.fromiter(map(len, codes), np.int64, len(codes)))  # of each code, in groups
    ends = np.flatnonzero(groups & 32 == 0)  # of each number
    first = np.concatenate([[0], np.searchsorted(ends, stops)])
    if groups.size == 0:
        return np.zeros(0, np.int64), first
    if groups.max() > 63 or (groups[stops[stops > 0] - 1] & 32).any():
        raise ValueError("not a compressed RLE")
    sizes = np.diff(ends, prepend=-1)  # groups of each number
    if sizes.max() > 7:  # they hold 35 bits, more than any image has pixels
        raise ValueError("a run of the RLE is too long")
    values = (groups[ends] & 31).astype(np.int64)
    values -= (values & 16) << 1
    longer = np.flatnonzero(sizes > 1)
    for place in range(1, 7):
        values[longer] = (values[longer] << 5) | (groups[ends[longer] - place] & 31)
        longer = longer[sizes[longer] > place + 1]
    return values, first


def run_lengths(segmentation: Segmentation, image_hw: tuple[int, int]) -> str:
    """The compressed run lengths of one object over the whole image, as COCO's own tools make them.

    Args:
        segmentation: polygons (their union is the object), or the compressed RLE of the whole image.
        image_hw: size of the image in pixels.
    """
    if isinstance(segmentation, bytes):
        return segmentation.decode("ascii")
    merged = rle.merge([rle.frPoly(polygon.tolist(), *image_hw) for polygon in segmentation])
    counts: str = merged["counts"].decode("ascii")
    return counts


def encode_bitmap(bitmap: Bitmap, image_hw: tuple[int, int]) -> bytes:
    """The compressed RLE of a bitmap over the whole image; what lies outside of the image is cut off."""
    height, width = image_hw
    x, y = bitmap.x, bitmap.y
    cut = bitmap.pixels[max(-y, 0) : max(height - y, 0), max(-x, 0) : max(width - x, 0)] != 0
    columns = np.zeros((cut.shape[1], height), bool)  # of the bitmap only, over the image's height
    columns[:, max(y, 0) : max(y, 0) + cut.shape[0]] = cut.T
    before = max(x, 0) * height if columns.size else 0
    places = np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False)) + before
    runs = np.diff(places, prepend=0, append=height * width)
    runs = runs[: len(runs) - (runs[-1] == 0)]  # as COCO's own encoder ends, where the object reaches the last pixel
    code: bytes = rle.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)["counts"]
    return code


def pixels_covered(segmentation: Segmentation, image_hw: tuple[int, int]) -> float:
    """The area of one object in pixels; arguments of `run_lengths`."""
    return float(rle.area({"size": list(image_hw), "counts": run_lengths(segmentation, image_hw)}))


def bitmap_of(segmentation: Segmentation, image_hw: tuple[int, int]) -> Bitmap:
    """The bitmap of one object, in the smallest rectangle; a single empty pixel where nothing is covered.

    Args:
        segmentation: polygons (their union is the object), or the compressed RLE of the whole image.
        image_hw: size of the image in pixels.
    """
    if isinstance(segmentation, bytes):
        return Bitmap(rle.decode({"size": list(image_hw), "counts": segmentation}), 0, 0).tight()
    return _polygons_to_bitmap(segmentation, image_hw).tight()


def _polygons_to_bitmap(polygons: Polygons, image_hw: tuple[int, int]) -> Bitmap:
    """The union of polygons as a bitmap of a rectangle around them.

    COCO's rasteriser works on int(5·x + 0.5). That is applied before the shift into the rectangle and passed
    on so that it comes out again, which makes the bitmap equal to the one of the full image in every pixel.
    """
    fifths = [np.trunc(p * 5 + 0.5).reshape(-1, 2) for p in polygons]
    points = np.concatenate([*fifths, np.empty((0, 2))])
    if len(points) == 0:
        return Bitmap(np.zeros((1, 1), np.uint8), 0, 0)
    limit = np.array(image_hw[::-1])
    low = np.clip(np.floor(points.min(axis=0) / 5) - 1, 0, limit - 1).astype(np.int64)
    high = np.clip(np.ceil(points.max(axis=0) / 5) + 2, low + 1, limit).astype(np.int64)
    width, height = (high - low).tolist()
    shifted = [p - 5 * low for p in fifths]
    codes = rle.frPyObjects([((p - (p < 0)) / 5).ravel().tolist() for p in shifted], height, width)
    return Bitmap(rle.decode(codes).max(axis=2), int(low[0]), int(low[1]))


def into_grid(bitmap: Bitmap, image_hw: tuple[int, int], grid: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Lay a bitmap into a grid with its margin.

    Args:
        bitmap: in the smallest rectangle.
        image_hw: size of the image in pixels.
        grid: most cells on an axis, at least 1.

    Returns:
        ``(S, S)`` uint8 with S = grid + 2, 255 = covered, and ``(4,)`` float32, the rectangle xyxy in pixels
        that the whole grid covers. Cell (1, 1) is the first of the object's rectangle; the ring around the
        used cells is zero, or repeats the outermost cells where the rectangle touches the image's edge, since
        there RoIAlign of the full bitmap repeats its outermost pixels. Cells to the right of and below the
        ring are zero.
    """
    height, width = bitmap.pixels.shape
    x, y, side = bitmap.x, bitmap.y, grid + 2
    used_h, used_w = min(height, grid), min(width, grid)
    cells = np.ascontiguousarray(bitmap.pixels) * np.uint8(255)
    if (used_h, used_w) != (height, width):
        cells = cv2.resize(cells, (used_w, used_h), interpolation=cv2.INTER_AREA).reshape(used_h, used_w)
    mask = np.zeros((side, side), np.uint8)
    mask[1 : used_h + 1, 1 : used_w + 1] = cells
    if y == 0:
        mask[0] = mask[1]
    if y + height == image_hw[0]:
        mask[used_h + 1] = mask[used_h]
    if x == 0:
        mask[:, 0] = mask[:, 1]
    if x + width == image_hw[1]:
        mask[:, used_w + 1] = mask[:, used_w]
    cell_w, cell_h = width / used_w, height / used_h
    left, top = x - cell_w, y - cell_h
    frame = np.array([left, top, left + side * cell_w, top + side * cell_h], np.float32)
    return mask, frame
