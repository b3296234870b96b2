"""Changes of an image together with its objects: resize, crop, flip and colours.

Each transform takes an image (H, W, 3) uint8, its `Instances` and a numpy generator, the only source of
chance. Masks ride along in their frames: no transform resamples them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailseg.data.images import fitted_size
from tailseg.recipes.data_section import DataRecipe
from tailseg.structures import Instances

Image = NDArray[np.uint8]  # (H, W, 3) RGB
Transform = Callable[[Image, Instances, np.random.Generator], tuple[Image, Instances]]
LUMA = (0.299, 0.587, 0.114)  # of R, G and B in a grey value (ITU-R BT.601)


def clip_boxes(boxes: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) xyxy cut at the image's edges."""
    height, width = image_hw
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


@dataclass(frozen=True, slots=True)
class ResizeShortestEdge:
    """Fit the image into a size drawn from ``short`` (pixels, one value: no chance) by ``long``, bilinear.

    With ``from_reduced`` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size where that is still at least the size
    drawn. Sizes, boxes and masks come out the same; pixels are averaged before they are interpolated, so fine texture
    has less aliasing: for training.
    """

    short: tuple[int, ...]
    long: int
    from_reduced: bool = False
    within: tuple[int, int] | None = None  # height and width that are not exceeded either

    def __post_init__(self) -> None:
        if not self.short or min(*self.short, self.long) < 1:
            raise ValueError(f"expected sides of at least one pixel, received {self.short} and {self.long}")

    def size(self, image_hw: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """The size that an image is given: all chance there is in resizing it."""
        short = self.short[rng.integers(len(self.short))] if len(self.short) > 1 else self.short[0]
        return fitted_size(image_hw, short, self.long, self.within)

    def __call__(self, image: Image, instances: Instances, rng: np.random.Generator) -> tuple[Image, Instances]:
        """The resized image; boxes and frames scaled by the true ratio of each axis, boxes clipped."""
        return _resized(image, instances, self.size((image.shape[0], image.shape[1]), rng))


@dataclass(frozen=True, slots=True)
class ResizeLongestEdge:
    """Give the longer edge a length drawn from ``low`` to ``high`` (pixels, both included), bilinear.

    ``from_reduced`` as in `ResizeShortestEdge`.
    """

    low: int
    high: int
    from_reduced: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"expected edges of at least one pixel in order, received {self.low} and {self.high}")

    def size(self, image_hw: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """The size that an image is given: all chance there is in resizing it."""
        edge = int(rng.integers(self.low, self.high + 1))
        return fitted_size(image_hw, edge, edge)

    def __call__(self, image: Image, instances: Instances, rng: np.random.Generator) -> tuple[Image, Instances]:
        """The resized image; boxes and frames scaled by the true ratio of each axis, boxes clipped."""
        return _resized(image, instances, self.size((image.shape[0], image.shape[1]), rng))


def _resized(image: Image, instances: Instances, image_hw: tuple[int, int]) -> tuple[Image, Instances]:
    (old_h, old_w), (height, width) = image.shape[:2], image_hw
    ratios = instances.boxes.new_tensor([width / old_w, height / old_h] * 2)
    if (height, width) != (old_h, old_w):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
    boxes = clip_boxes(instances.boxes * ratios, image_hw)
    return image, replace(instances, boxes=boxes, mask_frames=instances.mask_frames * ratios)


@dataclass(frozen=True, slots=True)
class RandomCrop:
    """Cut out a square of ``side`` pixels at a random place; an axis that is shorter stays whole.

    Objects that are cut get the box around what is left of their mask; those of which nothing is left are dropped.
    """

    side: int

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"expected a side of at least one pixel, received {self.side}")

    def __call__(self, image: Image, instances: Instances, rng: np.random.Generator) -> tuple[Image, Instances]:
        """The crop; two numbers are drawn in any case."""
        y, x = (int(rng.integers(max(side - self.side, 0) + 1)) for side in image.shape[:2])
        crop = image[y : y + self.side, x : x + self.side]
        height, width = crop.shape[:2]
        shift = instances.boxes.new_tensor([x, y, x, y])
        boxes, frames = instances.boxes - shift, instances.mask_frames - shift
        clipped = clip_boxes(boxes, (height, width))
        cut = (clipped != boxes).any(dim=1)
        left = boxes_from_masks(instances.masks[cut], frames[cut], (0, 0, width, height))
        boxes[cut] = left
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return crop, replace(instances, boxes=boxes, mask_frames=frames)[kept]


