"""Labels that a model disagrees with, surely: another class in an object's place, or an object nobody annotated.

Boxes are compared, not masks. What LVIS leaves open is left alone: classes that nobody looked for in an image, or did
not annotate exhaustively there, and crowds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.diagnosis.findings import Finding
from tailseg.evaluation.ground_truth import ground_truth_of
from tailseg.evaluation.label_errors import Disagreement, disagreements_of
from tailseg.evaluation.metrics import detection_areas, match_detections
from tailseg.evaluation.reading import Cut, read_results

SURE = 0.7  # score of a detection from which on it counts; those of `predict` are shown from 0.5 on


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
    return disagreements_of(evaluation, truth, annotations, columns, sure)


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
