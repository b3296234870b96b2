"""Detections and objects after matching at IoU 0.5, as columns: what an analysis counts.

Shape letters: N detections that count, M objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hotcoco import COCOeval
from numpy.typing import NDArray

from tailseg.evaluation.boundary import precision_curve
from tailseg.evaluation.ground_truth import Objects
from tailseg.evaluation.reading import ResultColumns

IOU = 0.5
ALL_SCORES = 2.0  # no detection has so high a score: a diagnosis of labels that names none


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Matches:
    """Detections that are right or wrong, and objects that are found or missed; what the rules ignore is left out."""

    rows: NDArray[np.int64]  # (N,) position among the detections that were matched
    image: NDArray[np.int64]  # (N,) position
    category: NDArray[np.int64]  # (N,) position
    scores: NDArray[np.float64]  # (N,)
    right: NDArray[np.bool_]  # (N,)
    object_image: NDArray[np.int64]  # (M,) position
    object_category: NDArray[np.int64]  # (M,) position
    object_area: NDArray[np.float64]  # (M,) pixels
    found_with: NDArray[np.float64]  # (M,) score of the detection that found the object; -inf: none did

    def of(self, detections: NDArray[np.bool_], objects: NDArray[np.bool_]) -> Matches:
        """The chosen detections (N,) and objects (M,) alone."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in Matches.__slots__}
        chosen = {
            name: column[objects if name.startswith("object_") or name == "found_with" else detections]
            for name, column in columns.items()
        }
        return replace(self, **chosen)

    def by_class(self) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.bool_], int]]:
        """Each class with objects or detections, in order: its scores, best first, the right ones, its objects."""
        order = np.lexsort((-self.scores, self.category))  # stable
        classes, starts = np.unique(self.category[order], return_index=True)
        parts = dict(zip(classes.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}
        objects = np.bincount(self.object_category, minlength=int(classes.max(initial=-1)) + 1)
        for number in sorted(parts.keys() | set(np.flatnonzero(objects).tolist())):
            rows = parts.get(number, np.empty(0, np.int64))
            yield number, self.scores[rows], self.right[rows], int(objects[number])

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """Numbers of right detections, of wrong ones, and of missed objects, where scores below do not count."""
        shown = self.scores >= threshold
        right = int((self.right & shown).sum())
        return right, int(shown.sum()) - right, int((self.found_with < threshold).sum())

    def average_precision(self) -> float | None:
        """AP50: the mean over the classes with objects; None without any."""
        values = [
            precision_curve(right, ~right, objects)[0].mean() for _, _, right, objects in self.by_class() if objects
        ]
        return float(np.mean(values)) if values else None


def matches_of(evaluation: COCOeval, found: ResultColumns, objects: Objects) -> Matches:
    """What the rules of LVIS make of detections and objects at IoU 0.5.

    Args:
        evaluation: after ``evaluate``, of just these.
        found: the detections; number i is that of id i + 1.
        objects: likewise.
    """
    diagnosis = evaluation.image_diagnostics(iou_thr=IOU, score_thr=ALL_SCORES)
    of_detections, of_objects, pairs = diagnosis["dt_status"], diagnosis["gt_status"], diagnosis["dt_match"]
    del diagnosis
    rows = np.fromiter(of_detections, np.int64, len(of_detections)) - 1
    right = np.fromiter((status == "tp" for status in of_detections.values()), np.bool_, len(of_detections))
    found_with = np.full(len(objects.image), -np.inf)
    found_with[np.fromiter(pairs.values(), np.int64, len(pairs)) - 1] = found.scores[
        np.fromiter(pairs, np.int64, len(pairs)) - 1
    ]
    numbers = np.sort(np.fromiter(of_objects, np.int64, len(of_objects)) - 1)
    order = np.argsort(rows)
    rows, right = rows[order], right[order]
    return Matches(
        rows=rows,
        image=found.images[rows],
        category=found.categories[rows],
        scores=found.scores[rows],
        right=right,
        object_image=objects.image[numbers],
        object_category=objects.category[numbers],
        object_area=objects.areas[numbers],
        found_with=found_with[numbers],
    )
