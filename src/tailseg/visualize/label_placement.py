"""Places for the labels of a picture: greedy placement of rectangles around boxes.

Shape letters: N boxes, K candidate places of one label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def place_labels(
    boxes: NDArray[np.float64],
    sizes: Sequence[tuple[int, int]],
    picture_hw: tuple[int, int],
    *,
    gap: int = 2,
) -> list[tuple[int, int, int, int] | None]:
    """Find a place for each label, greedily in the given order.

    Of the places around a box (above, below, left, right, at growing distances, and last inside it) the one
    is taken that is free of other labels, near, and covers least of all boxes.

    Args:
        boxes: (N, 4) xyxy in pixels.
        sizes: (width, height) of each label in pixels.
        picture_hw: labels stay inside.
        gap: pixels between a box and its label.

    Returns:
        For each label its xyxy pixels, or None where every place would cover another label.
    """
    taken = np.zeros((0, 4))
    extents = (boxes[:, 2:] - boxes[:, :2]).clip(min=1).prod(axis=1)
    places: list[tuple[int, int, int, int] | None] = []
    for index, size in enumerate(sizes):
        plates, cost = _candidates(boxes[index], size, picture_hw, gap)
        free = (_overlaps(plates, taken).sum(axis=1) == 0) if len(plates) else np.zeros(0, dtype=bool)
        if not free.any():
            places.append(None)
            continue
        area = size[0] * size[1]
        shared = _overlaps(plates, boxes)
        own, others = shared[:, index], np.delete(shared, index, axis=1)
        hidden = (others / np.delete(extents, index)).sum(axis=1)
        # Own box: to be avoided before anything else. Others: better to cover a part than to stray far,
        # and better a part of a large object than all of a small one.
        cost = cost + 20 * own / area + np.minimum(others.sum(axis=1) / area, 1) + 4 * np.minimum(hidden, 1.5)
        best = plates[np.where(free, cost, np.inf).argmin()]
        taken = np.concatenate([taken, best[None]])
        places.append((int(best[0]), int(best[1]), int(best[2]), int(best[3])))
    return places


def _candidates(
    box: NDArray[np.float64], size: tuple[int, int], picture_hw: tuple[int, int], gap: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Plates (K, 4) inside the picture, and their distance from the box in label heights (K,)."""
    (width, height), (x0, y0, x1, y1) = size, box
    x0, y0, x1, y1 = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
    across = (x0, (x0 + x1 - width) // 2, x1 - width, x0 - width // 3, x1 - 2 * width // 3)
    along = (y0, (y0 + y1 - height) // 2, y1 - height)
    rows: list[tuple[float, float, float]] = []  # left, top, cost
    for step in range(9):
        away = gap + step * height // 2
        for order, left in enumerate(across):
            inside = min(max(left, 0), max(picture_hw[1] - width, 0))
            rows.append((inside, y0 - away - height, step + 0.01 * order))
            rows.append((inside, y1 + away, step + 0.1 + 0.01 * order))
        for order, top in enumerate(along):  # dearer: beside a box, a label often seems to be a neighbour's
            inside = min(max(top, 0), max(picture_hw[0] - height, 0))
            rows.append((x0 - away - width, inside, step + 0.6 + 0.01 * order))
            rows.append((x1 + away, inside, step + 0.6 + 0.01 * order))
    for left in across[:3]:
        for top in along:
            rows.append((left, top, 0.3))
    table = np.array(rows, dtype=np.float64)
    plates = np.concatenate([table[:, :2], table[:, :2] + np.array(size)], axis=1)
    fits = (plates[:, :2] >= 0).all(axis=1)
    fits &= (plates[:, 2] <= picture_hw[1]) & (plates[:, 3] <= picture_hw[0])
    return plates[fits], table[fits, 2]


def _overlaps(plates: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area in pixels shared by each of (K, 4) and each of (N, 4): (K, N)."""
    low = np.maximum(plates[:, None, :2], boxes[None, :, :2])
    high = np.minimum(plates[:, None, 2:], boxes[None, :, 2:])
    shared: NDArray[np.float64] = (high - low).clip(min=0).prod(axis=2)
    return shared
