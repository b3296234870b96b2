"""The rows of one COCO file, repaired as far as that goes, with the files of their images."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from hotcoco import mask as rle

from tailseg.data.annotations.masks import run_lengths
from tailseg.data.annotations.oddities import CROWDS_FIX, ODD_KINDS, Tally, counted
from tailseg.data.annotations.packed import open_unpacked
from tailseg.data.annotations.parsing import read_tables, told_apart
from tailseg.data.annotations.repair import meant, plain_annotation
from tailseg.data.annotations.segmentations import sound_segmentation
from tailseg.data.importers.coco_images import MEANINGS as OF_IMAGES
from tailseg.data.importers.coco_images import usable_images
from tailseg.data.importers.foreign import DECIMALS, id_of, rectangle
from tailseg.data.importers.shapes import number_of, rotated
from tailseg.data.importers.writer import Part, Row, new_names
from tailseg.errors import UserError
from tailseg.wording import short

MANY = 0.1  # share of crowds, or of boxes that fit as corners, from which on a note says what they may be
BEYOND = 2  # pixels by which boxes may leave their image, from rounding
_MEANINGS = {
    **OF_IMAGES,
    "its_image": "annotations of images that are left out: left out too",
    "no_category": "annotations of a category that the file does not list: left out",
    "empty": "images without objects: kept, as images that show none of the classes",
    "ignored": 'objects with "ignore": neither objects nor background in training; found or not, they do not count',
}


_FIXES = {  # where nothing else is left, and it is convert that says so
    "its_image": "put these images there, or correct them",
    "no_category": "write an id of the list of categories into each category_id",
    "no_mask": "draw one",
    "no_box": "write bbox as four numbers x, y, width, height, or draw masks",
}


class CocoContent:
    """One annotation file, its rows repaired as far as that goes."""

    def __init__(self, path: Path, split: str, root: Path, *, alone: bool, crowds_are_objects: bool) -> None:
        """Read a file.

        Args:
            path: the file.
            split: "train" or "val".
            root: folder below which its images are searched for.
            alone: there is no file of another split.
            crowds_are_objects: take ``iscrowd`` as 0 throughout.
        """
        self.path, self.split, self.root = path, split, root
        self.alone, self.crowds_are_objects = alone, crowds_are_objects
        self.files: list[Path] = []  # of its images, known with its part
        self.met = Tally()
        self.notes: list[str] = []
        lists = self._lists()
        self.images, self.annotations = lists["image"], lists["annotation"]
        self.categories = self._named(lists["category"])  # their names are told apart by `settle`
        self.names_are_unique = True

    def _lists(self) -> dict[str, list[Row]]:
        """The file's rows by kind."""
        lists: dict[str, list[Row]] = {"image": [], "annotation": [], "category": []}
        for table in read_tables(self.path):
            lists[table.kind] += table.objects(self.met).rows
        if not lists["category"] or (not lists["image"] and self.split == "train"):
            missing = "images" if lists["category"] else "categories"
            raise UserError(f"{self.path}: the list of {missing} is empty; fill it, or remove the file")
        if any(type(row.get("id")) is float and abs(row["id"]) >= 2**63 for row in lists["image"]):
            with open_unpacked(self.path) as file:  # the fast reader makes floats of these, many of which are the same
                text = file.read().decode("utf-8-sig")
            try:
                content = json.loads(text, parse_int=_number)
            except ValueError:
                raise UserError(f"{self.path}: an id has thousands of digits; number the images 1, 2, ...") from None
            annotations = [row for row in content.get("annotations", []) if type(row) is dict]
            lists |= {"image": content["images"], "annotation": annotations}
        return lists

    def _named(self, rows: Sequence[Row]) -> list[Row]:
        """The categories, each once."""
        named: dict[Any, Row] = {}
        for number, row in enumerate(rows, 1):
            key, name = id_of(row.get("id")), row.get("name")
            name = str(name) if type(name) in (int, float) else name
            if key is None or not isinstance(name, str) or not name:
                raise UserError(f"{self.path}: category number {number} of the list has no id or no name; give it both")
            name = normalize("NFC", name)
            if key in named and named[key]["name"] != name:
                raise UserError(f"{self.path}: category {short(key)}: this id occurs more than once; give each its own")
            if key in named:
                self.met.add("category_again", [f"category {key!r}: {name!r}"])
            named.setdefault(key, {**row, "id": key, "name": name})
        return list(named.values())

    def settle(self, left_out: Sequence[Row]) -> None:
        """Give each category a name of its own, without those left out: `kind_of` them counts."""
        kinds = set(map(kind_of, left_out))
        rows = [row for row in self.categories if kind_of(row) not in kinds]
        names = told_apart([row["id"] for row in rows], [row["name"] for row in rows], self.met)
        self.categories = [{**row, "name": name} for row, name in zip(rows, names, strict=True)]
        self.names_are_unique = "same_name" not in self.met.counts

    def part(self, numbers: Mapping[Any, int], progress: Callable[[int], None] = lambda done: None) -> Part:
        """The split as LVIS rows.

        Args:
            numbers: the new ids of the file's categories.
            progress: called with the number of images looked at.

        Raises:
            UserError: most images cannot be used; or there are annotations but none can.
        """
        usable, self.files = usable_images(
            self.images, self.path, self.root, self.split, self.met, progress, self._are_exchanged, alone=self.alone
        )
        names = new_names([image.path for image in usable], self.root)
        part, entries, at = Part(), dict[Any, Row](), dict[str, Row]()
        for image, name in zip(usable, names, strict=True):
            key, file = id_of(image.row["id"]), os.path.realpath(image.path)
            if file in at:  # listed more than once, which must not put it into two splits
                self.met.add("image_again", [name])
            else:
                height, width = image.image_hw
                new = {"id": key, "file_name": name, "height": height, "width": width}
                at[file] = image.row | self._lists_of_categories(image.row, numbers) | new
                part.images.append(at[file])
                part.files.append(image.path)
            if entries.setdefault(key, at[file]) is not at[file]:
                raise UserError(f"{self.path}: image {short(key)}: this id is that of two files; give each its own")
        if not all(type(row["id"]) is int and -(2**63) <= row["id"] < 2**63 for row in part.images):
            for number, row in enumerate(part.images, 1):
                row["id"] = number
        self._add_annotations(part, entries, numbers)
        self._count(part)
        return part

    def _are_exchanged(self, images: Mapping[Any, tuple[int, int]]) -> bool:
        """Return whether all objects fit into images of these (height, width), and some not into the turned ones."""
        fits_turned = True
        for row in self.annotations:
            image_hw = images.get(id_of(row.get("image_id")))
            if image_hw is None:
                continue
            extent = _extent(row)
            if extent is None:
                continue
            height, width = extent
            if height > image_hw[0] + 1 or width > image_hw[1] + 1:
                return False
            fits_turned &= height <= image_hw[1] + 1 and width <= image_hw[0] + 1
        return not fits_turned

    def _lists_of_categories(self, row: Row, numbers: Mapping[Any, int]) -> Row:
        """LVIS's lists of an image, of the new ids."""
        lists: Row = {}
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if isinstance(row.get(key), list):
                lists[key] = [numbers[id_of(value)] for value in row[key] if id_of(value) in numbers]
                if len(lists[key]) < len(row[key]):
                    self.met.add("id_list", [f"image {row['id']!r}: {key}"])
        return lists

    def _add_annotations(self, part: Part, images: Mapping[Any, Row], numbers: Mapping[Any, int]) -> None:
        """The annotations that are whole, or can be made so."""
        boxes_only = not any(map(_has_mask, self.annotations))
        no_areas = all(row.get("area") == 0 for row in self.annotations)  # a tool that does not know them
        listed = {id_of(row.get("id")) for row in self.images} - {None}
        rectangles = turned = 0
        corners_fit: list[str] = []
        for number, row in enumerate(self.annotations):
            own, key, category = (id_of(row.get(name)) for name in ("id", "image_id", "category_id"))
            place = f"annotation number {number + 1} of the list" if own is None else f"annotation {short(own)}"
            if key not in images:
                self.met.add("its_image" if key in listed else "no_image", [place])
                continue
            if category not in numbers:
                found = short(row["category_id"]) if "category_id" in row else "missing"
                self.met.add("no_category", [f"{place}: its category_id is {found}"])
                continue
            image = images[key]
            plain = plain_annotation(
                row | {"image_id": image["id"], "category_id": numbers[category]}, place, number, self.met
            )
            assert plain is not None
            if self.crowds_are_objects:
                plain["iscrowd"] = 0
            if no_areas:
                plain["area"] = None
            if boxes_only and plain["bbox"][0] == plain["bbox"][0]:
                x, y, w, h = plain["bbox"]
                corners, degrees = rectangle(x, y, x + w, y + h), _rotation(row)
                rectangles += 1
                if not degrees and _fits_as_corners(plain["bbox"], plain["area"], (image["height"], image["width"])):
                    corners_fit.append(place)
                if degrees:  # the area stays
                    corners = rotated(corners, degrees)
                    low, high = corners.min(axis=0), corners.max(axis=0)
                    plain["bbox"] = [*low.round(DECIMALS).tolist(), *(high - low).round(DECIMALS).tolist()]
                    turned += 1
                plain["segmentation"] = [corners.round(DECIMALS).ravel().tolist()]
            elif boxes_only:
                self.met.add("no_box", [f"{place}: its bbox is {short(row['bbox']) if 'bbox' in row else 'missing'}"])
                continue
            if self._make_whole(plain, place, (image["height"], image["width"])):
                part.annotations.append(plain)
        ids = Counter(row["id"] for row in part.annotations)
        again = [f"annotation {number}" for number, count in ids.items() if count > 1]
        if again:
            self.met.add("annotation_id", again, len(part.annotations) - len(ids))
            part.annotations = [{**row, "id": i} for i, row in enumerate(part.annotations, 1)]
        if rectangles:
            rotation = f", {turned:,} of them turned as their attribute 'rotation' says" if turned else ""
            self.notes.append(f"{rectangles:,} objects have a box only: their masks are rectangles{rotation}")
        if corners_fit and len(corners_fit) >= MANY * rectangles:
            meaning = "boxes that fit only if their numbers are x0, y0, x1, y1; write bbox as x, y, width, height"
            self.notes.append("warning: " + counted(len(corners_fit), meaning, corners_fit))

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
        no_box = not _meets(row["bbox"], image_hw)
        no_area = row["area"] is None or row["area"] < 0
        if no_box or no_area:
            code = {"size": list(image_hw), "counts": _counts(segmentation, image_hw)}
            if no_box:
                row["bbox"] = np.round(_box_of(segmentation, code), DECIMALS).tolist()
                if _meets(row["bbox"], image_hw):
                    self.met.add("box", [place])
            if no_area:
                row["area"] = float(rle.area(code))
                self.met.add("area", [place])
        if not _meets(row["bbox"], image_hw):
            self.met.add("outside", [place])
            return False
        if row["area"] <= 0:
            self.met.add("no_area", [place])
            return False
        return True

    def _count(self, part: Part) -> None:
        """Say what of the rows does not serve training."""
        if self.split == "train" and self.annotations and not part.annotations:
            if any("segments_info" in row for row in self.annotations):
                raise UserError(f"{self.path}: it is a panoptic file; give the file of the instances of the same set")
            cause, fix = self._cause()
            total = f"{len(self.annotations):,} annotations"
            raise UserError(f"{self.path}: none of its {total} can be used ({cause}); {fix}")
        crowds = sum(row.get("iscrowd", 0) for row in part.annotations)
        if crowds:
            likely = f": {CROWDS_FIX}" if crowds >= MANY * len(part.annotations) else ""
            self.notes.append(f"{crowds:,} of {len(part.annotations):,} objects are crowds: not trained on{likely}")
        ignored = [f"annotation {row['id']}" for row in part.annotations if row.get("ignore")]
        self.met.add("ignored", ignored)
        used = {row["image_id"] for row in part.annotations}
        self.met.add("empty", [row["file_name"] for row in part.images if row["id"] not in used])

    def _cause(self) -> tuple[str, str]:
        """The most frequent cause for which annotations were left out, and its fix."""
        counts = self.met.counts
        causes = [kind for kind in counts if kind in _FIXES or (kind in ODD_KINDS and ODD_KINDS[kind].dropped)]
        kind = max(causes, key=counts.__getitem__)
        return self._sentence(kind), _FIXES.get(kind) or ODD_KINDS[kind].fix

    def all_notes(self, where: str) -> list[str]:
        """Sentences on everything odd; ``where`` ends them, to name the file."""
        return [note + where for note in (*self.notes, *map(self._sentence, self.met.counts))]

    def _sentence(self, kind: str) -> str:
        """How often a kind of odd thing was met, and where first."""
        meaning = _MEANINGS.get(kind) or ODD_KINDS[kind].meaning
        return counted(self.met.counts[kind], meaning, self.met.places[kind])


