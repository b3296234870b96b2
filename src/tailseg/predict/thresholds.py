"""Lowest scores by class, as ``eval --analyse`` writes them: ``{"default": 0.31, "classes": {"owl": 0.42, ...}}``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from tailseg.data.annotations.annotations import Category
from tailseg.data.sources import same_name
from tailseg.errors import UserError
from tailseg.wording import short

Thresholds = str | PathLike[str] | Mapping[str, Any]


def class_scores(thresholds: Thresholds, categories: Sequence[Category]) -> tuple[float, ...]:
    """The lowest score of each label.

    Names are compared as `tailseg.data.sources.known_categories` does it: as they are, else without differences of
    case, spaces and underscores.

    Args:
        thresholds: JSON file, or its content: ``default``, and ``classes`` that have another threshold, by name.
        categories: of the model, by label.

    Raises:
        UserError: the file is missing or damaged, a score is not a number from 0 to 1, or the model lacks a class.
    """
    if isinstance(thresholds, Mapping):
        return _by_label(thresholds, "thresholds", categories)
    path = Path(thresholds)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path of the thresholds") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({short(str(error))}); write it again with `eval --analyse`") from error
    return _by_label(content, str(path), categories)


def _by_label(content: Any, place: str, categories: Sequence[Category]) -> tuple[float, ...]:
    example = '{"default": 0.3, "classes": {"owl": 0.4}}'
    if not isinstance(content, Mapping) or "default" not in content:
        raise UserError(f"{place}: expected an object with 'default', such as {example}; found {short(content)}")
    unknown = next((key for key in content if key not in ("default", "classes")), None)
    if unknown is not None:
        raise UserError(f"{place}: unknown entry {short(unknown)}; there are 'default' and 'classes'")
    classes = content.get("classes", {})
    if not isinstance(classes, Mapping):
        raise UserError(f"{place}: 'classes' is {short(classes)}, expected names with scores, such as {example}")
    scores = [_score(content["default"], f"{place}: 'default'")] * len(categories)
    for name, value in classes.items():
        score = _score(value, f"{place}: the threshold of {short(name)}")
        for label in _labels(str(name), place, categories):
            scores[label] = score
    return tuple(scores)


def _score(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{place} is {short(value)}, expected a score from 0 to 1")
    return float(value)


def _labels(name: str, place: str, categories: Sequence[Category]) -> list[int]:
    names = [category.name for category in categories]
    found = [label for label, own in enumerate(names) if own == name]
    found = found or [label for label, own in enumerate(names) if same_name(own) == same_name(name)]
    if not found:
        near = difflib.get_close_matches(name, names, 1, 0.0)[0]
        raise UserError(f"{place}: the model has no class {short(name)}; the nearest is {short(near)}")
    return found
