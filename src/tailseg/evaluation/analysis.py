"""Analysis of an AP: kinds of errors, calibration, confusions, and AP against training frequency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hotcoco import COCOeval

SURE = 0.5  # lowest score of a detection that can be a confusion; `predict` shows no others either
CONFUSIONS = 50  # pairs of classes listed
# Training images up to which a bin reaches: half decades, so that LVIS's groups are two bins, two bins, and the rest.
BIN_ENDS = (3, 10, 31, 100, 316, 1000, 3162, 10_000, 31_623, 100_000)


def analyse(evaluation: COCOeval, per_category: Sequence[dict[str, Any]], iou_type: str) -> dict[str, Any]:
    """A matched evaluation as JSON content.

    Args:
        evaluation: after ``evaluate``.
        per_category: rows with "name", "train_images" and ``iou_type`` + "_AP", in order of id.
        iou_type: "bbox" or "segm".

    Returns:
        ``errors``: kinds of errors by TIDE at IoU 0.5, each with what AP50 would gain without it (``delta_ap``) and
        how often it occurs (``counts``). ``calibration``: bins of score with the share that is right at IoU 0.5, and
        the expected and the largest gap between the two. ``confusions``: the most frequent pairs of an object's class
        and another that was found in its place with a score of at least 0.5. ``frequency``: the mean AP of the
        classes by their number of training images.
    """
    errors, calibration = evaluation.tide_errors(), evaluation.calibration()
    return {
        "errors": {"delta_ap": errors["delta_ap"], "counts": errors["counts"], "AP50": errors["ap_base"]},
        "calibration": {key: calibration[key] for key in ("ece", "mce", "bins")},
        "confusions": _confusions(evaluation, [row["name"] for row in per_category]),
        "frequency": frequency_bins(per_category, iou_type),
    }


def _confusions(evaluation: COCOeval, names: Sequence[str]) -> list[dict[str, Any]]:
    matrix = evaluation.confusion_matrix(min_score=SURE)["matrix"][:-1, :-1].astype(np.int64)  # without background
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:CONFUSIONS]
    return [
        {"object": names[i], "found": names[j], "count": int(matrix[i, j])}
        for i, j in zip(*np.unravel_index(order, matrix.shape), strict=True)
        if matrix[i, j]
    ]


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
