"""Scenes of the built-in data set: classes made of a shape, a colour and a texture, and pictures of them.

All sizes that people would see are relative to the picture, so a larger picture shows the same objects with
more pixels. Everything is a function of its arguments and the generator it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MAX_OBJECTS = 6  # planned for an image; those left unlabelled on purpose come on top
SECOND_OBJECT_RATE = 0.25  # how often a class has two objects in an image
NOT_EXHAUSTIVE_RATE = 0.04  # of images, with one class of which some objects are left unlabelled

DIAMETER = (0.17, 0.52)  # of the image's side, log-uniform: 22 to 67 pixels at 128
MIN_VISIBLE = 0.25  # of an object's own area, inside the image and not covered by others
MIN_PIXELS = 40  # visible, at 128 pixels
PLACES_TRIED = 24

# How much the objects of a class differ from one another.
HUE_VARIES = 25.0  # degrees to either side
STRETCH = 0.35  # logarithm of the most that an axis is lengthened
LIGHT = (0.7, 1.1)  # on an object as a whole


# ---------------------------------------------------------------------------------------------------------
# The classes


def _polygon(*coordinates: float) -> Floats:
    return np.array(coordinates, np.float32).reshape(-1, 2)


def _mirrored(*right_half: float) -> Floats:
    """An outline that is symmetric about x = 0, from the points of its right half, downwards."""
    half = _polygon(*right_half)
    return np.concatenate([half, half[::-1] * np.array([-1, 1], np.float32)])


def _arc(radius: float, start: float, stop: float, x: float = 0.0, y: float = 0.0) -> Floats:
    angle = np.linspace(start, stop, 48)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1).astype(np.float32)


def _polar(radius: Callable[[NDArray[np.float64]], Any], steps: int = 96) -> Floats:
    """The closed curve radius(angle), angle 0 pointing up."""
    angle = np.arange(steps) * 2 * np.pi / steps
    points: NDArray[np.float64] = np.stack([np.sin(angle), -np.cos(angle)], axis=1) * radius(angle)[:, None]
    return points.astype(np.float32)


def _heart() -> Floats:
    t = np.linspace(0, _TURN, 96)
    y = -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, y / 16], axis=1).astype(np.float32)


_TURN = 2 * np.pi
_CIRCLE = _arc(1, 0, _TURN)

# Closed outlines within about [-1, 1], y down; a second outline is a hole. Neighbours in this order resemble
# one another, and so do neighbours among the colours.
SHAPES: dict[str, tuple[Floats, ...]] = {
    "circle": (_CIRCLE,),
    "ring": (_CIRCLE, _CIRCLE * 0.48),
    "flower": (_polar(lambda a: 0.55 + 0.45 * np.abs(np.cos(2.5 * a)) ** 0.7),),
    "star": (_polar(lambda a: np.where(np.arange(10) % 2, 0.42, 1.0), 10),),
    "cross": (_mirrored(0.36, -1, 0.36, -0.36, 1, -0.36, 1, 0.36, 0.36, 0.36, 0.36, 1),),
    "tee": (_mirrored(0.95, -0.9, 0.95, -0.25, 0.34, -0.25, 0.34, 0.95),),
    "arrow": (_mirrored(0, -1, 0.9, 0, 0.38, 0, 0.38, 0.95),),
    "triangle": (_mirrored(0, -0.95, 1, 0.8),),
    "drop": (_polar(lambda a: 0.62 + 0.43 * np.exp(-3 * np.minimum(a, _TURN - a))) + _polygon(0, 0.2),),
    "heart": (_heart(),),
    "dome": (_arc(1, np.pi, _TURN, y=0.45),),
    "crescent": (np.concatenate([_arc(1, 1.015, 5.268, 0.2), _arc(0.85, 4.745, 1.538, 0.7)]),),
    "bolt": (_polygon(0.35, -1, -0.7, 0.15, -0.05, 0.15, -0.35, 1, 0.7, -0.25, 0.05, -0.25),),
    "square": (_polygon(-0.8, -0.8, 0.8, -0.8, 0.8, 0.8, -0.8, 0.8),),
    "hexagon": (_polar(np.ones_like, 6),),
}
# Hue in degrees, saturation, value.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0, 0.85, 0.85),
    "orange": (28, 0.9, 0.97),
    "brown": (24, 0.65, 0.5),
    "yellow": (54, 0.8, 0.97),
    "green": (115, 0.75, 0.65),
    "teal": (176, 0.75, 0.75),
    "blue": (222, 0.85, 0.85),
    "purple": (275, 0.7, 0.7),
    "pink": (325, 0.42, 0.98),
    "white": (0, 0.0, 0.97),
    "black": (0, 0.0, 0.12),
}


def _soft_step(x: Floats) -> Floats:
    return np.asarray(np.clip(4 * x + 0.5, 0, 1))


# How much ink, 0 to 1, at (u, v) in the object's own frame. Depth is the distance to the outline, 1 at the
# innermost point; the phases p and q are uniform in [0, 1).
Texture = Callable[[Floats, Floats, Floats, float, float], Floats]
TEXTURES: dict[str, Texture] = {
    "plain": lambda u, v, depth, p, q: np.zeros_like(u),
    "striped": lambda u, v, depth, p, q: _soft_step(np.sin(_TURN * ((1.3 + 0.4 * q) * v + p))),
    "checked": lambda u, v, depth, p, q: _soft_step(2 * np.sin(_TURN * (1.1 * u + p)) * np.sin(_TURN * (1.1 * v + q))),
    "dotted": lambda u, v, depth, p, q: _soft_step(np.cos(_TURN * (1.6 * u + p)) + np.cos(_TURN * (1.6 * v + q)) - 0.7),
    "ringed": lambda u, v, depth, p, q: _soft_step(np.cos(_TURN * ((1.8 + 0.4 * q) * np.hypot(u, v) + 0.4 * p))),
    "rayed": lambda u, v, depth, p, q: _soft_step(np.sin(6 * np.arctan2(v, u) + _TURN * p)),
    "halved": lambda u, v, depth, p, q: _soft_step(4 * u + 0.8 * (p - 0.5)),
    "shaded": lambda u, v, depth, p, q: np.clip(0.5 + 0.65 * v + 0.3 * (p - 0.5), 0, 1),
    "rimmed": lambda u, v, depth, p, q: _soft_step(4 * (0.42 - depth)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectClass:
    """A class: the look that all its objects have in common."""

    shape: str
    colour: str
    texture: str

    @property
    def name(self) -> str:
        """For example ``striped_red_star``."""
        return f"{self.texture}_{self.colour}_{self.shape}"

    def differs_by_one(self, other: ObjectClass) -> bool:
        """Return whether the two are look-alikes: equal but for one property."""
        same = (self.shape == other.shape, self.colour == other.colour, self.texture == other.texture)
        return sum(same) == 2


def _frequent_class(index: int) -> ObjectClass:
    """The index-th of 1485 different classes, close ones in no property alike."""
    shapes, colours, textures = list(SHAPES), list(COLOURS), list(TEXTURES)
    # 15, 11 and 9 meet again after 495 steps; the third shift tells the rounds apart.
    return ObjectClass(
        shape=shapes[4 * index % len(shapes)],
        colour=colours[3 * index % len(colours)],
        texture=textures[(index + index // 495) % len(textures)],
    )


def _look_alikes(parent: ObjectClass) -> Iterator[ObjectClass]:
    """The class with another texture, or a shape or colour that resembles its own."""
    shapes, colours = list(SHAPES), list(COLOURS)
    shape, colour = shapes.index(parent.shape), colours.index(parent.colour)
    for texture in TEXTURES:
        yield ObjectClass(shape=parent.shape, colour=parent.colour, texture=texture)
    for step in (-2, -1, 1, 2):
        near = shapes[(shape + step) % len(shapes)]
        yield ObjectClass(shape=near, colour=parent.colour, texture=parent.texture)
    for step in (-1, 1):
        near = colours[(colour + step) % len(colours)]
        yield ObjectClass(shape=parent.shape, colour=near, texture=parent.texture)


def object_classes(classes: int, frequent: int) -> list[ObjectClass]:
    """All classes by rank, most frequent first; each after the first ``frequent`` resembles one of those."""
    chosen = [_frequent_class(index) for index in range(frequent)]
    taken = set(chosen)
    rng = np.random.default_rng([classes, frequent])  # not the user's seed: the task stays the same
    parents = [chosen[i] for i in rng.permutation(frequent)]
    while len(chosen) < classes:
        if not parents:  # too few frequent classes for so many: look-alikes of look-alikes
            parents = list(chosen)
        parent = parents.pop(0)
        free = [candidate for candidate in _look_alikes(parent) if candidate not in taken]
        if free:
            chosen.append(free[rng.integers(len(free))])
            taken.add(chosen[-1])
            parents.append(parent)
    return chosen


# ---------------------------------------------------------------------------------------------------------
# The drawing


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scene:
    """One picture and what is in it, lowest object first."""

    image: NDArray[np.uint8]  # (H, W, 3) BGR
    owner: NDArray[np.int16]  # (H, W), the object seen at a pixel, -1 for background
    labels: list[int]  # (N,) ranks
    annotated: list[bool]  # (N,) False for objects left unlabelled on purpose


def _bgr(hue: float, saturation: float, value: float) -> Floats:
    """(3,) BGR in [0, 255] from hue in degrees, saturation and value in [0, 1]."""
    sector = (np.array([1, 3, 5]) + hue / 60) % 6  # n = 5, 3, 1 of the usual formula, for R, G, B
    return (255 * value * (1 - saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1))).astype(np.float32)


def _object_colours(colour: str, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Base and ink of one object, BGR: the class's colour, varied, and a dark (for black, a light) one."""
    hue, saturation, value = COLOURS[colour]
    hue = (hue + rng.uniform(-HUE_VARIES, HUE_VARIES)) % 360
    saturation = saturation * rng.uniform(0.85, 1.1)
    value = value * rng.uniform(*LIGHT)
    base = _bgr(hue, min(saturation, 1), min(value, 1))
    if colour == "black":
        return base, _bgr(0, 0, rng.uniform(0.6, 0.8))
    return base, base * np.float32(rng.uniform(0.15, 0.35))


