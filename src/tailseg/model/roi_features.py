"""RoI features from the pyramids of a batch.

RoIAlign is that of Mask R-CNN, section 3, with levels as in FPN, Eq. 1; its twin whose cells can be shifted,
differentiable in the shift, is TSD's (arXiv 2003.07540).

Shape letters: B images, R RoIs, S output cells a side, L levels, n sampling points along each side of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from tailseg.layers.weighted_sums import weighted_sums
from tailseg.model import semantic
from tailseg.model.box_head import Pool
from tailseg.model.roi_align import Sampling, SharedMaps, takes_triton
from tailseg.model.traceable import roi_align_by_level, shifted_roi_align_by_level

MOST_WEIGHTS = 1 << 22  # of pixels that are pooled at once


class ImageFeatures:
    """The pyramid of a batch and what is added to all RoI features: vectors of images, features of stuff and things.

    Args:
        pyramid: P2..P6, (B, channels, h, w) each.
        context: of the context encoder, (B, channels), or None.
        semantic: of the semantic branch, (B, channels, H / 8, W / 8), or None. What is pooled of it at 14 x 14 is
            averaged where fewer cells are wanted; it cannot be shifted.
    """

    def __init__(
        self, pyramid: Sequence[Tensor], context: Tensor | None = None, semantic: Tensor | None = None
    ) -> None:
        self.pyramid = pyramid
        self.context = context
        self.semantic = semantic

    def pool(self, pooler: RoIPooler) -> Pool:
        """The function that makes features of RoIs with this pooler's size, levels and sampling."""
        return partial(self._pooled, pooler)

    def _pooled(self, pooler: RoIPooler, rois: Tensor, shifts: Tensor | None = None) -> Tensor:
        if torch.compiler.is_exporting():
            pooled = pooler.traced(self.pyramid, rois, shifts)
        elif shifts is not None:
            pooled = shifted_roi_align(self._rows, rois, shifts, pooler.output_size)
        else:
            pooled = pooler(self._rows if pooled_by_table(rois) else self._maps, rois)
        if self.semantic is not None:
            own = RoIPooler(
                semantic.ROI_SIZE, (semantic.STRIDE,), sampling_ratio=pooler.sampling_ratio, aligned=pooler.aligned
            )
            pooled = pooled + F.adaptive_avg_pool2d(own([self.semantic], rois), pooler.output_size)
        if self.context is None:
            return pooled
        return pooled + self.context[rois[:, 0].long()][:, :, None, None]

    @cached_property
    def _maps(self) -> SharedMaps | list[Tensor]:
        return SharedMaps(self.pyramid) if takes_triton(self.pyramid) else planar(self.pyramid)

    @cached_property
    def _rows(self) -> PyramidRows:
        return pyramid_rows(self.pyramid)


def roi_levels(boxes: Tensor, levels: int) -> Tensor:
    """Pyramid level (N,) int64 of boxes (N, 4): clamp(floor(log2(sqrt(w·h) / 56 + 1e-6)), 0, levels - 1)."""
    scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    # A box that is no number belongs somewhere too: so a diverged model shows in its losses, not as a broken shape.
    return torch.log2(scale / 56 + 1e-6).floor().nan_to_num(0).clamp(0, levels - 1).long()


def pooled_by_table(rois: Tensor) -> bool:
    """Whether RoIs are pooled from one table of all levels: on a CPU, which waits for no device."""
    return rois.device.type == "cpu"


