"""From a mask's grid of probabilities over its box to pixels of the image, and to COCO run-length codes.

Nothing of the image's size is ever painted. For drawing, the grid is sampled at the pixel centres inside the box; the
runs of the whole image follow from the few of those pixels beside which a column can change. Shape letters: N objects,
M side of a grid, h and w the pixels inside a box.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tailseg.layers.triton_support import has_triton

if TYPE_CHECKING:  # scoring a file needs codes, but not PyTorch with its seconds and its gigabyte
    from torch import Tensor

    Values = Tensor | NDArray[np.float32]

Pixels = NDArray[np.bool_]

GROUP = 8192  # columns that are looked at together


Rle = dict[str, Any]
"""A mask in COCO's compressed run-length code: size, [height, width] of the image, and counts, a string."""


def encode_masks(probs: Values, boxes: Values, image_hw: tuple[int, int]) -> list[Rle]:
    """Paste each grid of probabilities into its box and encode the pixels that reach 0.5.

    Bilinear sampling at pixel centres with zeros outside the grid, as Mask R-CNN's implementations do it:
    pixel x lies at (x + 0.5 - x1) / (x2 - x1) * M - 0.5 of the grid.

    Args:
        probs: (N, M, M) float in [0, 1].
        boxes: (N, 4) float, xyxy in pixels of the image; may reach beyond it.
        image_hw: (height, width) of the image in pixels.

    Returns:
        N codes. A box without area, without a pixel centre inside, or with a value that is not finite gives
        the code of an empty mask.
    """
    height, width = image_hw
    if len(probs) and not isinstance(probs, np.ndarray) and probs.is_cuda and has_triton():
        assert not isinstance(boxes, np.ndarray)
        from tailseg.layers.paste_triton import changes

        codes = _compressed(*changes(probs, boxes, image_hw), height * width)
    else:
        codes = _codes_on_cpu(probs, boxes, image_hw)
    return [{"size": list(image_hw), "counts": code} for code in codes]


def _codes_on_cpu(probs: Values, boxes: Values, image_hw: tuple[int, int]) -> list[str]:
    """Compressed run lengths of each mask."""
    height, width = image_hw
    grids, corners = _padded(probs), _to_float64(boxes)
    sound = np.all(np.isfinite(corners), axis=1) & np.all(corners[:, :2] < corners[:, 2:], axis=1)
    corners = np.where(sound[:, None], corners, [-2.0, -2.0, -1.0, -1.0])  # outside of any image
    across = _axis_samples(corners[:, 0], corners[:, 2], width, grids.shape[1] - 2)
    down = _axis_samples(corners[:, 1], corners[:, 3], height, grids.shape[1] - 2)
    return [
        code
        for group in _groups(across.numbers)
        for code in _run_lengths(grids[group], across.of(group), down.of(group), image_hw)
    ]


def mask_crop(probs: Values, box: Values, image_hw: tuple[int, int]) -> tuple[Pixels, tuple[int, int]]:
    """The pixels of one mask inside its box, for drawing.

    Args:
        probs: (M, M) float in [0, 1].
        box: (4,) float, xyxy in pixels of the image; may reach beyond it.
        image_hw: (height, width) of the image in pixels.

    Returns:
        (h, w) bool, and the image's (row, column) of its first pixel. A side may be 0.
    """
    (x1, y1, x2, y2), (height, width) = _to_float64(box), image_hw
    if not (np.isfinite([x1, y1, x2, y2]).all() and x2 > x1 and y2 > y1):
        return np.zeros((0, 0), dtype=bool), (0, 0)
    grid = _padded(probs[None])[0]
    across = _axis_samples(np.array([x1]), np.array([x2]), width, len(grid) - 2)
    down = _axis_samples(np.array([y1]), np.array([y2]), height, len(grid) - 2)
    along_x = _mix(grid[across.cells], grid[across.cells + 1], across.shares[:, None])  # (w, M + 2)
    sampled = _mix(along_x[:, down.cells], along_x[:, down.cells + 1], down.shares)  # (w, h)
    pixels: Pixels = np.asarray(sampled >= 0.5)
    return np.ascontiguousarray(pixels.T), (int(down.first[0]), int(across.first[0]))


