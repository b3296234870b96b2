"""Where detections contradict annotations: another class in an object's place, or an object nobody annotated.

What LVIS leaves open is left alone: classes that nobody looked for in an image, or did not annotate exhaustively
there, and crowds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hotcoco import COCOeval
from hotcoco import mask as rle_codec
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.diagnosis.mask_checks import iou
from tailseg.evaluation.ground_truth import GroundTruth
from tailseg.evaluation.reading import ResultColumns
from tailseg.wording import score_text

SAME_PLACE = 0.5  # IoU


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A detection that contradicts the annotations of its image."""

    image_id: int
    file_name: str
    annotation_id: int | None  # of the object in its place; None: there is none
    annotated: str | None  # that object's class
    found: str  # the detection's class
    score: float
    box_xywh: tuple[float, float, float, float]  # of the detection, pixels

    def __str__(self) -> str:
        """One line for a report: image, annotation or place, classes, score."""
        image = f"image {self.image_id}" + (f" ({Path(self.file_name).name})" if self.file_name else "")
        found = f"'{self.found}' with {score_text(self.score)}"
        if self.annotation_id is not None:
            return f"{image}: annotation {self.annotation_id} is '{self.annotated}', found {found}"
        x, y, width, height = self.box_xywh
        return f"{image}: {found} at x {x:.0f}, y {y:.0f}, {width:.0f} x {height:.0f} pixels"


def disagreements_of(
    evaluation: COCOeval, truth: GroundTruth, annotations: Annotations, columns: ResultColumns, sure: float
) -> list[Disagreement]:
    """The sure detections that contradict annotations, highest score first.

    Of several in the place of one annotation, or in one place where nothing is annotated, the first counts.

    Args:
        evaluation: after ``evaluate``; it says whether boxes or masks are compared.
        truth: of ``annotations``.
        annotations: a split.
        columns: the detections that were matched, all with an area.
        sure: lowest score that counts.
    """
    errors = evaluation.image_diagnostics(iou_thr=SAME_PLACE, score_thr=sure)["label_errors"]
    names = [category.name for category in annotations.categories]
    found: list[Disagreement] = []
    for error in sorted(errors, key=lambda error: (-error["dt_score"], error["dt_id"])):
        row, object_row = error["dt_id"] - 1, None if error["gt_id"] is None else error["gt_id"] - 1
        box = _box(truth, columns, row)
        image = int(np.flatnonzero(annotations.image_ids == truth.known.image_ids[columns.images[row]])[0])
        if object_row is None and _in_open_region(annotations, image, box):
            continue
        x, y, width, height = box.tolist()
        found.append(
            Disagreement(
                image_id=annotations.image_id(image),
                file_name=annotations.file_names[image] or "",
                annotation_id=None if object_row is None else int(annotations.annotation_ids[object_row]),
                annotated=None if object_row is None else names[int(truth.objects.category[object_row])],
                found=names[int(columns.categories[row])],
                score=float(columns.scores[row]),
                box_xywh=(x, y, width, height),
            )
        )
    return _first_of_each(found)


def _box(truth: GroundTruth, columns: ResultColumns, row: int) -> NDArray[np.float64]:
    if columns.boxes is not None:
        return np.asarray(columns.boxes[row])
    (code,) = truth.known.codes(columns[np.array([row])])
    return np.asarray(rle_codec.to_bbox(code), np.float64)


def _in_open_region(annotations: Annotations, image: int, box_xywh: NDArray[np.float64]) -> bool:
    """Return whether half of a box lies in one crowd, or in one object that is to be ignored."""
    rows = slice(*annotations.first_annotation[image : image + 2].tolist())
    regions = annotations.boxes[rows][annotations.crowd[rows] | annotations.ignored[rows]]
    x, y, width, height = box_xywh
    low, high = np.maximum(regions[:, :2], (x, y)), np.minimum(regions[:, 2:], (x + width, y + height))
    return bool((np.prod((high - low).clip(min=0), axis=1) >= width * height / 2).any())


def _first_of_each(found: Sequence[Disagreement]) -> list[Disagreement]:
    """Without those that have an earlier one on the same annotation, or in the same unannotated place."""
    kept: list[Disagreement] = []
    annotated: set[int] = set()
    places: dict[int, list[tuple[float, float, float, float]]] = {}
    for item in found:
        if item.annotation_id is not None:
            new = item.annotation_id not in annotated
            annotated.add(item.annotation_id)
        else:
            others = places.setdefault(item.image_id, [])
            own = _corners([item.box_xywh] * len(others))
            new = not (iou(own, _corners(others)) >= SAME_PLACE).any()
            others.append(item.box_xywh)
        if new:
            kept.append(item)
    return kept


def _corners(boxes_xywh: Sequence[tuple[float, float, float, float]]) -> NDArray[np.float64]:
    boxes = np.array(boxes_xywh, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
