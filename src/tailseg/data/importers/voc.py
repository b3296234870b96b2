"""Pascal VOC's files, one XML for each image: boxes, and the polygons that Roboflow adds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.image_files import alike, files_below
from tailseg.data.images import IMAGE_SUFFIXES
from tailseg.data.importers.foreign import (
    AnnotatedImage,
    LeftOut,
    Source,
    read_bytes,
    read_text,
    rectangle,
    source_by_names,
)
from tailseg.data.importers.layouts import Split, split_of, split_of_path, words_of
from tailseg.data.importers.shapes import ObjectList, OddObjectError, label_of, number_of, polygon_of, size_of
from tailseg.data.importers.source_images import SourceImages, recognised
from tailseg.data.importers.xml_files import parse_xml, root_of
from tailseg.errors import UserError

HEAD = 4096  # bytes of a list that tell whether it is one
MAX_BYTES = 2**25  # of a file

_ANNOTATIONS = "annotations"  # the folder, in any case
_LIST_FOLDERS = ("Main", "Segmentation", "Layout", "")  # of ImageSets, in this order
_ORDER: tuple[Split, ...] = ("train", "val", "test")
_FLAG = re.compile(r"\s+-?[01]$")  # behind the names in the lists of a class
_IMAGE_FOLDERS = ("JPEGImages", "images")


def is_voc(path: Path) -> bool:
    """Return whether a file looks like one of Pascal VOC's, by its first 4 KB: XML whose root is <annotation>."""
    return root_of(path) == "annotation"


def read_voc(source: Path) -> Source:
    """Pascal VOC's folders, also those of several years, or XML files in any folders.

    Splits are told by the lists in `ImageSets` (train.txt, val.txt, trainval.txt) beside `Annotations`; where there are
    none, by folders called train and val.
    """
    if source.is_file():
        raise UserError(f"{source}: Pascal VOC has one file for each image; give the folder that holds all of them")
    found = LeftOut()
    files = list(files_below(source, (".xml",)))
    own = recognised(files, is_voc, "XML files that are not Pascal VOC's: left out", found)
    if not own:
        problem = f"none of its {len(files)} XML files is Pascal VOC's" if files else "there is no XML file in it"
        raise UserError(f"{source}: {problem}; give the folder that holds Annotations")
    reader = _Reader(source, found)
    told = _told(source, own, found)
    told.sort(key=lambda item: not reader.has_own_image(item[0]))  # before copies, which state the image of another
    result = source_by_names(reader.images.read(told, reader.read), source, found)
    bases = {_base(path, source) for path in own}
    return Source(result.categories, result.parts, [*result.notes, *reader.notes(bases)])


def _told(source: Path, files: list[Path], found: LeftOut) -> list[tuple[Path, Split | None]]:
    """The split of each file, by the lists in its `ImageSets` folder, or else by the folders that it lies in."""
    bases: dict[Path, list[Path]] = {}
    for path in files:
        bases.setdefault(_base(path, source), []).append(path)
    told: list[tuple[Path, Split | None]] = []
    for base, paths in bases.items():
        lists = _lists(base)
        if lists:
            told += _listed(lists, base, paths, found)
        else:
            told += [(path, split_of_path(path, source)) for path in paths]
    return told


def _base(path: Path, source: Path) -> Path:
    """The folder that holds `Annotations`, where a file lies in one; else the source."""
    parts = path.parent.relative_to(source).parts
    places = [place for place, part in enumerate(parts) if part.lower() == _ANNOTATIONS]
    return source.joinpath(*parts[: places[0]]) if places else source


def _lists(base: Path) -> dict[Split, Path]:
    """The lists of names of each split; those of a class (cat_train.txt) are not among them."""
    folders = [sorted((base / "ImageSets" / folder).glob("*.txt")) for folder in _LIST_FOLDERS]
    beside = [path for path in sorted(base.glob("*.txt")) if _lists_files(path)]  # as PaddleDetection has them
    for paths in (*folders, beside):
        found: dict[Split, Path] = {}
        for path in paths:
            split = split_of(path.stem) if len(words_of(path.stem)) == 1 else None
            if split is not None:
                found.setdefault(split, path)
        both = [path for path in paths if path.stem.lower() == "trainval"]
        if both and "train" not in found:
            found["train"] = both[0]
        elif both and "val" not in found:
            found["val"] = both[0]  # names of the training list stay with training
        if found:
            return found
    return {}


