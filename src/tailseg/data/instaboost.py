"""InstaBoost: the objects of an image jittered over an in-painted background.

Fang et al., "InstaBoost: Boosting Instance Segmentation via Probability Map Guided Copy-Pasting" (arXiv 1908.07801).
The objects are cut out by their masks and what they leave behind is in-painted; objects whose boxes
overlap, directly or by way of others, make a group; each group is pasted back under one similarity transform close to
the identity; in half of the cases the colours of the whole image are changed.

Points are indices of pixels, so a point (x, y) is the centre of a pixel, and boxes are xyxy without the +1 convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageEnhance

from tailseg.data.annotations.masks import Bitmap
from tailseg.data.placement import Box, Placement, draw_placement, group_box, groups_of, near_sides
from tailseg.data.transforms import Image

INPAINT_RADIUS = 5  # pixels
COLOUR_PROBABILITY = 0.5
COLOUR_TENTHS = (  # saturation, brightness, contrast, sharpness, in this order; factors in tenths, both included
    (ImageEnhance.Color, 0, 30),
    (ImageEnhance.Brightness, 10, 20),
    (ImageEnhance.Contrast, 10, 20),
    (ImageEnhance.Sharpness, 0, 30),
)
HEAT_MAP_SIDE = 64  # cells of the heat map's longer side, at most
RING_WEIGHTS = (0.4, 0.35, 0.25)  # of the rings around a group, the innermost first


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """The annotated objects of an image, at its full resolution."""

    boxes: NDArray[np.float32]  # (N, 4) xyxy in pixels, inside the image
    labels: NDArray[np.int64]  # (N,) in [0, C)
    bitmaps: tuple[Bitmap, ...]  # N, inside the image

    def __len__(self) -> int:
        return len(self.bitmaps)


@dataclass(frozen=True, slots=True)
class InstaBoost:
    """Jitter the objects of an image with ``probability``.

    With ``heatmap``, groups go where the surroundings look like their own (`heat_map`), not just anywhere near.
    """

    probability: float
    heatmap: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"expected a probability, received {self.probability}")

    def chance(self, seed: int) -> np.random.Generator | None:
        """The source of all chance for the sample with this seed, or None where its image is left as it is.

        It is a stream apart from that of ``np.random.default_rng(seed)``, so resizing, cropping and mirroring draw
        the same numbers with and without InstaBoost.
        """
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
        return rng if rng.random() < self.probability else None

    def __call__(self, image: Image, objects: Objects, rng: np.random.Generator) -> tuple[Image, Objects]:
        """The jittered image with what is left of its objects; the arguments are not changed.

        Objects keep their order, and get the box around their new mask. One whose new mask is empty is dropped. If
        that would leave none, image and objects stay as they are.

        Args:
            image: (H, W, 3) uint8 RGB, at full resolution.
            objects: of this image.
            rng: of `chance`.
        """
        image_hw = (image.shape[0], image.shape[1])
        groups = groups_of(objects.boxes)
        placements = [draw_placement(group_box(objects.boxes[group], image_hw), image_hw, rng) for group in groups]
        if self.heatmap:
            members = [[objects.bitmaps[i] for i in group] for group in groups]
            placements = guided(image, members, placements, rng)
        moved: dict[int, Bitmap] = {}
        patches = []
        for group, placement in zip(groups, placements, strict=True):
            cut = [_cut(objects.bitmaps[i], placement.box) for i in group]
            patches.append(_patch(image, cut, placement))
            moved |= {int(i): _moved(part, placement, image_hw) for i, part in zip(group, cut, strict=True)}
        kept = [i for i in range(len(objects)) if moved[i].pixels.any()]
        if not kept:
            return image, objects
        picture = _pasted(image, _union(objects.bitmaps, (0, 0, image_hw[1], image_hw[0])), patches)
        if rng.random() < COLOUR_PROBABILITY:
            picture = change_colours(picture, draw_colour_factors(rng))
        bitmaps = tuple(moved[i] for i in kept)
        boxes = np.array([bitmap.box for bitmap in bitmaps], np.float32)
        return picture, Objects(boxes, objects.labels[kept], bitmaps)


# ---------------------------------------------------------------------------------------------------------
# Groups and where they go


@dataclass(frozen=True, slots=True, eq=False)
class _Patch:
    """A group as it is pasted into the new image."""

    pixels: Image
    alpha: NDArray[np.uint8]  # (h, w), 255 = opaque
    place: tuple[slice, slice]  # in the new image


def _window(box: Box) -> tuple[slice, slice]:
    """Slices that select the box in an image."""
    return slice(box[1], box[3]), slice(box[0], box[2])


def _cut(bitmap: Bitmap, box: Box) -> Bitmap:
    """The part of a bitmap inside a box; a single empty pixel where there is none."""
    x0, y0, x1, y1 = bitmap.box
    left, top, right, bottom = max(x0, box[0]), max(y0, box[1]), min(x1, box[2]), min(y1, box[3])
    if left >= right or top >= bottom:
        return Bitmap(np.zeros((1, 1), np.uint8), box[0], box[1])
    return Bitmap(bitmap.pixels[_window((left - x0, top - y0, right - x0, bottom - y0))], left, top)


def _union(bitmaps: Sequence[Bitmap], box: Box) -> NDArray[np.uint8]:
    """(h, w) uint8, 1 where a bitmap covers the pixel; all bitmaps lie inside the box."""
    union = np.zeros((box[3] - box[1], box[2] - box[0]), np.uint8)
    for bitmap in bitmaps:
        x0, y0, x1, y1 = bitmap.box
        union[y0 - box[1] : y1 - box[1], x0 - box[0] : x1 - box[0]] |= bitmap.pixels
    return union


def _warped(source: NDArray[np.uint8], at: Box, placement: Placement, window: Box, **how: int) -> NDArray[np.uint8]:
    """The window of the new image, filled from ``source``, the pixels of the old one in the box ``at``."""
    matrix = placement.inverse()
    matrix[:, 2] += matrix[:, :2] @ window[:2] - at[:2]
    size = (window[2] - window[0], window[3] - window[1])
    how["flags"] |= cv2.WARP_INVERSE_MAP
    warped: NDArray[np.uint8] = cv2.warpAffine(np.ascontiguousarray(source), matrix, size, **how)
    return warped


def _moved(bitmap: Bitmap, placement: Placement, image_hw: tuple[int, int]) -> Bitmap:
    """An object's mask in the new image, from the nearest pixel of the old one."""
    window = placement.window(bitmap.box, image_hw)
    if window is None:
        return Bitmap(np.zeros((1, 1), np.uint8), 0, 0)
    how = {"flags": cv2.INTER_NEAREST, "borderMode": cv2.BORDER_CONSTANT}
    return Bitmap(_warped(bitmap.pixels, bitmap.box, placement, window, **how), window[0], window[1]).tight()


