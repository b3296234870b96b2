"""Detections as rows for files: COCO results, our JSON, objects of an export. All of them come from one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailseg.data.annotations.annotations import Category
from tailseg.data.annotations.masks import pixels_covered
from tailseg.data.exporters.outlines import editable
from tailseg.data.exporters.records import ExportObject
from tailseg.evaluation.results import result_rows
from tailseg.structures import RawDetections


def coco_rows(raw: RawDetections, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Rows of a COCO or LVIS results file without image ids, as `result_rows` describes them, in plain values."""
    rows = result_rows(raw, [category.id for category in categories])
    numbers = ("bbox", "score", "box_score")
    return [{key: value.tolist() if key in numbers else value for key, value in row.items()} for row in rows]


def json_rows(raw: RawDetections, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Rows of the JSON that `tailseg predict` writes: category_id, category, score, bbox, segmentation.

    The score is the one that ranks boxes; a model that ranks masks by a score of their own adds a mask_score.
    """
    rows = []
    for label, row in zip(raw.labels.tolist(), coco_rows(raw, categories), strict=True):
        box_score = row.get("box_score", row["score"])
        own = {"mask_score": row["score"]} if "box_score" in row else {}
        head = {"category_id": row["category_id"], "category": categories[label].name, "score": box_score}
        rows.append({**head, "bbox": row["bbox"], "segmentation": row["segmentation"], **own})
    return rows


def export_objects(raw: RawDetections, categories: Sequence[Category]) -> list[ExportObject]:
    """Objects of an export, their masks as polygons of few corners for a person to correct, see `editable`."""
    objects = []
    for label, row in zip(raw.labels.tolist(), json_rows(raw, categories), strict=True):
        mask = editable(row["segmentation"]["counts"].encode(), raw.image_hw)
        area = pixels_covered(mask, raw.image_hw)
        objects.append(ExportObject(label, tuple(row["bbox"]), mask, area, score=row["score"]))
    return objects
