"""Average precision under the LVIS rules, as the official lvis-api computes it; matching runs in hotcoco.

The rules (those of lvis-api 0.5.3): the best 300 detections of an image over all classes count; a detection
of a class that nobody looked for in its image is left out; an unmatched one of a class that was not annotated
exhaustively there is ignored; AP is the mean over IoU 0.50:0.05:0.95, 101 recall points and the classes with
ground truth. Ties in score keep the order of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import COCO, COCOeval
from numpy.typing import NDArray
from rich.table import Table

from tailseg.errors import UserError
from tailseg.evaluation.results import ResultColumns, is_box, read_json, read_results, rle_area, to_rle

Metrics = dict[str, dict[str, float | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Metrics of one results file, fractions in [0, 1]; None where the data has nothing to measure it on."""

    metrics: Metrics  # "bbox" and "segm" -> AP, AP50, AP75, APs/m/l, APr/c/f, AR300, ARs/m/l300
    per_category: list[dict[str, Any]]  # id, name, frequency, instances, bbox_AP, segm_AP; in order of id


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _GroundTruth:
    """An annotation file made ready to be scored against."""

    dataset: COCO
    image_hws: dict[int, tuple[int, int]]
    categories: list[dict[str, Any]]  # id, name, frequency (or None), instances; in order of id


def score(
    annotations: Path | dict[str, Any],
    detections: Path | list[dict[str, Any]],
    *,
    iou_types: Sequence[str] = ("bbox", "segm"),
    max_dets: int = 300,
    frequencies: Mapping[int, str] | None = None,
    mask_areas: bool = False,
) -> Scores:
    """Score an LVIS results file.

    Two habits of lvis-api are kept: a detection's area is that of its box, for masks too, if the first row
    has a box; and detections of area 0 are dropped after the cut at ``max_dets``. An image without
    ``neg_category_ids``, as in COCO files, counts as searched for every class. Crowd regions are ignored.

    Args:
        annotations: LVIS or COCO annotation file (``.json`` or ``.json.gz``), or its content.
        detections: LVIS results file (``.json`` or ``.json.gz``), or its rows.
        iou_types: "bbox", "segm", or both.
        max_dets: how many detections of an image count.
        frequencies: "r", "c" or "f" of every category id; by default what the annotation file says.
        mask_areas: decide small, medium and large of "segm" by the masks' areas, though rows have boxes.

    Raises:
        UserError: a file is missing or damaged, or names ids that the annotation file does not have.
    """
    unknown = set(iou_types) - {"bbox", "segm"}
    if unknown or not iou_types:
        raise UserError(f"IoU types are bbox and segm, found {', '.join(sorted(unknown)) or 'none'}")
    truth = _read_ground_truth(annotations, iou_types, frequencies)
    columns = read_results(
        read_json(detections) if isinstance(detections, Path) else detections,
        str(detections) if isinstance(detections, Path) else "detections",
        truth.image_hws,
        {category["id"] for category in truth.categories},
        iou_types,
    )
    columns = columns[_best_of_each_image(columns.image_ids, columns.scores, max_dets)]
    groups = {
        name: np.array([category["frequency"] == name for category in truth.categories], dtype=bool) for name in "rcf"
    }
    metrics: Metrics = {}
    per_category = [dict(category) for category in truth.categories]
    for iou_type in iou_types:
        use_masks = iou_type == "segm" and (mask_areas or columns.boxes is None)
        precision, recall = _match(truth.dataset, columns, iou_type, use_masks, max_dets)
        metrics[iou_type] = _summarise(precision, recall, groups, max_dets)
        for index, row in enumerate(per_category):
            row[f"{iou_type}_AP"] = _mean(precision[:, :, index, 0])
    return Scores(metrics=metrics, per_category=per_category)


def format_table(metrics: Metrics) -> Table:
    """The metrics in percent, one a row; a dash where there is nothing to measure."""
    table = Table("%", *({"bbox": "boxes", "segm": "masks"}.get(kind, kind) for kind in metrics))
    for name in next(iter(metrics.values()), {}):
        values = (of_kind[name] for of_kind in metrics.values())
        table.add_row(name, *("–" if value is None else f"{100 * value:.1f}" for value in values))
    return table


def _best_of_each_image(image_ids: NDArray[np.int64], scores: NDArray[np.float64], max_dets: int) -> NDArray[np.int64]:
    """Positions of the best ``max_dets`` rows of each image, in the file's order; ties go to the earlier."""
    order = np.lexsort((-scores, image_ids))  # stable
    grouped = image_ids[order]
    rank = np.arange(len(order)) - np.searchsorted(grouped, grouped)
    return np.sort(order[rank < max_dets])


