"""Rows of an annotation file that are not plain: made plain where their meaning is certain, else left out and counted.

Plain rows, as almost all are, never come here (`parsing.py` reads them as columns, all at once).
"""

from __future__ import annotations

import math
import re
from typing import Any

from tailseg.data.annotations.oddities import Tally
from tailseg.data.annotations.segmentations import MAX_SIDE, number_meant
from tailseg.data.images import MAX_PIXELS
from tailseg.wording import short

Row = dict[str, Any]
FARTHEST = 10 * MAX_SIDE  # pixels that a box may reach; what is beyond is no box
TWO_64 = 2**64
_DIGITS = re.compile(r"-?\d{1,20}", re.ASCII)


def whole(value: object) -> int | None:
    """A whole number of at most 64 bits, with or without sign, also written as 3.0; else None."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -(2**63) <= value < TWO_64 else None


def meant(value: object) -> int | None:
    """The same, also where it is written as a text: "3"."""
    return whole(int(value) if type(value) is str and _DIGITS.fullmatch(value) else value)


def wrapped(number: int) -> int:
    """The 64-bit number with sign that has the same bits: numbers from 2^63 on become negative."""
    return number - TWO_64 if number >= 2**63 else number


def plain_image(row: Row, place: str, met: Tally) -> Row | None:
    """An image's entry with whole numbers for id and size, and texts or nothing for names."""
    number = meant(row.get("id"))
    if number is None:
        met.add("image_id", [f"{place}: its id is {_found(row, 'id')}"])
        return None
    sides = [meant(row.get(key)) for key in ("height", "width")]
    if not all(side is not None and 1 <= side <= MAX_SIDE for side in sides):
        found = [_found(row, key) for key in ("height", "width")]
        met.add("image_size", [f"{place}: it has height {found[0]} and width {found[1]}"])
        return None
    height, width = (side or 0 for side in sides)
    if height * width > MAX_PIXELS:
        size = f"height {height} and width {width}, more than {MAX_PIXELS:,} pixels"
        met.add("image_size", [f"{place}: it has {size}, and no such image can be read"])
        return None
    if number >= 2**63:
        met.add("unsigned_id", [place])
    plain = {**row, "id": wrapped(number), "height": height, "width": width}
    for key in ("file_name", "coco_url"):
        if type(plain.get(key)) is not str:
            plain[key] = None
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        if plain.get(key) is not None:
            ids = [meant(value) for value in plain[key]] if type(plain[key]) is list else [None]
            if None in ids:
                met.add("id_list", [f"{place}: {key}"])
            plain[key] = [wrapped(value) for value in ids if value is not None]
    return plain


def plain_category(row: Row, place: str, met: Tally) -> Row | None:
    """A category's entry with a whole number as id and a text as name."""
    number, name = meant(row.get("id")), row.get("name")
    if number is None or number >= 2**63:
        met.add("category_id", [f"{place}: its id is {_found(row, 'id')}"])
        return None
    if type(name) in (int, float):
        met.add("name_number", [place])
        name = str(name)
    if type(name) is not str or not name:
        met.add("category_name", [f"{place}: its name is {_found(row, 'name')}"])
        return None
    return {**row, "id": number, "name": name}


def plain_annotation(row: Row, place: str, number: int, met: Tally) -> Row | None:
    """An annotation's entry with whole numbers for ids, numbers or nothing for box and area, and flags.

    ``number`` is its place in the file's list, which stands for an id that it lacks.
    """
    plain = dict(row)
    own = meant(row.get("id"))
    if own is None:
        met.add("annotation_id", [place])
        own = number
    image, category = meant(row.get("image_id")), meant(row.get("category_id"))
    if image is None:
        met.add("no_image", [f"{place}: its image_id is {_found(row, 'image_id')}"])
        return None
    if category is None or category >= 2**63:
        met.add("no_category", [f"{place}: its category_id is {_found(row, 'category_id')}"])
        return None
    plain |= {"id": wrapped(own), "image_id": wrapped(image), "category_id": category}
    stated = row.get("bbox")
    box = [number_meant(value) for value in stated] if type(stated) is list else stated
    sound = type(box) is list and len(box) == 4 and all(map(_is_number, box)) and max(map(abs, box)) <= FARTHEST
    if sound and box != stated:
        met.add("form", [place])
    plain["bbox"] = box if sound else [math.nan] * 4
    area = row.get("area")
    plain["area"] = area if _is_number(area) else None
    for key in ("iscrowd", "ignore"):
        if key in row:
            flag = _flag(row[key])
            if flag is None:
                met.add("crowd_flag", [f"{place}: {key} is {_found(row, key)}"])
            plain[key] = flag or 0
    return plain


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _flag(value: object) -> int | None:
    """0 or 1, as tools write them; else None."""
    try:
        return _FLAGS.get(value)  # 1.0 and True are 1 here
    except TypeError:
        return None


_FLAGS: dict[object, int] = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1}


def _found(row: Row, key: str) -> str:
    return short(row[key]) if key in row else "missing"
