"""Box arithmetic: overlap, the delta coder, clipping, anchors (spec of Mask R-CNN; Faster R-CNN, section 3.1.2).

Boxes are (..., 4) float32 xyxy pixels, width = x2 - x1. Shape letters: N and M boxes, A anchors, H and W cells.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # |dw|, |dh| beyond this would overflow exp and are clamped

Stds = tuple[float, float, float, float]


@functools.cache
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of these values, made once for each device: every copy to a device waits for all of its work."""
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


def clip(boxes: Tensor, image_hws: Tensor) -> Tensor:
    """Boxes (B, ..., 4) clipped to their images of size ``image_hws`` (B, 2) (height, width)."""
    limits = image_hws.flip(-1).repeat(1, 2).to(boxes.dtype)  # (B, 4): w, h, w, h
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
