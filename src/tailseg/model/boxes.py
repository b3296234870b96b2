"""Box arithmetic: overlap, the delta coder, its loss, clipping, anchors, NMS (Faster R-CNN, section 3.1.2).

Boxes are (..., 4) float32 xyxy pixels, width = x2 - x1. Shape letters: N and M boxes, A anchors, H and W cells.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from tailseg.layers.triton_support import has_triton
from tailseg.model.traceable import keep_within_classes

MAX_LOG_SCALE = math.log(1000 / 16)  # |dw|, |dh| beyond this would overflow exp and are clamped

CALL_BOXES = 1 << 15  # most boxes of several images in a call: it takes an eighth of a byte per pair of them, 128 MiB
FIRST_CANDIDATES = 4096  # prefix tried first; a busy LVIS image needs a few thousand pairs for 300 detections

Stds = tuple[float, float, float, float]


def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of these values, made once for each device: every copy to a device waits for all of its work."""
    if torch.compiler.is_exporting():  # what is traced must not be kept
        return torch.tensor(values, device=device, dtype=dtype)
    return _kept_constant(values, device, dtype)


@functools.cache
def _kept_constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # so that it can take part in training later on
        return torch.tensor(values, device=device, dtype=dtype)


def box_areas(boxes: Tensor) -> Tensor:
    """Areas (...,) of boxes (..., 4), in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every pair.

    Args:
        boxes: (..., N, 4).
        others: (..., M, 4).

    Returns:
        (..., N, M) float32 in [0, 1]. The union is area + area - intersection on float32 corners, so that overlaps
        that tie in the reference implementation tie here too.
    """
    # Coordinate by coordinate: a last dimension of 2 or 4 would keep the CPU from using vectors.
    x1, y1, x2, y2 = boxes.unsqueeze(-2).unbind(-1)  # (..., N, 1) each
    u1, v1, u2, v2 = others.unsqueeze(-3).unbind(-1)  # (..., 1, M) each
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    intersection = width * height
    union = box_areas(boxes).unsqueeze(-1) + box_areas(others).unsqueeze(-2) - intersection
    return intersection / union.clamp(min=1e-6)


def encode(boxes: Tensor, targets: Tensor, stds: Stds) -> Tensor:
    """Deltas (..., 4) = (dx, dy, dw, dh) / stds that move ``boxes`` (..., 4) onto ``targets`` (..., 4)."""
    size = boxes[..., 2:] - boxes[..., :2]
    target_size = targets[..., 2:] - targets[..., :2]
    shift = (targets[..., :2] + targets[..., 2:] - boxes[..., :2] - boxes[..., 2:]) * 0.5 / size
    deltas = torch.cat([shift, (target_size / size).log()], dim=-1)
    return deltas / constant(stds, deltas.device, deltas.dtype)


def decode(boxes: Tensor, deltas: Tensor, stds: Stds) -> Tensor:
    """Boxes (..., 4) that ``deltas`` (..., 4) make of ``boxes`` (..., 4): the inverse of `encode`, not clipped."""
    deltas = deltas.float() * constant(stds, deltas.device)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() * 0.5
    return torch.cat([centre - half, centre + half], dim=-1)


