"""Large pictures in overlapping slices, so that small objects reach the detector at a size that it can see."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tailseg.predict.joining import join_windows
from tailseg.structures import RawDetections

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
Detect = Callable[[Sequence[Picture]], list[RawDetections]]


def slice_windows(image_hw: tuple[int, int], side: int, overlap: float) -> NDArray[np.int64]:
    """The slices of a picture.

    Args:
        image_hw: (height, width) in pixels.
        side: of a slice in pixels; a picture that is smaller along an axis has one slice there.
        overlap: share of a slice that the next one shows too, at least, in [0, 1).

    Returns:
        (K, 4) xyxy in pixels, row by row, at equal distances, none beyond the picture.
    """
    height, width = image_hw
    rows, columns = (_starts(length, side, overlap) for length in image_hw)
    return np.array([[x, y, min(x + side, width), min(y + side, height)] for y in rows for x in columns], np.int64)


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if length <= side:
        return [0]
    steps = math.ceil((length - side) / max(1, math.floor(side * (1 - overlap))))
    return [round(i * (length - side) / steps) for i in range(steps + 1)]


def detect_slices(
    detect: Detect, picture: Picture, *, side: int, overlap: float, iou: float, batch: int
) -> RawDetections:
    """Detections in the whole picture and in its slices, joined (see `join_windows`).

    Only the small grids of masks are kept, never masks of the picture's size.

    Args:
        detect: gives the detections of each of at most ``batch`` pictures, on the CPU.
        picture: (H, W, 3) uint8 RGB.
        side: of a slice in pixels; a picture of one slice is detected as it is.
        overlap: see `slice_windows`.
        iou: from which masks are of one object.
        batch: most slices at a time.
    """
    height, width = picture.shape[:2]
    slices = slice_windows((height, width), side, overlap)
    if len(slices) == 1:
        return detect([picture])[0]
    found = [*detect([picture])]
    for start in range(0, len(slices), batch):
        part = slices[start : start + batch].tolist()
        for (x, y, _, _), own in zip(part, detect([picture[y1:y2, x1:x2] for x1, y1, x2, y2 in part]), strict=True):
            found.append(replace(own, image_hw=(height, width), boxes=own.boxes + own.boxes.new_tensor([x, y, x, y])))
    windows = np.concatenate([[[0, 0, width, height]], slices])
    return join_windows(found, windows, iou)
