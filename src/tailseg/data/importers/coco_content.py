"""The rows of one COCO file, repaired as far as that goes, with the files of their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import mask as rle

from tailseg.data.annotations.image_files import candidate_names
from tailseg.data.annotations.masks import run_lengths
from tailseg.data.annotations.oddities import ODD_KINDS, Tally
from tailseg.data.annotations.repair import plain_annotation, whole
from tailseg.data.annotations.segmentations import MAX_SIDE, sound_segmentation
from tailseg.data.importers.foreign import DECIMALS, image_size, read_object, rectangle
from tailseg.data.importers.layouts import ImageFinder
from tailseg.data.importers.writer import Part, Row, new_names
from tailseg.errors import UserError
from tailseg.wording import short

SHOWN = 3  # places of each kind of odd thing
_MEANINGS = {
    "missing_image": "images whose file is not there: left out with their annotations",
    "its_image_missing": "annotations of images whose file is not there: left out",
    "size_read": "images without a sound height and width: taken from the file",
}


class CocoContent:
    """One annotation file, its rows repaired as far as that goes."""

    def __init__(self, path: Path, split: str, root: Path, crowds_are_objects: bool) -> None:
        self.path, self.split, self.root, self.crowds_are_objects = path, split, root, crowds_are_objects
        self.met = Tally()
        self.notes: list[str] = []
        data = read_object(path)
        self.images = self._rows(data, "images")
        self.annotations = self._rows(data, "annotations", needed=False)
        self.categories = self._rows(data, "categories")
        self._require_names()

    def _rows(self, data: Mapping[str, Any], key: str, *, needed: bool = True) -> list[Row]:
        rows = data.get(key, None if needed else [])
        if not isinstance(rows, list) or (needed and not rows):
            raise UserError(f"{self.path}: {key!r} must be a list of at least one object; check the file")
        wrong = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
        if wrong is not None:
            raise UserError(f"{self.path}: {key}[{wrong}] is no object; remove it")
        return rows

    def part(self, numbers: Mapping[Any, int]) -> Part:
        """The split as LVIS rows; ``numbers`` are the new ids of the file's categories."""
        kept = self._located_images()
        ids = _new_ids([row.get("id") for row, _ in kept], f"{self.path}: image")
        places: dict[Any, Row] = {}
        part = Part()
        names = new_names([path for _, path in kept], self.root)
        for (row, path), number, name in zip(kept, ids, names, strict=True):
            height, width = self._size(row, path)
            lists = {
                key: [numbers[i] for i in row[key] if is_id(i) and i in numbers]
                for key in ("neg_category_ids", "not_exhaustive_category_ids")
                if isinstance(row.get(key), list)
            }
            new = {**row, **lists, "id": number, "file_name": name, "height": height, "width": width}
            part.images.append(new)
            part.files.append(path)
            places[row.get("id")] = new
        self._add_annotations(part, places, numbers)
        return part

    def _located_images(self) -> list[tuple[Row, Path]]:
        """The images whose file is there, each once."""
        candidates = [
            candidate_names(_text(row.get("file_name")) or _text(row.get("path")), _text(row.get("coco_url")))
            for row in self.images
        ]
        paths = ImageFinder(self.root).locate(candidates, self.path.parent, self.split)
        missing = [i for i, path in enumerate(paths) if path is None]
        if len(missing) > len(paths) / 2:
            shown = candidates[missing[0]][0] if candidates[missing[0]] else "without a name"
            count = f"{len(missing)} of its {len(paths)} images are not in {self.root}"
            raise UserError(f"{self.path}: {count}, the first of them {shown}; put the images there")
        for i in missing:
            name = candidates[i][0] if candidates[i] else f"image {short(self.images[i].get('id'))}"
            self.met.add("missing_image", [name])
        seen: set[tuple[Any, Path]] = set()
        kept = []
        for row, path in zip(self.images, paths, strict=True):
            if path is not None and (_hashable(row.get("id")), path) not in seen:
                seen.add((_hashable(row.get("id")), path))
                kept.append((row, path))
        return kept

    def _size(self, row: Row, path: Path) -> tuple[int, int]:
        height, width = whole(row.get("height")), whole(row.get("width"))
        if height is not None and width is not None and 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
            return height, width
        self.met.add("size_read", [f"image {short(row.get('id'))}"])
        return image_size(path, f"{self.path}: image {short(row.get('id'))}")

    def _add_annotations(self, part: Part, images: Mapping[Any, Row], numbers: Mapping[Any, int]) -> None:
        """The annotations that are whole, or can be made so."""
        boxes_only = not any(row.get("segmentation") for row in self.annotations)
        listed = {_hashable(row.get("id")) for row in self.images}
        rectangles = 0
        for number, row in enumerate(self.annotations):
            own = row.get("id")
            place = f"annotation {short(own)}" if is_id(own) else f"annotation number {number + 1} of the list"
            image = images.get(row.get("image_id")) if is_id(row.get("image_id")) else None
            if image is None:
                known = _hashable(row.get("image_id")) in listed
                self.met.add("its_image_missing" if known else "no_image", [place])
                continue
            category = row.get("category_id")
            if not is_id(category) or category not in numbers:
                problem = f"{place}: there is no category with the category_id {short(category)}"
                raise UserError(f"{self.path}: {problem}; add it or remove this annotation")
            plain = plain_annotation(
                row | {"image_id": image["id"], "category_id": numbers[category]}, place, number, self.met
            )
            assert plain is not None
            if self.crowds_are_objects:
                plain["iscrowd"] = 0
            if boxes_only and plain["bbox"][0] == plain["bbox"][0]:
                x, y, w, h = plain["bbox"]
                plain["segmentation"] = [rectangle(x, y, x + w, y + h).ravel().tolist()]
                rectangles += 1
            if self._make_whole(plain, place, (image["height"], image["width"])):
                part.annotations.append(plain)
        ids = [row["id"] for row in part.annotations]
        if len(set(ids)) < len(ids):
            part.annotations = [{**row, "id": i} for i, row in enumerate(part.annotations, 1)]
        if rectangles:
            self.notes.append(f"{rectangles:,} objects have a box only: their masks are rectangles")

    def _make_whole(self, row: Row, place: str, image_hw: tuple[int, int]) -> bool:
        """Check the mask, and fill in box and area where they are missing; False if the object is left out."""
        segmentation, fault = sound_segmentation(row.get("segmentation"), place, self.met)
        if fault is None and isinstance(segmentation, dict) and segmentation["size"] != list(image_hw):
            fault_kind, problem = "bad_mask", f"the RLE's size is {segmentation['size']}, the image's {list(image_hw)}"
        elif fault is not None:
            fault_kind, problem = fault.kind, fault.problem
        else:
            fault_kind, problem = "", ""
        if fault_kind:
            self.met.add(fault_kind, [f"{place}: {problem}"])
            return False
        row["segmentation"] = segmentation
        no_box, no_area = row["bbox"][0] != row["bbox"][0], row["area"] is None
        if no_box or no_area:
            code = {"size": list(image_hw), "counts": _counts(segmentation, image_hw)}
            if no_box:
                row["bbox"] = np.round(_box_of(segmentation, code), DECIMALS).tolist()
                self.met.add("box", [place])
            if no_area:
                row["area"] = float(rle.area(code))
                self.met.add("area", [place])
        x, y, w, h = row["bbox"]
        if min(x + w, image_hw[1]) <= max(x, 0) or min(y + h, image_hw[0]) <= max(y, 0):
            self.met.add("outside", [place])
            return False
        if row["area"] <= 0:
            self.met.add("no_area", [place])
            return False
        return True

    def _require_names(self) -> None:
        """Names of categories are texts, ids whole numbers or texts, each once."""
        for number, row in enumerate(self.categories, 1):
            name = row.get("name")
            if type(name) in (int, float):
                row["name"] = name = str(name)
            if not is_id(row.get("id")) or not isinstance(name, str) or not name:
                raise UserError(f"{self.path}: category number {number} of the list has no id or no name; give it both")
            if type(row["id"]) is float:
                row["id"] = int(row["id"])
        ids = [row["id"] for row in self.categories]
        if len(set(ids)) < len(ids):
            again = next(number for number in ids if ids.count(number) > 1)
            raise UserError(f"{self.path}: category {again!r}: this id occurs more than once; give each its own")

    def all_notes(self, where: str) -> list[str]:
        """Sentences on everything odd; ``where`` ends them, to name the file."""
        notes = [note + where for note in self.notes]
        for kind, count in self.met.counts.items():
            meaning = _MEANINGS.get(kind) or ODD_KINDS[kind].meaning
            places = self.met.places[kind][:SHOWN]
            notes.append(f"{count:,} {meaning} ({', '.join(places)}{', ...' if count > len(places) else ''}){where}")
        return notes


