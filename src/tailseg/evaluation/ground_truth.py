"""Annotation files made ready to be scored against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import COCO
from numpy.typing import NDArray

from tailseg.errors import UserError
from tailseg.evaluation.reading import Known, Rows, positions, read_json


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objects:
    """The annotations that are scored, in the file's order; M of them."""

    image: NDArray[np.int64]  # (M,) position in `Known.image_ids`
    category: NDArray[np.int64]  # (M,) position in `Known.category_ids`
    areas: NDArray[np.float64]  # (M,) pixels
    crowd: NDArray[np.bool_]  # (M,)
    counts: NDArray[np.object_] | None  # (M,) run lengths of the masks; None if not asked for


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroundTruth:
    """What detections are matched to."""

    dataset: COCO
    known: Known
    objects: Objects
    not_exhaustive: NDArray[np.bool_]  # (I, K) not every object of the class was annotated in the image
    categories: list[dict[str, Any]]  # id, name, frequency, train_images (or None each), instances; in order of id


def read_ground_truth(
    annotations: Path | dict[str, Any], with_masks: bool, frequencies: Mapping[int, str] | None = None
) -> GroundTruth:
    """Read an annotation file, or its content, for scoring.

    Args:
        annotations: LVIS or COCO annotation file (``.json`` or ``.json.gz``), or its content.
        with_masks: read and check the masks too.
        frequencies: "r", "c" or "f" of every category id; by default what the file says.

    Raises:
        UserError: the file is missing or damaged; names the first entry at fault.
    """
    source = str(annotations) if isinstance(annotations, Path) else "annotations"
    content = read_json(annotations) if isinstance(annotations, Path) else annotations
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise UserError(f"{source}: not an annotation file; it needs the lists {', '.join(parts)}")
    try:
        return _ground_truth(content, source, with_masks, frequencies or {})
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{source}: not an annotation file; an entry lacks {error}") from error
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{source}: not an annotation file; an entry is of the wrong kind ({error})") from error


def _ground_truth(
    content: dict[str, Any], source: str, with_masks: bool, frequencies: Mapping[int, str]
) -> GroundTruth:
    """What an annotation file says; errors of Python's own where entries are not what they should be."""
    image_ids, image_rows = _sorted_ids(content["images"], source, "image")
    category_ids, category_rows = _sorted_ids(content["categories"], source, "category")
    image_hws = np.array([(row["height"], row["width"]) for row in image_rows], dtype=np.int64).reshape(-1, 2)
    objects = Rows(rows=content["annotations"], source=source, noun="annotation")
    image, unknown_image = positions(objects.whole_numbers("image_id"), image_ids)
    category, unknown_category = positions(objects.whole_numbers("category_id"), category_ids)
    strange = unknown_image | unknown_category
    if strange.any():
        raise UserError(
            f"{objects.place(int(strange.argmax()))} names an image or a category that the file does not have"
        )
    boxes = objects.boxes()
    counts, mask_areas = objects.masks(image_hws[image]) if with_masks else (None, boxes[:, 2] * boxes[:, 3])
    stated = [row.get("area") for row in objects.rows]  # where it is not, COCO and LVIS mean the mask's area
    areas = np.array([np.nan if area is None else area for area in stated], dtype=np.float64)
    areas = np.where(np.isnan(areas), mask_areas, areas)
    crowd = np.array([bool(row.get("iscrowd", 0)) for row in objects.rows], dtype=bool)
    kept = areas > 0  # lvis-api counts no others
    scored = Objects(
        image=image[kept],
        category=category[kept],
        areas=areas[kept],
        crowd=crowd[kept],
        counts=None if counts is None else counts[kept],
    )
    # COCO's images are searched for every class; an empty list would let false positives go free.
    judged = _flags(image_rows, "neg_category_ids", category_ids, absent=True)
    judged[scored.image, scored.category] = True
    known = Known(image_ids=image_ids, image_hws=image_hws, category_ids=category_ids, judged=judged)
    dataset = COCO.from_arrays(
        [_scored_image(row, category_ids) for row in image_rows],
        [{"id": row["id"], "name": row["name"]} for row in category_rows],
        image_ids[scored.image],
        category_ids[scored.category],
        boxes[kept],  # ids in the file may repeat, and lvis-api takes 0 for unmatched: they are 1, 2, ... here
        area=scored.areas,
        iscrowd=scored.crowd,
        segmentation=None if scored.counts is None else known.codes_at(scored.image, scored.counts),
    )
    instances = np.bincount(scored.category[~scored.crowd], minlength=len(category_ids))
    categories = [
        {
            "id": row["id"],
            "name": row["name"],
            "frequency": frequencies.get(row["id"], row.get("frequency")),
            "train_images": row.get("image_count"),
            "instances": int(count),
        }
        for row, count in zip(category_rows, instances, strict=True)
    ]
    return GroundTruth(
        dataset=dataset,
        known=known,
        objects=scored,
        not_exhaustive=_flags(image_rows, "not_exhaustive_category_ids", category_ids, absent=False),
        categories=categories,
    )


def _sorted_ids(rows: list[dict[str, Any]], source: str, noun: str) -> tuple[NDArray[np.int64], list[dict[str, Any]]]:
    """Ids in ascending order, and the rows in that order; of rows that share an id the last counts."""
    ids = Rows(rows=rows, source=source, noun=noun).whole_numbers("id")
    by_id = dict(zip(ids.tolist(), rows, strict=True))
    return np.unique(ids), [by_id[i] for i in sorted(by_id)]


def _flags(
    image_rows: list[dict[str, Any]], key: str, category_ids: NDArray[np.int64], *, absent: bool
) -> NDArray[np.bool_]:
    """(I, K) the class is in the image's list ``key``; ``absent`` where the image has no such list."""
    flags = np.zeros((len(image_rows), len(category_ids)), dtype=bool)
    for flags_K, row in zip(flags, image_rows, strict=True):
        listed = row.get(key)
        flags_K[:] = absent if listed is None else np.isin(category_ids, np.asarray(listed, dtype=np.int64).reshape(-1))
    return flags


def _scored_image(image: dict[str, Any], category_ids: NDArray[np.int64]) -> dict[str, Any]:
    absent = image.get("neg_category_ids")
    return {
        "id": image["id"],
        "height": image["height"],
        "width": image["width"],
        "neg_category_ids": category_ids.tolist() if absent is None else absent,
        "not_exhaustive_category_ids": image.get("not_exhaustive_category_ids") or [],
    }
