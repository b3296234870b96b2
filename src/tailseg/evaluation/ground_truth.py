"""Annotations made ready to be scored against.

Images and categories are known by their positions, in ascending order of id: so an id may be any number.
Shape letters: I images, K categories, M objects, N detections.
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
from tailseg.evaluation.pairs import Pairs
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

    def labels(self) -> NDArray[np.int64]:
        """The classes with objects, in order: only these have an AP, however many are listed."""
        return np.unique(self.category)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroundTruth:
    """The objects that detections are matched to."""

    known: Known
    objects: Objects
    boxes_xywh: NDArray[np.float64]  # (M, 4) pixels
    absent: Pairs  # the class was looked for in the image and is not there
    not_exhaustive: Pairs  # not every object of the class was annotated in the image
    categories: list[dict[str, Any]]  # id, name, frequency, train_images (or None each), instances; in order of id

    def dataset(self, images: NDArray[np.int64], categories: NDArray[np.int64]) -> COCO:
        """The objects as hotcoco takes them, with images and categories as positions + 1.

        It asks of each detection whether its class was looked for in its image. For images that were searched for
        every class, as COCO's, it is told of those that detections have: lists of all would fill the memory.

        Args:
            images: (N,) position of each detection's image.
            categories: (N,) position of its category.
        """
        everywhere = self.absent.whole[images]
        absent = self.absent.and_of(images[everywhere], categories[everywhere]).lists()
        not_exhaustive = self.not_exhaustive.lists()
        sizes = self.known.image_sizes.tolist()
        objects = self.objects
        return COCO.from_arrays(
            [
                {
                    "id": i + 1,
                    "height": height,
                    "width": width,
                    "neg_category_ids": [label + 1 for label in absent[i]],
                    "not_exhaustive_category_ids": [label + 1 for label in not_exhaustive[i]],
                }
                for i, (height, width) in enumerate(sizes)
            ],
            [{"id": label + 1, "name": category["name"]} for label, category in enumerate(self.categories)],
            objects.image + 1,
            objects.category + 1,
            self.boxes_xywh,  # ids of annotations are 1, 2, ... here: lvis-api takes 0 for unmatched
            area=objects.areas,
            iscrowd=objects.crowd,
            segmentation=None if objects.counts is None else self.known.codes_at(objects.image, objects.counts),
        )


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
    never = np.zeros(len(order), np.bool_)
    # COCO's images are searched for every class.
    absent = _pairs(annotations.neg_category_ids, category_ids, position, ~annotations.neg_stated[order])
    known = Known(
        image_ids=annotations.image_ids[order],
        image_sizes=annotations.image_sizes[order],
        category_ids=category_ids,
        judged=absent.and_of(objects.image, objects.category),
    )
    return GroundTruth(
        known=known,
        objects=objects,
        boxes_xywh=np.asarray(annotations.boxes_xywh),
        absent=absent,
        not_exhaustive=_pairs(annotations.not_exhaustive_category_ids, category_ids, position, never),
        categories=_categories(annotations, objects, frequencies),
    )


def _run_lengths(annotations: Annotations, of_row: NDArray[np.int64]) -> NDArray[np.object_]:
    hws = annotations.image_sizes.tolist()
    codes = (run_lengths(annotations.segmentation(row), tuple(hws[i])) for row, i in enumerate(of_row.tolist()))
    return np.fromiter(codes, dtype=object, count=len(of_row))


def _pairs(
    lists: IdLists, category_ids: NDArray[np.int64], position: NDArray[np.int64], whole: NDArray[np.bool_]
) -> Pairs:
    """The class is in the image's list; ids that the file does not have are left out."""
    columns, found = positions_of(lists.ids, category_ids)
    rows = position[np.repeat(np.arange(len(lists)), np.diff(lists.starts))]
    return Pairs.of(rows[found], columns[found], len(category_ids), whole)


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
