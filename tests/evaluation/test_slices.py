"""Slices and worst images of matches that can be counted by hand."""

import pytest
from matched import matches_by_hand
from tiny import score_of

from tailseg.evaluation.metrics import ScoreOptions
from tailseg.evaluation.slices import slices


def test_slices_by_hand():
    found = slices(matches_by_hand(), 4, ["r", "c", "f"], 0.5)
    assert found["size"] == [
        {"first": 0, "last": 16, "objects": 1, "recall": 1.0, "recall_any_score": 1.0},
        {"first": 16, "last": 32, "objects": 1, "recall": 0.0, "recall_any_score": 1.0},
        {"first": 32, "last": 64, "objects": 1, "recall": 0.0, "recall_any_score": 0.0},
        {"first": 192, "last": None, "objects": 1, "recall": 1.0, "recall_any_score": 1.0},
    ]
    of_class_0 = pytest.approx((34 + 33 * 2 / 3) / 101)
    assert found["crowding"] == [
        {"first": 0, "last": 0, "images": 2, "objects": 0, "AP50": None, "precision": None, "recall": None},
        {
            **{"first": 1, "last": 4, "images": 2, "objects": 4},
            **{"AP50": pytest.approx((of_class_0.expected + 1) / 2), "precision": 2 / 3, "recall": 0.5},
        },
    ]
    assert found["frequency"] == [
        {"group": "r", "classes": 1, "objects": 3, "AP50": of_class_0, "precision": 0.5, "recall": 1 / 3},
        {"group": "c", "classes": 0, "objects": 0, "AP50": None, "precision": None, "recall": None},
        {"group": "f", "classes": 1, "objects": 1, "AP50": pytest.approx(1), "precision": 1.0, "recall": 1.0},
    ]
    assert slices(matches_by_hand(), 4, [None] * 3, 0.5)["frequency"] == []


def objects_of(counts, category=1):
    """So many objects of 10 x 10 pixels in a row, for each image id."""
    return [
        {"image_id": image, "category_id": category, "bbox": [12 * i, 0, 10, 10], "area": 100}
        for image, count in counts.items()
        for i in range(count)
    ]


def test_worst_images_come_first():
    """Of 14 images with one missed object the first 12 with the most mistakes; perfect ones are left out."""
    counts = dict.fromkeys(range(1, 15), 1) | {20: 3, 30: 2, 40: 4}
    truth = [{"id": i, **row} for i, row in enumerate(objects_of(counts), 1)]
    data = {
        "images": [{"id": i, "height": 50, "width": 50, "file_name": f"{i}.jpg"} for i in sorted(counts, reverse=True)],
        "annotations": truth,
        "categories": [{"id": 1, "name": "cat"}, {"id": 6, "name": "dog"}],
    }
    rows = [row | {"score": 0.9} for row in objects_of({30: 2, 40: 1})]  # 30 is perfect, 40 misses three of four
    rows += [row | {"score": 0.8} for row in objects_of({20: 1}, category=6)]  # a wrong one, and three are missed
    found = score_of(data, rows, iou_types=["bbox"], options=ScoreOptions(analyse=True)).analysis["bbox"]["worst"]
    assert [row["image_id"] for row in found] == [20, *range(1, 12)]
    assert found[0] == {
        **{"image_id": 20, "file_name": "20.jpg", "right": 0, "wrong": 0, "missed": 3, "F1": 0.0},
        **{"missed_classes": {"cat": 3}, "found": []},  # its detection is below the threshold, 0.9
    }
    rows += [row | {"score": 0.95} for row in objects_of({20: 1}, category=6)]
    found = score_of(data, rows, iou_types=["bbox"], options=ScoreOptions(analyse=True)).analysis["bbox"]["worst"]
    assert (found[0]["wrong"], found[0]["missed"]) == (1, 3)
    row = {"category_id": 6, "name": "dog", "score": 0.95, "right": False, "bbox": [0.0, 0.0, 10.0, 10.0]}
    assert found[0]["found"] == [row]
