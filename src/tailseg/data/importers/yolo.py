"""YOLO sets: `data.yaml`, images, and for each image a text file of polygons or boxes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tailseg.data.images import IMAGE_SUFFIXES, MAX_PIXELS, ImageTooLargeError
from tailseg.data.importers.foreign import (
    AnnotatedImage,
    LeftOut,
    Shape,
    Source,
    image_size,
    read_text,
    source_of,
)
from tailseg.data.importers.yolo_config import MOST_FOLDERS, NAME_FILES, entries_of, find_config, find_names
from tailseg.data.importers.yolo_labels import CAUSES, REACHING, LabelFiles, Line, parse_labels
from tailseg.data.importers.yolo_layout import YoloLayout, find_layout
from tailseg.errors import UserError

MAX_BYTES = 2**26  # of a label file
MANY = 0.1  # share of boxes beyond their image from which on a note says what they may be

NO_IMAGE = "label files without an image: left out"
NO_LABEL = "images without a label file: taken as images without objects"
BROKEN = "images that cannot be read: left out with their labels"
TOO_LARGE = f"images of too many pixels (the limit is {MAX_PIXELS:,}): left out with their labels"
NO_TEXT = "images whose label file is not a UTF-8 text: left out"
LONG_TEXT = f"images whose label file has more than {MAX_BYTES >> 20} MB: left out"
SHARED = "images that share their label file with another image: taken with the same objects"
UNUSABLE = (BROKEN, TOO_LARGE, NO_TEXT, LONG_TEXT)


def read_yolo(source: Path, progress: Callable[[int], None] = lambda done: None) -> Source:
    """A YOLO set of polygons or boxes; a box gives a rectangular mask.

    Args:
        source: its folder, or its `data.yaml` or `obj.data`.
        progress: is told the number of images read.

    Raises:
        UserError: the set cannot be read; the sentence names the file and the place.
    """
    found = LeftOut()
    layout = find_layout(source, found)
    reader = _Reader(layout, found)
    objects: dict[str, list[AnnotatedImage]] = {}
    done = 0
    for split, images in layout.images.items():
        read = []
        for image, root in images.items():
            read.append(reader.read(image, root))
            done += 1
            progress(done)
        objects[split] = [image for image in read if image is not None]
    lone = reader.labels_without_image()
    reader.require_objects(objects)
    names = layout.names or {number: f"class_{number}" for number in sorted(reader.numbers)}
    result = source_of(objects, layout.root, [*names.values()], found)
    notes = [*layout.notes, *result.notes, *reader.notes(sum(map(len, objects.values())), lone)]
    return Source(result.categories, result.parts, notes)


class _Reader:
    """Reads image after image and counts what the notes tell."""

    def __init__(self, layout: YoloLayout, found: LeftOut) -> None:
        self._layout = layout
        self._found = found
        self._finders = {root: LabelFiles(root) for root in layout.roots}
        self._labelled = 0  # images with a label file
        self._boxes = 0
        self.numbers: set[int] = set()  # of classes that occur
        self._labels: dict[Path, Path] = {}  # label files in use, each with its first image
        self._contradictions: list[str] = []  # a sentence for each label file that has a class without a name

    def read(self, path: Path, root: Path) -> AnnotatedImage | None:
        """An image below ``root`` with its objects; None if it is left out."""
        label = self._finders[root].find(path)
        try:
            image_hw = image_size(path, str(self._layout.where))
        except UserError as error:
            self._found.add(TOO_LARGE if isinstance(error, ImageTooLargeError) else BROKEN, str(path))
            return None
        lines: list[Line] = []
        if label is None:
            self._found.add(NO_LABEL, str(path))
        else:
            if self._labels.setdefault(label, path) != path:
                self._found.add(SHARED, str(path))
            text = self._text(label)
            if text is None:
                return None
            layout = self._layout
            try:
                lines = parse_labels(text, str(label), layout.names, self._found, layout.keypoint_numbers)
            except UserError as error:
                self._contradictions.append(str(error))
            self._labelled += 1
        self._boxes += sum(is_box for _, _, is_box in lines)
        self.numbers.update(number for number, _, _ in lines)
        known = self._layout.names
        names = [known[number] if known else f"class_{number}" for number, _, _ in lines]
        shapes: list[Shape] = [[points * image_hw[::-1]] for _, points, _ in lines]
        return AnnotatedImage(path, image_hw, names, shapes)

    def _text(self, label: Path) -> str | None:
        """The text of a label file; None, and counted, if it cannot be read."""
        if label.stat().st_size > MAX_BYTES:
            self._found.add(LONG_TEXT, str(label))
            return None
        try:
            return read_text(label)
        except UserError:
            self._found.add(NO_TEXT, str(label))
            return None

    def labels_without_image(self) -> int:
        """Count the label files that belong to no image."""
        lone = [
            str(label)
            for root, finder in self._finders.items()
            for label in finder.without_image(place.path for place in self._layout.folders if place.root == root)
        ]
        if lone:
            self._found.add(NO_IMAGE, *lone)
        return len(lone)

    def require_objects(self, objects: dict[str, list[AnnotatedImage]]) -> None:
        """Refuse a set of which nothing can be used, with the likely cause."""
        where, counts = self._layout.where, self._found.counts
        if self._contradictions:
            others = len(self._contradictions) - 1
            raise UserError(
                self._contradictions[0] + (f" ({others:,} more label files are at fault)" if others else "")
            )
        if not objects["train"]:
            kind = max((kind for kind in UNUSABLE if kind in counts), key=counts.__getitem__)
            if kind == NO_TEXT:
                share = f", as of {counts[kind]:,} images" if counts[kind] > 1 else ""
                raise UserError(
                    f"{self._found.first(kind)}: this label file is not a UTF-8 text{share}; save it as one"
                )
            raise UserError(f"{where}: no training image can be used, such as {self._found.first(kind)}; replace it")
        if not self._labelled:
            raise UserError(f"{where}: no image has a label file; labels/ must lie beside images/, with the same names")
        odd = [kind for kind in CAUSES if kind in counts]
        if odd and not self.numbers:
            kind = max(odd, key=counts.__getitem__)
            what = f"{counts[kind]:,} are {kind.removesuffix(': left out')}"
            raise UserError(f"{self._found.first(kind)}: no line of any label file can be used; {what}: {CAUSES[kind]}")
        if not self.numbers:
            raise UserError(f"{where}: no label file has an object; check that these are the labels")

    def notes(self, images: int, lone: int) -> list[str]:
        """What to know beside the odd things: of ``images`` images that were read and ``lone`` labels without image."""
        notes = []
        if self._boxes:
            notes.append(f"{self._boxes:,} objects have a box only: their masks are rectangles")
        reaching = self._found.counts.get(REACHING, 0)
        if reaching and reaching >= MANY * self._boxes:
            share = f"{reaching:,} of {self._boxes:,} boxes reach beyond their image"
            notes.append(f"warning: {share}; check that they are x y w h with the centre first")
        if self._layout.keypoint_numbers:
            notes.append("the set has keypoints (kpt_shape): they were left out")
        if not self._layout.names:
            notes.append("no file tells the class names: they are class_0 and so on; write one a line to classes.txt")
        unlabelled = self._found.counts.get(NO_LABEL, 0)
        if 2 * unlabelled > images:
            share = f"{unlabelled:,} of {images:,} images have no label file"
            notes.append(f"warning: {share}; check that labels/ lies beside images/ and that the files' names agree")
        if lone > self._labelled:
            share = f"{lone:,} of {lone + self._labelled:,} label files have no image"
            notes.append(f"warning: {share}; check that no images are missing and that the files' names agree")
        return notes


def is_yolo(source: Path, *, inner: bool = True) -> bool:
    """Whether a file or folder looks like a YOLO set: names and a training split in YAML, or labels beside images.

    Only a few folders are looked into; what it accepts may still be refused by `read_yolo`, with the reason.

    Args:
        source: the file or folder.
        inner: a folder in it may be the set.
    """
    try:
        config = find_config(source)
        if config is not None and (inner or source in (config.path, config.path.parent)):
            return bool({"names", "nc"} & config.content.keys()) and "train" in config.entries()
    except UserError:  # in a folder, the fault of a data.yaml is for the reader to tell
        pass
    if not source.is_dir():
        return False
    try:
        folders = [source, *(entries_of(source)[0][:MOST_FOLDERS] if inner else [])]
        return any(map(_has_label_folder, folders)) or any(map(_has_labels_beside, folders))
    except UserError:
        return False


def has_names(source: Path) -> bool:
    """Whether a file in a folder tells the names of YOLO's classes, or is at fault."""
    try:
        return find_config(source) is not None or find_names(source) is not None
    except UserError:
        return True


def _has_label_folder(folder: Path) -> bool:
    """Whether a folder has images/ and labels/, and a text file lies in the latter or a folder in it."""
    inner = {path.name.lower(): path for path in entries_of(folder)[0]}
    if "images" not in inner or "labels" not in inner:
        return False
    folders, files = entries_of(inner["labels"])
    files += [path for below in folders[:MOST_FOLDERS] for path in entries_of(below)[1]]
    return any(path.suffix.lower() == ".txt" for path in files)


def _has_labels_beside(folder: Path) -> bool:
    """Whether images have text files beside them, and class names lie there or above."""
    if not any((place / name).is_file() for place in (folder, folder.parent) for name in NAME_FILES):
        return False
    names = [path.name for path in entries_of(folder)[1]]
    images = {os.path.splitext(name)[0] for name in names if name.lower().endswith(IMAGE_SUFFIXES)}
    return any(name.lower().endswith(".txt") and os.path.splitext(name)[0] in images for name in names)