def draw_object(kind: ObjectClass, diameter: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """One object of about ``diameter`` pixels, alone.

    Returns:
        (h, w) coverage in [0, 1] and (h, w, 3) BGR colour in [0, 255], with an empty ring of pixels around.

    """
    angle, stretch = np.deg2rad(rng.uniform(-35, 35)), np.exp(rng.uniform(-STRETCH, STRETCH))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    flip = rng.choice([-1.0, 1.0])
    matrix = diameter / 2 * turn @ np.diag([flip * stretch, 1 / stretch])  # own frame -> pixels
    outlines = [outline @ matrix.T for outline in SHAPES[kind.shape]]
    low, high = np.min(outlines[0], axis=0) - 1, np.max(outlines[0], axis=0) + 1
    width, height = np.ceil(high - low).astype(int).tolist()

    # Coverage is counted on a grid four times as fine, ink on one twice as fine.
    fine = np.zeros((4 * height, 4 * width), np.uint8)
    points = [np.rint(((outline - low) * 4 - 0.5) * 16).astype(np.int32) for outline in outlines]
    cv2.fillPoly(fine, points, 255, shift=4)
    coverage = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255

    y, x = np.mgrid[: 2 * height, : 2 * width].astype(np.float32) / 2 + 0.25
    inverse = np.linalg.inv(matrix).astype(np.float32)
    x, y = x + np.float32(low[0]), y + np.float32(low[1])
    u, v = inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y
    depth = cv2.distanceTransform(fine[::2, ::2].copy(), cv2.DIST_L2, 5)
    ink = TEXTURES[kind.texture](u, v, depth / max(float(depth.max()), 1.0), rng.random(), rng.random())
    ink = cv2.resize(ink.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)[..., None]
    base, dark = _object_colours(kind.colour, rng)
    return coverage, base * (1 - ink) + dark * ink


def _background(size: int, rng: np.random.Generator) -> Floats:
    """(size, size, 3) a dull uneven ground with strokes and blots that are no objects."""
    ground = rng.uniform(70, 190) + rng.uniform(-22, 22, (4, 4, 3)) + rng.uniform(-18, 18, 3)
    image: Floats = cv2.resize(ground.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(3, 9)):
        layer = image.copy()
        colour = (np.array(cv2.mean(image)[:3]) + rng.uniform(-60, 60) + rng.uniform(-25, 25, 3)).tolist()
        points = (rng.uniform(-0.1, 1.1, (rng.integers(2, 5), 2)) * size).astype(np.int32)
        if rng.random() < 0.7:
            thickness = max(1, round(size * rng.uniform(0.008, 0.03)))
            cv2.polylines(layer, [points], False, colour, thickness, cv2.LINE_AA)
        else:
            cv2.fillPoly(layer, [points], colour, cv2.LINE_AA)
        image = cv2.addWeighted(image, 0.45, layer, 0.55, 0)
    return image


class _Canvas:
    """A picture on which objects are laid one over the other, each kept visible."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.image = _background(size, rng)
        self.owner = np.full((size, size), -1, np.int16)
        self.areas: list[int] = []  # pixels each object covers by itself, the part outside included
        self.visible: list[int] = []  # pixels of each object that can be seen

    def lay(self, kind: ObjectClass, diameter: float) -> bool:
        """Draw one object on top of all others, somewhere; False where no place was found."""
        for attempt in range(PLACES_TRIED):
            if attempt % 6 == 0:  # a new and, after the first, smaller object for every six places
                coverage, colour = draw_object(kind, diameter * 0.8 ** (attempt // 6), self.rng)
            height, width = coverage.shape
            left = round(self.rng.uniform(-0.15 * width, self.size - 0.85 * width))
            top = round(self.rng.uniform(-0.15 * height, self.size - 0.85 * height))
            inside = np.s_[max(-top, 0) : self.size - top, max(-left, 0) : self.size - left]
            place = np.s_[max(top, 0) : top + height, max(left, 0) : left + width]
            if self._has_room(coverage[inside] >= 0.5, int((coverage >= 0.5).sum()), place):
                alpha = coverage[inside][..., None]
                self.image[place] += alpha * (colour[inside] - self.image[place])
                return True
        return False

    def _has_room(self, mask: NDArray[np.bool_], area: int, place: tuple[slice, slice]) -> bool:
        """Take the pixels of ``mask`` for a new object, unless it or one below would be seen too little."""
        count = len(self.areas)
        covered = np.bincount(self.owner[place][mask] + 1, minlength=count + 1)[1:]
        visible = [*(np.array(self.visible, int) - covered).tolist(), int(mask.sum())]
        fewest = max(4.0, MIN_PIXELS * (self.size / 128) ** 2)
        if any(
            seen < max(fewest, MIN_VISIBLE * whole) for seen, whole in zip(visible, [*self.areas, area], strict=True)
        ):
            return False
        self.owner[place][mask] = count
        self.areas.append(area)
        self.visible = visible
        return True


def draw_scene(labels: list[int], kinds: list[ObjectClass], size: int, rng: np.random.Generator) -> Scene:
    """Draw one picture with an object or two of each class in ``labels`` (ranks into ``kinds``).

    Now and then one class has further objects that are drawn and left unlabelled. An object for which no
    visible place is found is left out.
    """
    wanted = [(label, True) for label in labels]
    wanted += [(label, True) for label in labels if rng.random() < SECOND_OBJECT_RATE][
        : max(0, MAX_OBJECTS - len(labels))
    ]
    if labels and rng.random() < NOT_EXHAUSTIVE_RATE:
        wanted += [(labels[rng.integers(len(labels))], False)] * int(rng.integers(1, 3))
    canvas = _Canvas(size, rng)
    drawn = []
    for index in rng.permutation(len(wanted)):
        diameter = size * np.exp(rng.uniform(*np.log(DIAMETER)))
        if canvas.lay(kinds[wanted[index][0]], diameter):
            drawn.append(wanted[index])
    noise = rng.standard_normal((size, size, 3), np.float32) * np.float32(rng.uniform(2, 7))
    return Scene(
        image=np.clip(canvas.image + noise + 0.5, 0, 255).astype(np.uint8),
        owner=canvas.owner,
        labels=[label for label, _ in drawn],
        annotated=[annotated for _, annotated in drawn],
    )
