"""Masks of detections in pixels of the picture: bitmaps, outlines, cut-outs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailseg.data.annotations.masks import Bitmap
from tailseg.data.exporters.outlines import outlines_of
from tailseg.layers.paste import mask_crop
from tailseg.structures import RawDetections


def bitmaps(raw: RawDetections) -> Iterator[Bitmap]:
    """The mask of each object inside its box; a side may be 0."""
    for grid, box in zip(raw.masks, raw.boxes, strict=True):
        pixels, (y, x) = mask_crop(grid, box, raw.image_hw)
        yield Bitmap(pixels.view(np.uint8), x, y)


def full_masks(raw: RawDetections) -> Tensor:
    """(N, H, W) bool."""
    masks = np.zeros((len(raw), *raw.image_hw), dtype=bool)
    for mask, bitmap in zip(masks, bitmaps(raw), strict=True):
        x1, y1, x2, y2 = bitmap.box
        mask[y1:y2, x1:x2] = bitmap.pixels
    return torch.from_numpy(masks)


def areas(raw: RawDetections) -> list[int]:
    """Pixels of each mask."""
    return [int(np.count_nonzero(bitmap.pixels)) for bitmap in bitmaps(raw)]


def polygons(raw: RawDetections) -> list[list[NDArray[np.float64]]]:
    """The exact outlines of each object, a (K, 2) array of x, y for each piece."""
    return [
        [piece.astype(np.float64) for piece in outlines_of(bitmap).pieces] if bitmap.pixels.size else []
        for bitmap in bitmaps(raw)
    ]


def crops(picture: NDArray[np.uint8], raw: RawDetections, *, masked: bool) -> list[NDArray[np.uint8]]:
    """The part of the picture in each box: (h, w, 3) RGB, or (h, w, 4) RGBA that is transparent outside the mask."""
    height, width = raw.image_hw
    parts = []
    for bitmap, (x1, y1, x2, y2) in zip(bitmaps(raw), raw.boxes.tolist(), strict=True):
        left, top = min(max(math.floor(x1), 0), width - 1), min(max(math.floor(y1), 0), height - 1)
        right, bottom = max(min(math.ceil(x2), width), left + 1), max(min(math.ceil(y2), height), top + 1)
        part = picture[top:bottom, left:right].copy()
        if masked:
            alpha = np.zeros((*part.shape[:2], 1), np.uint8)
            h, w = bitmap.pixels.shape
            alpha[bitmap.y - top : bitmap.y - top + h, bitmap.x - left : bitmap.x - left + w, 0] = 255 * bitmap.pixels
            part = np.concatenate([part, alpha], axis=2)
        parts.append(part)
    return parts
