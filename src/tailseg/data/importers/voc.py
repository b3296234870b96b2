"""Pascal VOC's files, one XML for each image: boxes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.image_files import files_below
from tailseg.data.images import IMAGE_SUFFIXES
from tailseg.data.importers.foreign import (
    AnnotatedImage,
    LeftOut,
    Shape,
    Source,
    image_size,
    read_bytes,
    read_text,
    rectangle,
    source_by_names,
)
from tailseg.data.importers.layouts import split_folders
from tailseg.data.importers.writer import require_inside
from tailseg.errors import UserError


def read_voc(source: Path) -> Source:
    """`Annotations/`, `JPEGImages/` and `ImageSets/Main/` (train.txt, val.txt), or XML files beside their images."""
    if (source / "Annotations").is_dir():
        files = _voc_lists(source)
    else:
        files = {split: list(files_below(folder, (".xml",))) for split, folder in split_folders(source).items()}
    objects = {split: [_voc(path, source) for path in paths] for split, paths in files.items()}
    if not any(objects.values()):
        raise UserError(f"{source}: there is no annotation (.xml) in it; check the folder")
    found = source_by_names(objects, source, LeftOut())
    note = "Pascal VOC has boxes only: the masks are rectangles, so mask AP means box AP"
    return Source(found.categories, found.parts, [*found.notes, note])


def _voc_lists(source: Path) -> dict[str, list[Path]]:
    """The annotation files of each split, by the lists of image names."""
    lists = {split: source / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val")}
    if not lists["train"].exists():
        return {"train": list(files_below(source / "Annotations", (".xml",)))}
    found: dict[str, list[Path]] = {}
    for split, path in lists.items():
        if path.exists():
            found[split] = []
            for number, line in enumerate(read_text(path).split("\n"), start=1):
                if words := line.split():
                    file = source / "Annotations" / f"{words[0]}.xml"
                    found[split].append(require_inside(file, source, f"{path}: line {number}"))
    return found


def _voc(path: Path, root: Path) -> AnnotatedImage:
    tree = parse_xml(read_bytes(path), str(path))
    file = _voc_image(path, root, tree.findtext("filename") or "")
    width, height = (_number(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    stated = (int(height), int(width)) if width and height else None
    image_hw = image_size(file, str(path), stated)
    names: list[str] = []
    shapes: list[Shape] = []
    for number, item in enumerate(tree.findall("object"), start=1):
        name, box = parse_voc_object(item, f"{path}: object {number}")
        names.append(name)
        shapes.append([box])
    return AnnotatedImage(file, image_hw, names, shapes)


def parse_xml(content: bytes, where: str) -> ElementTree.Element:
    """The root of an XML file without document type, whose entities could grow without end."""
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise UserError(f"{where}: it declares a document type; remove the line with <!DOCTYPE")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{where}: not valid XML: {error}; write it again".replace("\n", " ")) from None


def parse_voc_object(item: ElementTree.Element, where: str) -> tuple[str, NDArray[np.float64]]:
    """Name and rectangle of an object; its pixels count from 1, and the last one belongs to it."""
    name = (item.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{where}: it has no name; give it one")
    sides = [_number(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
    x0, y0, x1, y1 = (np.nan if side is None else side for side in sides)
    if not (x0 <= x1 and y0 <= y1):  # also refuses what is missing or not a number
        raise UserError(f"{where}: its bndbox needs the numbers xmin <= xmax and ymin <= ymax; correct it")
    return name, rectangle(x0 - 1, y0 - 1, x1, y1)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _voc_image(path: Path, root: Path, name: str) -> Path:
    """The image of an annotation file, by the name it states or its own; in `JPEGImages` or beside it."""
    names = [name] if name else []
    names += [path.stem + suffix for suffix in IMAGE_SUFFIXES]
    for file in _places(path, root, names):
        if file.is_file():
            return require_inside(file, root, str(path))
    raise UserError(f"{path}: its image {names[0]!r} is not in JPEGImages or beside it; put it there")


def _places(path: Path, root: Path, names: Iterable[str]) -> Iterable[Path]:
    return (folder / name for name in names for folder in (root / "JPEGImages", path.parent, root / "images"))
