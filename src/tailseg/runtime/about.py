"""The texts that an exported file carries: its format, classes, input and recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailseg.errors import UserError

FORMAT = 1
PREFIX = "tailseg."  # of the keys
MOST_TEXT = 16 << 20  # characters of all texts
LONGEST_NAME = 100_000  # letters of a class's name
_CLASS = {"id": int, "name": str, "frequency": str, "image_count": int, "instance_count": int}


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What the user of an exported model needs to know of it."""

    version: str  # of tailseg that wrote it
    classes: list[dict[str, Any]]  # by label: id, name, frequency, image_count, instance_count
    short_edge: int  # pixels: pictures are fitted into these two edges
    long_edge: int
    divisor: int  # pixels: pictures are padded to multiples of it
    size: tuple[int, int] | None  # (height, width) of the input; None takes any
    mean: list[float]  # of RGB in 0..255; the model itself subtracts it
    std: list[float]
    score_threshold: float  # detections score above it
    nms_iou: float
    max_detections: int
    recipe: dict[str, Any]

    def texts(self) -> dict[str, str]:
        """Keys and texts for the file's metadata."""
        values = asdict(self)
        top = {"format": FORMAT} | {key: values.pop(key) for key in ("version", "classes", "recipe")}
        return {f"{PREFIX}{key}": json.dumps(value) for key, value in (top | {"input": values}).items()}


def read_about(texts: Mapping[str, str], path: Path) -> About:
    """The inverse of `About.texts`.

    Raises:
        UserError: the file is not one of ours, was written by a later version, or its texts are damaged.
    """
    if f"{PREFIX}format" not in texts:
        raise UserError(f"{path}: is no model that `tailseg export` wrote; export one with --format onnx")
    if sum(map(len, texts.values())) > MOST_TEXT:
        raise UserError(f"{path}: its metadata are too large; the file is damaged or was edited: export it again")
    try:
        about = {key.removeprefix(PREFIX): json.loads(text) for key, text in texts.items() if key.startswith(PREFIX)}
        if about.pop("format") != FORMAT:
            raise UserError(f"{path}: has a format that this version cannot read; update tailseg or export it again")
        found = About(**about.pop("input"), **about)
        _require_sound(found)
        size = None if found.size is None else (found.size[0], found.size[1])
        return About(**{**asdict(found), "size": size})
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, AttributeError) as error:
        raise UserError(
            f"{path}: its metadata are damaged or were edited ({str(error)[:80]}); export it again"
        ) from None


def fault_of_class(row: object) -> str | None:
    """What is wrong with a class in the metadata of a model, to be read behind its name; None if nothing is."""
    if not isinstance(row, dict) or {key: type(value) for key, value in row.items()} != _CLASS:
        return "is not made of " + ", ".join(_CLASS)
    if not all(-(2**63) <= row[key] < 2**63 for key, kind in _CLASS.items() if kind is int):
        return "has a number of more than 64 bits"
    if row["frequency"] not in ("r", "c", "f"):
        return "has a frequency that is none of r, c and f"
    if len(row["name"]) > LONGEST_NAME:
        return f"has a name of more than {LONGEST_NAME:,} letters"
    try:
        row["name"].encode()
    except UnicodeEncodeError:
        return "has a name that is no text"
    return None


def _require_sound(about: About) -> None:
    for row in about.classes:
        if fault := fault_of_class(row):
            raise ValueError(f"a class {fault}")
    sides = (about.short_edge, about.long_edge, about.divisor, about.max_detections, *(about.size or ()))
    if not all(type(side) is int and 1 <= side <= 1 << 16 for side in sides) or len(about.size or (1, 1)) != 2:
        raise ValueError("a size is no number of pixels")
    if not all(isinstance(value, float | int) for value in (about.score_threshold, about.nms_iou)):
        raise ValueError("a threshold is no number")
    if not isinstance(about.recipe, dict) or not isinstance(about.version, str):
        raise ValueError("the recipe or version is of another type")
