"""RoIAlign from all levels of a pyramid in one Triton launch, and its gradient in another; maps are channels_last.

A program takes a block of cells of a RoI and a block of channels. The mean over a cell's points is a sum of the pixels
that they lie between, weighted by row and by column: n points no more than a pixel apart touch n + 1 pixels of an axis.
"""

# Triton compiles what it reads: in these functions names are its language, not Python's.
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from tailseg.layers.triton_support import Launcher

CELL_BLOCK = 4  # cells of a program, which is a single warp: it need not wait for others
CHANNEL_BLOCK = 256  # and its channels at most
NUMBERS = ("h0", "w0", "h1", "w1", "h2", "w2", "h3", "w3", "cells")
MAPS = ("x0", "x1", "x2", "x3")
TENSORS = (*MAPS, "rois", "pooled")


@triton.jit
def _level(width, height, levels: tl.constexpr):
    """The level of a box: `roi_features.roi_levels`, its logarithm compared with 1, 2 and 3 without being taken."""
    area = width * height
    scale = tl.div_rn(tl.sqrt_rn(tl.where(area > 0, area, 0.0)), 56.0) + 1e-6
    level = tl.zeros((), tl.int32)
    if levels > 1:
        level += (scale >= 2.0).to(tl.int32)
    if levels > 2:
        level += (scale >= 4.0).to(tl.int32)
    if levels > 3:
        level += (scale >= 8.0).to(tl.int32)
    return level


@triton.jit
def _points(cell, samples: tl.constexpr):
    """Sampling points along a side of a cell with this extent in pixels."""
    if samples > 0:
        return tl.zeros((), tl.int32) + samples
    known = tl.abs(cell) < float("inf")  # else one, so that it is seen in what is pooled
    return tl.where(known, tl.ceil(tl.where(known & (cell > 0), cell, 0.0)), 1.0).to(tl.int32)


@triton.jit
def _near(place, size):
    """The place, moved onto the map; what is no number stays so."""
    place = tl.where(place < 0, 0.0, place)
    return tl.where(place > size - 1, size - 1.0, place)


@triton.jit
def _pixel(near):
    return tl.where(near == near, tl.floor(near), 0.0).to(tl.int32)


@triton.jit
def _touched(begin, step, points, size, entry, samples: tl.constexpr):
    """One of the pixels of an axis that each cell's points lie between, and its share of the cell's mean.

    Points more than a pixel outside of the map have no share. The first is half a step behind ``begin``.
    """
    if samples > 0:
        place = begin + (entry // 2 + 0.5) * step
        near = _near(place, size)
        pixel = _pixel(near)
        after = near - pixel.to(tl.float32)
        weight = tl.where(entry % 2 == 1, after, 1.0 - after) * ((place >= -1) & (place <= size)).to(tl.float32)
        pixel = tl.minimum(pixel + entry % 2, size - 1)
    else:
        pixel = _pixel(_near(begin + 0.5 * step, size)) + entry
        weight = tl.zeros_like(begin)
        for point in range(0, points):
            place = begin + (point + 0.5) * step
            share = 1.0 - tl.abs(_near(place, size) - pixel.to(tl.float32))
            share = tl.where(share < 0, 0.0, share)
            weight += share * ((place >= -1) & (place <= size)).to(tl.float32)
    return pixel, weight / points.to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=TENSORS)
