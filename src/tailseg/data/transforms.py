"""Changes of an image together with its objects: resize and flip.

Each transform takes an image (H, W, 3) uint8, its `Instances` and a numpy generator, the only source of
chance. Masks ride along in their frames: no transform resamples them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tailseg.structures import Instances

Image = NDArray[np.uint8]  # (H, W, 3) RGB
Transform = Callable[[Image, Instances, np.random.Generator], tuple[Image, Instances]]


def clip_boxes(boxes: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) xyxy cut at the image's edges."""
    height, width = image_hw
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def fitted_size(image_hw: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """The largest (height, width) of the same shape with sides of at most ``short`` and ``long`` pixels.

    factor = min(long / max(h, w), short / min(h, w)); a side becomes int(side · factor + 0.5), at least 1.
    """
    height, width = image_hw
    factor = min(long / max(height, width), short / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


@dataclass(frozen=True, slots=True)
class ResizeShortestEdge:
    """Fit the image into a size drawn from ``short`` (pixels, one value: no chance) by ``long``, bilinear."""

    short: tuple[int, ...]
    long: int

    def __post_init__(self) -> None:
        if not self.short or min(*self.short, self.long) < 1:
            raise ValueError(f"expected sides of at least one pixel, received {self.short} and {self.long}")

    def __call__(self, image: Image, instances: Instances, rng: np.random.Generator) -> tuple[Image, Instances]:
        """The resized image; boxes and frames scaled by the true ratio of each axis, boxes clipped."""
        old_h, old_w = image.shape[:2]
        short = self.short[rng.integers(len(self.short))] if len(self.short) > 1 else self.short[0]
        height, width = fitted_size((old_h, old_w), short, self.long)
        ratios = instances.boxes.new_tensor([width / old_w, height / old_h] * 2)
        if (height, width) != (old_h, old_w):
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        boxes = clip_boxes(instances.boxes * ratios, (height, width))
        return image, replace(instances, boxes=boxes, mask_frames=instances.mask_frames * ratios)


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
        return image[:, ::-1], mirrored


def _mirrored(rectangles: Tensor, width: int) -> Tensor:
    """(N, 4) xyxy in a mirror of ``width`` pixels: x becomes width - x, left and right change places."""
    flipped = rectangles[:, [2, 1, 0, 3]]
    flipped[:, [0, 2]] = width - flipped[:, [0, 2]]
    return flipped


@dataclass(frozen=True, slots=True)
class Compose:
    """Transforms in a row."""

    transforms: tuple[Transform, ...]

    def __call__(self, image: Image, instances: Instances, rng: np.random.Generator) -> tuple[Image, Instances]:
        """The image and its objects after all transforms."""
        for transform in self.transforms:
            image, instances = transform(image, instances, rng)
        return image, instances


def fit_transform(short: int, long: int) -> Compose:
    """What evaluation and prediction do to an image: fit it, nothing by chance."""
    return Compose((ResizeShortestEdge((short,), long),))
