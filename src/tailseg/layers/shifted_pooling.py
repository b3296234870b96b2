"""RoI features whose cells can be shifted, differentiable in the shift (TSD, arXiv 2003.07540; spec, section 20).

Shape letters: R RoIs, S output cells a side, L levels, n sampling points along each side of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.layers.roi_pooling import roi_levels


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PyramidRows:
    """All levels of a pyramid in one table of pixels, made once for the poolings of a step."""

    table: Tensor  # (pixels, channels) at least float32: by level, image, row, column
    levels: Tensor  # (L, 4) int64: height, width, first row in the table, stride


def pyramid_rows(pyramid: Sequence[Tensor], strides: Sequence[int] = (4, 8, 16, 32)) -> PyramidRows:
    """The first ``len(strides)`` maps (B, channels, h, w) as a table, finest first; channels_last costs one copy."""
    maps = pyramid[: len(strides)]
    table = torch.cat([features.permute(0, 2, 3, 1).flatten(0, 2) for features in maps])
    numbers, first = [], 0
    for features, stride in zip(maps, strides, strict=True):
        batch, _, height, width = features.shape
        numbers += [height, width, first, stride]
        first += batch * height * width
    # Filled one by one: a copy from the host would wait for the device.
    levels = torch.stack([torch.full((), number, device=table.device) for number in numbers]).view(-1, 4)
    return PyramidRows(table=table.to(torch.promote_types(table.dtype, torch.float32)), levels=levels)


def shifted_roi_align(rows: PyramidRows, rois: Tensor, shifts: Tensor, output_size: int, *, samples: int = 2) -> Tensor:
    """Aligned RoIAlign with n·n points a cell, each RoI from the level of its own size and its cells shifted.

    Point b of cell j lies at x = (x1 + w · ((j + (b + 0.5) / n) / S + shift)) / stride - 0.5 in pixels of the level,
    w the RoI's width; likewise y (spec, section 20). A point outside takes the value of the nearest edge, and zero if
    it is more than a pixel away (below -1 or above the size). In float32, also under autocast, or float64.

    Args:
        rows: from `pyramid_rows`; a gradient flows to it.
        rois: (R, 5): image index, x1, y1, x2, y2 in pixels; without gradient.
        shifts: (R, 2) of whole RoIs or (R, 2, S, S) of every cell: x, y in units of the RoI's width and height;
            a gradient flows to them.
        output_size: S.
        samples: n.

    Returns:
        (R, channels, S, S), channels_last.
    """
    table, side = rows.table, output_size
    rois, shifts = rois.detach(), shifts.to(table.dtype)
    if shifts.dim() == 2:
        shifts = shifts[:, :, None, None]
    height, width, first, stride = rows.levels[roi_levels(rois[:, 1:], len(rows.levels))].view(-1, 4, 1, 1, 1).unbind(1)
    x1, y1, x2, y2 = (rois[:, 1:].to(table.dtype).view(-1, 4, 1, 1, 1) / stride.unsqueeze(1)).unbind(1)
    places = (torch.arange(side * samples, device=table.device, dtype=table.dtype) + 0.5) / (side * samples)
    x = x1 - 0.5 + (x2 - x1) * (places.view(1, 1, side, samples) + shifts[:, 0].unsqueeze(3))
    y = y1 - 0.5 + (y2 - y1) * (places.view(1, side, 1, samples) + shifts[:, 1].unsqueeze(3))
    columns, column_weights = _neighbours(x, width)  # (R, 1 or S, S, 2n)
    lines, line_weights = _neighbours(y, height)  # (R, S, 1 or S, 2n)
    # The points of a cell form a grid: their pixels and weights are those of its rows by those of its columns.
    image = rois[:, 0].long().view(-1, 1, 1, 1)
    starts = first + (image * height + lines) * width
    pixels = starts.unsqueeze(4) + columns.unsqueeze(3)  # (R, S, S, 2n, 2n)
    weights = (line_weights / samples**2).unsqueeze(4) * column_weights.unsqueeze(3)
    pooled = F.embedding_bag(
        pixels.flatten(0, 2).flatten(1), table, per_sample_weights=weights.flatten(0, 2).flatten(1), mode="sum"
    )
    return pooled.view(-1, side, side, table.shape[1]).permute(0, 3, 1, 2)


def _neighbours(points: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The two pixels (..., 2n) int64 beside each point (..., n) along an axis of ``size`` pixels, and their weights."""
    last = size - 1
    inside = (points >= -1) & (points <= size)
    clamped = points.clamp(min=0).clamp(max=last.to(points.dtype))
    # What is no number gets a pixel that exists, and a weight that is no number either.
    before = clamped.detach().nan_to_num().floor()
    after_weight = clamped - before
    weights = torch.stack([1 - after_weight, after_weight], dim=-1) * inside.unsqueeze(-1)
    lower = before.long()
    return torch.stack([lower, torch.minimum(lower + 1, last)], dim=-1).flatten(-2), weights.flatten(-2)