def _roi_align_kernel(
    x0, x1, x2, x3, rois, pooled, h0, w0, h1, w1, h2, w2, h3, w3, cells,
    s0: tl.constexpr, s1: tl.constexpr, s2: tl.constexpr, s3: tl.constexpr, levels: tl.constexpr, side: tl.constexpr,
    samples: tl.constexpr, aligned: tl.constexpr, channels: tl.constexpr, vectors: tl.constexpr,
    backward: tl.constexpr, cell_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    """Pool the maps; backward, add the gradient of what was pooled to theirs.

    ``vectors`` says that channels can be read by eight; threads that add do it side by side, one channel each.
    """
    channel_blocks = tl.cdiv(channels, channel_block)
    cell_blocks = tl.cdiv(cells, cell_block)
    block = tl.program_id(0) // channel_blocks
    channel = (tl.program_id(0) % channel_blocks * channel_block + tl.arange(0, channel_block))[None, :]
    roi = (block // cell_blocks).to(tl.int64)
    cell = (block % cell_blocks * cell_block + tl.arange(0, cell_block))[:, None]

    image = tl.load(rois + roi * 5).to(tl.int64)
    left = tl.load(rois + roi * 5 + 1)
    top = tl.load(rois + roi * 5 + 2)
    right = tl.load(rois + roi * 5 + 3)
    bottom = tl.load(rois + roi * 5 + 4)
    level = _level(right - left, bottom - top, levels)
    x, height, width, scale = x0, h0, w0, tl.full((), 1.0 / s0, tl.float32)
    if level == 1:
        x, height, width, scale = x1, h1, w1, tl.full((), 1.0 / s1, tl.float32)
    if level == 2:
        x, height, width, scale = x2, h2, w2, tl.full((), 1.0 / s2, tl.float32)
    if level == 3:
        x, height, width, scale = x3, h3, w3, tl.full((), 1.0 / s3, tl.float32)

    shift: tl.constexpr = 0.5 if aligned else 0.0
    begin_x = left * scale - shift
    begin_y = top * scale - shift
    extent_x = right * scale - shift - begin_x
    extent_y = bottom * scale - shift - begin_y
    if not aligned:
        extent_x = tl.where(extent_x < 1, 1.0, extent_x)
        extent_y = tl.where(extent_y < 1, 1.0, extent_y)
    cell_x = tl.div_rn(extent_x, tl.full((), side, tl.float32))
    cell_y = tl.div_rn(extent_y, tl.full((), side, tl.float32))
    points_x = _points(cell_x, samples)
    points_y = _points(cell_y, samples)
    starts_x = begin_x + (cell % side).to(tl.float32) * cell_x
    starts_y = begin_y + (cell // side).to(tl.float32) * cell_y
    step_x = cell_x / tl.maximum(points_x, 1).to(tl.float32)
    step_y = cell_y / tl.maximum(points_y, 1).to(tl.float32)
    columns, rows = points_x + 1, points_y + 1
    if samples > 0:
        columns, rows = 2 * points_x, 2 * points_y
    if (points_x == 0) | (points_y == 0):
        columns, rows = points_x * 0, points_y * 0

    inside = (cell < cells) & (channel < channels)
    place = pooled + (roi * cells + cell) * channels + channel
    if vectors:
        place = tl.multiple_of(place, (1, 16))
    total = tl.zeros((cell_block, channel_block), tl.float32)
    if backward:
        total = tl.load(place, inside, 0.0).to(tl.float32)
    for a in range(0, rows):
        row, row_weight = _touched(starts_y, step_y, points_y, height, a, samples)
        line = (image * height + row) * width
        for b in range(0, columns):
            column, column_weight = _touched(starts_x, step_x, points_x, width, b, samples)
            weight = row_weight * column_weight
            there = inside & (row < height) & (column < width)
            pixel = x + (line + column) * channels + channel
            if vectors:
                pixel = tl.multiple_of(pixel, (1, 16))
            if backward:
                # Rows that fill a batch up have no gradient: nothing to add.
                tl.atomic_add(pixel, total * weight, there & (total != 0) & (weight != 0), sem="relaxed")
            else:
                total += weight * tl.load(pixel, there, 0.0).to(tl.float32)
    if not backward:
        tl.store(place, total.to(pooled.dtype.element_ty), inside)


_roi_align = Launcher(_roi_align_kernel)


def launch(
    maps: Sequence[Tensor],
    rois: Tensor,
    pooled: Tensor,
    *,
    output_size: int,
    strides: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    backward: bool,
) -> None:
    """Fill ``pooled``, every RoI from the level of its size; backward, add what its gradient makes of them to the maps.

    Those sums are made in any order, so that their last bits differ from run to run.

    Args:
        maps: of each stride (B, channels, h, w), channels_last, of one dtype; backward their gradients, float32.
        rois: (R, 5) float32, contiguous.
        pooled: (R, channels, S, S), channels_last, float; backward its gradient.
        output_size: S.
        strides: four at most.
        sampling_ratio: as in `RoIPooler`.
        aligned: as in `RoIPooler`.
        backward: which of the two.
    """
    levels, (count, channels) = len(strides), pooled.shape[:2]
    if not pooled.numel():
        return
    more = len(MAPS) - levels
    own = [*maps[:levels], *[maps[0]] * more]  # the last are not read
    sizes = [size for each in own for size in each.shape[2:]]
    block = min(triton.next_power_of_2(channels), CHANNEL_BLOCK)
    cells = output_size**2
    programs = count * triton.cdiv(cells, CELL_BLOCK) * triton.cdiv(channels, block)
    vectors = not backward and channels % 8 == 0 and all(each.data_ptr() % 16 == 0 for each in (*own, pooled))
    constants = (*strides, *[1] * more, levels, output_size, sampling_ratio, aligned, channels, vectors, backward)
    _roi_align((programs,), (*own, rois, pooled, *sizes, cells), (*constants, CELL_BLOCK, block), 1)