def planar(pyramid: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, channels, h, w) as RoIAlign reads them, float32 and one channel after the other.

    It would convert by itself, but again in every pooling.
    """
    return [features.float().contiguous() for features in pyramid]


class RoIPooler(nn.Module):
    """RoIAlign, each RoI from the level of its size.

    Args:
        output_size: S.
        strides: stride of each level, finest first.
        sampling_ratio: sampling points along each side of a cell; 0 takes as many as the cell has feature pixels.
        aligned: a pixel's value stands at its centre, not at its upper left corner.
    """

    def __init__(
        self,
        output_size: int,
        strides: Sequence[int] = (4, 8, 16, 32),
        *,
        sampling_ratio: int,
        aligned: bool,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = tuple(strides)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, pyramid: Sequence[Tensor] | PyramidRows | SharedMaps, rois: Tensor) -> Tensor:
        """Features (R, channels, S, S), float32; on CUDA under autocast in the dtype of the maps.

        Args:
            pyramid: at least as many maps (B, channels, h, w) as there are strides; on a CPU their table will do, on
                CUDA what several poolings share.
            rois: (R, 5): image index, x1, y1, x2, y2 in pixels.
        """
        if not isinstance(pyramid, PyramidRows | SharedMaps):
            if torch.compiler.is_exporting():
                return self.traced(pyramid, rois, None)
            if takes_triton(pyramid):
                pyramid = SharedMaps(pyramid)
        if isinstance(pyramid, SharedMaps):
            return pyramid.pool(
                rois, Sampling(self.output_size, self.strides, self.sampling_ratio, aligned=self.aligned)
            )
        levels = roi_levels(rois[:, 1:], len(self.strides))
        if isinstance(pyramid, PyramidRows) or pooled_by_table(rois):
            return self._by_table(pyramid, rois, levels)
        return self._at_every_level(pyramid, rois, levels)

    def traced(self, pyramid: Sequence[Tensor], rois: Tensor, shifts: Tensor | None) -> Tensor:
        """The same for `torch.export`, with ``shifts`` as `shifted_roi_align`."""
        levels = roi_levels(rois[:, 1:], len(self.strides))
        if shifts is not None:
            return shifted_roi_align_by_level(pyramid, rois, shifts, levels, self.strides, self.output_size)
        return roi_align_by_level(
            pyramid, rois, levels, self.strides, self.output_size, self.sampling_ratio, aligned=self.aligned
        )

    def _by_table(self, pyramid: Sequence[Tensor] | PyramidRows, rois: Tensor, levels: Tensor) -> Tensor:
        rows = pyramid if isinstance(pyramid, PyramidRows) else pyramid_rows(pyramid, self.strides)
        return roi_align_of_rows(rows, rois, levels, self.output_size, self.sampling_ratio, aligned=self.aligned)

    def _at_every_level(self, pyramid: Sequence[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
        # A RoI of another level is given no extent: it has no sampling points, costs next to nothing and adds zero.
        # Unlike picking the rows of a level, that does not wait for their number.
        parts = []
        for level, stride in enumerate(self.strides):
            here = (levels == level).unsqueeze(1)
            own = torch.cat([rois[:, :1], torch.where(here, rois[:, 1:], rois[:, 1:3].repeat(1, 2))], dim=1)
            pooled = self._align(pyramid[level], own, stride)
            if self.sampling_ratio > 0 or not self.aligned:  # then even a RoI without extent is sampled
                pooled = torch.where(here[:, :, None, None], pooled, 0.0)
            parts.append(pooled)
        return torch.stack(parts).sum(dim=0)

    def _align(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        pooled: Tensor = roi_align(
            features.float(), rois.float(), self.output_size, 1 / stride, self.sampling_ratio, self.aligned
        )
        return pooled


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


def roi_align_of_rows(
    rows: PyramidRows, rois: Tensor, levels: Tensor, output_size: int, sampling_ratio: int, *, aligned: bool
) -> Tensor:
    """RoIAlign of a table, each RoI from its level: weighted sums of pixels.

    A cell's mean over a grid of points, each of them bilinear, is a sum of pixels with weights that are a product of
    one of the row and one of the column. Where points lie no more than a pixel apart, n of them touch n + 1 pixels of
    an axis. RoIs with the same numbers of points are pooled together; their number is waited for.

    Args:
        rows: from `pyramid_rows`; a gradient flows to it.
        rois: (R, 5): image index, x1, y1, x2, y2 in pixels; without gradient.
        levels: (R,) int64.
        output_size: S.
        sampling_ratio: as in `RoIPooler`.
        aligned: as in `RoIPooler`.

    Returns:
        (R, channels, S, S), channels_last.
    """
    table, side = rows.table, output_size
    rois = rois.detach()
    own = rows.levels[levels]
    sizes, first, stride = own[:, :2], own[:, 2], own[:, 3:]
    corners = rois[:, 1:].to(table.dtype) * (1 / stride.to(table.dtype)) - (0.5 if aligned else 0.0)
    starts, extents = corners[:, [1, 0]], (corners[:, 2:] - corners[:, :2]).flip(1)  # y, x, as the sizes
    if not aligned:
        extents = extents.clamp(min=1)
    cells = extents / side
    if sampling_ratio > 0:
        points = torch.full_like(sizes, sampling_ratio)
    else:
        points = cells.nan_to_num(1.0, 1.0, 1.0).ceil().clamp(min=0).long()
    order, parts = [], []
    for pair in points.unique(dim=0).tolist():
        group = (points == points.new_tensor(pair)).all(dim=1).nonzero().squeeze(1)
        touched = [2 * n if sampling_ratio > 0 else n + 1 for n in pair]
        for chunk in group.split(max(1, MOST_WEIGHTS // (side**2 * touched[0] * touched[1]))):
            (lines, line_weights), (columns, column_weights) = (
                _touched(starts[chunk, axis], cells[chunk, axis], sizes[chunk, axis], side, pair[axis], touched[axis])
                for axis in (0, 1)
            )
            width = sizes[chunk, 1]
            begin = first[chunk] + rois[chunk, 0].long() * sizes[chunk, 0] * width
            lines = begin[:, None, None] + lines * width[:, None, None]
            pixels = lines[:, :, None, :, None] + columns[:, None, :, None, :]  # (r, S, S, rows, columns)
            weights = line_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
            order.append(chunk)
            parts += [pixels.flatten(0, 2).flatten(1), weights.flatten(0, 2).flatten(1)]
    if not parts:
        return table[:0, :, None, None].expand(-1, -1, side, side)
    pooled = weighted_sums(table, *parts).view(-1, side, side, table.shape[1])
    return (pooled if len(order) == 1 else pooled[torch.cat(order).argsort()]).permute(0, 3, 1, 2)


def _touched(
    starts: Tensor, cells: Tensor, sizes: Tensor, side: int, points: int, touched: int
) -> tuple[Tensor, Tensor]:
    """Pixels (r, S, touched) int64 of an axis that the points of each cell lie between, and their mean weights.

    Args:
        starts: (r,) where RoIs begin, in pixels of the level.
        cells: (r,) extents of a cell.
        sizes: (r,) of the axis.
        side: S.
        points: of a cell along the axis; none gives weights of zero.
        touched: 2 pixels for each point, or one more than there are points, if these are at most a pixel apart.
    """
    numbers = torch.arange(side, device=starts.device, dtype=starts.dtype).unsqueeze(1)
    parts = torch.arange(points, device=starts.device, dtype=starts.dtype) + 0.5
    places = starts[:, None, None] + numbers * cells[:, None, None] + parts * (cells / max(points, 1))[:, None, None]
    pixels, weights = _neighbours(places, sizes[:, None, None])
    weights = weights / max(points, 1)
    if touched == 2 * points:
        return pixels, weights
    if points == 0:
        nothing = places.new_zeros(len(starts), side, touched)
        return nothing.long(), nothing
    base = pixels[:, :, :1]
    sums = weights.new_zeros(*weights.shape[:2], touched)
    sums.scatter_add_(2, (pixels - base).clamp(0, touched - 1), weights)
    own = base + torch.arange(touched, device=starts.device)
    return torch.minimum(own, sizes[:, None, None] - 1), sums


def shifted_roi_align(rows: PyramidRows, rois: Tensor, shifts: Tensor, output_size: int, *, samples: int = 2) -> Tensor:
    """Aligned RoIAlign with n·n points a cell, each RoI from the level of its own size and its cells shifted.

    Point b of cell j lies at x = (x1 + w · ((j + (b + 0.5) / n) / S + shift)) / stride - 0.5 in pixels of the level,
    w the RoI's width; likewise y. A point outside takes the value of the nearest edge, and zero if
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
    pooled = weighted_sums(table, pixels.flatten(0, 2).flatten(1), weights.flatten(0, 2).flatten(1))
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
