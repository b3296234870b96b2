"""Boundary AP: how well the outlines fit, also of large objects (Cheng et al., 2021, "Boundary IoU").

The overlap of two masks is the smaller of mask IoU and boundary IoU, the IoU of the bands along their outlines inside
the masks, as wide as 2% of the image's diagonal. All else is as for masks under the rules of LVIS. Matching is done
here, since hotcoco computes its overlaps itself; bands are made only of masks that overlap by half, for no others
can match. Shape letters: N detections, G objects of one class in one image, T thresholds, A ranges of area.
"""

from __future__ import annotations

import cv2
import numpy as np
from hotcoco import mask as rle_codec
from numpy.typing import NDArray

from tailseg.evaluation.ground_truth import GroundTruth, Objects
from tailseg.evaluation.reading import ResultColumns
from tailseg.layers.paste import Rle

BAND = 0.02  # of the image's diagonal
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # all, small, medium, large

Flags = NDArray[np.bool_]


def boundary_curves(
    truth: GroundTruth, columns: ResultColumns, areas: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (T, R, K, A) and recall (T, K, A) of the classes with objects; -1 where none of them counts.

    Args:
        truth: read with masks.
        columns: the detections that count, with masks.
        areas: (N,) pixels, of each detection.
    """
    columns, areas = columns[areas > 0], areas[areas > 0]
    known, objects = truth.known, truth.objects
    image, category = columns.images, columns.categories
    order = np.lexsort((-columns.scores, image, category))  # stable
    columns, areas, image, category = columns[order], areas[order], image[order], category[order]
    matched, to_ignored = _match_all(truth, columns, category * len(known.image_ids) + image)
    outside = (areas < AREAS[:, :1]) | (areas > AREAS[:, 1:])  # (A, N)
    forgiven = outside | truth.not_exhaustive.has(image, category)
    ignored = np.where(matched, to_ignored, forgiven[:, None])  # (A, T, N)
    object_ignored = _ignored(objects)  # (A, all objects)
    labels = objects.labels()
    precision = np.full((len(THRESHOLDS), len(RECALLS), len(labels), len(AREAS)), -1.0)
    recall = np.full((len(THRESHOLDS), len(labels), len(AREAS)), -1.0)
    for index, label in enumerate(labels.tolist()):
        rows = slice(*np.searchsorted(category, (label, label + 1)).tolist())
        ranked = np.argsort(-columns.scores[rows], kind="stable")
        counts = (~object_ignored[:, objects.category == label]).sum(1)
        for area in np.flatnonzero(counts):
            right = matched[area, :, rows][:, ranked]
            judged = ~ignored[area, :, rows][:, ranked]
            for t in range(len(THRESHOLDS)):
                curve = precision_curve((right & judged)[t], (~right & judged)[t], int(counts[area]))
                precision[t, :, index, area], recall[t, index, area] = curve
    return precision, recall


def precision_curve(right: Flags, wrong: Flags, objects: int) -> tuple[NDArray[np.float64], float]:
    """Precision (R,) at each recall, and the recall reached, from detections (N,) best first.

    Args:
        right: (N,) found one of the objects.
        wrong: (N,) found none; what is neither does not count.
        objects: number of those that could be found.
    """
    if not len(right):
        return np.zeros(len(RECALLS)), 0.0
    hits, misses = np.cumsum(right), np.cumsum(wrong)
    precision = hits / (hits + misses + np.spacing(1))
    best_beyond = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best_beyond[np.searchsorted(hits / objects, RECALLS)], float(hits[-1] / objects)


def _ignored(objects: Objects) -> Flags:
    """(A, objects) crowds, and what is not of the area in question."""
    return objects.crowd | (objects.areas < AREAS[:, :1]) | (objects.areas > AREAS[:, 1:])


def _match_all(truth: GroundTruth, columns: ResultColumns, group: NDArray[np.int64]) -> tuple[Flags, Flags]:
    """Flags of detections that match an object, and of those that match one to be ignored, (A, T, N) each.

    Args:
        truth: read with masks.
        columns: detections in ascending order of ``group``, best first within one.
        group: (N,) class and image as one number.
    """
    objects = truth.objects
    assert objects.counts is not None
    matched = np.zeros((len(AREAS), len(THRESHOLDS), len(columns)), dtype=bool)
    to_ignored = matched.copy()
    object_group = objects.category * len(truth.known.image_ids) + objects.image
    order = np.argsort(object_group, kind="stable")
    groups, starts = np.unique(object_group[order], return_index=True)
    ignored = _ignored(objects)
    codes = truth.known.codes(columns)
    object_codes = truth.known.codes_at(objects.image, objects.counts)
    for number, start, end in zip(groups, starts, np.append(starts, len(order))[1:], strict=True):
        first, last = np.searchsorted(group, (number, number + 1))
        if first == last:
            continue
        members = order[start:end]
        crowd = objects.crowd[members]
        ious = _overlaps(codes[first:last], [object_codes[i] for i in members], crowd)
        found = _match_group(ious, ignored[:, members], crowd)
        matched[..., first:last], to_ignored[..., first:last] = found
    return matched, to_ignored


def _overlaps(found: list[Rle], objects: list[Rle], crowd: Flags) -> NDArray[np.float64]:
    """(N, G) the smaller of mask and boundary IoU; 0 where the former is below every threshold."""
    ious: NDArray[np.float64] = rle_codec.iou(found, objects, crowd.tolist())
    ious[ious < THRESHOLDS[0]] = 0
    rows, partners = np.flatnonzero(ious.any(1)), np.flatnonzero(ious.any(0))
    if len(rows):
        bands = [boundary(found[i]) for i in rows], [boundary(objects[i]) for i in partners]
        cells = np.ix_(rows, partners)
        ious[cells] = np.minimum(ious[cells], rle_codec.iou(*bands, crowd[partners].tolist()))
    return ious


def _match_group(ious: NDArray[np.float64], ignored: Flags, crowd: Flags) -> tuple[Flags, Flags]:
    """Each detection takes the best object that is left, at every threshold and in every range of area.

    Args:
        ious: (N, G), detections best first.
        ignored: (A, G).
        crowd: (G,) can be taken more than once.

    Returns:
        (A, T, N) whether a detection took one, and whether that is ignored.
    """
    shape = (len(AREAS), len(THRESHOLDS), len(ious))
    matched, to_ignored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    taken = np.zeros((len(AREAS), len(THRESHOLDS), ious.shape[1]), dtype=bool)
    enough = np.minimum(THRESHOLDS, 1 - 1e-10)
    for row in np.flatnonzero((ious >= enough[0]).any(1)):
        free = ~taken & (ious[row] >= enough[:, None])
        counted = free & ~ignored[:, None]
        choice = np.where(counted.any(2, keepdims=True), counted, free)
        # The last of equals, as in the official implementation.
        best = ious.shape[1] - 1 - np.where(choice, ious[row], -1.0)[..., ::-1].argmax(2)
        hit = choice.any(2)
        a, t = np.nonzero(hit)
        taken[a, t, best[a, t]] = ~crowd[best[a, t]]
        matched[..., row] = hit
        to_ignored[..., row] = hit & np.take_along_axis(ignored, best, 1)
    return matched, to_ignored


def boundary(code: Rle) -> Rle:
    """The band inside a mask along its outline; the image's edge counts as outline."""
    height, width = code["size"]
    reach = max(1, round(BAND * float(np.hypot(height, width))))
    x, y, w, h = (int(side) for side in rle_codec.to_bbox(code))
    if min(w, h) <= 2 * reach:  # nothing lies further inside
        return code
    mask = rle_codec.decode(code)
    inside = (slice(y, y + h), slice(x, x + w))
    padded = cv2.copyMakeBorder(np.ascontiguousarray(mask[inside]), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    mask[inside] -= cv2.erode(padded, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))[1:-1, 1:-1]
    return rle_codec.encode(mask)
