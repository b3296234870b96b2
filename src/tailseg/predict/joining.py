"""Detections of overlapping windows of a picture as those of the picture: duplicates dropped, cut objects whole again.

Two detections of a class, from different windows, are the same object if their masks overlap enough in the part of the
picture that both windows show. (Of objects that no window cuts, that is class-wise NMS.) Then the better one stays; but
where a window's edge cuts the better one, all of them are joined to one object with the union of their masks. A window
has one piece of an object: what the detector kept apart in a window stays apart. Shape letters: N detections, K
windows, M side of a mask's grid.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tailseg.structures import RawDetections

Floats = NDArray[Any]
Rows = NDArray[np.int64]  # positions of detections

CUT_SHARE = 0.02  # of a window's side: a box that ends so near to an inner edge is cut by it
LATTICE = 32  # points along each side at which masks are compared
MOST_TIMES = 9  # by which the side of the masks' grids grows, for long objects
MOST_VALUES = 1 << 26  # of all masks together, where their grids grow: 256 MiB


def join_windows(found: Sequence[RawDetections], windows: Floats, iou: float) -> RawDetections:
    """Make one record of the detections of several windows.

    Args:
        found: of each window, boxes in pixels of the whole picture; on the CPU, their masks' grids of one size.
        windows: (K, 4) xyxy in pixels of the picture; one that shows all of it may be among them.
        iou: masks with at least this overlap are of one object.

    Returns:
        Detections of the picture, best score first. Where objects were joined, all masks have grids of
        M times 3, 5, 7 or 9, so that long ones lose little, as far as `MOST_VALUES` allows.
    """
    every = _concatenated(found)
    window_of = np.repeat(np.arange(len(found)), [len(part) for part in found])
    pieces = _Pieces(every, window_of, np.asarray(windows, np.float64), iou)
    groups = pieces.groups()
    joined = every[torch.tensor([group[0] for group in groups], dtype=torch.int64)]
    if all(len(group) == 1 for group in groups):
        return joined
    return pieces.united(joined, groups)


def _concatenated(found: Sequence[RawDetections]) -> RawDetections:
    first = found[0]
    own = [part.mask_scores for part in found]
    return replace(
        first,
        boxes=torch.cat([part.boxes for part in found]),
        scores=torch.cat([part.scores for part in found]),
        labels=torch.cat([part.labels for part in found]),
        masks=torch.cat([part.masks for part in found]),
        mask_scores=None if first.mask_scores is None else torch.cat([part for part in own if part is not None]),
    )


class _Pieces:
    """The detections of all windows.

    Args:
        every: all of them, window by window.
        window_of: (N,) window of each.
        windows, iou: see `join_windows`.
    """

    def __init__(self, every: RawDetections, window_of: Rows, windows: Floats, iou: float) -> None:
        self.every, self.window_of, self.windows, self.iou = every, window_of, windows, iou
        self.boxes = np.asfortranarray(every.boxes.numpy().astype(np.float64))  # quick to search by one side
        self.grids = every.masks.float().numpy()
        low, high = np.maximum(windows[:, None, :2], windows[:, :2]), np.minimum(windows[:, None, 2:], windows[:, 2:])
        meet = np.asarray((high > low).all(axis=2))
        self.neighbours = [[int(k) for k in np.flatnonzero(row)] for row in meet]
        own = windows[window_of]
        height, width = every.image_hw
        self.margin = CUT_SHARE * (own[:, 2:] - own[:, :2])
        starts = (own[:, :2] > 0) & (self.boxes[:, :2] <= own[:, :2] + self.margin)
        ends = (own[:, 2:] < [width, height]) & (self.boxes[:, 2:] >= own[:, 2:] - self.margin)
        self.cut = np.asarray((starts | ends).any(axis=1))
        self.by_class: dict[tuple[int, int], list[int]] = defaultdict(list)  # (label, window) -> rows, best first
        self.nearby: dict[tuple[int, int], Rows] = {}  # (label, window) -> rows of the windows around it
        self.order = np.argsort(-every.scores.numpy(), kind="stable").tolist()
        self.labels = every.labels.tolist()
        for row in self.order:
            self.by_class[self.labels[row], int(window_of[row])].append(row)

    def groups(self) -> list[list[int]]:
        """The rows of each object, best first."""
        free = np.ones(len(self.order), np.bool_)
        groups = []
        for row in self.order:
            if not free[row]:
                continue
            free[row] = False
            group, waiting = [row], [row]
            while waiting:
                piece = waiting.pop(0)
                used = {int(self.window_of[member]) for member in group}
                for other in self._candidates(piece, free):
                    window = int(self.window_of[other])
                    if window in used or not self._same(piece, other):
                        continue
                    free[other] = False
                    if self.cut[row]:
                        group.append(other)
                        waiting.append(other)
                        used.add(window)
            groups.append(group)
        return self._distinct(groups)

    def _candidates(self, row: int, free: NDArray[np.bool_]) -> Rows:
        """Other windows' detections of its class whose boxes overlap its own half as much as masks have to."""
        others = self._around_window(self.labels[row], int(self.window_of[row]))
        others = others[free[others]]
        others = others[_meeting(self.boxes, others, self.boxes[row])]
        if not len(others):
            return others
        shared = self._shared(row, others)
        mine, theirs = _clipped(self.boxes[row], shared), _clipped(self.boxes[others], shared)
        common = _areas(_clipped(mine, theirs))
        union = _areas(mine) + _areas(theirs) - common
        near: Rows = others[common >= 0.5 * self.iou * np.maximum(union, 1e-6)]
        return near

    def _around_window(self, label: int, own: int) -> Rows:
        """The detections of a class in the windows that overlap a window, but for its own."""
        found = self.nearby.get((label, own))
        if found is None:
            lists = [self.by_class.get((label, window), []) for window in self.neighbours[own] if window != own]
            found = self.nearby[label, own] = np.array([row for rows in lists for row in rows], np.int64)
        return found

    def _shared(self, row: int, others: Rows | int) -> Floats:
        """The parts of the picture that the windows of a detection and of others show both."""
        return _clipped(self.windows[self.window_of[row]], self.windows[self.window_of[others]])

    def _same(self, row: int, other: int) -> bool:
        """Return whether two masks overlap enough in what both windows show."""
        shared = self._shared(row, other)
        mine, theirs = _clipped(self.boxes[row], shared), _clipped(self.boxes[other], shared)
        around = np.concatenate([np.minimum(mine[:2], theirs[:2]), np.maximum(mine[2:], theirs[2:])])
        xs, ys = _lattice(around)
        one, two = self._mask([row], xs, ys), self._mask([other], xs, ys)
        return bool((one & two).sum() >= self.iou * max((one | two).sum(), 1))

    def _sampled(self, row: int, xs: Floats, ys: Floats) -> Floats:
        """Probabilities (len(ys), len(xs)) of a mask at columns ``xs`` and rows ``ys`` of the picture."""
        return sample_grid(self.grids[row], self.boxes[row], xs, ys)

    def _distinct(self, groups: list[list[int]]) -> list[list[int]]:
        """Leave out what is no object of its own, now that objects are whole: groups are given and come best first.

        That is, of joined objects, one whose mask overlaps that of a better one (NMS), and a fragment: a cut object
        that lies on a larger one. What a window sees of an object that only just reaches into it may look like another
        one. Of joined pieces the larger one has to be the better one, unless they are slivers even together.
        """
        outer = self._around(groups)
        joined = np.array([len(group) > 1 for group in groups], np.bool_)
        labels = np.array([self.labels[group[0]] for group in groups], np.int64)
        by_label = {label: np.flatnonzero(labels == label) for label in set(labels.tolist())}
        joined_by_label = {label: rows[joined[rows]] for label, rows in by_label.items()}
        gone: set[int] = set()
        for number, (group, box) in enumerate(zip(groups, outer, strict=True)):
            alone = len(group) == 1 and not self.cut[group[0]]  # what is alone and whole can only repeat joined ones
            others = (joined_by_label if alone else by_label)[int(labels[number])]
            others = others[_meeting(outer, others, box)]
            common = _areas(_clipped(outer[others], box))
            union = _areas(outer[others]) + _areas(box) - common
            near = others[(others < number) & (common >= 0.5 * self.iou * union)].tolist()
            larger = (_areas(outer[others]) > _areas(box)) & (common >= self.iou * _areas(box))
            if len(group) > 1 and not self._is_sliver(group, box):
                larger &= others < number
            around = others[larger].tolist() if self.cut[group[0]] else []
            if any(
                self._repeats(groups[other], outer[other], group, box) for other in near if other not in gone
            ) or any(self._covers(groups[other], group, box) for other in around if other not in gone):
                gone.add(number)
        return [group for number, group in enumerate(groups) if number not in gone]

    def _repeats(self, better: list[int], outer: Floats, group: list[int], box: Floats) -> bool:
        """Return whether two objects, one of which at least is joined, have one mask."""
        if len(better) == len(group) == 1:
            return False
        xs, ys = _lattice(np.concatenate([np.minimum(outer[:2], box[:2]), np.maximum(outer[2:], box[2:])]))
        one, two = self._mask(better, xs, ys), self._mask(group, xs, ys)
        return bool((one & two).sum() >= self.iou * max((one | two).sum(), 1))

    def _covers(self, group: list[int], fragment: list[int], box: Floats) -> bool:
        """Return whether the mask of an object lies on enough of a fragment that other windows show.

        A sliver is too small for masks to tell: there it is enough that their boxes overlap.
        """
        if np.isin(self.window_of[fragment], self.window_of[group]).any():
            return False
        if self._is_sliver(fragment, box):
            return True
        xs, ys = _lattice(box)
        own = self._mask(fragment, xs, ys)
        return bool((own & self._mask(group, xs, ys)).sum() >= self.iou * max(own.sum(), 1))

    def _is_sliver(self, group: list[int], box: Floats) -> bool:
        """Return whether pieces with a common box are no wider, or no higher, than the margin."""
        return bool((box[2:] - box[:2] <= self.margin[group[0]]).any())

    def _mask(self, group: list[int], xs: Floats, ys: Floats) -> NDArray[np.bool_]:
        """The union (len(ys), len(xs)) of the pieces' masks at columns ``xs`` and rows ``ys`` of the picture."""
        return np.asarray(np.maximum.reduce([self._sampled(row, xs, ys) for row in group]) >= 0.5)

    def _around(self, groups: list[list[int]]) -> Floats:
        """The box (G, 4) around the pieces of each object."""
        around = [[*self.boxes[g, :2].min(axis=0), *self.boxes[g, 2:].max(axis=0)] for g in groups]
        return np.asfortranarray(np.array(around, np.float64).reshape(-1, 4))

    def united(self, best: RawDetections, groups: list[list[int]]) -> RawDetections:
        """Boxes around all pieces, masks that are their union, and the best score for masks; ``best`` are the seeds."""
        side = self.grids.shape[-1]
        boxes = self._around(groups)
        several = [i for i, group in enumerate(groups) if len(group) > 1]
        side *= self._times(boxes, groups, several)
        masks = _enlarged(best.masks, side)
        for i in several:
            xs, ys = _lattice(boxes[i], side)
            parts = [self._sampled(row, xs, ys) for row in groups[i]]
            masks[i] = torch.from_numpy(np.maximum.reduce(parts).astype(np.float32))
        own = self.every.mask_scores
        return replace(
            best,
            boxes=torch.from_numpy(boxes.astype(np.float32)),
            masks=masks,
            mask_scores=None if own is None else torch.stack([own[group].max() for group in groups]),
        )

    def _times(self, boxes: Floats, groups: list[list[int]], several: list[int]) -> int:
        """By which odd number grids grow, so that a cell of a joined mask is hardly larger than of its largest piece.

        Odd, since the cells' centres are then among those of the larger grid: nothing changes between them.
        """
        longest = 1.0
        for i in several:
            sides = (self.boxes[groups[i], 2:] - self.boxes[groups[i], :2]).max(axis=0)
            longest = max(longest, float(((boxes[i, 2:] - boxes[i, :2]) / np.maximum(sides, 1e-6)).max()))
        most = min(MOST_TIMES, math.isqrt(MOST_VALUES // (len(groups) * self.grids.shape[-1] ** 2)))
        times = min(math.ceil(longest - 0.05), most)
        return max(1, times if times % 2 else times + 1 if times < most else times - 1)


def sample_grid(grid: Floats, box: Floats, xs: Floats, ys: Floats) -> Floats:
    """Bilinear values of a mask's grid at places of the picture, 0 outside of its box.

    Args:
        grid: (M, M).
        box: (4,) xyxy that it covers.
        xs: (w,) columns of the picture, in pixels.
        ys: (h,) rows.

    Returns:
        (h, w).
    """
    x1, y1, x2, y2 = box.tolist()
    if not (x2 > x1 and y2 > y1):
        return np.zeros((len(ys), len(xs)), grid.dtype)
    side = grid.shape[-1]
    left, share_x = _cells((xs - x1) / (x2 - x1), side)
    top, share_y = _cells((ys - y1) / (y2 - y1), side)
    right, bottom = np.minimum(left + 1, side - 1), np.minimum(top + 1, side - 1)
    rows = grid[top] + (grid[bottom] - grid[top]) * share_y[:, None]
    values = rows[:, left] + (rows[:, right] - rows[:, left]) * share_x
    inside: Floats = values * ((ys >= y1) & (ys <= y2))[:, None] * ((xs >= x1) & (xs <= x2))
    return inside


def _cells(places: Floats, side: int) -> tuple[Rows, Floats]:
    """The cell before each place in [0, 1] of an axis, and the share of the next one."""
    at = np.clip(places * side - 0.5, 0, side - 1)
    before = at.astype(np.int64)
    return before, at - before


def _enlarged(masks: Tensor, side: int) -> Tensor:
    """Masks (N, M, M) on grids of ``side`` cells, a copy."""
    if side == masks.shape[-1]:
        return masks.clone()
    return F.interpolate(masks.float()[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def _lattice(box: Floats, points: int = LATTICE) -> tuple[Floats, Floats]:
    """Columns and rows at the centres of equal parts of a box."""
    parts = (np.arange(points) + 0.5) / points
    return box[0] + parts * (box[2] - box[0]), box[1] + parts * (box[3] - box[1])


def _clipped(boxes: Floats, others: Floats) -> Floats:
    """Intersections of boxes (..., 4) and others (..., 4), xyxy; without area where they are apart."""
    return np.concatenate(
        [np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])], axis=-1
    )


def _meeting(boxes: Floats, rows: Rows, box: Floats) -> NDArray[np.bool_]:
    """Which of some rows' boxes meet a box: leaves little for the costlier questions."""
    x1, y1, x2, y2 = (boxes[:, side][rows] for side in range(4))
    return np.asarray((x1 < box[2]) & (y1 < box[3]) & (x2 > box[0]) & (y2 > box[1]))


def _areas(boxes: Floats) -> Floats:
    sides: Floats = np.clip(boxes[..., 2:] - boxes[..., :2], 0, None)
    return sides[..., 0] * sides[..., 1]
