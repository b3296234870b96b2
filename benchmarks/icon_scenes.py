"""One picture of icons over a photograph: where they lie, how they are turned and lit, what covers them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

DIAMETER = (0.15, 0.5)  # of the image's side, log-uniform
TURN, STRETCH = 25.0, 0.15  # degrees either way; of the sides, as a logarithm
MIN_VISIBLE = 0.25  # of an object's own area, inside the image and not covered
MIN_PIXELS = 30  # visible, at 128 pixels
PLACES_TRIED, SCENES_TRIED = 24, 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """An object to draw."""

    label: int  # -1: a piece of a photograph, which is no object
    icon: Pixels  # (h, w, 4) BGRA
    annotated: bool = True
    needed: bool = False  # the image is drawn again rather than without it


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """One picture and what is in it, lowest object first."""

    image: Pixels  # (H, W, 3) BGR
    owner: NDArray[np.int16]  # (H, W), the object seen at a pixel, -1 for background
    objects: list[Wanted]


def place_icon(icon: Pixels, diameter: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """An icon, turned, stretched, mirrored and lit, of about ``diameter`` pixels.

    Returns:
        (h, w) alpha in [0, 1] and (h, w, 3) BGR from 0 to about 255, multiplied by alpha.
    """
    layer = cv2.multiply(icon, cv2.cvtColor(icon[..., 3], cv2.COLOR_GRAY2BGRA), scale=1 / 255)  # (h, w, 4) uint8
    layer[..., 3] = icon[..., 3]
    if rng.random() < 0.5:
        layer = layer[:, ::-1]
    scale, stretch = diameter / max(icon.shape[:2]), math.exp(rng.uniform(-STRETCH, STRETCH))
    height, width = (max(2, round(n)) for n in (icon.shape[0] * scale / stretch, icon.shape[1] * scale * stretch))
    layer = cv2.resize(layer, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), rng.uniform(-TURN, TURN), 1)
    cos, sin = abs(turn[0, 0]), abs(turn[0, 1])
    wide, high = math.ceil(width * cos + height * sin) + 1, math.ceil(width * sin + height * cos) + 1
    turn[:, 2] += (wide - width) / 2, (high - height) / 2
    layer = cv2.warpAffine(layer, turn, (wide, high), flags=cv2.INTER_LINEAR)
    light = np.ones((wide, 4), np.float32)
    light[:, :3] = rng.uniform(0.65, 1.2) * rng.uniform(0.92, 1.08, 3)
    light[:, :3] *= 1 + np.linspace(-1, 1, wide)[:, None] * rng.uniform(-0.25, 0.25)
    lit = (layer.reshape(high, -1) * light.ravel()).reshape(high, wide, 4)  # long rows: three times as fast
    return lit[..., 3] / 255, lit[..., :3]


def background(photo: Pixels, size: int, rng: np.random.Generator) -> Floats:
    """(size, size, 3) a piece of a photograph, half to all of its shorter side wide, mirrored and lit."""
    side = round(min(photo.shape[:2]) * rng.uniform(0.5, 1))
    top, left = (int(rng.integers(0, n - side + 1)) for n in photo.shape[:2])
    piece = cv2.resize(photo[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    found: Floats = piece.astype(np.float32) * np.float32(rng.uniform(0.6, 1.1))
    return found


def occluder(photo: Pixels, rng: np.random.Generator) -> Pixels:
    """(64, 64, 4) a piece of a photograph in the shape of a blob or a bar."""
    piece = np.zeros((64, 64, 4), np.uint8)
    piece[..., :3] = background(photo, 64, rng).clip(0, 255)
    mask = np.zeros((64, 64), np.uint8)
    axes = (31, int(rng.integers(6, 31)))
    if rng.random() < 0.5:
        cv2.ellipse(mask, (32, 32), axes, 0, 0, 360, 255, -1)
    else:
        cv2.rectangle(mask, (1, 32 - axes[1]), (62, 32 + axes[1]), 255, -1)
    piece[..., 3] = mask
    return piece


class _Canvas:
    """A picture on which objects are laid one over the other, each kept visible."""

    def __init__(self, ground: Floats, rng: np.random.Generator) -> None:
        self.image, self.size, self.rng = ground, len(ground), rng
        self.owner = np.full(ground.shape[:2], -1, np.int16)
        self.visible: list[int] = []  # pixels of each object that can be seen
        self.fewest: list[float] = []  # that must be seen

    def lay(self, wanted: Wanted) -> bool:
        """Draw an object on top of all others, somewhere; False where no place was found."""
        for attempt in range(PLACES_TRIED):
            if attempt % 4 == 0:
                diameter = self.size * math.exp(self.rng.uniform(*np.log(DIAMETER)))
                alpha, colour = place_icon(wanted.icon, diameter, self.rng)
            height, width = alpha.shape
            left = round(self.rng.uniform(-0.2 * width, self.size - 0.8 * width))
            top = round(self.rng.uniform(-0.2 * height, self.size - 0.8 * height))
            inside = np.s_[max(-top, 0) : self.size - top, max(-left, 0) : self.size - left]
            place = np.s_[max(top, 0) : top + height, max(left, 0) : left + width]
            solid = alpha > 0.5
            least = max(4.0, MIN_PIXELS * (self.size / 128) ** 2, MIN_VISIBLE * int(solid.sum()))
            if self._has_room(solid[inside], least if wanted.label >= 0 else 0.0, place):
                piece = self.image[place]
                piece *= cv2.cvtColor(1 - alpha[inside], cv2.COLOR_GRAY2BGR)
                piece += colour[inside]
                return True
        return False

    def _has_room(self, mask: NDArray[np.bool_], least: float, place: tuple[slice, slice]) -> bool:
        """Take the pixels of ``mask`` for a new object, unless it or one below would be seen too little."""
        count = len(self.visible)
        covered = np.bincount(self.owner[place][mask] + 1, minlength=count + 1)[1:].tolist()
        visible = [seen - lost for seen, lost in zip(self.visible, covered, strict=True)] + [int(mask.sum())]
        if any(seen < fewest for seen, fewest in zip(visible, [*self.fewest, least], strict=True)):
            return False
        self.owner[place][mask] = count
        self.visible = visible
        self.fewest.append(least)
        return True


def draw_scene(wanted: Sequence[Wanted], photo: Pixels, size: int, rng: np.random.Generator) -> Scene:
    """Draw one picture with the objects in any order; those for which no place is found are left out.

    Where that befalls one that is needed the picture is drawn again, some times.
    """
    for _ in range(SCENES_TRIED):
        canvas = _Canvas(background(photo, size, rng), rng)
        laid = [wanted[index] for index in rng.permutation(len(wanted)) if canvas.lay(wanted[index])]
        if sum(one.needed for one in laid) == sum(one.needed for one in wanted):
            break
    image = canvas.image * np.float32(rng.uniform(0.75, 1.2))
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, 7))
    return Scene(np.clip(image + 0.5, 0, 255).astype(np.uint8), canvas.owner, laid)


def annotation_rows(scene: Scene, ids: Sequence[int]) -> list[dict[str, Any]]:
    """LVIS's rows of the annotated objects, without ids; ids[label] is a category id. Masks: the visible pixels."""
    rows = []
    for index, one in enumerate(scene.objects):
        if one.label < 0 or not one.annotated:
            continue
        mask = scene.owner == index
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = [xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]
        encoded = rle.encode(mask)
        row = {"category_id": ids[one.label], "bbox": [float(side) for side in box], "area": float(mask.sum())}
        rows.append(row | {"segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()}})
    return rows