@dataclass(frozen=True, slots=True)
class HorizontalFlip:
    """Mirror left and right with ``probability``."""

    probability: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"expected a probability, received {self.probability}")

    def __call__(self, image: Image, instances: Instances, rng: np.random.Generator) -> tuple[Image, Instances]:
        """The image as it is or mirrored; one number is drawn in either case."""
        if rng.random() >= self.probability:
            return image, instances
        width = image.shape[1]
        mirrored = replace(
            instances,
            boxes=_mirrored(instances.boxes, width),
            # The whole grid is mirrored, unused cells included, and so is the rectangle that it covers.
            masks=instances.masks.flip(-1),
            mask_frames=_mirrored(instances.mask_frames, width),
        )
        return cv2.flip(image, 1).astype(np.uint8, copy=False), mirrored


def _mirrored(rectangles: Tensor, width: int) -> Tensor:
    """(N, 4) xyxy in a mirror of ``width`` pixels: x becomes width - x, left and right change places."""
    flipped = rectangles[:, [2, 1, 0, 3]]
    flipped[:, [0, 2]] = width - flipped[:, [0, 2]]
    return flipped


@dataclass(frozen=True, slots=True)
class ColourJitter:
    """Change brightness, contrast and saturation by factors drawn from 1 - ``strength`` to 1 + ``strength``.

    With x the image, g(x) the grey value of each pixel, m the mean of g over the image, and the factors b, c, s:

        b · (c · (s · x + (1 - s) · g(x)) + (1 - c) · m), rounded and cut to 0..255 once, at the end

    (in fixed point: to within a level).
    Hue stays: it is what tells many classes apart.
    """

    strength: float

    def __post_init__(self) -> None:
        if not 0 <= self.strength < 1:
            raise ValueError(f"expected a strength of at least 0 and below 1, received {self.strength}")

    def __call__(self, image: Image, instances: Instances, rng: np.random.Generator) -> tuple[Image, Instances]:
        """The image in other colours; three numbers are drawn."""
        brightness, contrast, saturation = rng.uniform(1 - self.strength, 1 + self.strength, 3)
        mean = np.dot(LUMA, cv2.mean(image)[:3])
        matrix = np.empty((3, 4))
        matrix[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * np.array(LUMA))
        matrix[:, 3] = brightness * (1 - contrast) * mean
        return cv2.transform(image, matrix).astype(np.uint8, copy=False), instances


