"""Annotations made ready to be scored against.

Images and categories are known by their positions, in ascending order of id: so an id may be any number.
Shape letters: I images, K categories, M objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hotcoco import COCO
from numpy.typing import NDArray

from tailseg.data.annotations.annotations import Annotations
from tailseg.data.annotations.columns import IdLists, positions_of
from tailseg.data.annotations.masks import run_lengths
from tailseg.evaluation.reading import Known

# lvis-api treats objects with "ignore" as those of another size than is measured; this size is beyond all of them.
OF_NO_AREA = 1e12


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objects:
    """The annotations that are scored, image by image, in the file's order within one."""

    image: NDArray[np.int64]  # (M,) position
    category: NDArray[np.int64]  # (M,) position
    areas: NDArray[np.float64]  # (M,) pixels
    crowd: NDArray[np.bool_]  # (M,)
    ignored: NDArray[np.bool_]  # (M,) whether they are found or not, they do not count
    counts: NDArray[np.object_] | None  # (M,) run lengths of the masks; None if not asked for


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroundTruth:
    """The objects that detections are matched to; ``dataset`` knows images and categories as positions + 1."""

    dataset: COCO
    known: Known
    objects: Objects
    not_exhaustive: NDArray[np.bool_]  # (I, K) not every object of the class was annotated in the image
    categories: list[dict[str, Any]]  # id, name, frequency, train_images (or None each), instances; in order of id


def ground_truth_of(
    annotations: Annotations, with_masks: bool, frequencies: Mapping[int, str] | None = None
) -> GroundTruth:
    """Make annotations ready for scoring.

    Args:
        annotations: a split.
        with_masks: make the masks' run-length codes too.
        frequencies: "r", "c" or "f" of every category id; by default the groups that the file states.
    """
    ids = annotations.image_ids
    order = np.argsort(ids.view(np.uint64) if annotations.unsigned_ids else ids, kind="stable")
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    of_row = np.repeat(np.arange(len(order)), np.diff(annotations.first_annotation))  # image in the file's order
    objects = Objects(
        image=position[of_row],
        category=np.asarray(annotations.labels),
        areas=np.where(annotations.ignored, OF_NO_AREA, annotations.areas),
        crowd=np.asarray(annotations.crowd),
        ignored=np.asarray(annotations.ignored),
        counts=_run_lengths(annotations, of_row) if with_masks else None,
    )
    category_ids = annotations.label_to_category_id
    judged = _flags(annotations.neg_category_ids, category_ids)
    judged[~annotations.neg_stated] = True  # COCO's images are searched for every class
    not_exhaustive = _flags(annotations.not_exhaustive_category_ids, category_ids)
    absent, not_exhaustive = judged[order], not_exhaustive[order]
    judged = absent.copy()
    judged[objects.image, objects.category] = True
    known = Known(
        image_ids=annotations.image_ids[order],
        image_sizes=annotations.image_sizes[order],
        category_ids=category_ids,
        judged=judged,
    )
    dataset = COCO.from_arrays(
        [_scored_image(i, known.image_sizes[i], absent[i], not_exhaustive[i]) for i in range(len(order))],
        [{"id": label + 1, "name": category.name} for label, category in enumerate(annotations.categories)],
        objects.image + 1,
        objects.category + 1,
        np.asarray(annotations.boxes_xywh),  # ids of annotations are 1, 2, ... here: lvis-api takes 0 for unmatched
        area=objects.areas,
        iscrowd=objects.crowd,
        segmentation=None if objects.counts is None else known.codes_at(objects.image, objects.counts),
    )
    return GroundTruth(
        dataset=dataset,
        known=known,
        objects=objects,
        not_exhaustive=not_exhaustive,
        categories=_categories(annotations, objects, frequencies),
    )


def _run_lengths(annotations: Annotations, of_row: NDArray[np.int64]) -> NDArray[np.object_]:
    hws = annotations.image_sizes.tolist()
    codes = (run_lengths(annotations.segmentation(row), tuple(hws[i])) for row, i in enumerate(of_row.tolist()))
    return np.fromiter(codes, dtype=object, count=len(of_row))


def _flags(lists: IdLists, category_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(I, K) the class is in the image's list; ids that the file does not have are left out."""
    flags = np.zeros((len(lists), len(category_ids)), dtype=bool)
    columns, found = positions_of(lists.ids, category_ids)
    rows = np.repeat(np.arange(len(lists)), np.diff(lists.starts))
    flags[rows[found], columns[found]] = True
    return flags


def _scored_image(
    position: int, image_hw: NDArray[np.int64], absent: NDArray[np.bool_], not_exhaustive: NDArray[np.bool_]
) -> dict[str, Any]:
    height, width = image_hw.tolist()
    return {
        "id": position + 1,
        "height": height,
        "width": width,
        "neg_category_ids": (np.flatnonzero(absent) + 1).tolist(),
        "not_exhaustive_category_ids": (np.flatnonzero(not_exhaustive) + 1).tolist(),
    }


def _categories(
    annotations: Annotations, objects: Objects, frequencies: Mapping[int, str] | None
) -> list[dict[str, Any]]:
    instances = np.bincount(objects.category[~objects.crowd & ~objects.ignored], minlength=len(annotations.categories))
    if frequencies is None:
        frequencies = {c.id: c.frequency for c in annotations.categories} if annotations.frequency_stated else {}
    return [
        {
            "id": category.id,
            "name": category.name,
            "frequency": frequencies.get(category.id),
            "train_images": None if stated < 0 else stated,
            "instances": count,
        }
        for category, stated, count in zip(
            annotations.categories, annotations.stated_image_counts.tolist(), instances.tolist(), strict=True
        )
    ]