class _Samples(NamedTuple):
    """Pixel centres of N boxes along one axis, and their places on the boxes' padded grids; T samples of all boxes."""

    first: NDArray[np.int64]  # (N,), the first pixel of each box
    numbers: NDArray[np.int64]  # (N,), pixels of each box
    owners: NDArray[np.int64]  # (T,), the box of each sample, rising
    cells: NDArray[np.int64]  # (T,), the padded grid's value before the sample, rising inside a box
    shares: NDArray[np.float32]  # (T,), the next value's share of the sample

    def of(self, group: slice) -> _Samples:
        """The samples of neighbouring boxes."""
        begin, end = np.searchsorted(self.owners, [group.start, group.stop])
        owners = self.owners[begin:end] - group.start
        return _Samples(self.first[group], self.numbers[group], owners, self.cells[begin:end], self.shares[begin:end])


def _padded(probs: Values) -> NDArray[np.float32]:
    """Grids with a ring of zeros, (N, M + 2, M + 2) and x first, since codes run down the columns."""
    grids = probs if isinstance(probs, np.ndarray) else probs.detach().cpu().float().numpy()
    return np.pad(grids.transpose(0, 2, 1), ((0, 0), (1, 1), (1, 1)))


def _to_float64(boxes: Values) -> NDArray[np.float64]:
    array: NDArray[np.float64]
    array = boxes.astype(np.float64) if isinstance(boxes, np.ndarray) else boxes.detach().cpu().double().numpy()
    return array


def _mix(low: NDArray[np.float32], high: NDArray[np.float32], share: NDArray[np.float32]) -> NDArray[np.float32]:
    """Linear interpolation, low + share * (high - low); overwrites ``high``."""
    high -= low
    high *= share
    high += low
    return high


def _axis_samples(start: NDArray[np.float64], end: NDArray[np.float64], pixels: int, cells: int) -> _Samples:
    """Positions of the pixel centres in [start, end] on grids of ``cells`` padded by one zero at both ends.

    Outside the box a sample is less than half of a probability, hence never 0.5: those pixels are left out.
    """
    first = np.ceil(np.clip(start - 0.5, 0, pixels)).astype(np.int64)
    last = np.floor(np.clip(end - 0.5, -1, pixels - 1)).astype(np.int64)
    numbers = np.maximum(last - first + 1, 0)
    owners = np.repeat(np.arange(len(start)), numbers)
    centres = _positions(numbers, owners) + first[owners] + 0.5
    places = (centres - start[owners]) / (end - start)[owners] * cells + 0.5
    before = np.minimum(places.astype(np.int64), cells)
    return _Samples(first, numbers, owners, before, (places - before).astype(np.float32))


def _positions(numbers: NDArray[np.int64], owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """(T,): 0, 1, ... up to the number of each box's samples."""
    return np.arange(len(owners)) - (np.cumsum(numbers) - numbers)[owners]


def _groups(numbers: NDArray[np.int64]) -> list[slice]:
    """Neighbouring boxes of together about `GROUP` columns: what is made of them stays in the processor's cache."""
    parts = np.cumsum(numbers) // GROUP
    edges = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(numbers)]
    return [slice(*pair) for pair in itertools.pairwise(edges) if pair[0] < pair[1]]