@dataclass(frozen=True, slots=True)
class Compose:
    """Transforms in a row."""

    transforms: tuple[Transform, ...]

    def size(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width of an image after the transforms, where nothing is done by chance."""
        for transform in self.transforms:
            if isinstance(transform, ResizeShortestEdge | ResizeLongestEdge):
                image_hw = transform.size(image_hw, np.random.default_rng(0))
        return image_hw

    def reduction(self, image_hw: tuple[int, int], seed: int) -> int:
        """By how much (1, 2, 4 or 8) an image may be reduced while it is decoded for a sample with this seed.

        Only if the first transform resizes and agrees, and only by divisors of both sides, since factors and boxes
        are then the same numbers as of the whole image, to the bit.
        """
        first = self.transforms[0] if self.transforms else None
        if not isinstance(first, ResizeShortestEdge | ResizeLongestEdge) or not first.from_reduced:
            return 1
        needed = first.size(image_hw, np.random.default_rng(seed))
        sides = list(zip(image_hw, needed, strict=True))
        return next((k for k in (8, 4, 2) if all(a % k == 0 and a // k >= b for a, b in sides)), 1)

    def __call__(self, image: Image, instances: Instances, rng: np.random.Generator) -> tuple[Image, Instances]:
        """The image and its objects after all transforms."""
        for transform in self.transforms:
            image, instances = transform(image, instances, rng)
        return image, instances


def fit_transform(short: int, long: int, within: tuple[int, int] | None = None) -> Compose:
    """Transform of evaluation and prediction: fit the image, nothing by chance."""
    return Compose((ResizeShortestEdge((short,), long, within=within),))


def train_transform(recipe: DataRecipe) -> Compose:
    """Transform of training: resize, crop, mirror, change colours, all by chance.

    With `data.long_edges` of 0.1 and 2 times `data.crop` that is large-scale jitter (Simple Copy-Paste, section 3): the
    image fitted into a square of a random size, cut where that is larger; padding comes with the batch.
    """
    resize: Transform = ResizeShortestEdge(recipe.short_edges, recipe.long_edge, from_reduced=True)
    if recipe.long_edges is not None:
        resize = ResizeLongestEdge(*recipe.long_edges, from_reduced=True)
    crop = () if recipe.crop is None else (RandomCrop(recipe.crop),)
    colours = () if recipe.colour_jitter == 0 else (ColourJitter(recipe.colour_jitter),)
    return Compose((resize, *crop, HorizontalFlip(recipe.flip), *colours))


def boxes_from_masks(masks: Tensor, frames: Tensor, window: tuple[float, float, float, float] | None = None) -> Tensor:
    """Tight boxes around the covered cells, for instances whose image was cropped.

    A cell counts as covered from 128 on. A thin object in a large frame covers no cell by half; of one without such a
    cell in the window every cell counts that it touches.

    Args:
        masks: (N, S, S) uint8.
        frames: (N, 4) float32, xyxy in pixels: what each grid covers.
        window: rectangle xyxy in pixels; cells outside of it do not count and boxes are clipped to it. Give
            the image's own rectangle to leave out the margin that repeats the mask beyond the image's edge.

    Returns:
        (N, 4) float32 xyxy in pixels; four zeros where no cell is covered.
    """
    count, side = masks.shape[0], masks.shape[-1]
    if count == 0:
        return frames.new_zeros((0, 4))
    steps = torch.arange(side + 1, device=masks.device, dtype=frames.dtype) / side
    origins, extents = frames[:, :2], frames[:, 2:] - frames[:, :2]
    edges = origins[:, :, None] + extents[:, :, None] * steps  # (N, 2, S + 1): x edges, y edges
    low, high = edges[..., :-1], edges[..., 1:]
    if window is not None:
        first = frames.new_tensor(window[:2])[:, None]
        last = frames.new_tensor(window[2:])[:, None]
        slack = 1e-3 * (high - low)  # a cell that only touches the window is outside, in spite of rounding
        inside = (high > first + slack) & (low < last - slack)  # (N, 2, S)
        masks = masks * (inside[:, 1, :, None] & inside[:, 0, None, :])
        low, high = low.maximum(first), high.minimum(last)
    covered = masks >= 128
    covered = torch.where(covered.flatten(1).any(dim=1)[:, None, None], covered, masks > 0)
    used = torch.stack([covered.any(dim=1), covered.any(dim=2)], dim=1)  # (N, 2, S): columns, rows
    infinity = frames.new_tensor(float("inf"))
    corners = [torch.where(used, low, infinity).amin(dim=2), torch.where(used, high, -infinity).amax(dim=2)]
    return torch.where(used.any(dim=2).all(dim=1)[:, None], torch.cat(corners, dim=1), 0.0)
