"""Classes that are taken for each other: pairs, and a matrix of those with the most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from hotcoco import COCOeval
from numpy.typing import NDArray

from tailseg.evaluation.ground_truth import Objects
from tailseg.evaluation.reading import ResultColumns

LISTED = 50  # pairs of classes
IN_MATRIX = 20  # classes
CLASSES_AT_ONCE = 1024  # in a table of confusions


def confusions(
    evaluation: COCOeval, names: Sequence[str], found: ResultColumns, truth: Objects, threshold: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The most frequent confusions at IoU 0.5, whatever the classes. Crowds do not count, objects to be ignored do.

    Args:
        evaluation: of these detections and objects.
        names: of the classes, in order of id.
        found: the detections.
        truth: the objects.
        threshold: lowest score that counts.

    Returns:
        The most frequent pairs: ``object``, ``found`` and ``count``. And the matrix of the classes of the first of
        them: ``classes``, their names; ``counts``, a row for each, with the number of its objects that were found as
        each of them, as another class, and not at all.
    """
    kinds, totals = _pair_counts(evaluation, len(names), found, truth, threshold)
    objects, others = kinds // (len(names) + 1), kinds % (len(names) + 1)
    mixed = np.flatnonzero((objects != others) & (others < len(names)))
    mixed = mixed[np.argsort(-totals[mixed], kind="stable")]
    pairs = [{"object": names[objects[i]], "found": names[others[i]], "count": int(totals[i])} for i in mixed[:LISTED]]
    chosen: list[int] = []
    for i in mixed:
        more = [number for number in (int(objects[i]), int(others[i])) if number not in chosen]
        if len(chosen) + len(more) > IN_MATRIX:
            break
        chosen += more
    place = np.full(len(names) + 1, len(chosen))  # of other classes
    place[chosen], place[-1] = range(len(chosen)), len(chosen) + 1  # not found
    rows = np.isin(objects, chosen)
    counts = np.zeros((len(chosen), len(chosen) + 2), np.int64)
    np.add.at(counts, (place[objects[rows]], place[others[rows]]), totals[rows])
    return pairs, {"classes": [names[number] for number in chosen], "counts": counts.tolist()}


def _pair_counts(
    evaluation: COCOeval, classes: int, found: ResultColumns, truth: Objects, threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of an object's class and the one that was found, as ``object * (classes + 1) + found``; and their numbers.

    ``classes`` stands for what was not found. Some images at a time: a table of all classes by all would fill the
    memory.
    """
    parameters = evaluation.params
    whole = list(parameters.img_ids), list(parameters.cat_ids)
    sure = found.scores >= threshold
    images = np.concatenate([found.images[sure], truth.image])
    of_images = np.concatenate([found.categories[sure], truth.category])
    pairs, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for some, of_them in _parts(images, of_images):
        parameters.img_ids, parameters.cat_ids = (some + 1).tolist(), (of_them + 1).tolist()
        table = evaluation.confusion_matrix(min_score=threshold)
        matrix = table["matrix"][:-1]  # the last row: found where nothing is
        row, column = np.nonzero(matrix)
        labels = np.append(np.array(table["cat_ids"], np.int64) - 1, classes)
        pairs.append(labels[row] * (classes + 1) + labels[column])
        counts.append(matrix[row, column].astype(np.int64))
    parameters.img_ids, parameters.cat_ids = whole
    kinds, kind = np.unique(np.concatenate(pairs), return_inverse=True)
    return kinds, np.bincount(kind, np.concatenate(counts), len(kinds)).astype(np.int64)


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