def _run_lengths(grids: NDArray[np.float32], across: _Samples, down: _Samples, image_hw: tuple[int, int]) -> list[str]:
    """Lengths of the alternating runs 0, 1, 0, ... of whole images, down their columns; only the first may be 0.

    Between two values of the grid a column's samples rise or fall, rounding included: low + share * (high - low)
    follows the share. So a cell with both ends on one side of 0.5 holds no change of the mask, and any other at most
    one, which is searched for by halves.

    Args:
        grids: (N, M + 2, M + 2), padded, x first.
        across: columns of the boxes, T of them.
        down: rows of the boxes.
        image_hw: (height, width) of the image in pixels.

    Returns:
        The runs of each of the N masks, compressed; they sum to the number of pixels.
    """
    height, width = image_hw
    count, side, _ = grids.shape
    cells = side - 1
    owners = across.owners
    lines, before = grids.reshape(-1, side), owners * side + across.cells
    # The bilinear kernel is separable: first along x on the small grid, then along y.
    columns = _mix(lines[before], lines[before + 1], across.shares[:, None])  # (T, M + 2)

    # Rows of a box that lie in each cell: [edges[k], edges[k + 1])
    inside = np.bincount(down.owners * cells + down.cells, minlength=count * cells).reshape(count, cells)
    edges = np.concatenate([np.zeros((count, 1), np.int64), np.cumsum(inside, axis=1)], axis=1)
    filled = (inside > 0)[owners]  # (T, cells)

    low, slope = columns[:, :-1], np.diff(columns, axis=1)
    first, last = low >= 0.5, slope + low >= 0.5  # of a share of 0 and of 1
    column, cell = _nonzero((first != last) & filled)
    box, goal = owners[column], last[column, cell]
    top, bottom = edges[box, cell], edges[box, cell + 1]
    shares_from = (np.cumsum(down.numbers) - down.numbers)[box]
    ends = top + shares_from, bottom + shares_from
    turn = _first_row(low[column, cell], slope[column, cell], goal, down.shares, *ends) - shares_from
    first[column, cell] = np.where(turn == top, goal, ~goal)
    last[column, cell] = np.where(turn == bottom, ~goal, goal)

    # Changes of a column in their order: on entering each cell, inside it, and at last below the box.
    changes = np.zeros((2 * cells + 1, len(columns)), dtype=bool)
    state = np.zeros(len(columns), dtype=bool)
    for k, (here, above, below) in enumerate(zip(*map(_columns_side_by_side, (filled, first, last)), strict=True)):
        np.logical_and(here, above != state, out=changes[2 * k])
        np.logical_and(here, above != below, out=changes[2 * k + 1])
        np.copyto(state, below, where=here)
    changes[-1] = state
    column, place = _nonzero(changes.T)
    rows = edges[owners[column], place // 2]
    rows[place % 2 == 1] = turn[(top < turn) & (turn < bottom)]
    starts = (across.first[owners] + _positions(across.numbers, owners)) * height + down.first[owners]
    places, boxes = starts[column] + rows, owners[column]
    # A column that reaches the image's lower edge runs on into the next one where that begins at the upper edge.
    twice = np.flatnonzero((places[1:] == places[:-1]) & (boxes[1:] == boxes[:-1]))
    if len(twice):
        places, boxes = (np.delete(each, np.concatenate([twice, twice + 1])) for each in (places, boxes))
    return _compressed(places, np.bincount(boxes, minlength=count), height * width)


def _columns_side_by_side(table: Pixels) -> Pixels:
    return np.ascontiguousarray(table.T)


def _nonzero(table: Pixels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`np.nonzero` of a table, several times faster."""
    return np.divmod(np.flatnonzero(np.ascontiguousarray(table)), table.shape[1])


def _first_row(
    low: NDArray[np.float32],
    slope: NDArray[np.float32],
    goal: NDArray[np.bool_],
    shares: NDArray[np.float32],
    top: NDArray[np.int64],
    bottom: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The first in [top, bottom) whose sample is on the side of 0.5 that ``goal`` says; bottom where none is.

    All samples behind that one are on its side too.
    """
    top, bottom = top.copy(), bottom.copy()
    open_ = np.flatnonzero(top < bottom)
    while len(open_):
        middle = (top[open_] + bottom[open_]) // 2
        reached = (slope[open_] * shares[middle] + low[open_] >= 0.5) == goal[open_]
        bottom[open_[reached]] = middle[reached]
        top[open_[~reached]] = middle[~reached] + 1
        open_ = open_[top[open_] < bottom[open_]]
    return top


def _compressed(places: NDArray[np.int64], numbers: NDArray[np.int64], pixels: int) -> list[str]:
    """COCO's strings of run lengths of masks whose pixels change at these places, so many in each mask, rising there.

    A run from the fourth on is told as its difference from the one before the last, and each number in base 32, the
    lowest digit first: a character of 5 bits, the last one's highest of which is the sign, and a bit for "more follow".
    """
    # Each mask's places, and the image's end.
    ends = np.insert(places, np.cumsum(numbers), pixels)
    amounts = numbers + 1
    first = np.cumsum(amounts) - amounts
    runs = np.diff(ends, prepend=0)
    runs[first] = ends[first]
    place = np.arange(len(runs)) - np.repeat(first, amounts)
    told = runs.copy()
    late = np.flatnonzero(place > 2)
    told[late] -= runs[late - 2]
    left = (runs > 0) | (place == 0)  # an end where the last change is has no run
    digits = np.ones(len(told), np.int64)
    for bits in range(4, 64, 5):
        longer = (told >> bits != 0) & (told >> bits != -1)
        if not longer.any():
            break
        digits += longer
    digits *= left
    stops = np.cumsum(digits)
    text = np.empty(stops[-1] if len(stops) else 0, np.uint8)
    for digit in range(digits.max(initial=0)):
        own = np.flatnonzero(digits > digit)
        more = digits[own] > digit + 1
        text[stops[own] - digits[own] + digit] = (told[own] >> 5 * digit & 31) + 32 * more + 48
    whole, after = text.tobytes().decode("ascii"), [0, *stops[first + numbers].tolist()]
    return [whole[begin:end] for begin, end in itertools.pairwise(after)]
