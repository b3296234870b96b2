"""From a mask's grid of probabilities over its box to pixels of the image, and to COCO run-length codes.

Nothing of the image's size is ever painted: the grid is sampled at the pixel centres inside the box, and the
runs of the whole image follow from that crop. Shape letters: N objects, M side of a grid, H and W the image,
h and w the crop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hotcoco import mask as rle_codec
from numpy.typing import NDArray

if TYPE_CHECKING:  # scoring a file needs codes, but not PyTorch with its seconds and its gigabyte
    from torch import Tensor

    Values = Tensor | NDArray[np.float32]

Pixels = NDArray[np.bool_]


Rle = dict[str, Any]
"""A mask in COCO's compressed run-length code: size, [height, width] of the image, and counts, a string."""


def encode_masks(probs: Values, boxes: Values, image_hw: tuple[int, int]) -> list[Rle]:
    """Paste each grid of probabilities into its box and encode the pixels that reach 0.5.

    Bilinear sampling at pixel centres with zeros outside the grid, as Mask R-CNN's implementations do it:
    pixel x lies at (x + 0.5 - x1) / (x2 - x1) * M - 0.5 of the grid.

    Args:
        probs: (N, M, M) float in [0, 1].
        boxes: (N, 4) float, xyxy in pixels of the image; may reach beyond it.
        image_hw: (height, width) of the image in pixels.

    Returns:
        N codes. A box without area, without a pixel centre inside, or with a value that is not finite gives
        the code of an empty mask.
    """
    uncompressed = []
    for padded, box in zip(_padded(probs), _to_float64(boxes), strict=True):
        columns, y0, x0 = _paste_columns(padded, box, image_hw)
        counts = _run_lengths(columns, y0, x0, image_hw)
        uncompressed.append({"size": list(image_hw), "counts": counts.tolist()})
    codes = rle_codec.frPyObjects(uncompressed, *image_hw) if uncompressed else []
    return [{"size": list(image_hw), "counts": code["counts"].decode("ascii")} for code in codes]


def mask_crop(probs: Values, box: Values, image_hw: tuple[int, int]) -> tuple[Pixels, tuple[int, int]]:
    """The pixels of one mask inside its box, for drawing.

    Args:
        probs: (M, M) float in [0, 1].
        box: (4,) float, xyxy in pixels of the image; may reach beyond it.
        image_hw: (height, width) of the image in pixels.

    Returns:
        (h, w) bool, and the image's (row, column) of its first pixel. A side may be 0.
    """
    columns, y0, x0 = _paste_columns(_padded(probs[None])[0], _to_float64(box), image_hw)
    return np.ascontiguousarray(columns.T), (y0, x0)


def _padded(probs: Values) -> NDArray[np.float32]:
    """Grids with a ring of zeros, (N, M + 2, M + 2) and x first, since codes run down the columns."""
    grids = probs if isinstance(probs, np.ndarray) else probs.detach().cpu().float().numpy()
    return np.pad(grids.transpose(0, 2, 1), ((0, 0), (1, 1), (1, 1)))


def _to_float64(boxes: Values) -> NDArray[np.float64]:
    array: NDArray[np.float64]
    array = boxes.astype(np.float64) if isinstance(boxes, np.ndarray) else boxes.detach().cpu().double().numpy()
    return array


def _paste_columns(
    padded: NDArray[np.float32], box: NDArray[np.float64], image_hw: tuple[int, int]
) -> tuple[Pixels, int, int]:
    """Crop of one mask from its padded grid, (w, h) bool; its first row and first column in the image."""
    x1, y1, x2, y2 = box.tolist()
    if not (np.isfinite(box).all() and x2 > x1 and y2 > y1):
        return np.zeros((0, 0), dtype=bool), 0, 0
    height, width = image_hw
    x0, cells_x, shares_x = _axis_samples(x1, x2, width, len(padded) - 2)
    y0, cells_y, shares_y = _axis_samples(y1, y2, height, len(padded) - 2)
    # The bilinear kernel is separable: first along x on the small grid, then along y. A product would be
    # shorter, but BLAS wakes all its threads for each of the small products and waits for them.
    along_x = _mix(padded[cells_x], padded[cells_x + 1], shares_x[:, None])  # (w, M + 2)
    sampled = _mix(along_x[:, cells_y], along_x[:, cells_y + 1], shares_y)  # (w, h)
    return sampled >= 0.5, y0, x0


def _mix(low: NDArray[np.float32], high: NDArray[np.float32], share: NDArray[np.float32]) -> NDArray[np.float32]:
    """Linear interpolation, low + share * (high - low); overwrites ``high``."""
    high -= low
    high *= share
    high += low
    return high


def _axis_samples(
    start: float, end: float, pixels: int, cells: int
) -> tuple[int, NDArray[np.int64], NDArray[np.float32]]:
    """Positions of the pixel centres in [start, end] on a grid of ``cells`` padded by one zero at both ends.

    Outside the box a sample is less than half of a probability, hence never 0.5: those pixels are left out.

    Returns:
        The first pixel; (n,) for each pixel the padded cell before it; (n,) its share of the next cell.
    """
    first = int(np.ceil(min(max(start - 0.5, 0.0), pixels)))
    last = int(np.floor(max(min(end - 0.5, pixels - 1.0), -1.0)))
    centres = np.arange(first, last + 1) + 0.5
    places = (centres - start) / (end - start) * cells + 0.5
    before = np.minimum(places.astype(np.int64), cells)
    return first, before, (places - before).astype(np.float32)


def _run_lengths(columns: Pixels, y0: int, x0: int, image_hw: tuple[int, int]) -> NDArray[np.int64]:
    """Lengths of the alternating runs 0, 1, 0, ... of the whole image, down its columns.

    Args:
        columns: (w, h) bool, the crop transposed.
        y0: row of the crop's first pixel.
        x0: column of the crop's first pixel.
        image_hw: (height, width) of the image in pixels.

    Returns:
        (runs,) int64 that sum to the number of pixels; only the first may be 0.
    """
    height, width = image_hw
    w, h = columns.shape
    if h < height:  # a background pixel below ends each column's last run; full columns run on into the next
        columns = np.concatenate([columns, np.zeros((w, 1), dtype=bool)], axis=1)
    flat = np.concatenate([[False], columns.ravel(), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    column, row = np.divmod(changes, max(columns.shape[1], 1))
    places = (x0 + column) * height + y0 + row
    counts = np.diff(places, prepend=0, append=height * width)
    return counts if counts[-1] or len(counts) == 1 else counts[:-1]
