"""Simple Copy-Paste: objects of other training images pasted into an image, those of rare classes first.

Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation" (arXiv 2012.07177).
Objects are cut out by their masks, scaled, perhaps mirrored, and pasted anywhere in the image. What they cover is taken
off the masks of the objects below them. Unlike there, objects are drawn one by one instead of by image (`ObjectPool`),
so that rare classes can come first, and the image that they are pasted into is scaled afterwards, with all that is in
it. No class is pasted into an image that the annotations say was verified not to hold it: such images are where the
model learns what does not belong to the class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.masks import Bitmap
from tailseg.data.instaboost import Objects, blend
from tailseg.data.sampling import class_repeat_factors, trained_rows
from tailseg.data.transforms import Image
from tailseg.errors import UserError
from tailseg.recipes.data_section import DataRecipe

MOST_OBJECTS = 3  # pasted into an image; each number from 1 to this is equally likely
SCALES = (0.5, 1.5)  # of an object, beside the ratio of the two images' longer sides
LEAST_LEFT = 0.1  # an object with a smaller part of its pixels left is dropped


@dataclass(frozen=True, slots=True)
class Drawn:
    """An object that chance chose, and how it is pasted."""

    row: int  # of the annotations
    size: float  # in `SCALES`
    mirrored: bool
    place: tuple[float, float]  # x, y in [0, 1) of the places where it lies inside the image

    def scale(self, source_hw: tuple[int, int], image_hw: tuple[int, int]) -> float:
        """By how much the object is enlarged, unless it then is larger than the image."""
        return self.size * max(image_hw) / max(source_hw)

    def reduction(self, source_hw: tuple[int, int], image_hw: tuple[int, int]) -> int:
        """By how much (1, 2, 4 or 8) its image may be reduced while it is decoded: never below the size it is given."""
        scale = self.scale(source_hw, image_hw)
        return next((k for k in (8, 4, 2) if scale * k <= 1 and not any(side % k for side in source_hw)), 1)


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """An object as it is pasted, inside the image."""

    pixels: Image  # (h, w, 3)
    alpha: NDArray[np.uint8]  # (h, w), 255 = opaque; the object's mask is where it is at least 128
    x: int  # of the left column and the upper row in the image
    y: int
    label: int

    @property
    def bitmap(self) -> Bitmap:
        """Its mask; a single empty pixel where it has none."""
        return Bitmap((self.alpha >= 128).astype(np.uint8), self.x, self.y).tight()


class ObjectPool:
    """The objects of the training images, to be drawn: a class first, then an object of it, all equally often.

    Attributes:
        weights: (C,) float64, how often each class is drawn, relative to the others.
    """

    def __init__(self, annotations: Annotations, images: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
        """Take the objects of some images.

        Args:
            annotations: the file.
            images: rising positions in the file.
            weights: (C,) of each class, at least 0; that of a class without objects does not count.
        """
        rows = trained_rows(annotations, images)
        labels = np.asarray(annotations.labels)[rows]
        self.rows = rows[np.argsort(labels, kind="stable")]  # those of the first class, of the second, ...
        self.counts = np.bincount(labels, minlength=len(weights))
        self.firsts = np.cumsum(self.counts) - self.counts
        self.weights = np.where(self.counts > 0, weights, 0.0)

    @staticmethod
    def of(annotations: Annotations, images: NDArray[np.int64], recipe: DataRecipe) -> ObjectPool:
        """The pool of a recipe.

        ``rare-first``: classes by their repeat factor at `data.repeat_threshold`, so frequent classes are all drawn
        equally often and rare ones more often. ``uniform``: every object equally often.
        """
        if recipe.copy_paste_draw == "rare-first":
            weights = class_repeat_factors(annotations, recipe.repeat_threshold, images)
        else:
            labels = annotations.labels[trained_rows(annotations, images)]
            weights = np.bincount(labels, minlength=len(annotations.categories)).astype(np.float64)
        return ObjectPool(annotations, images, weights)

    def draw(self, barred: NDArray[np.bool_], rng: np.random.Generator) -> int | None:
        """A row of the annotations; two numbers are drawn in any case.

        Args:
            barred: (C,) classes that are not drawn; None is returned where no other has objects.
            rng: the source of chance.
        """
        of_class, of_object = rng.random(2)
        sums = np.cumsum(np.where(barred, 0.0, self.weights))
        if sums.size == 0 or sums[-1] <= 0:
            return None
        last = int(np.searchsorted(sums, sums[-1]))  # of those that can be drawn; rounding must not lead beyond it
        label = min(int(np.searchsorted(sums, of_class * sums[-1], side="right")), last)
        return int(self.rows[self.firsts[label] + int(of_object * self.counts[label])])


@dataclass(frozen=True, slots=True)
class CopyPaste:
    """Paste one to three objects of other images into an image, with ``probability``.

    ``mirrored`` is the probability that an object is mirrored.
    """

    probability: float
    pool: ObjectPool
    mirrored: float

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and 0 <= self.mirrored <= 1):
            raise ValueError(f"expected probabilities, received {self.probability} and {self.mirrored}")

    @staticmethod
    def of(annotations: Annotations, images: NDArray[np.int64], recipe: DataRecipe) -> CopyPaste | None:
        """Copy-Paste of a recipe over its training images; None where the recipe has none.

        Raises:
            UserError: there is no other image to paste from.
        """
        if recipe.copy_paste == 0:
            return None
        if len(images) < 2:
            raise UserError(
                f"{annotations.path}: data.copy_paste pastes objects of other images, and there is one image to train "
                "on; set data.copy_paste=0, or add images"
            )
        return CopyPaste(recipe.copy_paste, ObjectPool.of(annotations, images, recipe), recipe.flip)

    def chance(self, seed: int) -> np.random.Generator | None:
        """The source of all chance for the sample with this seed, or None where nothing is pasted.

        It is a stream apart from those of the transform and of InstaBoost, which draw the same numbers without it.
        """
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        return rng if rng.random() < self.probability else None

    def draw(self, barred: NDArray[np.bool_], rng: np.random.Generator) -> list[Drawn]:
        """One to three objects, or none where all classes with objects are barred.

        Args:
            barred: (C,) bool, classes that are not drawn.
            rng: of `chance`.
        """
        drawn = []
        for _ in range(int(rng.integers(1, MOST_OBJECTS, endpoint=True))):
            row, numbers = self.pool.draw(barred, rng), rng.random(4)
            if row is not None:
                size = SCALES[0] + (SCALES[1] - SCALES[0]) * float(numbers[0])
                place = (float(numbers[2]), float(numbers[3]))
                drawn.append(Drawn(row, size, bool(numbers[1] < self.mirrored), place))
        return drawn


def patch_of(
    drawn: Drawn, source: Image, source_hw: tuple[int, int], bitmap: Bitmap, label: int, image_hw: tuple[int, int]
) -> Patch:
    """The object as it is pasted, shrunk further if it would be larger than the image.

    Args:
        drawn: how.
        source: (h / k, w / k, 3), the object's image, reduced by k.
        source_hw: h and w, multiples of k.
        bitmap: of the object, at full resolution.
        label: its class.
        image_hw: size of the image that it is pasted into.
    """
    reduced = source_hw[0] // source.shape[0]
    x0, y0, x1, y1 = bitmap.box
    left, top, right, bottom = x0 % reduced, y0 % reduced, -x1 % reduced, -y1 % reduced  # to whole reduced pixels
    mask = np.pad(bitmap.pixels, ((top, bottom), (left, right))) * np.uint8(255)
    columns, rows = (
        slice((x0 - left) // reduced, (x1 + right) // reduced),
        slice((y0 - top) // reduced, (y1 + bottom) // reduced),
    )
    height, width = image_hw
    scale = min(drawn.scale(source_hw, image_hw), height / mask.shape[0], width / mask.shape[1])
    size = (min(max(round(mask.shape[1] * scale), 1), width), min(max(round(mask.shape[0] * scale), 1), height))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    alpha, pixels = (
        cv2.resize(np.ascontiguousarray(a), size, interpolation=how) for a in (mask, source[rows, columns])
    )
    if drawn.mirrored:
        alpha, pixels = cv2.flip(alpha, 1), cv2.flip(pixels, 1)
    x, y = (int(share * (side - own + 1)) for share, side, own in zip(drawn.place, (width, height), size, strict=True))
    return Patch(pixels, alpha, x, y, label)


def paste(image: Image, objects: Objects, patches: Iterable[Patch]) -> tuple[Image, Objects]:
    """The image with the patches over it, each over those before, and all objects that can still be seen.

    A pixel belongs to the last patch whose alpha is at least 128 there. Objects that lose pixels get the box around
    those that are left, and are dropped with less than a tenth of them; others stay as they were. The objects of the
    image come first, then the pasted ones, each in their order. A patch without a pixel of mask is left out.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        objects: of the image.
        patches: of other objects.
    """
    picture = image.copy()
    bitmaps, boxes, labels = list(objects.bitmaps), list(objects.boxes), objects.labels.tolist()
    whole: dict[int, int] = {}  # pixels, before, of the objects that lost some
    for patch in patches:
        own = patch.bitmap
        if not own.pixels.any():
            continue
        height, width = patch.alpha.shape
        place = slice(patch.y, patch.y + height), slice(patch.x, patch.x + width)
        picture[place] = blend(picture[place], patch.pixels, patch.alpha)
        for i, below in enumerate(bitmaps):
            rest = _without(below, own)
            if rest is not below:
                whole.setdefault(i, int(np.count_nonzero(below.pixels)))
                bitmaps[i] = rest
        bitmaps.append(own)
        boxes.append(np.array(own.box, np.float32))
        labels.append(patch.label)
    for i in whole:
        bitmaps[i] = bitmaps[i].tight()
        boxes[i] = np.array(bitmaps[i].box, np.float32)
    kept = [i for i in range(len(bitmaps)) if i not in whole or _can_be_seen(bitmaps[i], whole[i])]
    return picture, Objects(
        boxes=np.array([boxes[i] for i in kept], np.float32).reshape(-1, 4),
        labels=np.array([labels[i] for i in kept], np.int64),
        bitmaps=tuple(bitmaps[i] for i in kept),
    )


def _without(below: Bitmap, above: Bitmap) -> Bitmap:
    """A bitmap without the pixels of another one: the very same where they have none in common."""
    left, top = max(below.x, above.x), max(below.y, above.y)
    right, bottom = min(below.box[2], above.box[2]), min(below.box[3], above.box[3])
    if left >= right or top >= bottom:
        return below
    mine, theirs = ((slice(top - one.y, bottom - one.y), slice(left - one.x, right - one.x)) for one in (below, above))
    covered = above.pixels[theirs]
    if not (below.pixels[mine] & covered).any():
        return below
    rest = below.pixels.copy()
    rest[mine] &= 1 - covered
    return Bitmap(rest, below.x, below.y)


def _can_be_seen(rest: Bitmap, before: int) -> bool:
    return int(np.count_nonzero(rest.pixels)) >= max(LEAST_LEFT * before, 1)
