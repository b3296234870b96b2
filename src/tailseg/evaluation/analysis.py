"""Analysis of an AP: errors, calibration, confusions, thresholds, slices, doubtful labels, AP by training images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hotcoco import COCOeval
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.frequency import GROUPS
from tailseg.evaluation.confusions import confusions
from tailseg.evaluation.ground_truth import GroundTruth
from tailseg.evaluation.label_errors import Disagreement, disagreements_of
from tailseg.evaluation.matches import Matches, matches_of
from tailseg.evaluation.reading import ResultColumns
from tailseg.evaluation.slices import slices, worst_images
from tailseg.evaluation.thresholds import FALLBACK, class_thresholds, common_threshold

logger = logging.getLogger(__name__)

LABELS = 50  # doubtful ones listed
CURVE_STEP = 5  # of a class's 101 recall points, every fifth is kept
# Training images up to which a bin reaches: half decades, so that LVIS's groups are two bins, two bins, and the rest.
BIN_ENDS = (3, 10, 31, 100, 316, 1000, 3162, 10_000, 31_623, 100_000)


def analyse(
    evaluation: COCOeval,
    per_category: Sequence[dict[str, Any]],
    iou_type: str,
    found: ResultColumns,
    truth: GroundTruth,
    annotations: Annotations,
    precision: NDArray[np.float64],
) -> dict[str, Any]:
    """A matched evaluation as JSON content. Right and wrong are told at IoU 0.5, but for AP.

    Args:
        evaluation: after ``evaluate``.
        per_category: rows with "name", "frequency", "train_images" and ``iou_type`` + "_AP", in order of id.
        iou_type: "bbox" or "segm".
        found: the detections that were matched, all with an area.
        truth: the objects.
        annotations: that they are from.
        precision: (T, R, M, A) at 10 IoU thresholds, 101 recall points, of the M classes with objects, in 4 ranges of
            area.

    Returns:
        ``errors``: kinds of errors by TIDE, each with what AP50 would gain without it (``delta_ap``) and how often it
        occurs (``counts``). ``calibration``: bins of score with the share that is right, and the expected and the
        largest gap between the two; None where a score is outside of [0, 1]. ``threshold``: the score with the best F1
        over all classes, or None. ``classes``: for each with objects or detections its own best threshold. Both are of
        the scores by which `predict` shows objects, those of boxes; where masks are ranked by scores of their own,
        ``mask_threshold`` is the best of these (else None), and what follows "at the threshold" is at it. ``curves``:
        precision at 101 recalls, the mean of each group of classes. ``confusions`` and ``confusion_matrix`` at the
        threshold; see `tailseg.evaluation.confusions`. ``frequency``: the mean AP of the classes by their number of
        training images. ``slices``, ``worst``: see `tailseg.evaluation.slices`. ``labels``: the number of detections
        that contradict annotations, with scores from the threshold on, and the 50 surest. ``images``, ``objects``:
        numbers of those that count.
    """
    matches = matches_of(evaluation, found, truth.objects)
    by_mask = iou_type == "segm" and found.box_scores is not None
    shown = matches if found.box_scores is None else replace(matches, scores=found.box_scores[matches.rows])
    common, ranking = common_threshold(shown), common_threshold(matches)
    threshold = FALLBACK if ranking is None else ranking.score
    errors = evaluation.tide_errors()
    pairs, matrix = confusions(evaluation, [row["name"] for row in per_category], found, truth.objects, threshold)
    groups, labels = [row["frequency"] for row in per_category], truth.objects.labels().tolist()
    return {
        "images": len(truth.known.image_ids),
        "objects": len(matches.found_with),
        "errors": {"delta_ap": errors["delta_ap"], "counts": errors["counts"], "AP50": errors["ap_base"]},
        "calibration": _calibration(evaluation, found.scores, iou_type),
        "threshold": None if common is None else common.content(),
        "mask_threshold": ranking.content() if by_mask and ranking is not None else None,
        "classes": _classes(
            shown, per_category, iou_type, dict(zip(labels, precision[0, ::CURVE_STEP, :, 0].T, strict=True))
        ),
        "curves": _group_curves(precision, [groups[label] for label in labels]),
        "confusions": pairs,
        "confusion_matrix": matrix,
        "frequency": frequency_bins(per_category, iou_type),
        "slices": slices(matches, len(truth.known.image_ids), groups, threshold),
        "worst": worst_images(matches, truth, annotations, found, threshold, with_masks=iou_type == "segm"),
        "labels": _labels(disagreements_of(evaluation, truth, annotations, found, threshold)),
    }


def _calibration(evaluation: COCOeval, scores: NDArray[np.float64], iou_type: str) -> dict[str, Any] | None:
    outside = int(((scores < 0) | (scores > 1)).sum())
    if outside:
        logger.warning(
            "%d of %d scores that count for %s are outside of 0 to 1, so no probabilities; calibration is left out.",
            outside, len(scores), "masks" if iou_type == "segm" else "boxes",
        )  # fmt: skip
        return None
    found = evaluation.calibration()
    return {key: found[key] for key in ("ece", "mce", "bins")}


def _classes(
    matches: Matches,
    per_category: Sequence[dict[str, Any]],
    iou_type: str,
    curves: Mapping[int, NDArray[np.float64]],
) -> list[dict[str, Any]]:
    """The classes with objects or detections: names, numbers, AP, their own best threshold and their curve."""
    thresholds, rows = class_thresholds(matches), []
    for number, _, _, objects in matches.by_class():
        category, own = per_category[number], thresholds.get(number)
        rows.append(
            {
                **{key: category[key] for key in ("id", "name", "frequency", "train_images")},
                "objects": objects,
                "AP": category[f"{iou_type}_AP"],
                "threshold": None if own is None else own.score,
                "precision": None if own is None else own.precision,
                "recall": None if own is None else own.recall,
                "right": 0 if own is None else own.right,
                "curve": [round(value, 3) for value in curves[number].tolist()] if objects else None,
            }
        )
    return rows


def _group_curves(precision: NDArray[np.float64], groups: Sequence[str | None]) -> dict[str, list[float]]:
    """Precision at 101 recalls: the mean of all classes with objects, and of those of each group, if it has any."""
    measured = precision[0, 0, :, 0] > -1
    members = {"all": measured}
    members |= {group: measured & np.array([own == group for own in groups], np.bool_) for group in GROUPS}
    return {name: precision[0][:, chosen, 0].mean(1).tolist() for name, chosen in members.items() if chosen.any()}


def _labels(doubtful: Sequence[Disagreement]) -> dict[str, Any]:
    keys = ("image_id", "file_name", "annotation_id", "annotated", "found", "score")
    first = [{key: getattr(item, key) for key in keys} | {"bbox": list(item.box_xywh)} for item in doubtful[:LABELS]]
    return {"count": len(doubtful), "first": first}


def frequency_bins(per_category: Sequence[dict[str, Any]], iou_type: str) -> list[dict[str, Any]]:
    """Mean AP of the classes with 0 to 3, 4 to 10, 11 to 31, ... training images; bins without classes are left out."""
    bins = []
    for first, last in zip((0, *(end + 1 for end in BIN_ENDS)), (*BIN_ENDS, None), strict=True):
        values = [
            row[f"{iou_type}_AP"]
            for row in per_category
            if row["train_images"] is not None
            and first <= row["train_images"] <= (np.inf if last is None else last)
            and row[f"{iou_type}_AP"] is not None
        ]
        if values:
            bins.append({"first": first, "last": last, "classes": len(values), "AP": float(np.mean(values))})
    return bins