def _new_ids(ids: Sequence[Any], where: str) -> list[int]:
    """The ids themselves if all are whole numbers of at most 64 bits with sign, else 1, 2, ...

    Raises:
        UserError: an id stands for two images.
    """
    plain = [int(i) if type(i) is float and i.is_integer() else i for i in ids]
    for i in plain:
        if not is_id(i):
            raise UserError(f"{where} has the id {short(i)}; give each image an id, a number or a text")
    if len(set(plain)) < len(plain):
        again = next(i for i in plain if plain.count(i) > 1)
        raise UserError(f"{where} {again!r}: this id is that of two files; give each its own")
    fits = all(type(i) is int and -(2**63) <= i < 2**63 for i in plain)
    return plain if fits else list(range(1, len(plain) + 1))


def is_id(value: object) -> bool:
    """Ids are names: any number or text."""
    return type(value) in (int, str) or (type(value) is float and value.is_integer())


def _hashable(value: object) -> Any:
    return value if is_id(value) else repr(value)


def _counts(segmentation: Any, image_hw: tuple[int, int]) -> str:
    if isinstance(segmentation, dict):
        code = rle.frPyObjects(segmentation, *image_hw) if isinstance(segmentation["counts"], list) else segmentation
        counts = code["counts"]
        return counts.decode() if isinstance(counts, bytes) else counts
    return run_lengths([np.array(polygon, np.float64) for polygon in segmentation], image_hw)


def _box_of(segmentation: Any, code: Row) -> Any:
    if isinstance(segmentation, dict):
        return np.asarray(rle.toBbox(code), np.float64)
    points = np.concatenate([np.array(polygon, np.float64) for polygon in segmentation]).reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    return np.array([*low, *(high - low)])


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
