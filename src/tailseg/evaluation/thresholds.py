"""Score thresholds that fit a model: the best F1 at IoU 0.5 of all classes together, and of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailseg.evaluation.matches import Matches

FEWEST = 5  # right detections at a class's threshold; with fewer it says nothing about new pictures
FALLBACK = 0.5  # where nothing at all was found; what `predict` has without a file
DIGITS = 4  # significant ones of thresholds, rounded down


@dataclass(frozen=True, slots=True)
class Threshold:
    """The lowest score that is shown, and what this shows."""

    score: float
    precision: float  # share of the shown detections that are right
    recall: float  # share of the objects that are found
    right: int  # shown detections that are right

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.precision * self.recall / (self.precision + self.recall)

    def content(self) -> dict[str, float]:
        """As JSON content."""
        return {"score": self.score, "precision": self.precision, "recall": self.recall, "F1": self.f1}


def best_threshold(scores: NDArray[np.float64], right: NDArray[np.bool_], objects: int) -> Threshold | None:
    """The threshold with the best F1; of equals the highest. None where nothing is right.

    Args:
        scores: (N,) best first.
        right: (N,).
        objects: number of those that could be found.
    """
    if not right.any():
        return None
    hits, shown = np.cumsum(right), np.arange(1, len(scores) + 1)
    possible = np.append(scores[1:] < scores[:-1], True)  # those with one score are shown together
    last = int(np.argmax(np.where(possible, 2 * hits / (shown + objects), -1.0)))
    count = int(hits[last])
    return Threshold(_down(scores[last]), count / (last + 1), count / objects, count)


def common_threshold(matches: Matches) -> Threshold | None:
    """The one threshold for all classes with the best F1 over all detections together; None where nothing is right."""
    order = np.argsort(-matches.scores, kind="stable")
    return best_threshold(matches.scores[order], matches.right[order], len(matches.found_with))


def class_thresholds(matches: Matches) -> dict[int, Threshold]:
    """The best threshold of each class of which something was found, by its position."""
    found = ((number, best_threshold(scores, right, n)) for number, scores, right, n in matches.by_class())
    return {number: threshold for number, threshold in found if threshold is not None}


def thresholds_content(classes: Sequence[dict[str, Any]], common: dict[str, float] | None) -> dict[str, Any]:
    """The content of ``thresholds.json``: ``{"default": 0.31, "classes": {"cat": 0.42, ...}}``.

    Classes with fewer than 5 right detections at their own threshold are left out, so that they get the default;
    likewise those that share their name.

    Args:
        classes: rows with "name", "threshold" (or None) and "right".
        common: `Threshold.content` of all classes together, or None.
    """
    names = Counter(row["name"] for row in classes)
    return {
        "default": FALLBACK if common is None else common["score"],
        "classes": {
            row["name"]: row["threshold"]
            for row in classes
            if row["threshold"] is not None and row["right"] >= FEWEST and names[row["name"]] == 1
        },
    }


def _down(score: float) -> float:
    """A score with few digits and not above, or what has just this score would not be shown."""
    rounded = float(f"{score:.{DIGITS - 1}e}")
    if rounded <= score:
        return rounded
    return float(Context(prec=DIGITS, rounding=ROUND_FLOOR).create_decimal_from_float(float(score)))
