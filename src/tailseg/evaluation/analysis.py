"""Analysis of an AP: kinds of errors, calibration, confusions, and AP against training frequency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from hotcoco import COCOeval
from numpy.typing import NDArray

from tailseg.evaluation.ground_truth import Objects
from tailseg.evaluation.reading import ResultColumns

SURE = 0.5  # lowest score of a detection that can be a confusion; `predict` shows no others either
CONFUSIONS = 50  # pairs of classes listed
CLASSES_AT_ONCE = 1024  # in a table of confusions
# Training images up to which a bin reaches: half decades, so that LVIS's groups are two bins, two bins, and the rest.
BIN_ENDS = (3, 10, 31, 100, 316, 1000, 3162, 10_000, 31_623, 100_000)


def analyse(
    evaluation: COCOeval, per_category: Sequence[dict[str, Any]], iou_type: str, found: ResultColumns, truth: Objects
) -> dict[str, Any]:
    """A matched evaluation as JSON content.

    Args:
        evaluation: after ``evaluate``.
        per_category: rows with "name", "train_images" and ``iou_type`` + "_AP", in order of id.
        iou_type: "bbox" or "segm".
        found: the detections that were matched, and maybe more.
        truth: the objects, with images and categories by the ids of the evaluation less 1, as for ``found``.

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
        "confusions": _confusions(evaluation, [row["name"] for row in per_category], found, truth),
        "frequency": frequency_bins(per_category, iou_type),
    }


def _confusions(
    evaluation: COCOeval, names: Sequence[str], found: ResultColumns, truth: Objects
) -> list[dict[str, Any]]:
    """The most frequent confusions. Some images at a time: a table of all classes by all would fill the memory."""
    parameters = evaluation.params
    whole = list(parameters.img_ids), list(parameters.cat_ids)
    sure = found.scores >= SURE
    images = np.concatenate([found.images[sure], truth.image])
    classes = np.concatenate([found.categories[sure], truth.category])
    pairs, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for some, of_them in _parts(images, classes):
        parameters.img_ids, parameters.cat_ids = (some + 1).tolist(), (of_them + 1).tolist()
        table = evaluation.confusion_matrix(min_score=SURE)
        matrix = table["matrix"][:-1, :-1]  # without background
        np.fill_diagonal(matrix, 0)
        row, column = np.nonzero(matrix)
        labels = np.array(table["cat_ids"], np.int64) - 1
        pairs.append(labels[row] * len(names) + labels[column])
        counts.append(matrix[row, column].astype(np.int64))
    parameters.img_ids, parameters.cat_ids = whole
    kinds, kind = np.unique(np.concatenate(pairs), return_inverse=True)
    totals = np.bincount(kind, np.concatenate(counts)).astype(np.int64)
    return [
        {"object": names[kinds[i] // len(names)], "found": names[kinds[i] % len(names)], "count": int(totals[i])}
        for i in np.argsort(-totals, kind="stable")[:CONFUSIONS]
    ]


def _parts(
    images: NDArray[np.int64], classes: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Images in parts, each with the classes that occur in it: at most `CLASSES_AT_ONCE`, or one image's."""
    order = np.argsort(images, kind="stable")
    images, classes = images[order], classes[order]
    if len(np.unique(classes)) <= CLASSES_AT_ONCE:
        yield np.unique(images), np.unique(classes)
        return
    ids, starts = np.unique(images, return_index=True)
    first, seen = 0, set[int]()
    for number, of_image in enumerate(np.split(classes, starts[1:])):
        with_it = seen.union(of_image.tolist())
        if number > first and len(with_it) > CLASSES_AT_ONCE:
            yield ids[first:number], np.array(sorted(seen))
            first, with_it = number, set(of_image.tolist())
        seen = with_it
    yield ids[first:], np.array(sorted(seen))


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
