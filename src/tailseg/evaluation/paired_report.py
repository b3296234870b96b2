"""A comparison of runs in words: numbers in percent, differences in points, the classes that changed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"
WORDS = {"segm": "masks", "bbox": "boxes"}
MINUS = "−"
LISTED = 10  # classes that gain or lose most

Content = Mapping[str, Any]


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def difference_texts(difference: Content) -> tuple[str, str]:
    """A difference of fractions in percentage points, with its sign, and its interval, "" if there is none.

    One digit, or two where both are below a point: a small difference that is beyond chance shall not read as 0.
    """
    value, ends = difference["value"], difference["interval"]
    if value is None:
        return NOTHING, ""
    digits = 1 if max(map(abs, (value, *(ends or ())))) >= 0.01 else 2
    rounded = round(100 * value, digits)
    sign = MINUS if rounded < 0 else "+" if rounded > 0 else "±"
    interval = ", ".join(_plain(100 * end, digits) for end in ends or ())
    return f"{sign}{abs(rounded):.{digits}f}", f"[{interval}]" if interval else ""


def _plain(value: float, digits: int) -> str:
    rounded = round(value, digits)
    return f"{MINUS if rounded < 0 else ''}{abs(rounded):.{digits}f}"


def certainty(difference: Content, fewest_images: int) -> str:
    """How much a difference tells."""
    if difference["value"] is None:
        return "nothing to compare"
    if difference["beyond_chance"] is None:
        return f"in fewer than {fewest_images} images, which cannot tell"
    return "beyond chance" if difference["beyond_chance"] else "may be chance"


def verdicts(content: Content) -> list[str]:
    """A sentence or two for each run but the first: AP and APr of masks (else of boxes), and its classes."""
    kind = main_kind(content)
    tables = content["kinds"][kind]
    of_metric = {row["metric"]: row for row in tables["metrics"]}
    sentences = []
    for index, run in enumerate(content["runs"][1:]):
        clauses = []
        for metric in ("AP", "APr"):
            difference = of_metric[metric]["differences"][index]
            if difference["value"] is not None:
                value, ends = difference_texts(difference)
                value += f" points {ends}".rstrip()
                clauses.append(f"{metric} {value}, {certainty(difference, content['fewest_images'])}")
        told = [row["differences"][index] for row in tables["classes"]]
        able = [difference for difference in told if difference["beyond_chance"] is not None]
        gained = sum(difference["beyond_chance"] and difference["interval"][0] > 0 for difference in able)
        lost = sum(difference["beyond_chance"] and difference["interval"][1] < 0 for difference in able)
        of_classes = (
            f" Of {len(able)} classes in {content['fewest_images']} images or more, {gained} gain and {lost} lose "
            f"beyond chance; {(1 - content['confidence']) * len(able):.0f} would by chance alone."
            if able
            else f" No class is in {content['fewest_images']} images or more, so none can tell by itself."
        )
        what = "; ".join(clauses) or "nothing to compare"
        sentences.append(f"{run['name']} against {content['runs'][0]['name']}, {WORDS[kind]}: {what}.{of_classes}")
    return sentences


def main_kind(content: Content) -> str:
    """Masks, if they were compared, else boxes."""
    return "segm" if "segm" in content["kinds"] else "bbox"


def most_changed(
    classes: Sequence[Content], index: int, fewest_images: int, *, gains: bool, count: int = LISTED
) -> list[Content]:
    """The rows of the classes that gain (or lose) most with the run ``index`` + 1, greatest first.

    Classes in too few images come only where no class is in enough.
    """
    able = [row for row in classes if row["images"] >= fewest_images]
    sign = 1 if gains else -1
    rows = [
        row
        for row in able or classes
        if row["differences"][index]["value"] is not None and sign * row["differences"][index]["value"] > 0
    ]
    return sorted(rows, key=lambda row: -sign * row["differences"][index]["value"])[:count]
