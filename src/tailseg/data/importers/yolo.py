"""YOLO's text labels: `data.yaml`, and for each image a file of lines `class x y x y ...`, from 0 to 1."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from tailseg.data.annotations.image_files import files_below
from tailseg.data.images import IMAGE_SUFFIXES
from tailseg.data.importers.foreign import (
    AnnotatedImage,
    LeftOut,
    Shape,
    Source,
    image_size,
    read_text,
    source_of,
)
from tailseg.data.importers.writer import require_inside
from tailseg.errors import UserError

BEYOND = 0.01  # how far a coordinate may lie outside of 0 to 1, from rounding; it is cut


def read_yolo(source: Path) -> Source:
    """A YOLO segmentation set, by its folder or its `data.yaml`; lines of a box give a rectangular mask."""
    config = source if source.is_file() else source / "data.yaml"
    if not config.exists():
        others = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
        config = others[0] if len(others) == 1 else config
    content = _yaml(config)
    names = _names(config, content)
    objects: dict[str, list[AnnotatedImage]] = {}
    boxes = labelled = 0
    for split in ("train", "val"):
        if content.get(split) is None:
            continue
        objects[split] = []
        for path in _images(config, content, split):
            label = _label_file(path)
            image_hw = image_size(path, str(config))
            lines: list[tuple[int, NDArray[np.float64], bool]] = []
            if label.exists():
                labelled += 1
                require_inside(label, config.parent, str(config))
                lines = parse_labels(read_text(label), str(label), names)
            boxes += sum(is_box for _, _, is_box in lines)
            shapes: list[Shape] = [[points * image_hw[::-1]] for _, points, _ in lines]
            objects[split].append(AnnotatedImage(path, image_hw, [names[number] for number, _, _ in lines], shapes))
    if "train" not in objects:
        raise UserError(f"{config}: the entry 'train' is missing; add it, with the folder of the training images")
    if not labelled:
        raise UserError(f"{config}: no image has a label file; labels/ must lie beside images/, with the same names")
    found = source_of(objects, config.parent, names, LeftOut())
    note = f"{boxes} objects have a box only: their masks are rectangles"
    return Source(found.categories, found.parts, [*found.notes, *([note] if boxes else [])])


def parse_labels(text: str, where: str, names: Sequence[str]) -> list[tuple[int, NDArray[np.float64], bool]]:
    """Class, (K, 2) points from 0 to 1, and whether it was a box, of each line that is not blank.

    Raises:
        UserError: a line is neither a polygon nor a box; it begins with ``where`` and the line's number.
    """
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{where}: line {number}"
        try:
            values = np.array([float(word) for word in line.split()])
        except ValueError:
            raise UserError(
                f"{place}: {line.strip()[:60]!r} is not a row of numbers; write class x y x y ..."
            ) from None
        label, rest = values[0], values[1:]
        if not (label == np.floor(label) and 0 <= label < len(names)):
            raise UserError(f"{place}: class {label:g} is not one of the {len(names)} names; use 0 to {len(names) - 1}")
        if len(rest) != 4 and (len(rest) < 6 or len(rest) % 2):
            what = f"{len(rest)} numbers after the class"
            raise UserError(f"{place}: {what}; a polygon needs at least three pairs x y, a box four numbers")
        if not ((rest >= -BEYOND) & (rest <= 1 + BEYOND)).all():  # also refuses what is not a number
            bad = rest[~((rest >= -BEYOND) & (rest <= 1 + BEYOND))][0]
            raise UserError(f"{place}: {bad:g} is not between 0 and 1; divide by the image's width or height")
        is_box = len(rest) == 4
        if is_box:
            x, y, w, h = rest
            rest = np.array([x - w / 2, y - h / 2, x + w / 2, y - h / 2, x + w / 2, y + h / 2, x - w / 2, y + h / 2])
        found.append((int(label), rest.clip(0, 1).reshape(-1, 2), is_box))
    return found


def _yaml(config: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(config))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{config}: not valid YAML{place}; write the entries train, val and names") from None
    if not isinstance(content, dict):
        raise UserError(f"{config}: expected the entries train, val and names; check the file")
    return content


def _names(config: Path, content: dict[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{config}: 'names' must be a list of class names, or map 0, 1, 2, ... to them")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"{config}: the class name {repeated[0]!r} occurs more than once; give each class its own")
    return names


def _images(config: Path, content: dict[str, Any], split: str) -> list[Path]:
    """The images of a split: of folders, or of text files that list them."""
    entries = content[split] if isinstance(content[split], list) else [content[split]]
    found: list[Path] = []
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise UserError(f"{config}: {split} is {entry!r}; it must be a folder of images or a list of files")
        path = _located(config, content.get("path"), entry)
        if path.is_dir():
            found += files_below(path, IMAGE_SUFFIXES)
            continue
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if name := line.strip():
                where = f"{path}: line {number}"
                base = path.parent if name.startswith("./") else config.parent
                image = require_inside(base / name, config.parent, where)
                if not image.is_file():
                    raise UserError(f"{where}: {image} does not exist; put the image there or remove the line")
                found.append(image)
    if not found:
        raise UserError(f"{config}: {split} has no images; check the folder it names")
    return found


def _located(config: Path, base: object, entry: str) -> Path:
    """Path of an entry of the YAML file: below its `path`, below the file's folder, or, as Roboflow writes, from a
    folder beside it. Only what lies in the file's own folder counts.
    """
    root = config.parent
    starts = [root / base, root] if isinstance(base, str) else [root]
    for path in [start / name for start in starts for name in (entry, entry.removeprefix("../"))]:
        if path.exists() and path.resolve().is_relative_to(root.resolve()):
            return Path(os.path.normpath(path)) if ".." in path.parts else path
    raise UserError(f"{config}: {entry} is not in {root}; put data.yaml into the folder that holds the images")


def _label_file(image: Path) -> Path:
    """The label file of an image: its path with the last folder `images` called `labels`."""
    parts = list(image.parts)
    for place in reversed(range(len(parts) - 1)):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")