def _patch(image: Image, members: Sequence[Bitmap], placement: Placement) -> _Patch:
    """A group's pixels and opacity in the new image, cubic. Its colours at the rim come from the image around it."""
    box, (height, width) = placement.box, image.shape[:2]
    window = placement.window(box, (height, width))
    if window is None:
        return _Patch(np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), np.uint8), (slice(0), slice(0)))
    around = (max(box[0] - 3, 0), max(box[1] - 3, 0), min(box[2] + 3, width), min(box[3] + 3, height))
    cubic = {"flags": cv2.INTER_CUBIC}
    pixels = _warped(image[_window(around)], around, placement, window, **cubic, borderMode=cv2.BORDER_REPLICATE)
    opaque = _union(members, box) * np.uint8(255)
    alpha = _warped(opaque, box, placement, window, **cubic, borderMode=cv2.BORDER_CONSTANT)
    return _Patch(pixels, alpha, _window(window))


def _pasted(image: Image, hole: NDArray[np.uint8], patches: Sequence[_Patch]) -> Image:
    """The patches, in their order, over the image without what is in the hole."""
    seen = hole > 0
    for patch in patches:
        seen[patch.place] &= patch.alpha < 255
    picture = inpaint(image, hole, seen)
    for patch in patches:
        picture[patch.place] = blend(picture[patch.place], patch.pixels, patch.alpha)
    return picture


