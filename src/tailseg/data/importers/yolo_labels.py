"""YOLO's label files: a line `class x y x y ...` for each polygon, or `class x y w h` for a box, from 0 to 1."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.image_files import FileTree, alike, files_below, is_hidden, linked_folders
from tailseg.data.images import IMAGE_SUFFIXES
from tailseg.data.importers.foreign import LeftOut
from tailseg.data.importers.yolo_config import NAME_FILES
from tailseg.errors import UserError

BEYOND = 0.01  # how far a coordinate may lie outside of 0 to 1, from rounding; it is cut
MOST_CLASSES = 100_000  # where no file tells the names
LONGEST_LINE = 1_000_000  # signs: as many as 50,000 points take

Line = tuple[int, NDArray[np.float64], bool]  # class, (K, 2) points from 0 to 1, whether it was a box

LONG_LINE = f"lines of more than {LONGEST_LINE:,} signs: left out"
NO_NUMBERS = "lines that are not rows of numbers: left out"
NO_SHAPE = "lines that are neither a polygon of 3 points or more nor a box: left out"
CONFIDENCE = "lines with a confidence: left out"
OUTSIDE = "lines with coordinates outside of 0 to 1: left out"
NO_SIZE = "boxes without width or height: left out"
BESIDE_POLYGONS = "boxes in a label file with polygons: taken as boxes, though Ultralytics reads polygons of two points"
REACHING = "boxes that reach beyond the image: cut"
TRACKED = "lines with a track id: taken without it"
CAUSES = {  # kinds of odd lines, and what to do where all are so
    LONG_LINE: "write each object on a line of its own",
    NO_NUMBERS: "write class x y x y ..., numbers with blanks between them",
    NO_SHAPE: "write at least three pairs x y after the class, or the four numbers of a box",
    CONFIDENCE: "these look like predictions of a model; export the labels, or save predictions without confidences",
    OUTSIDE: "these look like pixels; divide by the image's width or height",
    NO_SIZE: "write the boxes as x y w h, with the centre first",
}


def parse_labels(
    text: str, where: str, classes: Collection[int] | None, found: LeftOut, keypoint_numbers: int = 0
) -> list[Line]:
    """The objects of a label file; blank lines are none.

    Four numbers are a box. In a file that has polygons, whose lines Ultralytics reads as polygons throughout, they are
    one only if it lies in the image; else they are a polygon of two points. A whole number after the box or polygon is
    the id of a track, as CVAT writes them, and is dropped; another number there is a model's confidence.

    Args:
        text: of the file.
        where: the file's name.
        classes: numbers that have a name; None: any number from 0.
        found: odd lines are added to it, by the kinds in `CAUSES`.
        keypoint_numbers: that a line may have after its box; they are dropped.

    Raises:
        UserError: a class has no name; the sentence begins with ``where`` and the line's number.
    """
    lines: list[Line] = []
    rows = text.splitlines()
    has_polygons = not keypoint_numbers and any(len(line.split(None, 6)) > 6 for line in rows)
    for number, line in enumerate(rows, start=1):
        if len(line) > LONGEST_LINE:
            found.add(LONG_LINE, f"{where}: line {number}")
            continue
        words = line.split()
        if not words:
            continue
        try:
            label, *rest = map(float, words)
        except ValueError:
            label, rest = math.nan, []
        tracked = words[-1].isdecimal() and _has_one_more(len(rest), keypoint_numbers)
        if tracked:
            rest.pop()
        kind = ""
        if not math.isfinite(label + sum(rest)):
            kind = NO_NUMBERS
        elif not label.is_integer() or not (0 <= label < MOST_CLASSES if classes is None else int(label) in classes):
            raise UserError(f"{where}: line {number}: {_unknown_class(label, classes)}")
        elif keypoint_numbers and len(rest) == 4 + keypoint_numbers:
            rest = rest[:4]
        is_box = len(rest) == 4
        if kind:
            pass
        elif len(rest) == 5 or (len(rest) > 6 and len(rest) % 2 and 0 <= rest[-1] <= 1):
            kind = CONFIDENCE
        elif not is_box and (len(rest) < 6 or len(rest) % 2):
            kind = NO_SHAPE
        elif min(rest) < -BEYOND or max(rest) > 1 + BEYOND:
            kind = OUTSIDE
        elif is_box and min(rest[2:]) <= 0:
            kind = NO_SIZE
        elif is_box and has_polygons and not _is_inside(*rest):
            kind = NO_SHAPE
        if kind:
            found.add(kind, f"{where}: line {number}")
            continue
        if tracked:
            found.add(TRACKED, f"{where}: line {number}")
        if is_box:
            if not _is_inside(*rest):
                found.add(REACHING, f"{where}: line {number}")
            if has_polygons:
                found.add(BESIDE_POLYGONS, f"{where}: line {number}")
            x, y, w, h = rest
            rest = [x - w / 2, y - h / 2, x + w / 2, y - h / 2, x + w / 2, y + h / 2, x - w / 2, y + h / 2]
        lines.append((int(label), np.array(rest).clip(0, 1).reshape(-1, 2), is_box))
    return lines


def _has_one_more(numbers: int, keypoint_numbers: int) -> bool:
    """Return whether a line has one number more than a box, with or without keypoints, or a polygon."""
    return numbers in (5, 5 + keypoint_numbers) or (not keypoint_numbers and numbers > 6 and numbers % 2 == 1)


def _is_inside(x: float, y: float, w: float, h: float) -> bool:
    """Return whether a box lies in the image."""
    return all(abs(centre - 0.5) + side / 2 <= 0.5 + BEYOND for centre, side in ((x, w), (y, h)))


def _unknown_class(label: float, classes: Collection[int] | None) -> str:
    if classes is None:
        return f"class {label:g} is not a number from 0 to {MOST_CLASSES - 1}; check what the line begins with"
    if max(classes) == len(classes) - 1:
        return f"class {label:g} is not one of the {len(classes)} names; use 0 to {len(classes) - 1}"
    known = ", ".join(map(str, sorted(classes)[:10])) + (", ..." if len(classes) > 10 else "")
    return f"class {label:g} is not one of the {len(classes)} names; use {known}"


class LabelFiles:
    """Finds the label files of images below a root."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tree = FileTree(root, also_inside=linked_folders(root))
        self._places: dict[Path, list[tuple[str, ...]]] = {}  # folders of images -> those that may hold their labels
        self._found: set[Path] = set()

    def find(self, image: Path) -> Path | None:
        """The label file of an image, or None.

        It has the image's name and lies where the last folder called ``images`` is called ``labels``, or else in a
        folder ``labels`` put in anywhere on the way to the image, the deepest first, or else beside the image.

        Raises:
            UserError: it is a link that leads out of the root.
        """
        name = f"{image.stem}.txt"
        for folder in self._folders(image.parent):
            if label := self._tree.at((*folder, name), str(image)):
                self._found.add(label)
                return label
        return None

    def _folders(self, images: Path) -> list[tuple[str, ...]]:
        """The folders that may hold the labels of a folder's images, by their parts below the root."""
        known = self._places.get(images)
        if known is not None:
            return known
        parts = images.relative_to(self._root).parts
        places = [place for place, part in enumerate(parts) if part.lower() == "images"]
        ways = [(parts[:place], parts[place + 1 :]) for place in places[-1:]]
        ways += [(parts[:place], parts[place:]) for place in range(len(parts), -1, -1)]
        folders: list[tuple[str, ...]] = []
        for before, after in ways:
            names = sorted(name for name in listing(self._root.joinpath(*before)) if name.lower() == "labels")
            candidates = [(*before, name, *after) for name in reversed(names)]
            folders += [folder for folder in candidates if self._root.joinpath(*folder).is_dir()]
        return self._places.setdefault(images, [*folders, parts])

    def without_image(self, folders: Iterable[Path]) -> list[Path]:
        """The label files that belong to no image on disk, after `find` was asked for all images.

        Args:
            folders: of images, to be taken with all folders in them.
        """
        stems: dict[Path, set[str]] = {}
        lone: set[Path] = set()
        paired: set[Path] = set()
        whole = set(folders)
        for images in whole | self._places.keys():
            for parts in self._folders(images):
                labels = self._root.joinpath(*parts)
                beside = labels == images
                if beside and not any(label.parent == images for label in self._found):
                    continue
                deep = images in whole and not beside
                files = files_below(labels, (".txt",), inside=self._root) if deep else _text_files(labels)
                for label in files:
                    if label in self._found:
                        continue
                    folder = images / label.parent.relative_to(labels)
                    if folder not in stems:
                        pictures = [name for name in listing(folder) if name.lower().endswith(IMAGE_SUFFIXES)]
                        stems[folder] = {alike(f"{Path(name).stem}.txt") for name in pictures}
                    (paired if alike(label.name) in stems[folder] else lone).add(label)
        return sorted(label for label in lone - paired if _looks_like_labels(label))


def listing(folder: Path) -> list[str]:
    """The names in a folder; none, if it cannot be listed."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _text_files(folder: Path) -> list[Path]:
    return [folder / name for name in listing(folder) if name.lower().endswith(".txt") and not is_hidden(name)]


def _looks_like_labels(path: Path) -> bool:
    """Whether a text file is empty or begins with a number, and is not a list of class names."""
    if path.name.lower() in NAME_FILES:
        return False
    try:
        with path.open("rb") as file:
            words = file.read(200).split()
        return not words or bool(np.isfinite(float(words[0])))
    except (OSError, ValueError):
        return False
