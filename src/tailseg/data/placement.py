"""Places for groups of overlapping objects: where InstaBoost moves them."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]  # xyxy in pixels, at least one wide and high
SCALES = (0.8, 1.2)
SHIFT_DIVISOR = 15  # a group moves by at most this part of its width and height
DEGREES = (-1, 0, 1)
NEAR = 10  # pixels: a group this close to a side of the image may be cut by it


def groups_of(boxes: NDArray[np.float32]) -> list[NDArray[np.int64]]:
    """Positions of the boxes (N, 4) xyxy, by groups of boxes that overlap, directly or by way of others.

    Boxes that only touch do not overlap. Groups are in the order of their first box, boxes in their own order.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    overlap = np.asarray(((low[:, None] < high) & (low < high[:, None])).all(axis=2))
    left = np.ones(len(boxes), np.bool_)
    groups = []
    while left.any():
        reached = np.zeros(len(boxes), np.bool_)
        reached[left.argmax()] = True
        new = reached
        while new.any():
            new = overlap[new].any(axis=0) & ~reached
            reached = reached | new
        groups.append(np.flatnonzero(reached))
        left &= ~reached
    return groups


def group_box(boxes: NDArray[np.float32], image_hw: tuple[int, int]) -> Box:
    """The box around boxes (N, 4), in whole pixels inside the image; halves are rounded up."""
    height, width = image_hw
    x0, y0 = np.floor(boxes[:, :2].min(axis=0) + 0.5).astype(int).tolist()
    x1, y1 = np.floor(boxes[:, 2:].max(axis=0) + 0.5).astype(int).tolist()
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return x0, y0, min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)


@dataclass(frozen=True, slots=True)
class Placement:
    """The similarity transform of a group."""

    box: Box  # of the group, where it comes from
    scale: float
    degrees: int  # of rotation
    shift: tuple[int, int]  # dx, dy in pixels

    def inverse(self) -> NDArray[np.float64]:
        """(2, 3): takes a point of the new image to the point of the old one that it shows.

        With the group's box of w x h pixels at (x0, y0), t its centre plus the shift, and (X, Y) = (x, y) - t:
        x0 + (cos · X + sin · Y) / scale + w / 2, and y0 + (-sin · X + cos · Y) / scale + h / 2.
        """
        x0, y0, x1, y1 = self.box
        centre = np.array([x0 + x1, y0 + y1]) / 2
        cos, sin = np.cos(np.radians(self.degrees)), np.sin(np.radians(self.degrees))
        turn = np.array([[cos, sin], [-sin, cos]]) / self.scale
        return np.column_stack([turn, centre - turn @ (centre + self.shift)])

    def window(self, box: Box, image_hw: tuple[int, int]) -> Box | None:
        """The part of the new image that can show anything of ``box``; None where there is none."""
        forward = cv2.invertAffineTransform(self.inverse())
        x, y = [box[0] - 1, box[2]], [box[1] - 1, box[3]]  # a pixel around: cubic interpolation reaches that far
        corners = np.array([[x[0], x[1], x[0], x[1]], [y[0], y[0], y[1], y[1]], [1, 1, 1, 1]])
        points = forward @ corners
        low = np.maximum(np.floor(points.min(axis=1)).astype(int) - 1, 0)
        high = np.minimum(np.ceil(points.max(axis=1)).astype(int) + 2, image_hw[::-1])
        return (*low.tolist(), *high.tolist()) if (low < high).all() else None


def draw_placement(box: Box, image_hw: tuple[int, int], rng: np.random.Generator) -> Placement:
    """A transform close to the identity for the group in ``box``; four numbers are drawn in any case.

    A group near a side of the image is not shrunk, turned or moved away from that side, for it may be cut there.
    """
    furthest_x, furthest_y = (box[2] - box[0]) // SHIFT_DIVISOR, (box[3] - box[1]) // SHIFT_DIVISOR
    scale = rng.uniform(*SCALES)
    dx = int(rng.integers(-furthest_x, furthest_x, endpoint=True))
    dy = int(rng.integers(-furthest_y, furthest_y, endpoint=True))
    degrees = int(rng.choice(DEGREES))
    near_x, near_y = near_sides(box, image_hw)
    if any(near_x + near_y):
        scale, degrees = max(scale, 1.0), 0
    return Placement(box, scale, degrees, (_outward(dx, near_x), _outward(dy, near_y)))


def near_sides(box: Box, image_hw: tuple[int, int]) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
    """Return whether a box is within ten pixels of the (left, right) and the (upper, lower) side of the image."""
    height, width = image_hw
    x0, y0, x1, y1 = box
    return (x0 < NEAR, x1 > width - NEAR), (y0 < NEAR, y1 > height - NEAR)


def _outward(shift: int, near: tuple[bool, bool]) -> int:
    """A shift along an axis without what leads away from a side that is near."""
    shift = min(shift, 0) if near[0] else shift
    return max(shift, 0) if near[1] else shift