def blend(below: Image, above: Image, alpha: NDArray[np.uint8]) -> Image:
    """One picture (h, w, 3) over another; alpha (h, w) is 255 where the upper one is opaque."""
    opacity = alpha.astype(np.uint16)[:, :, None]
    mixed = below * (255 - opacity) + above * opacity  # at most 255², which 16 bits hold
    return ((mixed + 127) // 255).astype(np.uint8)


def inpaint(image: Image, hole: NDArray[np.uint8], seen: NDArray[np.bool_]) -> Image:
    """A copy of the image, the hole filled by OpenCV's Navier-Stokes method with a radius of five pixels.

    Where ``seen``, it is the picture that ``cv2.inpaint`` makes of all of the image, to the bit; the rest of the hole
    may hold anything. That saves time in two ways. Parts of the hole that lie more than 16 pixels apart do not know of
    each other, so each is filled alone, if any of it is seen. And filling proceeds from the edge at a steady pace, a
    pixel at a time, looking at what is filled within six pixels. So if nothing deeper than D is seen, what lies deeper
    than twice D may as well be given as known: by the time that D is reached, no news of it has come that far.

    Args:
        image: (H, W, 3) uint8.
        hole: (H, W) uint8, 1 = to be filled.
        seen: (H, W) bool, pixels of the hole that matter.
    """
    picture = image.copy()
    _, parts, rectangles, _ = cv2.connectedComponentsWithStats(cv2.dilate(hole, np.ones((17, 17), np.uint8)))
    for part in np.unique(parts[seen]).tolist():
        x, y, width, height = rectangles[part, :4].tolist()
        window = _window((x, y, x + width, y + height))  # eight pixels more than the hole on each side
        inside = hole[window] * (parts[window] == part)
        depth = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
        # Twice and a bit: on a grid, marching takes slanted ways a little more slowly than straight ones.
        inside &= (depth - 10) / 2.25 <= depth[seen[window]].max()
        filled = _filled(image[window], inside)
        np.copyto(picture[window], filled, where=inside[:, :, None] > 0)
    return picture


def _filled(image: Image, hole: NDArray[np.uint8]) -> Image:
    """What OpenCV makes of an image (h, w, 3) with a hole (h, w)."""
    rows = 2 if len(image) == 1 else 1  # of a single row it reads what lies beyond, a new result every time
    whole, mask = np.repeat(image, rows, axis=0), np.repeat(hole, rows, axis=0)
    filled: Image = cv2.inpaint(whole, mask, INPAINT_RADIUS, cv2.INPAINT_NS)
    return filled[: len(image)]


def draw_colour_factors(rng: np.random.Generator) -> tuple[float, ...]:
    """Factors of saturation, brightness, contrast and sharpness, in tenths."""
    return tuple(int(rng.integers(low, high, endpoint=True)) / 10 for _, low, high in COLOUR_TENTHS)


def change_colours(image: Image, factors: Sequence[float]) -> Image:
    """The image with saturation, brightness, contrast and sharpness changed by these factors, in this order."""
    picture = PillowImage.fromarray(image)
    for (enhance, _, _), factor in zip(COLOUR_TENTHS, factors, strict=True):
        picture = enhance(picture).enhance(factor)
    return np.array(picture)


# ---------------------------------------------------------------------------------------------------------
# The appearance consistency heat map (paper, section 3.3)


def guided(
    image: Image, groups: Sequence[Sequence[Bitmap]], placements: Sequence[Placement], rng: np.random.Generator
) -> list[Placement]:
    """The placements with shifts drawn from each group's heat map.

    Heat maps are computed on cells, squares of the image of which at most 64 lie along its longer side. A cell is drawn
    with a probability proportional to its heat, and a pixel in it with equal ones. The group's box stays inside the
    image. Along an axis on which the group is near a side of the image, the shift remains the one of the placement, and
    so it does where no cell can be drawn. Three numbers are drawn for each group whose map has a cell.

    Args:
        image: (H, W, 3) uint8.
        groups: the bitmaps of each group.
        placements: of each group.
        rng: the source of chance.
    """
    if not groups:
        return []
    image_hw = (image.shape[0], image.shape[1])
    size = -(-max(image_hw) // HEAT_MAP_SIDE)  # pixels a side of a cell
    cells = [_cells(bitmaps, image_hw, size) for bitmaps in groups]
    background = _small_background(image, np.any(cells, axis=0), size)
    occupied = np.sum(cells, axis=0)
    return [
        _guided(placement, own, occupied > own, background, size, image_hw, rng)
        for placement, own in zip(placements, cells, strict=True)
    ]


def _guided(
    placement: Placement,
    own: NDArray[np.bool_],
    others: NDArray[np.bool_],
    background: NDArray[np.float32],
    size: int,
    image_hw: tuple[int, int],
    rng: np.random.Generator,
) -> Placement:
    """A placement with its shift drawn from the heat map of its group."""
    x0, y0, x1, y1 = placement.box
    near = [any(sides) for sides in near_sides(placement.box, image_hw)]
    centre = ((y0 + y1) // 2 // size, (x0 + x1) // 2 // size)
    heat, (first_dy, first_dx) = heat_map(background, own, others, centre, (near[1], near[0]))
    if not heat.any():
        return placement
    cell = int(rng.choice(heat.size, p=heat.ravel() / heat.sum()))
    shift = np.array([first_dx + cell % heat.shape[1], first_dy + cell // heat.shape[1]]) * size
    shift += rng.integers(size, size=2) - size // 2
    shift = np.clip(shift, [-x0, -y0], [image_hw[1] - x1, image_hw[0] - y1])
    dx, dy = np.where(near, placement.shift, shift).tolist()
    return replace(placement, shift=(dx, dy))


def heat_map(
    background: NDArray[np.float32],
    own: NDArray[np.bool_],
    others: NDArray[np.bool_],
    centre: tuple[int, int],
    fixed: tuple[bool, bool],
) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """Heat of a group's possible shifts: the similarity of the surroundings there to its own.

    Ring i = 1, 2, 3 is what i dilations of the group by a square of 3 x 3 cells add to i - 1, as far as it is inside
    the image. With B the background and w = (0.4, 0.35, 0.25), the distance of a shift t from where the group is now is

        d(t) = sum over the rings i and their cells p of w_i |B(p + t) - B(p)|, the Euclidean distance of two colours.

    A shift is possible if all p + t are inside the image, the group's centre comes to lie on no other group and stays
    in its row or column where that is fixed. Of the n possible shifts, M and m being their largest and smallest d, each
    has the heat

        h(t) = -log(max((d(t) - m) / (M - m), 1 / n)), or 1 if all have the same distance, or 0 if it is not possible.

    That is the paper's appearance distance of three contour areas, whose widths and falling weights it leaves open (the
    weights here are those of its authors' code), and its h, but for the 1 / n: without it, the best place, which is
    where the group is now, would be infinitely hot. Of n numbers at random in [0, 1], the least is about 1 / n.

    Args:
        background: (h, w, 3) float32, the image without objects, a value a cell.
        own: (h, w) bool, cells of the group.
        others: (h, w) bool, cells of all other groups.
        centre: (y, x), the cell of the group's centre.
        fixed: whether the (y, x) of the centre must stay.

    Returns:
        The heat (n_y, n_x) of shifts by whole cells, and the (dy, dx) of the first; (0, 0) where there are no rings.
    """
    weights, inner = np.zeros(own.shape, np.float32), own
    for weight in RING_WEIGHTS:
        outer = cv2.dilate(inner.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(np.bool_)
        weights[outer & ~inner] = weight
        inner = outer
    ys, xs = np.nonzero(weights)
    if ys.size == 0:
        return np.zeros((0, 0)), (0, 0)
    (top, left), (bottom, right) = (ys.min(), xs.min()), (ys.max(), xs.max())
    dys, dxs = np.arange(own.shape[0] - bottom + top) - top, np.arange(own.shape[1] - right + left) - left
    distance = np.zeros((len(dys), len(dxs)), np.float32)
    for y, x in zip(ys.tolist(), xs.tolist(), strict=True):
        change = background[y - top :, x - left :][: len(dys), : len(dxs)] - background[y, x]
        distance += weights[y, x] * np.sqrt(np.einsum("yxc,yxc->yx", change, change))
    y, x = centre[0] + dys, centre[1] + dxs
    possible = ((y >= 0) & (y < own.shape[0]))[:, None] & ((x >= 0) & (x < own.shape[1]))
    possible &= ~others[y.clip(0, own.shape[0] - 1)][:, x.clip(0, own.shape[1] - 1)]
    possible &= (dys[:, None] == 0) | (not fixed[0])
    possible &= (dxs == 0) | (not fixed[1])
    heat = np.zeros(distance.shape)
    heat[possible] = _heat(distance[possible].astype(np.float64))
    return heat, (int(dys[0]), int(dxs[0]))


def _heat(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """The heat of shifts with these distances (n,)."""
    if distances.size == 0 or distances.min() == distances.max():
        return np.ones(distances.shape)
    share = (distances - distances.min()) / (distances.max() - distances.min())
    return np.asarray(-np.log(np.maximum(share, 1 / len(share))))


def _cells(bitmaps: Sequence[Bitmap], image_hw: tuple[int, int], size: int) -> NDArray[np.bool_]:
    """(h, w) bool, the cells of which the bitmaps cover a pixel."""
    cells = np.zeros((-(-image_hw[0] // size), -(-image_hw[1] // size)), np.bool_)
    for bitmap in bitmaps:
        x0, y0, x1, y1 = bitmap.box
        columns, rows = np.arange(x0 // size, (x1 - 1) // size + 1), np.arange(y0 // size, (y1 - 1) // size + 1)
        starts = np.maximum(rows * size - y0, 0), np.maximum(columns * size - x0, 0)
        covered = np.maximum.reduceat(np.maximum.reduceat(bitmap.pixels, starts[0], axis=0), starts[1], axis=1)
        cells[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] |= covered > 0
    return cells


def _small_background(image: Image, cells: NDArray[np.bool_], size: int) -> NDArray[np.float32]:
    """(h, w, 3) float32, the mean colour of each cell; cells with a pixel of an object are in-painted."""
    (height, width), (rows, columns) = image.shape[:2], cells.shape
    whole = cv2.copyMakeBorder(image, 0, rows * size - height, 0, columns * size - width, cv2.BORDER_REPLICATE)
    small = cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA)
    return _filled(small, cells.astype(np.uint8)).astype(np.float32)