def _lists_files(path: Path) -> bool:
    """Return whether the first line of a text ends with the name of an image or an annotation file."""
    try:
        with path.open("rb") as file:
            line = file.readline(HEAD).decode("utf-8", "replace")
    except OSError:
        return False
    return line.strip().lower().endswith((*IMAGE_SUFFIXES, ".xml"))


def _listed(lists: dict[Split, Path], base: Path, files: list[Path], found: LeftOut) -> list[tuple[Path, Split | None]]:
    """The split of each file by the lists; the first of training, validation and test that names it counts."""
    names: dict[str, Path] = {}
    for path in files:
        names.setdefault(alike(f"{path.stem}.xml"), path)
    for path in files:
        parts = path.relative_to(base).parts
        names[alike("/".join(parts[parts[0].lower() == _ANNOTATIONS :]))] = path
    # Where there is a list for training, files that no list names are as little for it as those of a test list.
    rest: Split | None = "test" if "train" in lists else None
    told: dict[Path, Split | None] = {}
    for split in _ORDER:
        lines = read_text(lists[split]).splitlines() if split in lists else []
        for number, line in enumerate(lines, start=1):
            name = line.strip().strip('"')
            if not name:
                continue
            file = _named(name, names)
            if file is None:
                if split != "test":
                    found.add("names in a list without annotation file: left out", f"{lists[split]}: line {number}")
            elif file not in told:
                told[file] = split
            elif told[file] == "train" and split == "val" and lists[split].stem.lower() != "trainval":
                found.add("names in both lists: kept for training only", f"{lists[split]}: line {number}")
    return [(path, told.get(path, rest)) for path in files]


def _named(line: str, names: dict[str, Path]) -> Path | None:
    """The annotation file that a line of a list names: with or without folder, suffix or the flag of a class.

    Of a line with an image and its annotation file, the latter counts.
    """
    for text in (line, _FLAG.sub("", line).strip('"'), line.split()[-1]):
        name = text.replace("\\", "/")
        stem, dot, suffix = name.rpartition(".")
        bare = stem if f"{dot}{suffix}".lower() in (*IMAGE_SUFFIXES, ".xml") else name
        for candidate in (bare, bare.partition("/")[2], bare.rpartition("/")[2]):
            if candidate and (file := names.get(alike(f"{candidate}.xml"))):
                return file
    return None


