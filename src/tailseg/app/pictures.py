"""Pictures that a user has dropped, with what was found in them; all that the page shows of them is made here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Category
from tailseg.data.annotations.frequency import GROUPS
from tailseg.data.images import read_content
from tailseg.errors import UserError
from tailseg.results.detections import Detections
from tailseg.results.masks import areas
from tailseg.results.pictures import drawn, shrunk
from tailseg.structures import RawDetections
from tailseg.visualize.gallery import jpeg

MOST_BYTES = 32 << 20  # of a file
MOST_PIXELS = 64_000_000  # of a picture: the largest that phones take
MOST_PICTURES = 10  # at a time
SHOWN_SIDE = 1280  # pixels of the longer side of a picture on the page
NO_GROUP = "–"  # of the classes of a model that does not know its training images

Picture = NDArray[np.uint8]  # (H, W, 3) RGB


class Finder(Protocol):
    """The part of a `Model` that the page needs."""

    @property
    def categories(self) -> Sequence[Category]:
        """Category of each label."""

    def predict(self, source: Picture, /) -> Detections:
        """The objects of a picture."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The objects that the user wants to see."""

    score: float = 0.5  # lowest
    labels: Set[int] = frozenset()  # the classes; without any, all of them

    def of(self, found: Detections) -> NDArray[np.int64]:
        """(K,) positions of the chosen objects."""
        chosen = found.scores >= self.score
        if self.labels:
            known = [label for label in range(len(found.categories)) if label in self.labels]
            chosen &= torch.isin(found.labels, torch.tensor(known, dtype=torch.int64))
        return np.asarray(chosen.nonzero().flatten(), np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A picture with all that was found in it, kept small enough for many of them to lie in memory."""

    name: str  # of its file, without folders
    content: bytes  # of its file
    found: Detections  # in pixels of the picture, without it
    areas: tuple[int, ...]  # pixels of each mask
    small: Picture  # the picture as the page shows it
    small_found: RawDetections  # in its pixels

    @property
    def size(self) -> int:
        """Bytes that it takes in memory, about."""
        raw = self.found.raw
        return len(self.content) + self.small.nbytes + 2 * raw.masks.nbytes

    def whole(self, choice: Choice) -> Detections:
        """The chosen objects with the picture in its full size."""
        kept = self.found[choice.of(self.found)]
        return Detections(kept.raw, kept.categories, read_content(self.content, self.name, MOST_PIXELS), self.name)


def look(model: Finder, files: Iterable[tuple[str, bytes]]) -> tuple[list[Seen], list[str]]:
    """Find the objects of some picture files.

    Args:
        model: finds them.
        files: names, of which folders are left out, and contents.

    Returns:
        The pictures that can be read, and a sentence for each that cannot, as `tailseg predict` says it.
    """
    seen, faults = [], []
    for number, (path, content) in enumerate(files):
        name = PurePath(path.replace("\\", "/")).name or f"image {number}"
        if number >= MOST_PICTURES:
            faults.append(f"{name}: {MOST_PICTURES} pictures at a time are the most; drop the others by themselves")
            continue
        try:
            seen.append(_look(model, name, content))
        except UserError as error:
            faults.append(str(error))
    return seen, faults


def _look(model: Finder, name: str, content: bytes) -> Seen:
    if len(content) > MOST_BYTES:
        raise UserError(
            f"{name}: the file is too large ({len(content):,} bytes, the limit is {MOST_BYTES:,}); shrink the picture"
        )
    picture = read_content(content, name, MOST_PIXELS)
    found = model.predict(picture)
    small, small_found = shrunk(picture, found.raw, SHOWN_SIDE)
    return Seen(
        name=name,
        content=content,
        found=Detections(found.raw, found.categories, source=name),
        areas=tuple(areas(found.raw)),
        small=small,
        small_found=small_found,
    )


def picture_shown(seen: Seen, choice: Choice) -> bytes:
    """A JPEG file of the picture with the chosen objects; nothing is computed but the drawing."""
    rows = torch.from_numpy(choice.of(seen.found))
    return jpeg(drawn(seen.small, seen.small_found[rows], seen.found.categories))


TABLE_HEAD = ("class", "group", "score", "x", "y", "width", "height", "area")


def table(seen: Seen, choice: Choice) -> list[list[str | float | int]]:
    """A row for each chosen object, best score first: see `TABLE_HEAD`; boxes and areas in pixels."""
    rows = choice.of(seen.found)
    groups = frequency_groups(seen.found.categories)
    kept = seen.found[rows]
    return [
        [
            kept.categories[label].name,
            groups[label],
            round(score, 3),
            *(round(value, 1) for value in (x1, y1, x2 - x1, y2 - y1)),
            seen.areas[row],
        ]
        for row, label, score, (x1, y1, x2, y2) in zip(
            rows.tolist(), kept.labels.tolist(), kept.scores.tolist(), kept.boxes.tolist(), strict=True
        )
    ]


def frequency_groups(categories: Sequence[Category]) -> list[str]:
    """The name of each class's frequency group; dashes where a model does not know its training images."""
    if not any(category.image_count for category in categories):
        return [NO_GROUP] * len(categories)
    return [GROUPS[category.frequency] for category in categories]


def classes_found(pictures: Sequence[Seen]) -> list[tuple[str, int]]:
    """Names and labels of the classes with objects of any score, those with the best scores first."""
    best: dict[int, float] = {}
    for seen in pictures:
        for label, score in zip(seen.found.labels.tolist(), seen.found.scores.tolist(), strict=True):
            best[label] = max(score, best.get(label, 0.0))
    names = [category.name for category in pictures[0].found.categories] if pictures else []
    return [(names[label], label) for label in sorted(best, key=lambda label: (-best[label], label))]


def sentence(pictures: Sequence[Seen], choice: Choice, position: int) -> str:
    """The number of chosen objects of the picture shown, and the score to try if there is none."""
    seen = pictures[position]
    count = len(choice.of(seen.found))
    where = f"{seen.name}: " + ("1 object" if count == 1 else f"{count} objects")
    if count:
        return where
    others = Choice(0.0, choice.labels).of(seen.found)
    best = float(seen.found.scores[others].max()) if len(others) else None
    if best is None:
        return f"{where}, at whatever score"
    return f"{where}; the best score is {best:.2g}, so lower the lowest score"
