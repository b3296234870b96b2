"""Kinds of detections and missed objects, counted by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hotcoco import mask as rle

from tailseg.data.annotations.annotations import load_annotations
from tailseg.evaluation.findings import BKG, BOTH, CLS, DUPE, KINDS, LOC, MISS, RIGHT, findings_of

CAT, DOG = 3, 8  # ids; positions 0 and 1


def square(x: int, y: int, side: int = 20) -> dict[str, Any]:
    return {"bbox": [x, y, side, side], "area": side * side}


def mask_of(box: list[int]) -> dict[str, Any]:
    bitmap = np.zeros((100, 100), np.uint8, order="F")
    x, y, width, height = box
    bitmap[y : y + height, x : x + width] = 1
    code = rle.encode(bitmap)
    counts = code["counts"]
    return {"size": [100, 100], "counts": counts.decode() if isinstance(counts, bytes) else counts}


def polygon(box: list[int]) -> list[list[int]]:
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


OBJECTS = [
    {"image_id": 7, "category_id": CAT, **square(0, 0)},
    {"image_id": 7, "category_id": DOG, **square(40, 0)},
    {"image_id": 7, "category_id": CAT, **square(0, 40)},
    {"image_id": 7, "category_id": DOG, **square(40, 40)},
    {"image_id": 7, "category_id": CAT, "iscrowd": 1, **square(70, 70)},
]
DETECTIONS = [
    (CAT, 0.9, [0, 0, 20, 20], RIGHT, -1),
    (CAT, 0.8, [0, 1, 20, 20], DUPE, 0),
    (CAT, 0.7, [40, 0, 20, 20], CLS, 1),
    (CAT, 0.6, [0, 50, 20, 20], LOC, 0),  # IoU 1/3
    (CAT, 0.55, [40, 50, 20, 20], BOTH, 1),
    (DOG, 0.52, [0, 80, 10, 10], BKG, -1),
    (CAT, 0.5, [70, 70, 20, 20], None, None),  # in a crowd: ignored
    (DOG, 0.3, [40, 0, 20, 20], None, None),  # right, but below the threshold
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Image 7 with everything, image 2 without an object."""
    content = {
        "images": [{"id": i, "height": 100, "width": 100, "file_name": f"{i}.jpg"} for i in (7, 2)],
        "annotations": [
            {"id": i, "iscrowd": 0, "segmentation": mask_of(o["bbox"]) if o.get("iscrowd") else polygon(o["bbox"])} | o
            for i, o in enumerate(OBJECTS, 1)
        ],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
    }
    rows = [
        {"image_id": 7, "category_id": own, "score": score, "bbox": box, "segmentation": mask_of(box)}
        for own, score, box, _, _ in DETECTIONS
    ]
    rows.append(
        {"image_id": 2, "category_id": CAT, "score": 0.95, "bbox": [0, 0, 9, 9], "segmentation": mask_of([0, 0, 9, 9])}
    )
    annotations, detections = tmp_path / "val.json", tmp_path / "detections.json"
    annotations.write_text(json.dumps(content))
    detections.write_text(json.dumps(rows))
    return annotations, detections


def test_kinds_by_hand(files: tuple[Path, Path]) -> None:
    findings = findings_of(load_annotations(files[0], files[0].parent), files[1], 0.5)
    assert findings.truth.known.image_ids.tolist() == [2, 7]
    of_7 = findings.image == 1
    shown = of_7 & (findings.kind != MISS)
    expected = {score: (kind, other) for _, score, _, kind, other in DETECTIONS if kind is not None}
    found = {
        round(score, 2): (kind, other)
        for score, kind, other in zip(
            findings.scores[shown].tolist(), findings.kind[shown].tolist(), findings.other[shown].tolist(), strict=True
        )
    }
    assert found == expected
    missed = of_7 & (findings.kind == MISS)
    assert findings.category[missed].tolist() == [1, 0, 1]  # both dogs and the cat below
    assert findings.row[missed].tolist() == [-1] * 3
    alone = findings.image == 0  # an image without objects
    assert findings.kind[alone].tolist() == [BKG]
    assert len(findings) == len(expected) + 3 + 1


def test_a_lower_threshold_finds_the_dog(files: tuple[Path, Path]) -> None:
    findings = findings_of(load_annotations(files[0], files[0].parent), files[1], 0.3)
    assert (findings.kind == MISS).sum() == 2
    assert findings.kind[findings.scores == 0.3].tolist() == [RIGHT]


def test_without_detections(files: tuple[Path, Path]) -> None:
    files[1].write_text("[]")
    findings = findings_of(load_annotations(files[0], files[0].parent), files[1], 0.5)
    assert findings.kind.tolist() == [MISS] * 4
    assert KINDS[MISS] == "Miss"