class _Reader:
    """Reads annotation files, and counts what has a box only."""

    def __init__(self, source: Path, found: LeftOut) -> None:
        self.source = source
        self.images = SourceImages(source, found, "annotation files")
        self._found = found
        self._boxes = self._objects = 0

    def read(self, path: Path) -> AnnotatedImage | None:
        """The image of a file with its objects; None, and counted, if there is no such thing."""
        where = str(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UserError(f"{where}: it has more than {MAX_BYTES >> 20} MB; write one file for each image")
            tree = parse_xml(read_bytes(path), where)
        except UserError as error:
            self.images.fault("XML files that cannot be read: left out", str(error))
            return None
        file = self._image(path, tree)
        if file is None:
            return None
        stated = size_of(tree.findtext("size/height"), tree.findtext("size/width"))
        image_hw = self.images.use(file, where, stated)
        if image_hw is None:
            return None
        objects = ObjectList(image_hw)
        for number, item in enumerate(tree.findall("object"), start=1):
            try:
                name, polygon = parse_voc_object(item)
            except OddObjectError as odd:
                self._found.add(str(odd), f"{where}: object {number}")
            else:
                objects.add(name, polygon)
                if (item.findtext("difficult") or "").strip() == "1":
                    self._found.add("objects marked as difficult: taken as all others", f"{where}: object {number}")
                self._objects += 1
                self._boxes += item.find("polygon/x1") is None
        return AnnotatedImage(file, image_hw, objects.names, objects.shapes())

    def has_own_image(self, path: Path) -> bool:
        """Return whether an image has the name of a file."""
        return self.images.of_stem(path.stem, self._folders(path)) is not None

    def _image(self, path: Path, tree: Element) -> Path | None:
        """The image of a file; None, and counted, if there is none."""
        names = [(tree.findtext(tag) or "").strip().replace("\\", "/") for tag in ("filename", "path")]
        names = [name for name in (*names, *(name.rpartition("/")[2] for name in names)) if name]
        file = next(filter(None, self._found_images(path, names)), None)
        if file is None:
            shown = next(iter(names), f"{path.stem}.jpg")
            fix = "put it into JPEGImages, images or beside the file, or give the folder that holds both"
            self.images.missing(f"{path}: its image {shown!r} {self.images.absence(shown)}; {fix}")
        return file

    def _found_images(self, path: Path, names: Sequence[str]) -> Iterator[Path | None]:
        """The images that a file may mean, the likeliest first, by the names that it states and its own.

        Files and images of one name belong together, as in VOC itself. What a file states is often the name of another
        image: that of the file that it was copied from, or its own before it was renamed.
        """
        folders, where = self._folders(path), str(path)
        own = [
            name for name in names if alike(f"{PurePosixPath(name).stem}.xml") == alike(path.with_suffix(".xml").name)
        ]
        yield from (self.images.stated(name, folders, where) for name in own)
        yield self.images.of_stem(path.stem, folders)
        yield from (self.images.stated(name, folders, where) for name in names)
        yield from (self.images.of_stem(name.rpartition("/")[2], folders) for name in names)  # without suffix
        yield from (self.images.anywhere(name, path.parent) for name in (*names, path.stem))

    def _folders(self, path: Path) -> list[Path]:
        """The folders that may hold the image of a file, those that mirror its own place first."""
        parts = path.parent.relative_to(self.source).parts
        places = [place for place, part in enumerate(parts) if part.lower() == _ANNOTATIONS]
        folders: list[Path] = []
        for place in reversed(places):
            for name in _IMAGE_FOLDERS:
                base = self.source.joinpath(*parts[:place], name)
                folders += [base.joinpath(*parts[place + 1 :]), base]
        return [*folders, path.parent, *(self.source / name for name in _IMAGE_FOLDERS), self.source]

    def notes(self, bases: Iterable[Path]) -> list[str]:
        """Sentences on masks that are rectangles, and on those not read: beside `Annotations` in the ``bases``."""
        found = []
        if self._boxes == self._objects:
            found.append("Pascal VOC has boxes only: the masks are rectangles, so mask AP means box AP")
        elif self._boxes:
            found.append(f"{self._boxes:,} objects have a box only: their masks are rectangles")
        for folder in sorted(path for base in bases for path in base.glob("SegmentationObject")):
            number = sum(1 for _ in files_below(folder, (".png",)))
            found.append(f"{folder} has masks of {number:,} images, which are not read: export COCO to have them")
        return found


def parse_voc_object(item: Element) -> tuple[str, NDArray[np.float64]]:
    """Name and outline (K, 2) of an object: its polygon, or the rectangle of its box.

    Pixels count from 1, and the last one of a box belongs to it.

    Raises:
        OddObjectError: it has no name, or neither a polygon nor a box.
    """
    name = label_of((item.findtext("name") or "").strip())
    polygon = item.find("polygon")
    if polygon is not None and polygon.find("x1") is not None:
        values = {child.tag: number_of(child.text) for child in polygon}
        count = next(number for number in range(1, len(values) + 2) if f"x{number}" not in values)
        pairs = [(values[f"x{number}"], values.get(f"y{number}", np.nan)) for number in range(1, count)]
        return name, polygon_of(np.array(pairs) - 1)
    sides = [number_of(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
    if np.isnan(sides).any():
        raise OddObjectError("objects without a box of four numbers: left out")
    corners = polygon_of(rectangle(sides[0] - 1, sides[1] - 1, sides[2], sides[3]))
    if not (corners[0] < corners[2]).all():
        raise OddObjectError("objects whose box has xmin > xmax or ymin > ymax: left out")
    return name, corners
