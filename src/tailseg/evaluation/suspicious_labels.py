"""Labels that a model disagrees with, surely: another class in an object's place, or an object nobody annotated.

Boxes are compared, not masks. What LVIS leaves open is left alone: classes that nobody looked for in an image, or did
not annotate exhaustively there, and crowds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.diagnosis.findings import Finding
from tailseg.data.diagnosis.mask_checks import iou
from tailseg.evaluation.ground_truth import ground_truth_of
from tailseg.evaluation.metrics import detection_areas, match_detections
from tailseg.evaluation.reading import Cut, read_results

SURE = 0.7  # score of a detection from which on it counts; those of `predict` are shown from 0.5 on
SAME_PLACE = 0.5  # IoU of boxes


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
        found = f"'{self.found}' with {self.score:.2f}"
        if self.annotation_id is not None:
            return f"{image}: annotation {self.annotation_id} is '{self.annotated}', found {found}"
        x, y, width, height = self.box_xywh
        return f"{image}: {found} at x {x:.0f}, y {y:.0f}, {width:.0f} x {height:.0f} pixels"


def disagreements(
    annotations: Annotations, detections: Path | list[dict[str, Any]], sure: float = SURE
) -> list[Disagreement]:
    """The sure detections that contradict annotations, highest score first.

    Of several in the place of one annotation, or in one place where nothing is annotated, the first counts.

    Args:
        annotations: a split.
        detections: of its images: LVIS results file, or its rows, with boxes.
        sure: lowest score that counts.

    Raises:
        UserError: the results are faulty.
    """
    truth = ground_truth_of(annotations, with_masks=False)
    source = str(detections) if isinstance(detections, Path) else "detections"
    cut = Cut()
    columns = read_results(detections, source, truth.known, ("bbox",), cut).ranked("bbox", cut)
    columns = columns[detection_areas(columns, use_masks=False) > 0]
    assert columns.boxes is not None
    if not len(columns) or not len(annotations.labels):
        return []
    areas = detection_areas(columns, use_masks=False)
    dataset = truth.dataset(columns.images, columns.categories)
    evaluation = match_detections(truth, dataset, columns, areas, "bbox", cut.limit)
    errors = evaluation.image_diagnostics(iou_thr=SAME_PLACE, score_thr=sure)["label_errors"]
    names = [category.name for category in annotations.categories]
    found: list[Disagreement] = []
    for error in sorted(errors, key=lambda error: (-error["dt_score"], error["dt_id"])):
        row, object_row = error["dt_id"] - 1, None if error["gt_id"] is None else error["gt_id"] - 1
        x, y, width, height = columns.boxes[row].tolist()
        image = int(np.flatnonzero(annotations.image_ids == truth.known.image_ids[columns.images[row]])[0])
        if object_row is None and _in_open_region(annotations, image, columns.boxes[row]):
            continue
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


def label_findings(found: Sequence[Disagreement], split: str, model: str) -> list[Finding]:
    """Findings of `tailseg data check`; ``model`` names the model in them."""
    wrong = tuple(str(item) for item in found if item.annotation_id is not None)
    missing = tuple(str(item) for item in found if item.annotation_id is None)
    look = "look at them, the highest scores first; where the model is right, correct the annotation"
    add = "look at them, the highest scores first; where the model is right, annotate the object"
    return [
        Finding("note", split, f"annotations in whose place {model} finds another class", look, len(wrong), wrong),
        Finding("note", split, f"objects that {model} finds and nobody annotated", add, len(missing), missing),
    ]
