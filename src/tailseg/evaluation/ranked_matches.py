"""What the scorer matched, detection by detection: from it every metric follows, and those of any choice of images.

Shape letters: I images, K categories, M of them with objects, T = 10 IoU thresholds, R = 101 recall points,
N detections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from hotcoco import COCO, COCOeval
from numpy.typing import NDArray

from tailseg.evaluation.ground_truth import GroundTruth
from tailseg.evaluation.metrics import detection_areas, evaluator_of
from tailseg.evaluation.reading import ResultColumns

DETECTIONS_AT_ONCE = 200_000  # whose matches are Python lists at one time
_KINDS = (np.int64, np.int32, np.float64, np.uint16, np.uint16)  # of the columns of `_rows`
ALL_AREAS = [0.0, 1e10]  # square pixels


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RankedMatches:
    """The detections of a run that count, class by class, the best first; ties in the order of images.

    Bit t of ``right`` and ``wrong`` is of the t-th IoU threshold; a detection that is ignored there has neither.
    """

    starts: NDArray[np.int64]  # (K + 1,) first detection of each class
    images: NDArray[np.int32]  # (N,) position of the image
    right: NDArray[np.uint16]  # (N,) it has found an object
    wrong: NDArray[np.uint16]  # (N,) it has found none
    precision: NDArray[np.float64]  # (T, R, M) of the scorer, of the classes with objects; -1 where none counts

    def of_class(self, label: int) -> slice:
        """The rows of a class."""
        return slice(int(self.starts[label]), int(self.starts[label + 1]))


def ranked_matches(
    truth: GroundTruth, dataset: COCO, columns: ResultColumns, iou_type: str, limit: int
) -> RankedMatches:
    """Match detections to ground truth with the scorer, objects of all sizes.

    Args:
        truth: the objects.
        dataset: of ``truth``, for these detections and maybe more.
        columns: the detections that count.
        iou_type: "bbox" or "segm".
        limit: detections of an image that count.
    """
    areas = detection_areas(columns, use_masks=False)
    evaluation = evaluator_of(truth, dataset, columns, areas, iou_type, limit)
    evaluation.params.area_rng, evaluation.params.area_rng_lbl = [ALL_AREAS], ["all"]
    count, with_objects = len(truth.known.category_ids), truth.objects.labels()
    labels_there = np.union1d(with_objects, columns.categories)
    rows: list[tuple[NDArray[Any], ...]] = [tuple(np.zeros(0, kind) for kind in _KINDS)]
    precision: list[NDArray[np.float64]] = []
    for labels in _parts(labels_there, np.bincount(columns.categories, minlength=count)[labels_there]):
        evaluation.params.cat_ids = (labels + 1).tolist()
        evaluation.evaluate()
        rows.append(_rows(evaluation))
        evaluation.params.cat_ids = (np.intersect1d(labels, with_objects) + 1).tolist()
        if evaluation.params.cat_ids:
            evaluation.accumulate()
            curves = evaluation.eval
            assert curves is not None
            precision.append(curves["precision"][..., 0, 0])
    categories, images, scores, right, wrong = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.lexsort((images, -scores, categories))  # stable: within an image the scorer's own order
    order = order[(right | wrong)[order] != 0]
    return RankedMatches(
        starts=np.searchsorted(categories[order], np.arange(count + 1)),
        images=images[order],
        right=right[order],
        wrong=wrong[order],
        precision=np.concatenate(precision, axis=2) if precision else np.zeros((10, 101, 0)),
    )


def _parts(labels: NDArray[np.int64], detections: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Labels in parts of at most `DETECTIONS_AT_ONCE` of their numbers of detections, or of one class."""
    part = np.maximum(0, np.cumsum(detections) - 1) // DETECTIONS_AT_ONCE
    for number in np.unique(part):
        yield labels[part == number]


def _rows(evaluation: COCOeval) -> tuple[NDArray[Any], ...]:
    """Category, image, score, and the bits of right and wrong (N,) of matched detections."""
    groups = [group for group in evaluation.eval_imgs if group is not None]
    counts = [len(group["dtScores"]) for group in groups]
    scores = np.array([score for group in groups for score in group["dtScores"]], np.float64)
    right, wrong = np.zeros(len(scores), np.uint16), np.zeros(len(scores), np.uint16)
    for t in range(len(evaluation.params.iou_thrs)):
        matched = np.array([flag for group in groups for flag in group["dtMatched"][t]], bool)
        counted = ~np.array([flag for group in groups for flag in group["dtIgnore"][t]], bool)
        right |= (matched & counted).astype(np.uint16) << t
        wrong |= (~matched & counted).astype(np.uint16) << t
    categories = np.repeat(np.array([group["category_id"] - 1 for group in groups], np.int64), counts)
    images = np.repeat(np.array([group["image_id"] - 1 for group in groups], np.int32), counts)
    return categories, images, scores, right, wrong
