"""AP of many resampled sets of images at once, from what was matched once (Efron, 1979).

A set drawn from I images with replacement holds each of them some number of times, its weight. The matches within an
image do not change, so the AP of a class in such a set follows from sums of weights over its detections, best first;
the federated rules are in the matches: what the scorer ignores has no place in the sums. Precision at a recall is the
best at that recall or beyond, so only the places of right detections matter; the wrong ones between two of them, by
far the most, are summed once for all IoU thresholds.

Shape letters: B sets, I images, K classes, T = 10 IoU thresholds, S detections that are right at some IoU or ignored
at some but not at all, P the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailseg.evaluation.ground_truth import GroundTruth
from tailseg.evaluation.ranked_matches import ALL_AREAS, RankedMatches

THRESHOLDS = 10
RECALLS = np.linspace(0, 1, 101)
ELEMENTS = 4_000_000  # of an array, at most: so many sets at a time
EVERY_IOU = np.uint16(2**THRESHOLDS - 1)

Weights = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class ObjectCounts:
    """Objects that count, by class and image."""

    starts: NDArray[np.int64]  # (K + 1,) first object of each class
    images: NDArray[np.int64]  # (objects,) position of each one's image, class by class

    @staticmethod
    def of(truth: GroundTruth) -> ObjectCounts:
        """The counts of a ground truth, without crowds and ignored objects."""
        objects = truth.objects
        counted = ~objects.crowd & (objects.areas >= ALL_AREAS[0]) & (objects.areas <= ALL_AREAS[1])
        labels, images = objects.category[counted], objects.image[counted]
        order = np.argsort(labels, kind="stable")
        return ObjectCounts(np.searchsorted(labels[order], np.arange(len(truth.known.category_ids) + 1)), images[order])

    def of_class(self, label: int) -> NDArray[np.int64]:
        """The image of each object of a class."""
        return self.images[self.starts[label] : self.starts[label + 1]]

    def labels(self) -> NDArray[np.int64]:
        """The classes with objects that count, in order; M of them."""
        return np.flatnonzero(np.diff(self.starts))

    def image_counts(self) -> NDArray[np.int64]:
        """(K,) images with an object of the class."""
        return np.array([len(np.unique(self.of_class(label))) for label in range(len(self.starts) - 1)], np.int64)

    def images_with_any(self, labels: NDArray[np.int64]) -> int:
        """Images with an object of any of these classes."""
        return len(np.unique(np.concatenate([np.empty(0, np.int64), *map(self.of_class, labels.tolist())])))


def resampled(images: int, replicates: int, seed: int) -> Weights:
    """Draw sets of images with replacement: how often (B, I) each holds each image; rows sum to I."""
    rng = np.random.default_rng(seed)
    weights = np.empty((replicates, images), np.int32)
    for row in weights:
        row[:] = np.bincount(rng.integers(images, size=images), minlength=images)
    return weights


def class_aps(
    matches: RankedMatches, objects: ObjectCounts, weights: Weights
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AP and AP50 (M, B) of `ObjectCounts.labels` in every set; NaN where the set has no object of the class.

    It is what the scorer gives for the images repeated by their weights, if no two detections of a class in one image
    have the same score (it takes those of one copy of the image after those of another, here they stand together).

    Args:
        matches: of a run.
        objects: of its ground truth.
        weights: (B, I) how often each set holds each image.
    """
    labels, sets = objects.labels().tolist(), len(weights)
    ap, ap50 = np.full((len(labels), sets), np.nan), np.full((len(labels), sets), np.nan)
    for index, label in enumerate(labels):
        rows = matches.of_class(label)
        images, right, wrong = matches.images[rows], matches.right[rows], matches.wrong[rows]
        at_once = max(1, ELEMENTS // max(1, len(images)))
        for first in range(0, sets, at_once):
            some = weights[first : first + at_once]
            total = some[:, objects.of_class(label)].sum(axis=1)
            there = total > 0
            values = _aps(images, right, wrong, some[there], total[there])
            ap[index, first : first + at_once][there] = values.mean(axis=0)
            ap50[index, first : first + at_once][there] = values[0]
    return ap, ap50


def _aps(
    images: NDArray[np.int32],
    right: NDArray[np.uint16],
    wrong: NDArray[np.uint16],
    weights: Weights,
    total: NDArray[np.int64],
) -> NDArray[np.float64]:
    """AP (T, B) of one class from its detections, best first; ``total`` (B,) are its objects in each set."""
    values = np.zeros((THRESHOLDS, len(weights)))
    plain = wrong == EVERY_IOU
    special = np.flatnonzero(~plain)
    if not right.any():
        return values
    last = special[-1] + 1
    before = np.cumsum(plain)[special]  # plain ones before each special one
    sums = np.zeros((len(weights), before[-1] + 1))
    np.cumsum(weights[:, images[:last][plain[:last]]], axis=1, out=sums[:, 1:])
    always_wrong, own = sums[:, before], weights[:, images[special]]  # (B, S)
    for t in range(THRESHOLDS):
        bit = np.uint16(1 << t)
        hit, miss = (right[special] & bit) != 0, (wrong[special] & bit) != 0
        places = np.flatnonzero(hit)
        if not len(places):
            continue
        found = np.cumsum(own[:, places], axis=1, dtype=np.float64)
        false = always_wrong[:, places]
        others = np.flatnonzero(miss)
        if len(others):
            more = np.zeros((len(weights), len(others) + 1))
            np.cumsum(own[:, others], axis=1, out=more[:, 1:])
            false = false + more[:, np.searchsorted(others, places)]
        precision = found / (found + false + np.spacing(1))
        best_beyond = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        passed = np.searchsorted(RECALLS, found / total[:, None], side="right")  # recall points up to each place
        values[t] = (best_beyond * np.diff(passed, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)
    return values
