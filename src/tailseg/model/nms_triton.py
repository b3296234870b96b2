"""Greedy NMS of many sorted lists in two Triton launches: a mask of overlaps, then its reduction, a program a list."""

# Triton compiles what it reads: in these functions names are its language, not Python's.
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # boxes of a tile: the bits of a word
ROW_BLOCK = 1024  # words read at a time


@triton.jit
def _corners(boxes, place, inside):
    x1 = tl.load(boxes + place * 4, inside, 0.0)
    y1 = tl.load(boxes + place * 4 + 1, inside, 0.0)
    x2 = tl.load(boxes + place * 4 + 2, inside, 0.0)
    y2 = tl.load(boxes + place * 4 + 3, inside, 0.0)
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@triton.jit(do_not_specialize=["total"])
def _overlap_kernel(
    boxes, labels, starts, words, total, threshold, lists: tl.constexpr, grouped: tl.constexpr, tile: tl.constexpr
):
    """A word for every pair of a tile of columns and a row before or in it: the columns that the row would drop."""
    own_list = tl.program_id(0)
    column_tile = tl.program_id(1)
    row_tile = tl.program_id(2)
    start = tl.load(starts + own_list % lists)
    size = tl.load(starts + own_list % lists + 1) - start
    if (row_tile <= column_tile) & (column_tile * tile < size):
        bit = tl.arange(0, tile)
        row = row_tile * tile + bit
        column = column_tile * tile + bit
        first = (own_list // lists).to(tl.int64) * total + start
        x1, y1, x2, y2, area = _corners(boxes, first + row, row < size)
        u1, v1, u2, v2, other_area = _corners(boxes, first + column, column < size)
        width = tl.maximum(tl.minimum(x2[:, None], u2[None, :]) - tl.maximum(x1[:, None], u1[None, :]), 0.0)
        height = tl.maximum(tl.minimum(y2[:, None], v2[None, :]) - tl.maximum(y1[:, None], v1[None, :]), 0.0)
        intersection = width * height
        union = area[:, None] + other_area[None, :] - intersection
        # Rounded as IEEE has it, like torchvision's; the plain / would be off by up to two units. 0 / 0 drops nothing.
        iou = tl.div_rn(intersection, tl.where(union == 0, 1.0, union))
        drops = (iou > threshold) & (row[:, None] < column[None, :]) & (column < size)[None, :]
        if grouped:
            label = tl.load(labels + first + row, row < size, 0)
            other_label = tl.load(labels + first + column, column < size, 0)
            drops = drops & (label[:, None] == other_label[None, :])
        word = tl.sum(drops.to(tl.int64) << bit.to(tl.int64)[None, :], 1)
        tiles = tl.num_programs(1)
        tl.store(words + (own_list.to(tl.int64) * tiles + column_tile) * tiles * tile + row, word)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["total", "tiles"])
def _keep_kernel(
    words, valid, starts, keep, total, tiles, lists: tl.constexpr, tile: tl.constexpr, row_block: tl.constexpr
):
    """Tile by tile: what kept boxes of earlier tiles drop, then what those of the tile itself drop."""
    own_list = tl.program_id(0)
    start = tl.load(starts + own_list % lists)
    size = tl.load(starts + own_list % lists + 1) - start
    first = (own_list // lists).to(tl.int64) * total + start
    bit = tl.arange(0, tile)
    for column_tile in range(0, tl.cdiv(size, tile)):
        own_words = words + (own_list.to(tl.int64) * tiles + column_tile) * tiles * tile
        collected = tl.zeros((row_block,), tl.int64)
        for begin in range(0, column_tile * tile, row_block):
            row = begin + tl.arange(0, row_block)
            earlier = row < column_tile * tile
            kept = tl.load(keep + first + row, earlier, 0) != 0
            collected = collected | tl.where(kept, tl.load(own_words + row, earlier, 0), 0)
        dropped_before = tl.reduce(collected, 0, _either)

        column = column_tile * tile + bit
        candidate = tl.load(valid + first + column, column < size, 0) != 0
        word = tl.load(own_words + column)
        # A box's fate hangs on earlier ones alone, so each round settles at least one more, and what no longer changes
        # is the greedy answer: after a few rounds, however many boxes there are.
        dropped = dropped_before
        before = ~dropped
        while dropped != before:
            before = dropped
            kept = candidate & (((dropped >> bit.to(tl.int64)) & 1) == 0)
            dropped = dropped_before | tl.reduce(tl.where(kept, word, 0), 0, _either)
        kept = candidate & (((dropped >> bit.to(tl.int64)) & 1) == 0)
        tl.store(keep + first + column, kept.to(tl.uint8), column < size)
        tl.debug_barrier()  # the next tile's threads read what this one's have written


def largest_float32(value: float) -> float:
    """The largest float32 number up to ``value``: a float32 number is above the one exactly if above the other."""
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-math.inf)))


def keep_sorted(
    boxes: Tensor, valid: Tensor, starts: Tensor, sizes: Sequence[int], iou: float, labels: Tensor | None = None
) -> Tensor:
    """Mark the boxes that survive greedy NMS within their list. Nothing waits for the device.

    The overlaps are torchvision's in float32, operation by operation, and so are the survivors.

    Args:
        boxes: (B, N, 4) float32, an image's lists one after the other, the best box of a list first.
        valid: (B, N) bool; the others are dropped and drop nothing.
        starts: (L + 1,) int32 on the device of the boxes: where an image's lists start, and N.
        sizes: the L lengths of the lists, as the host knows them.
        iou: boxes with more overlap than this with a better kept one are dropped.
        labels: (B, N) int64; with it a box is dropped by boxes of its own label alone.

    Returns:
        (B, N) bool.
    """
    keep = torch.empty(valid.shape, dtype=torch.uint8, device=boxes.device)
    count, total = valid.shape
    if keep.numel():
        boxes, valid = boxes.contiguous(), valid.contiguous().view(torch.uint8)
        lists, tiles = len(sizes), triton.cdiv(max(sizes), TILE)
        words = torch.empty(count * lists, tiles, tiles * TILE, dtype=torch.int64, device=boxes.device)
        with torch.cuda.device_of(boxes):
            _overlap_kernel[(count * lists, tiles, tiles)](
                boxes,
                boxes if labels is None else labels.contiguous(),  # not read without labels
                starts,
                words,
                total,
                largest_float32(iou),
                lists=lists,
                grouped=labels is not None,
                tile=TILE,
                num_warps=8,
                enable_fp_fusion=False,  # a fused product is not rounded, and ties would be none
            )
            _keep_kernel[(count * lists,)](
                words, valid, starts, keep, total, tiles, lists=lists, tile=TILE, row_block=ROW_BLOCK
            )
    return keep.view(torch.bool)