def _number(digits: str) -> int | str:
    """A whole number; as the text that it is, where it takes more than 64 bits, which cannot be written again."""
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else digits


def kind_of(category: Row) -> tuple[str, str]:
    """A category's name and supercategory: what it has in common with the same category of another file."""
    return category["name"], normalize("NFC", str(category.get("supercategory")))


def _has_mask(row: Row) -> bool:
    value = row.get("segmentation")
    return any(value) if isinstance(value, list) else bool(value)


def _rotation(row: Row) -> float:
    """The degrees by which CVAT turns an object's box, clockwise about its middle."""
    attributes = row.get("attributes")
    degrees = number_of(attributes.get("rotation")) if isinstance(attributes, dict) else 0.0
    return degrees if math.isfinite(degrees) else 0.0


def _extent(row: Row) -> tuple[float, float] | None:
    """The height and width that an image needs at least for an object; None if that is not known."""
    segmentation = row.get("segmentation")
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        sides = [meant(side) for side in size] if isinstance(size, list) else []
        return (sides[0] or 0, sides[1] or 0) if len(sides) == 2 else None
    box = row.get("bbox")
    if isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box):
        return box[1] + box[3], box[0] + box[2]
    return None


def _meets(box: Sequence[float], image_hw: tuple[int, int]) -> bool:
    """Return whether a box x, y, width, height has an area in an image; one of NaN has none."""
    x, y, w, h = box
    return min(x + w, image_hw[1]) > max(x, 0) and min(y + h, image_hw[0]) > max(y, 0)


def _fits_as_corners(box: Sequence[float], area: float | None, image_hw: tuple[int, int]) -> bool:
    """Return whether the numbers of a box fit its image, or the area that is stated, only as x0, y0, x1, y1."""
    (x, y, w, h), (height, width) = box, image_hw
    if not (0 <= x < w <= width and 0 <= y < h <= height):
        return False
    if x + w > width + BEYOND or y + h > height + BEYOND:
        return True
    if area is None or math.isclose(area, w * h, rel_tol=0.01):
        return False
    return math.isclose(area, (w - x) * (h - y), rel_tol=0.01)


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
