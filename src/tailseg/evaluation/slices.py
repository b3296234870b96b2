"""Slices of a split: objects by size, images by the number of their objects, classes by frequency; the worst images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from hotcoco import mask as rle_codec

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.frequency import GROUPS
from tailseg.evaluation.ground_truth import GroundTruth
from tailseg.evaluation.matches import Matches
from tailseg.evaluation.reading import ResultColumns

SIDES = (0, 16, 32, 64, 96, 192, None)  # pixels, root of an object's area; 32 and 96 are those of APs, APm and APl
CROWDS = (0, 1, 5, 10, 20, 50, None)  # objects of an image
WORST = 12  # images
DETECTIONS_SHOWN = 50  # of an image

Row = dict[str, Any]


def slices(matches: Matches, images: int, groups: Sequence[str | None], threshold: float) -> dict[str, list[Row]]:
    """Numbers of each slice that is not empty.

    Args:
        matches: of the split.
        images: number of its images.
        groups: "r", "c", "f" or None of each class.
        threshold: lowest score that counts for precision and recall, not for AP50.

    Returns:
        ``size``: ``objects``, and the shares of them that were found (``recall``) and that were with whatever score
        (``recall_any_score``). ``crowding`` and ``frequency``: ``objects``, ``AP50``, ``precision`` and ``recall``,
        None where there is nothing to measure it on. Each with ``images`` or ``classes``, and bounds ``first`` and
        ``last`` (sides in pixels, below ``last``; or numbers of objects), or ``group``.
    """
    return {
        "size": _by_size(matches, threshold),
        "crowding": _by_crowding(matches, images, threshold),
        "frequency": _by_frequency(matches, groups, threshold),
    }


def _by_size(matches: Matches, threshold: float) -> list[Row]:
    sides, rows = np.sqrt(matches.object_area), []
    for first, last in pairwise(SIDES):
        assert first is not None
        found_with = matches.found_with[(sides >= first) & (sides < (np.inf if last is None else last))]
        if len(found_with):
            shares = {"recall": float((found_with >= threshold).mean())}
            shares["recall_any_score"] = float((found_with > -np.inf).mean())
            rows.append({"first": first, "last": last, "objects": len(found_with), **shares})
    return rows


def _by_crowding(matches: Matches, images: int, threshold: float) -> list[Row]:
    numbers, rows = np.bincount(matches.object_image, minlength=images), []
    for first, after in pairwise(CROWDS):
        assert first is not None
        inside = (numbers >= first) & (numbers < (np.inf if after is None else after))
        if inside.any():
            part = matches.of(inside[matches.image], inside[matches.object_image])
            last = None if after is None else after - 1
            rows.append({"first": first, "last": last, "images": int(inside.sum()), **_numbers(part, threshold)})
    return rows


def _by_frequency(matches: Matches, groups: Sequence[str | None], threshold: float) -> list[Row]:
    rows = []
    for group in GROUPS:
        members = np.array([own == group for own in groups], np.bool_)
        if members.any():
            part = matches.of(members[matches.category], members[matches.object_category])
            with_objects = len(np.unique(part.object_category))
            rows.append({"group": group, "classes": with_objects, **_numbers(part, threshold)})
    return rows


def _numbers(part: Matches, threshold: float) -> Row:
    right, wrong, _ = part.counts(threshold)
    objects = len(part.found_with)
    return {
        "objects": objects,
        "AP50": part.average_precision(),
        "precision": right / (right + wrong) if right + wrong else None,
        "recall": right / objects if objects else None,
    }


def worst_images(
    matches: Matches,
    truth: GroundTruth,
    annotations: Annotations,
    found: ResultColumns,
    threshold: float,
    *,
    with_masks: bool,
) -> list[Row]:
    """The images with the lowest F1; of equals those with the most mistakes, wrong detections and missed objects.

    Args:
        matches: of the split.
        truth: its objects.
        annotations: that they are from.
        found: the detections that were matched.
        threshold: lowest score that counts.
        with_masks: of the detections; otherwise they are boxes.

    Returns:
        For each of at most 12 with a mistake: ``image_id``, ``file_name``, ``right``, ``wrong``, ``missed``, ``F1``,
        ``missed_classes`` (name -> number), and ``found``: rows of a results file, best score first, at most 50, each
        with ``right``. They have a ``bbox`` if the detections do.
    """
    images, shown = len(truth.known.image_ids), matches.scores >= threshold
    missing = matches.found_with < threshold
    right = np.bincount(matches.image[shown & matches.right], minlength=images)
    wrong = np.bincount(matches.image[shown & ~matches.right], minlength=images)
    missed = np.bincount(matches.object_image[missing], minlength=images)
    with np.errstate(invalid="ignore"):
        f1 = 2 * right / (2 * right + wrong + missed)
    faulty = np.flatnonzero(wrong + missed)
    worst = faulty[np.lexsort((-(wrong + missed)[faulty], f1[faulty]))][:WORST]
    rows = []
    for image in worst.tolist():
        position = int(np.flatnonzero(annotations.image_ids == truth.known.image_ids[image])[0])
        of_image = np.flatnonzero(shown & (matches.image == image))
        of_image = of_image[np.argsort(-matches.scores[of_image], kind="stable")][:DETECTIONS_SHOWN]
        names, numbers = np.unique(
            matches.object_category[missing & (matches.object_image == image)], return_counts=True
        )
        rows.append(
            {
                "image_id": annotations.image_id(position),
                "file_name": annotations.file_names[position] or "",
                "right": int(right[image]),
                "wrong": int(wrong[image]),
                "missed": int(missed[image]),
                "F1": float(f1[image]),
                "missed_classes": {
                    truth.categories[name]["name"]: number
                    for name, number in zip(names.tolist(), numbers.tolist(), strict=True)
                },
                "found": [
                    result_row(truth, found, int(matches.rows[row]), right=bool(matches.right[row]), masks=with_masks)
                    for row in of_image.tolist()
                ],
            }
        )
    return rows


def result_row(truth: GroundTruth, found: ResultColumns, row: int, *, right: bool, masks: bool) -> Mapping[str, Any]:
    """A detection as a row of a results file, with the name of its class and ``right``; with a mask if asked for.

    Args:
        truth: knows the images and categories.
        found: detections.
        row: position of the one among them.
        right: as it stands in the row.
        masks: the detections have them.
    """
    one = found[np.array([row])]
    category = truth.categories[int(one.categories[0])]
    content = {"category_id": category["id"], "name": category["name"], "score": float(one.scores[0]), "right": right}
    if one.boxes is not None:
        content["bbox"] = one.boxes[0].tolist()
    if masks:
        assert one.counts is not None
        height, width = truth.known.image_sizes[int(one.images[0])].tolist()
        counts = one.counts[0]
        if isinstance(counts, list):
            counts = rle_codec.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
        text = counts.decode("ascii") if isinstance(counts, bytes) else counts
        content["segmentation"] = {"size": [height, width], "counts": text}
    return content
