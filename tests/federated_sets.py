"""Small data sets with all of LVIS's federated rules, and results on them."""

from __future__ import annotations

from typing import Any

import numpy as np

Content = dict[str, Any]
Rows = list[Content]


def federated_data(seed: int, images: int = 6) -> tuple[Content, Rows]:
    """Four classes, with classes verified absent, not searched for, and not annotated exhaustively; crowds too."""
    rng = np.random.default_rng(seed)
    data: Content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3 * i, "name": f"c{i}", "frequency": "rccf"[i - 1]} for i in (1, 2, 3, 4)],
    }
    rows: Rows = []
    for image_id in rng.permutation(np.arange(10, 10 + images)).tolist():
        present: set[int] = set()
        for _ in range(int(rng.integers(0, 6))):
            category = int(rng.choice([3, 6, 12]))
            present.add(category)
            box = [int(v) for v in (*rng.integers(0, 40, 2), *rng.integers(4, 24, 2))]
            place = {"image_id": image_id, "category_id": category}
            about = {"area": box[2] * box[3], "iscrowd": int(rng.random() < 0.1), "segmentation": _outline(box)}
            data["annotations"].append({"id": len(data["annotations"]) + 1, **place, "bbox": box, **about})
            for _ in range(int(rng.integers(0, 4))):
                near = [max(1, v + int(d)) for v, d in zip(box, rng.integers(-3, 4, 4), strict=True)]
                rows.append({**place, "bbox": near})
        for _ in range(int(rng.integers(0, 8))):
            box = [int(v) for v in (*rng.integers(0, 40, 2), *rng.integers(4, 24, 2))]
            rows.append({"image_id": image_id, "category_id": int(rng.choice([3, 6, 9, 12])), "bbox": box})
        absent = sorted({3, 6, 9, 12} - present)
        data["images"].append(
            {
                **{"id": image_id, "height": 64, "width": 64},
                "neg_category_ids": absent[: int(rng.integers(0, 3))],
                "not_exhaustive_category_ids": [int(c) for c in rng.choice([3, 6, 12], rng.integers(0, 2))],
            }
        )
    for row, score in zip(rows, rng.permutation(len(rows)), strict=True):
        row["score"] = (int(score) + 1) / (len(rows) + 1)
        row["segmentation"] = _outline(row["bbox"])
    return data, rows


def _outline(box: list[int]) -> list[list[int]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]
