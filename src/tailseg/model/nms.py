"""Non-maximum suppression, exact and only as far as its result is needed."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

CALL_BOXES = 1 << 15  # most boxes of several images in a call: it takes an eighth of a byte per pair of them, 128 MiB
FIRST_CANDIDATES = 4096  # prefix tried first; a busy LVIS image needs a few thousand pairs for 300 detections


def nms_within_groups(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Positions of the boxes that survive greedy NMS among those of their own group, best score first.

    Groups are moved apart so that one call does them all. The shift is done in float64: in float32 the coordinates
    of group 1202 would be rounded to an eighth of a pixel.

    Args:
        boxes: (N, 4) float32.
        scores: (N,).
        groups: (N,) int64, class, level or image.
        iou: boxes with more overlap than this with a better kept one are dropped.
    """
    if boxes.shape[0] == 0:
        return groups.new_zeros(0)
    span = boxes.max().double() - boxes.min().double() + 1
    apart = boxes.double() + (groups * span)[:, None]
    kept: Tensor = nms(apart, scores.double(), iou)
    return kept


def keep_within_levels(boxes: Tensor, scores: Tensor, valid: Tensor, level_sizes: list[int], iou: float) -> Tensor:
    """Mark the proposals that survive NMS within their image and level.

    Args:
        boxes: (B, N, 4), levels one after the other.
        scores: (B, N).
        valid: (B, N) bool; the others are dropped.
        level_sizes: number of proposals of each level, summing to N.
        iou: overlap threshold.

    Returns:
        (B, N) bool.
    """
    # On CPU many short lists are cheaper than a long one, and their lengths are free to know.
    form = _keep_list_by_list if boxes.device.type == "cpu" else _keep_in_few_calls
    return form(boxes, scores, valid, level_sizes, iou)


def _keep_list_by_list(boxes: Tensor, scores: Tensor, valid: Tensor, level_sizes: list[int], iou: float) -> Tensor:
    keep = torch.zeros_like(valid)
    for image in range(boxes.shape[0]):
        start = 0
        for size in level_sizes:
            rows = valid[image, start : start + size].nonzero().squeeze(1) + start
            keep[image, rows[nms(boxes[image, rows], scores[image, rows], iou)]] = True
            start += size
    return keep


def _keep_in_few_calls(boxes: Tensor, scores: Tensor, valid: Tensor, level_sizes: list[int], iou: float) -> Tensor:
    images = max(1, CALL_BOXES // max(1, boxes.shape[1]))
    parts = zip(boxes.split(images), scores.split(images), valid.split(images), strict=True)
    return torch.cat([_keep_in_one_call(*part, level_sizes, iou) for part in parts])


def _keep_in_one_call(boxes: Tensor, scores: Tensor, valid: Tensor, level_sizes: list[int], iou: float) -> Tensor:
    levels = torch.cat([torch.full((size,), level, device=boxes.device) for level, size in enumerate(level_sizes)])
    groups = torch.arange(boxes.shape[0], device=boxes.device)[:, None] * len(level_sizes) + levels
    # Invalid boxes are sent to a group of their own instead of being counted out, which would wait for the device.
    groups = torch.where(valid, groups, boxes.shape[0] * len(level_sizes))
    kept = nms_within_groups(boxes.flatten(0, 1), scores.flatten(), groups.flatten(), iou)
    keep = torch.zeros_like(valid)
    keep.view(-1).index_fill_(0, kept, True)  # by index, True would be copied to the device, and waited for
    return keep & valid


def best_per_class(
    boxes: Tensor, scores: Tensor, *, score_threshold: float, iou: float, limit: int, min_size: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``limit`` best (box, class) pairs of an image after NMS within each class (spec, section 24).

    Whether greedy NMS keeps a pair depends on better-scored pairs alone, so a prefix of the pairs in score order
    that yields ``limit`` survivors yields exactly the survivors of the whole; it is lengthened until it does.

    Args:
        boxes: (R, C, 4), or (R, 1, 4) where the box does not depend on the class.
        scores: (R, C) class scores without background.
        score_threshold: pairs must score above this.
        iou: NMS threshold.
        limit: most detections.
        min_size: boxes with a side of at most this many pixels are dropped first; None drops none.

    Returns:
        boxes (n, 4), scores (n,), labels (n,) and RoI rows (n,), best score first, n <= limit.
    """
    num_classes = scores.shape[1]
    if min_size is not None:
        scores = torch.where(((boxes[..., 2:] - boxes[..., :2]) > min_size).all(dim=2), scores, -1.0)
    flat = scores.flatten()
    candidates = int((flat > score_threshold).sum())
    prefix = min(FIRST_CANDIDATES, candidates)
    while True:
        top, pair = flat.topk(prefix)
        rows, labels = pair // num_classes, pair % num_classes
        pair_boxes = boxes[rows, labels if boxes.shape[1] > 1 else torch.zeros_like(labels)]
        kept = nms_within_groups(pair_boxes, top, labels, iou)[:limit]
        if kept.shape[0] == limit or prefix == candidates:
            return pair_boxes[kept], top[kept], labels[kept], rows[kept]
        prefix = min(prefix * 4, candidates)
