"""Where the pixels of pasted masks change, found on the device: one launch counts, one writes; a program a column.

Bit for bit the arithmetic of `paste.py`: places in float64, samples in float32, every step rounded for itself.
"""

# Triton compiles what it reads: in these functions names are its language, not Python's.
from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

ROWS_AT_ONCE = 128  # pixels of a column that a program looks at together


@triton.jit
def _span(start, end, pixels):
    """First and last pixel whose centre lies in [start, end]."""
    first = tl.ceil(tl.minimum(tl.maximum(start - 0.5, 0.0), pixels.to(tl.float64)))
    last = tl.floor(tl.minimum(tl.maximum(end - 0.5, -1.0), pixels.to(tl.float64) - 1.0))
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _place(pixel, start, end, side):
    """The padded grid's value before a pixel's centre, and the next one's share."""
    place = (pixel.to(tl.float64) + 0.5 - start) / (end - start) * side.to(tl.float64) + 0.5
    before = tl.minimum(place.to(tl.int64), side.to(tl.int64))
    return before.to(tl.int32), (place - before.to(tl.float64)).to(tl.float32)


@triton.jit
def _value(grid, column, row, side, asked):
    """Values of the grid (side, side), rows first, at places on the padded one."""
    inside = asked & (column > 0) & (column <= side) & (row > 0) & (row <= side)
    return tl.load(grid + (row - 1) * side + (column - 1), inside, 0.0)


@triton.jit
def _is_set(grid, side, x, y, x1, y1, x2, y2, left, right, top, bottom):
    """Whether pixels (x, y) reach 0.5; False outside of the box."""
    asked = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    column, across = _place(x, x1, x2, side)
    row, down = _place(tl.where(asked, y, top), y1, y2, side)
    low_above = _value(grid, column, row, side, asked)
    high_above = _value(grid, column + 1, row, side, asked)
    low_below = _value(grid, column, row + 1, side, asked)
    high_below = _value(grid, column + 1, row + 1, side, asked)
    above = (high_above - low_above) * across + low_above
    below = (high_below - low_below) * across + low_below
    return asked & ((below - above) * down + above >= 0.5)


# A number of 1 would be a constant of the compilation, without a type: some pictures are one pixel high.
@triton.jit(do_not_specialize=["side", "height", "width"])
def _change_kernel(
    grids, boxes, numbers, offsets, places, side, height, width, write: tl.constexpr, block: tl.constexpr
):
    """Count the changes of a mask from one pixel to the next down a column, or write their places in the image."""
    x = tl.program_id(0) % width
    mask = tl.program_id(0) // width
    x1 = tl.load(boxes + mask * 4)
    y1 = tl.load(boxes + mask * 4 + 1)
    x2 = tl.load(boxes + mask * 4 + 2)
    y2 = tl.load(boxes + mask * 4 + 3)
    left, right = _span(x1, x2, width)
    top, bottom = _span(y1, y2, height)
    grid = grids + mask.to(tl.int64) * side * side
    slot = mask.to(tl.int64) * width + x
    found = tl.zeros((), tl.int32)
    # The column after the box holds the end of what reached the image's lower edge.
    if (x >= left) & (x <= right + 1) & (left <= right) & (top <= bottom):
        base = x.to(tl.int64) * height
        if write:
            out = places + tl.load(offsets + slot)
        lane = tl.arange(0, block)
        # Row 0 follows the last row of the column before.
        ahead = _is_set(grid, side, x - 1 + lane * 0, height - 1 + lane * 0, x1, y1, x2, y2, left, right, top, bottom)
        carried = tl.max(ahead.to(tl.int32), 0)
        if (top > 0) & (carried > 0):
            if write:
                tl.store(out, base)
            found += 1
        for start in range(top, tl.minimum(bottom + 2, height), block):
            y = start + lane
            own = _is_set(grid, side, x + lane * 0, y, x1, y1, x2, y2, left, right, top, bottom)
            before = _is_set(grid, side, x + lane * 0, y - 1, x1, y1, x2, y2, left, right, top, bottom)
            before = tl.where(y == 0, carried > 0, before)
            changed = ((own != before) & (y <= bottom + 1) & (y < height)).to(tl.int32)
            if write:
                tl.store(out + found + tl.cumsum(changed, 0) - 1, base + y, changed > 0)
            found += tl.sum(changed, 0)
    if not write:
        tl.store(numbers + slot, found)


def changes(probs: Tensor, boxes: Tensor, image_hw: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places in the image, counted down its columns, where masks of `encode_masks` change.

    Waits for the device twice: for their number, and for the places.

    Args:
        probs: (N, M, M) float.
        boxes: (N, 4) float, xyxy in pixels; N >= 1.
        image_hw: (height, width) of the image in pixels.

    Returns:
        The places, rising inside each mask, and how many each of the N masks has.
    """
    height, width = image_hw
    count, side = len(probs), probs.shape[2]
    grids = probs.detach().float().contiguous()
    corners = boxes.detach().double()
    sound = corners.isfinite().all(dim=1) & (corners[:, :2] < corners[:, 2:]).all(dim=1)
    corners = corners.where(sound.unsqueeze(1), corners.new_tensor([-2.0, -2.0, -1.0, -1.0])).contiguous()
    numbers = torch.empty(count, width, dtype=torch.int32, device=grids.device)

    def launch(offsets: Tensor, places: Tensor, *, write: bool) -> None:
        with torch.cuda.device_of(grids):
            _change_kernel[(width * count,)](  # a grid's second side may not be longer than 65,535
                grids,
                corners,
                numbers,
                offsets,
                places,
                side,
                height,
                width,
                write=write,
                block=ROWS_AT_ONCE,
                enable_fp_fusion=False,  # a fused product is not rounded
            )

    launch(numbers, numbers, write=False)
    ends = numbers.flatten().cumsum(0, dtype=torch.int64)
    places = torch.empty(int(ends[-1]), dtype=torch.int64, device=grids.device)
    if len(places):
        launch(ends - numbers.flatten(), places, write=True)
    found = torch.cat([places, ends.view(count, width)[:, -1]]).cpu().numpy()
    return found[: len(places)], np.diff(found[len(places) :], prepend=0)
