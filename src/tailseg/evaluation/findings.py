"""Every detection that is shown, and every object that is missed, with its kind: right, or which error it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hotcoco import mask as rle
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.evaluation.ground_truth import GroundTruth, ground_truth_of
from tailseg.evaluation.matches import IOU, matches_of
from tailseg.evaluation.metrics import detection_areas, match_detections
from tailseg.evaluation.reading import Cut, ResultColumns, read_results

NEAR = 0.1  # IoU from which on a detection is of an object, if badly placed
# As TIDE names the errors of detections; in its order, the first that holds. "Miss" is every object that no
# detection found.
KINDS = ("right", "Loc", "Cls", "Dupe", "Bkg", "Both", "Miss")
RIGHT, LOC, CLS, DUPE, BKG, BOTH, MISS = range(len(KINDS))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Findings:
    """Detections and missed objects of a split as columns; F of them, images and classes as positions in ``truth``."""

    truth: GroundTruth
    found: ResultColumns  # the detections that were matched, of all scores
    threshold: float  # lowest score that counts
    image: NDArray[np.int64]  # (F,)
    category: NDArray[np.int64]  # (F,) of the detection, or of the missed object
    kind: NDArray[np.int64]  # (F,) position in `KINDS`
    other: NDArray[np.int64]  # (F,) class of the object that a wrong detection lies on; -1: there is none
    scores: NDArray[np.float64]  # (F,) NaN of missed objects
    row: NDArray[np.int64]  # (F,) position in ``found``; -1 of missed objects

    def __len__(self) -> int:
        return len(self.kind)


def findings_of(annotations: Annotations, detections: Path, threshold: float) -> Findings:
    """Match the 300 best detections of each image by their masks, and tell the kinds of those from ``threshold`` on.

    Args:
        annotations: a split.
        detections: LVIS results file with masks.
        threshold: in [0, 1].

    Raises:
        UserError: the file is missing, damaged or of other data.
    """
    truth = ground_truth_of(annotations, with_masks=True)
    cut = Cut()
    columns = read_results(detections, str(detections), truth.known, ("segm",), cut)
    own = columns.ranked("segm", cut)
    areas = detection_areas(own, use_masks=True)
    own, areas = own[areas > 0], areas[areas > 0]
    dataset = truth.dataset(columns.images, columns.categories)
    matches = matches_of(match_detections(truth, dataset, own, areas, "segm", cut.limit), own, truth.objects)
    shown, missed = matches.scores >= threshold, matches.found_with < threshold
    rows, right = matches.rows[shown], matches.right[shown]
    kind, other = _kinds(truth, own, rows, right)
    misses = int(missed.sum())
    return Findings(
        truth=truth,
        found=own,
        threshold=threshold,
        image=np.concatenate([own.images[rows], matches.object_image[missed]]),
        category=np.concatenate([own.categories[rows], matches.object_category[missed]]),
        kind=np.concatenate([kind, np.full(misses, MISS)]),
        other=np.concatenate([other, np.full(misses, -1)]),
        scores=np.concatenate([own.scores[rows], np.full(misses, np.nan)]),
        row=np.concatenate([rows, np.full(misses, -1)]),
    )


def _kinds(
    truth: GroundTruth, found: ResultColumns, rows: NDArray[np.int64], right: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Kind of each detection, and the class of the object that a wrong one lies on."""
    kind, other = np.full(len(rows), RIGHT), np.full(len(rows), -1)
    objects = truth.objects
    real = ~(objects.crowd | objects.ignored)
    wrong = np.flatnonzero(~right)
    for image in np.unique(found.images[rows[wrong]]).tolist():
        here = wrong[found.images[rows[wrong]] == image]
        there = np.flatnonzero(real & (objects.image == image))
        overlaps = _overlaps(truth, found[rows[here]], there)
        for place, overlap in zip(here.tolist(), overlaps, strict=True):
            kind[place], other[place] = _kind(overlap, objects.category[there], int(found.categories[rows[place]]))
    return kind, other


def _overlaps(truth: GroundTruth, found: ResultColumns, objects: NDArray[np.int64]) -> NDArray[np.float64]:
    """IoU of the masks of detections and objects of one image, (detections, objects)."""
    if not len(objects):
        return np.zeros((len(found), 0))
    counts = truth.objects.counts
    assert counts is not None
    annotated = truth.known.codes_at(truth.objects.image[objects], counts[objects])
    overlaps: NDArray[np.float64] = np.asarray(rle.iou(truth.known.codes(found), annotated, [False] * len(objects)))
    return overlaps.reshape(len(found), len(objects))


def _kind(overlap: NDArray[np.float64], classes: NDArray[np.int64], own: int) -> tuple[int, int]:
    """Kind of a wrong detection of class ``own``, by its overlap with the objects, (M,), of these classes, (M,)."""
    same = classes == own
    best, best_same = overlap.max(initial=0.0), overlap[same].max(initial=0.0)
    best_other = overlap[~same].max(initial=0.0)
    on = int(classes[overlap.argmax()]) if best >= NEAR else -1
    if NEAR <= best_same < IOU:
        return LOC, own
    if best_other >= IOU:
        return CLS, int(classes[~same][overlap[~same].argmax()])
    if best_same >= IOU:
        return DUPE, own
    return (BKG, -1) if best < NEAR else (BOTH, on)
