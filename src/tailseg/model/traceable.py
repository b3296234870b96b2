"""Forms of RoI pooling and NMS for `torch.export`: no number of the data decides what Python does.

They give what the fast forms beside them give, to rounding. One image at a time; R RoIs, S output cells a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms, roi_align


def roi_align_by_level(
    pyramid: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    *,
    aligned: bool,
) -> Tensor:
    """RoIAlign, the RoIs of a level picked and pooled together; arguments as in `RoIPooler`.

    Args:
        pyramid: a map (1, channels, h, w) for each stride.
        rois: (R, 5).
        levels: (R,) int64.
        strides: of the levels, finest first.
        output_size: S.
        sampling_ratio: sampling points along each side of a cell; 0 is adaptive.
        aligned: a pixel's value stands at its centre.

    Returns:
        (R, channels, S, S).
    """
    parts = []
    for level, stride in enumerate(strides):
        own = rois[(levels == level).nonzero().squeeze(1)]
        parts.append(roi_align(pyramid[level], own, output_size, 1 / stride, sampling_ratio, aligned))
    return torch.cat(parts)[_places(levels)]


def shifted_roi_align_by_level(
    pyramid: Sequence[Tensor], rois: Tensor, shifts: Tensor, levels: Tensor, strides: Sequence[int], output_size: int
) -> Tensor:
    """`roi_features.shifted_roi_align` with 2·2 points a cell, by grid sampling; shifts are (R, 2, S, S).

    Returns:
        (R, channels, S, S).
    """
    samples, parts = 2, []
    points = output_size * samples
    places = (torch.arange(points, dtype=rois.dtype, device=rois.device) + 0.5) / points
    for level, stride in enumerate(strides):
        features = pyramid[level]
        channels, height, width = features.shape[1:]
        rows = (levels == level).nonzero().squeeze(1)
        x1, y1, x2, y2 = (rois[rows, 1:] / stride).view(-1, 4, 1, 1, 1).unbind(1)
        shift_x, shift_y = shifts[rows].unsqueeze(4).unbind(1)
        x = x1 - 0.5 + (x2 - x1) * (places.view(1, 1, output_size, samples) + shift_x)  # (r, S, S, n)
        y = y1 - 0.5 + (y2 - y1) * (places.view(1, output_size, 1, samples) + shift_y)
        x = x.unsqueeze(3).expand(-1, -1, -1, samples, -1).flatten(3)  # (r, S, S, n·n), a cell's row by row
        y = y.unsqueeze(4).expand(-1, -1, -1, -1, samples).flatten(3)
        inside = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1).view(1, -1, samples**2, 2)
        seen = F.grid_sample(features, grid, padding_mode="border", align_corners=False)
        means = (seen[0] * inside.view(-1, samples**2)).mean(dim=2)
        parts.append(means.view(channels, -1, output_size, output_size).transpose(0, 1))
    return torch.cat(parts)[_places(levels)]


def _places(levels: Tensor) -> Tensor:
    """Position (R,) of each RoI when they are put level by level; without ties, which not every runtime keeps."""
    count = levels.shape[0]
    order = (levels * count + torch.arange(count, device=levels.device)).argsort()
    return order.argsort()


@torch.library.custom_op("tailseg::keep_within_classes", mutates_args=())
def keep_within_classes(boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, iou: float) -> Tensor:
    """Mark the pairs that survive greedy NMS among those of their class; an operator, since ONNX has one for it.

    Args:
        boxes: (N, 4).
        scores: (N,), best first; those of candidates are above 0.
        labels: (N,) int64 in [0, C).
        num_classes: C.
        iou: overlap threshold.

    Returns:
        (N,) bool.
    """
    return kept_within_classes(boxes, scores, labels, num_classes, iou)


def kept_within_classes(boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, iou: float) -> Tensor:
    """The operator in those of PyTorch and torchvision: classes are moved apart, in float64."""
    del num_classes
    exact = boxes.double()
    apart = exact + (labels * (exact.max() - exact.min() + 1)).unsqueeze(1)
    # Two boxes without area are kept in any case: a traced `nms` is taken to keep no fewer.
    kept = nms(F.pad(apart, (0, 0, 0, 2)), F.pad(scores.double(), (0, 2)), iou)
    keep = torch.zeros_like(F.pad(labels, (0, 2)), dtype=torch.bool).index_fill(0, kept, True)
    return keep[: labels.shape[0]] & (scores > 0)


@keep_within_classes.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, iou: float) -> Tensor:
    return torch.empty_like(labels, dtype=torch.bool)