def _match(
    truth: COCO, columns: ResultColumns, iou_type: str, use_mask_areas: bool, max_dets: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Match detections to ground truth.

    Returns:
        Precision (T, R, K, A) and recall (T, K, A) over 10 IoU thresholds, 101 recall points, K classes in
        order of id and 4 ranges of area (all, small, medium, large); -1 where a class has no ground truth.
    """
    if use_mask_areas:
        assert columns.mask_areas is not None
        areas = columns.mask_areas
    else:
        assert columns.boxes is not None
        areas = columns.boxes[:, 2] * columns.boxes[:, 3]
    kept = np.flatnonzero(areas > 0)
    columns, areas = columns[kept], areas[kept]
    boxes = np.zeros((len(columns), 4)) if columns.boxes is None else columns.boxes
    table = np.column_stack([columns.image_ids, boxes, columns.scores, columns.category_ids])
    masks: list[Any] | None = columns.masks if iou_type == "segm" else None
    found = truth.load_res(table, segmentation=masks)
    found.update_anns(ids=np.arange(1, len(columns) + 1), area=areas)
    if max_dets > 300:  # the evaluator cuts at 300 itself, unless both of these tell it not to
        found = found.cap_detections_per_image(None)
    evaluation = COCOeval(truth, found, iou_type, lvis_style=True)
    evaluation.params.max_dets = [max(max_dets, 300)]
    evaluation.evaluate()
    evaluation.accumulate()
    curves = evaluation.eval
    assert curves is not None
    return curves["precision"][..., 0], curves["recall"][..., 0]


def _summarise(
    precision: NDArray[np.float64],
    recall: NDArray[np.float64],
    groups: dict[str, NDArray[np.bool_]],
    max_dets: int,
) -> dict[str, float | None]:
    """The thirteen numbers of lvis-api from precision (T, R, K, A) and recall (T, K, A)."""
    sizes = {"": 0, "s": 1, "m": 2, "l": 3}
    ap = {f"AP{size}": _mean(precision[..., area]) for size, area in sizes.items()}
    ap |= {"AP50": _mean(precision[0, ..., 0]), "AP75": _mean(precision[5, ..., 0])}
    ap |= {f"AP{name}": _mean(precision[:, :, members, 0]) for name, members in groups.items()}
    order = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
    ar = {f"AR{size}{max_dets}": _mean(recall[..., area]) for size, area in sizes.items()}
    return {name: ap[name] for name in order} | ar


def _mean(values: NDArray[np.float64]) -> float | None:
    """Mean of what was measured (-1 is not); None if nothing was."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None


def _read_ground_truth(
    annotations: Path | dict[str, Any], iou_types: Sequence[str], frequencies: Mapping[int, str] | None
) -> _GroundTruth:
    source = str(annotations) if isinstance(annotations, Path) else "annotations"
    content = read_json(annotations) if isinstance(annotations, Path) else annotations
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise UserError(f"{source}: not an annotation file; it needs the lists {', '.join(parts)}")
    try:
        return _ground_truth(content, source, iou_types, frequencies or {})
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{source}: not an annotation file; an entry lacks {error}") from error
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{source}: not an annotation file; an entry is of the wrong kind ({error})") from error


def _ground_truth(
    content: dict[str, Any], source: str, iou_types: Sequence[str], frequencies: Mapping[int, str]
) -> _GroundTruth:
    """What an annotation file says; errors of Python's own where entries are not what they should be."""
    categories = [
        {
            "id": category["id"],
            "name": category["name"],
            "frequency": frequencies.get(category["id"], category.get("frequency")),
            "instances": 0,
        }
        for category in sorted(content["categories"], key=lambda category: category["id"])
    ]
    by_id = {category["id"]: category for category in categories}
    image_hws = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    scored = _scored_objects(content["annotations"], image_hws, by_id, source, "segm" in iou_types)
    for entry in scored:
        by_id[entry["category_id"]]["instances"] += 1 - entry["iscrowd"]
    every_category = list(by_id)
    images = [_scored_image(image, every_category) for image in content["images"]]
    names = [{"id": category["id"], "name": category["name"]} for category in categories]
    dataset = COCO({"images": images, "annotations": scored, "categories": names})
    return _GroundTruth(dataset=dataset, image_hws=image_hws, categories=categories)


def _scored_image(image: dict[str, Any], every_category: list[int]) -> dict[str, Any]:
    return {
        "id": image["id"],
        "height": image["height"],
        "width": image["width"],
        # COCO's images are searched for every class; an empty list would let false positives go free.
        "neg_category_ids": image.get("neg_category_ids", every_category),
        "not_exhaustive_category_ids": image.get("not_exhaustive_category_ids", []),
    }


def _scored_objects(
    objects: list[dict[str, Any]],
    image_hws: dict[int, tuple[int, int]],
    categories: dict[int, dict[str, Any]],
    source: str,
    with_masks: bool,
) -> list[dict[str, Any]]:
    """Annotations with an area, since lvis-api counts no others, with ids of their own and checked masks."""
    scored = []
    for index, item in enumerate(objects):
        place = f"{source}: annotation {index}"
        if item["image_id"] not in image_hws or item["category_id"] not in categories:
            raise UserError(f"{place} names an image or a category that the file does not have")
        if not is_box(item["bbox"]):
            raise UserError(f"{place} has a bbox that is not four finite numbers x, y, width, height")
        entry = {
            "id": index + 1,  # ids in the file may repeat, and lvis-api takes 0 for unmatched
            "image_id": item["image_id"],
            "category_id": item["category_id"],
            "bbox": item["bbox"],
            "iscrowd": int(item.get("iscrowd", 0)),
        }
        if with_masks:
            entry["segmentation"] = to_rle(item["segmentation"], image_hws[item["image_id"]], f"{place}: segmentation")
            mask_area = rle_area(entry["segmentation"], f"{place}: segmentation")
        area = item.get("area")
        if area is None:  # COCO and LVIS mean the mask's area
            area = mask_area if with_masks else item["bbox"][2] * item["bbox"][3]
        if area > 0:
            scored.append({**entry, "area": float(area)})
    return scored
