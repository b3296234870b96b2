"""Masks against boxes and images, all annotations at once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations

Boxes = NDArray[np.float64]  # (N, 4) xyxy in pixels
Flags = NDArray[np.bool_]

SLACK = 2.0  # pixels by which a box may differ from its mask, or reach beyond the image
AGREEMENT = 0.75  # IoU of the box and the mask's own box, from which on they agree
TURNED_SHARE = 0.5  # of an image's masks that must fit after a turn, for the image to count as turned


@dataclass(frozen=True, slots=True, eq=False)
class MaskFacts:
    """Flags of odd annotations (N) and images (I); crowds count nowhere."""

    empty: Flags  # (N,) no pixel of the mask lies in the image
    disagreeing: Flags  # (N,) the box is not that of the mask, and nothing below explains it
    corners: Flags  # (N,) the box is that of the mask if its numbers are x0, y0, x1, y1
    duplicate: Flags  # (N,) same image, class and box (in whole pixels) as an earlier annotation
    beyond: Flags  # (N,) the box reaches beyond the image
    turned: Flags  # (I,) masks fit their boxes, or the image, only after a turn by 90 degrees


def image_of_rows(annotations: Annotations) -> NDArray[np.int64]:
    """(N,) the image of each annotation."""
    return np.repeat(np.arange(len(annotations)), np.diff(annotations.first_annotation))


def mask_boxes(annotations: Annotations) -> Boxes:
    """The box around each mask, of whole RLE pixels or polygon corners; NaN for an RLE without pixels."""
    masks = annotations.segmentations
    boxes = np.full((len(annotations.labels), 4), np.nan)
    rows = np.flatnonzero(np.diff(masks.first_polygon) > 0)
    if rows.size:
        starts = np.asarray(masks.polygon_starts)[np.asarray(masks.first_polygon)[rows]] // 2
        for axis in (0, 1):
            values = masks.coordinates[axis::2]
            boxes[rows, axis] = np.minimum.reduceat(values, starts)
            boxes[rows, axis + 2] = np.maximum.reduceat(values, starts)
    coded = np.flatnonzero(np.diff(masks.rle_starts) > 0)
    hws = annotations.image_sizes[image_of_rows(annotations)[coded]].tolist()
    codes = [{"size": hw, "counts": annotations.segmentation(row)} for row, hw in zip(coded.tolist(), hws, strict=True)]
    if codes:
        xywh = np.asarray(rle.toBbox(codes), np.float64).reshape(-1, 4)
        xywh[(xywh[:, 2:] <= 0).any(axis=1)] = np.nan
        boxes[coded] = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    return boxes


def iou(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """(N,) overlap of boxes, pair by pair; 0 where one is NaN or has no area."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    inter = np.prod(sides.clip(min=0), axis=1)
    union = np.prod(a[:, 2:] - a[:, :2], axis=1) + np.prod(b[:, 2:] - b[:, :2], axis=1) - inter
    overlap: NDArray[np.float64] = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    return np.nan_to_num(overlap)


def check_masks(annotations: Annotations) -> MaskFacts:
    """Compare masks, boxes and images."""
    images = image_of_rows(annotations)
    real = np.asarray(annotations.trained)
    hw = annotations.image_sizes[images].astype(np.float64)
    limits = np.concatenate([hw[:, ::-1], hw[:, ::-1]], axis=1)  # w, h, w, h
    boxes, masks = np.asarray(annotations.boxes, np.float64), mask_boxes(annotations)
    inside = masks.clip(0, limits)
    empty = ~((inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1]))  # also NaN
    known = ~np.isnan(masks[:, 0])

    differs = (np.abs(boxes.clip(0, limits) - inside) > SLACK).any(axis=1)
    odd = known & real & differs & (iou(boxes.clip(0, limits), inside) < AGREEMENT)
    fits_turned = np.zeros(len(boxes), np.bool_)
    rows = np.flatnonzero(odd)
    for flip_x, flip_y, stretched in product((False, True), repeat=3):
        candidates = _turned(masks[rows], hw[rows], flip_x, flip_y, stretched)
        fits_turned[rows] |= iou(boxes[rows], candidates) >= AGREEMENT
    turned = _most(fits_turned, images, real, len(annotations)) | _fits_swapped(
        annotations, masks, images, known & real
    )
    corners = np.zeros(len(boxes), np.bool_)
    corners[rows] = iou(np.asarray(annotations.boxes_xywh)[rows], masks[rows]) >= AGREEMENT
    disagreeing = odd & ~corners & ~(fits_turned & turned[images])

    return MaskFacts(
        empty=empty & real & ~turned[images],
        disagreeing=disagreeing & ~empty & ~turned[images],
        corners=corners & ~turned[images],
        duplicate=_duplicates(annotations, images) & real,
        beyond=real & ((boxes[:, :2] < -SLACK).any(axis=1) | (boxes[:, 2:] > limits[:, 2:] + SLACK).any(axis=1)),
        turned=turned,
    )


def _turned(boxes: Boxes, hw: NDArray[np.float64], flip_x: bool, flip_y: bool, stretched: bool) -> Boxes:
    """Boxes with x and y exchanged and then mirrored in an image of ``hw`` (N, 2): the quarter turns, transposed.

    Of LVIS's turned masks some are also stretched to the image's sides: x / width and y / height are exchanged.
    """
    turned = boxes[:, [1, 0, 3, 2]]
    if stretched:
        ratio = hw[:, 1] / hw[:, 0]  # width / height
        turned *= np.stack([ratio, 1 / ratio, ratio, 1 / ratio], axis=1)
    for axis, flip in ((0, flip_x), (1, flip_y)):
        if flip:
            side = hw[:, 1 - axis]
            turned[:, axis], turned[:, axis + 2] = side - turned[:, axis + 2], side - turned[:, axis]
    return turned


def _most(flags: Flags, images: NDArray[np.int64], real: Flags, count: int) -> Flags:
    """(I,) images with at least `TURNED_SHARE` of their annotations flagged."""
    flagged = np.bincount(images[flags & real], minlength=count)
    return (flagged > 0) & (flagged >= TURNED_SHARE * np.bincount(images[real], minlength=count))


def _fits_swapped(annotations: Annotations, masks: Boxes, images: NDArray[np.int64], known: Flags) -> Flags:
    """(I,) images whose masks together reach beyond the image, but not beyond one of its width and height swapped."""
    far = np.zeros((len(annotations), 2))
    np.maximum.at(far, images[known], masks[known][:, 2:])
    wh = annotations.image_sizes[:, ::-1]
    fits: Flags = np.all(far <= wh[:, ::-1] + SLACK, axis=1) & np.any(far > wh + SLACK, axis=1)
    return fits


def _duplicates(annotations: Annotations, images: NDArray[np.int64]) -> Flags:
    """(N,) annotations that repeat an earlier one."""
    corners = np.rint(annotations.boxes).astype(np.int64)
    columns = (*corners.T, np.asarray(annotations.labels), images)
    order = np.lexsort(columns)
    same = np.ones(max(len(order) - 1, 0), np.bool_)
    for column in columns:
        same &= column[order][1:] == column[order][:-1]
    repeated = np.zeros(len(order), np.bool_)
    repeated[order[1:][same]] = True
    return repeated