def clip(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Boxes (B, ..., 4) clipped to their images of size ``image_sizes`` (B, 2) (height, width)."""
    limits = image_sizes.flip(-1).repeat(1, 2).to(boxes.dtype)  # (B, 4): w, h, w, h
    limits = limits.view(-1, *([1] * (boxes.dim() - 2)), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def base_anchors(size: float, ratios: Sequence[float], *, rounded: bool = False) -> Tensor:
    """Anchors (len(ratios), 4) of area size² around (0, 0); a ratio is height / width, ``rounded`` to whole pixels."""
    roots = torch.tensor(ratios).sqrt()
    half_hw = torch.stack([size * roots, size / roots], dim=1) / 2
    half = half_hw.flip(1)
    anchors = torch.cat([-half, half], dim=1)
    return anchors.round() if rounded else anchors


def anchor_grid(base: Tensor, stride_hw: tuple[int, int], grid_hw: tuple[int, int]) -> Tensor:
    """Anchors (H·W·ratios, 4) of one level, by row, column, ratio, centred on (column·stride_w, row·stride_h)."""
    rows = torch.arange(grid_hw[0], device=base.device, dtype=base.dtype) * stride_hw[0]
    columns = torch.arange(grid_hw[1], device=base.device, dtype=base.dtype) * stride_hw[1]
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1)  # (H, W, 4)
    return (shifts[:, :, None] + base).view(-1, 4)


def smooth_l1(predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    """Element-wise |x| - beta/2, or x²/(2·beta) where |x| < beta; beta 0 is L1."""
    if beta == 0:
        return (predicted - target).abs()
    return F.smooth_l1_loss(predicted, target, reduction="none", beta=beta)


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
    device = with_float64(boxes.device)
    exact = boxes.to(device, torch.float64)
    span = exact.max() - exact.min() + 1
    apart = exact + (groups.to(device) * span)[:, None]
    kept: Tensor = nms(apart, scores.to(device, torch.float64), iou)
    return kept.to(boxes.device)


def with_float64(device: torch.device) -> torch.device:
    """The device itself, or the CPU for Apple's GPU, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def has_kernels(boxes: Tensor) -> bool:
    """Return whether NMS of sorted boxes is done by `nms_triton`, which takes float32 on CUDA, or by torchvision."""
    return boxes.is_cuda and boxes.dtype == torch.float32 and has_triton()


def keep_within_levels(boxes: Tensor, scores: Tensor, valid: Tensor, level_sizes: list[int], iou: float) -> Tensor:
    """Mark the proposals that survive NMS within their image and level.

    Args:
        boxes: (B, N, 4), levels one after the other, the best box of a level first.
        scores: (B, N), falling within a level.
        valid: (B, N) bool; the others are dropped.
        level_sizes: number of proposals of each level, summing to N.
        iou: overlap threshold.

    Returns:
        (B, N) bool.
    """
    if torch.compiler.is_exporting():
        return _keep_traced(boxes, scores, valid, level_sizes, iou)
    if has_kernels(boxes):
        return _keep_by_kernels(boxes, valid, level_sizes, iou)
    # On CPU many short lists are cheaper than a long one, and their lengths are free to know.
    form = _keep_list_by_list if boxes.device.type == "cpu" else _keep_in_few_calls
    return form(boxes, scores, valid, level_sizes, iou)


def _keep_by_kernels(
    boxes: Tensor, valid: Tensor, level_sizes: list[int], iou: float, labels: Tensor | None = None
) -> Tensor:
    from tailseg.model.nms_triton import keep_sorted

    starts = constant((0, *itertools.accumulate(level_sizes)), boxes.device, torch.int32)
    return keep_sorted(boxes, valid, starts, level_sizes, iou, labels)


def _keep_traced(boxes: Tensor, scores: Tensor, valid: Tensor, level_sizes: list[int], iou: float) -> Tensor:
    levels = torch.cat([torch.full((size,), level, device=boxes.device) for level, size in enumerate(level_sizes)])
    (own_boxes,), (own_scores,) = boxes, torch.where(valid, scores, 0.0)  # of one image
    keep: Tensor = keep_within_classes(own_boxes, own_scores, levels, len(level_sizes), iou)
    return keep.unsqueeze(0)


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


def multiclass_nms(
    boxes: Tensor, scores: Tensor, *, score_threshold: float, iou: float, limit: int, min_size: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``limit`` best (box, class) pairs of an image after NMS within each class.

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
    by_kernels = has_kernels(boxes)
    # The kernels are told which pairs are candidates: counting them waits for the device, so only if too few are kept.
    candidates = None if by_kernels else int((flat > score_threshold).sum())
    prefix = min(FIRST_CANDIDATES, flat.shape[0] if candidates is None else candidates)
    while True:
        top, pair = flat.topk(prefix)
        rows, labels = pair // num_classes, pair % num_classes
        pair_boxes = boxes[rows, labels if boxes.shape[1] > 1 else torch.zeros_like(labels)]
        if by_kernels:
            keep = _keep_by_kernels(pair_boxes[None], (top > score_threshold)[None], [prefix], iou, labels[None])
            kept = keep[0].nonzero().squeeze(1)[:limit]
        else:
            kept = nms_within_groups(pair_boxes, top, labels, iou)[:limit]
        if candidates is None and kept.shape[0] < limit:
            candidates = int((flat > score_threshold).sum())
        if candidates is None or kept.shape[0] == limit or prefix >= candidates:
            return pair_boxes[kept], top[kept], labels[kept], rows[kept]
        prefix = min(prefix * 4, candidates)
