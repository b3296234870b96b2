"""What became of annotated objects, on two images made by hand."""

from pathlib import Path

import numpy as np
import orjson
import pytest

from tailseg.cli.demo_objects import Fates, confusion, fates, look_alikes, outcomes
from tailseg.data.annotations.annotations import Annotations, load_annotations

NAMES = ["plain_red_star", "striped_red_star", "plain_blue_ring"]
GROUPS = ["f", "r", "r"]


@pytest.fixture
def truth(tmp_path: Path) -> Annotations:
    """Image 1 holds a star of each kind side by side, image 2 a ring."""
    rows = [(1, 1, [0, 0, 10, 10]), (1, 2, [20, 0, 10, 10]), (2, 3, [0, 0, 10, 10])]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 40} for i in (1, 2)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": 100,
             "segmentation": [[box[0], 0, box[0] + 10, 0, box[0] + 10, 10, box[0], 10]]}
            for n, (image, category, box) in enumerate(rows, 1)
        ],
        "categories": [{"id": n, "name": NAMES[n - 1], "frequency": GROUPS[n - 1]} for n in (1, 2, 3)],
    }  # fmt: skip
    (tmp_path / "val.json").write_bytes(orjson.dumps(content))
    return load_annotations(tmp_path / "val.json", tmp_path)


def detections(folder: Path, rows: list[tuple[int, int, list[float], float]]) -> Path:
    made = [{"image_id": i, "category_id": c, "bbox": box, "score": score} for i, c, box, score in rows]
    (folder / "found.json").write_bytes(orjson.dumps(made))
    return folder / "found.json"


def test_the_first_detection_on_an_object_counts_and_only_within_the_limit(truth: Annotations, tmp_path: Path) -> None:
    found = detections(
        tmp_path,
        [
            (1, 1, [0, 0, 10, 10], 0.9),  # right
            (1, 1, [20, 0, 10, 9], 0.8),  # the striped star is taken for a plain one ...
            (1, 2, [20, 0, 10, 10], 0.2),  # ... and named right further down, beyond a limit of two
            (2, 3, [30, 30, 5, 5], 0.7),  # elsewhere
        ],
    )
    at_two = fates(truth, found, limit=2)
    assert at_two.labels.tolist() == [0, 1, 2]
    assert at_two.claims.tolist() == [0, 0, -1]
    assert at_two.scores.tolist() == [0.9, 0.2, 0.0]
    assert at_two.bars.tolist() == [0.8, 0.0]
    told = outcomes(at_two, look_alikes(NAMES), GROUPS)
    assert told["ends"]["f"] == {"right": 1, "look-alike": 0, "other class": 0, "missed": 0}
    assert told["ends"]["r"] == {"right": 0, "look-alike": 1, "other class": 0, "missed": 1}
    assert told["ends"]["c"] == dict.fromkeys(("right", "look-alike", "other class", "missed"), 0)
    assert told["scores"]["r"] == pytest.approx([0.02, 0.05, 0.1, 0.15, 0.18])
    assert told["scores"]["c"] == []
    assert told["bar"] == pytest.approx(0.4)


def test_without_any_detection_all_is_missed(truth: Annotations, tmp_path: Path) -> None:
    none = fates(truth, detections(tmp_path, []), limit=2)
    assert none.claims.tolist() == [-1, -1, -1]
    assert none.scores.tolist() == [*none.bars.tolist(), 0.0] == [0.0, 0.0, 0.0]


def test_look_alikes_differ_in_one_property() -> None:
    assert look_alikes(NAMES).tolist() == [[False, True, False], [True, False, False], [False, False, False]]


def test_the_example_is_the_rare_class_that_loses_most_to_one_look_alike() -> None:
    def of(claims: list[int]) -> Fates:
        labels = np.array([1, 1, 1, 2, 2], np.int64)
        return Fates(labels, np.array(claims, np.int64), np.zeros(5), np.zeros(0))

    found = confusion(of([0, 0, 1, 0, 0]), of([0, 1, 1, -1, -1]), look_alikes(NAMES), GROUPS)
    assert found == {
        "label": 1,
        "other": 0,
        "objects": 3,
        "counts": [{"right": 1, "taken": 2}, {"right": 2, "taken": 1}],
    }
    assert confusion(of([1, 1, 1, 2, 2]), of([0] * 5), look_alikes(NAMES), GROUPS) is None
