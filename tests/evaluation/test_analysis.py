"""The analysis on a case that can be counted by hand."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from tiny import score_of as score

from tailseg.evaluation.analysis import frequency_bins
from tailseg.evaluation.metrics import ScoreOptions


def row(box, category, **changes):
    x, y, w, h = box
    mask = np.zeros((100, 100), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    code = {"size": [100, 100], "counts": coco_mask.encode(mask)["counts"].decode()}
    return {"image_id": 1, "category_id": category, "bbox": box, "area": w * h, "segmentation": code} | changes


TRUTH = {
    "images": [{"id": 1, "height": 100, "width": 100}],
    "categories": [{"id": i, "name": name, "image_count": n} for i, name, n in ((1, "cat", 5), (4, "dog", 500))],
    "annotations": [row([0, 0, 20, 20], 1, id=1), row([40, 40, 20, 20], 1, id=2), row([70, 70, 20, 20], 4, id=3)],
}
FOUND = [
    row([0, 0, 20, 20], 1, score=0.95),  # right
    row([0, 0, 20, 20], 1, score=0.85),  # a duplicate
    row([40, 40, 20, 20], 4, score=0.75),  # a cat taken for a dog
    row([74, 74, 20, 20], 4, score=0.65),  # IoU 0.47: badly placed
    row([70, 0, 20, 20], 4, score=0.15),  # nothing there
]


def analysis(rows=FOUND):
    return score(TRUTH, rows, options=ScoreOptions(analyse=True)).analysis


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_by_hand(kind):
    found = analysis()[kind]
    assert found["errors"]["counts"] == {"Cls": 1, "Loc": 1, "Both": 0, "Dupe": 1, "Bkg": 1, "Miss": 0}
    assert (found["images"], found["objects"]) == (1, 3)
    # At 0.95 one of one is right and one of three found: no lower score has a better F1.
    assert found["threshold"] == pytest.approx({"score": 0.95, "precision": 1, "recall": 1 / 3, "F1": 0.5})
    cat, dog = found["classes"]
    assert {key: cat[key] for key in ("id", "name", "train_images", "objects", "right", "threshold")} == {
        "id": 1, "name": "cat", "train_images": 5, "objects": 2, "right": 1, "threshold": 0.95,
    }  # fmt: skip
    assert (cat["precision"], cat["recall"], cat["AP"]) == (1, 0.5, pytest.approx(51 / 101))
    assert cat["curve"] == [1.0] * 11 + [0.0] * 10
    assert (dog["threshold"], dog["precision"], dog["recall"], dog["right"], dog["AP"]) == (None, None, None, 0, 0)
    assert found["curves"] == {"all": [pytest.approx(0.5)] * 51 + [0] * 50}
    assert found["confusions"] == []  # at the threshold
    bins = [(b["bin_lower"], b["count"], b["avg_accuracy"]) for b in found["calibration"]["bins"] if b["count"]]
    assert bins == [pytest.approx(b) for b in ((0.1, 1, 0), (0.6, 1, 0), (0.7, 1, 0), (0.8, 1, 0), (0.9, 1, 1))]
    # Gaps of 0.15, 0.65, 0.75, 0.85 and 0.05, one detection each.
    assert found["calibration"]["ece"] == pytest.approx(0.49)
    assert found["calibration"]["mce"] == pytest.approx(0.85)
    assert found["frequency"] == [
        {"first": 4, "last": 10, "classes": 1, "AP": pytest.approx(51 / 101)},
        {"first": 317, "last": 1000, "classes": 1, "AP": 0},
    ]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_confusions_and_labels_by_hand(kind):
    """At the threshold; a crowd is neither missed nor taken for something else."""
    truth = [
        row([0, 0, 20, 20], 1, id=7),
        row([40, 40, 20, 20], 1, id=8, iscrowd=1),
        row([70, 70, 20, 20], 4, id=9),
        row([0, 70, 20, 20], 4, id=10),
    ]
    rows = [row([0, 0, 20, 20], 4, score=0.9), row([70, 70, 20, 20], 4, score=0.8), row([0, 30, 9, 9], 4, score=0.1)]
    found = score(TRUTH | {"annotations": truth}, rows, options=ScoreOptions(analyse=True)).analysis[kind]
    assert found["threshold"]["score"] == 0.8
    assert found["confusions"] == [{"object": "cat", "found": "dog", "count": 1}]
    # A row a class; cats and dogs found in its place, other classes, nothing.
    assert found["confusion_matrix"] == {"classes": ["cat", "dog"], "counts": [[0, 1, 0, 0], [0, 1, 0, 1]]}
    label = {"image_id": 1, "file_name": "", "annotation_id": 7, "annotated": "cat", "found": "dog", "score": 0.9}
    assert found["labels"] == {"count": 1, "first": [label | {"bbox": [0, 0, 20, 20]}]}


def test_masks_without_boxes():
    """The place of a doubtful label is then the box around the mask."""
    rows = [row([0, 0, 20, 20], 4, score=0.9), row([40, 40, 20, 20], 1, score=0.95)]
    for one in rows:
        del one["bbox"]
    found = score(TRUTH, rows, iou_types=["segm"], options=ScoreOptions(analyse=True)).analysis["segm"]
    assert found["labels"]["first"] == []  # its score is below the threshold
    rows[0]["score"] = 0.97
    found = score(TRUTH, rows, iou_types=["segm"], options=ScoreOptions(analyse=True)).analysis["segm"]
    assert found["labels"]["first"][0]["bbox"] == [0, 0, 20, 20]
    assert "bbox" not in found["worst"][0]["found"][0]


@pytest.mark.parametrize("at_once", [1, 3, 6])
def test_many_classes_are_counted_in_parts(monkeypatch, at_once):
    """However few classes are taken at once, confusions and ties among them are those of all images together."""
    rng = np.random.default_rng(0)
    places = [[20 * x, 20 * y, 16, 16] for x in range(4) for y in range(4)]
    data = {
        "images": [{"id": i, "height": 100, "width": 100} for i in range(1, 9)],
        "categories": [{"id": 10 * i, "name": f"class {i}"} for i in range(1, 9)],
    }
    truth, found, expected = [], [], {}
    for image in range(1, 9):
        for place in places[: rng.integers(1, 16)]:
            real, taken = (10 * rng.integers(1, 4 if image < 5 else 9, 2)).tolist()
            sure = bool(rng.random() < 0.8)
            taken = (real if rng.random() < 0.5 else taken) if sure else real % 80 + 10  # the unsure are wrong
            truth.append(row(place, real, id=len(truth) + 1, image_id=image))
            found.append(row(place, taken, score=0.9 if sure else 0.3, image_id=image))
            if sure and taken != real:
                expected[real, taken] = expected.get((real, taken), 0) + 1
    named = [
        {"object": f"class {real // 10}", "found": f"class {taken // 10}", "count": count}
        for (real, taken), count in sorted(expected.items(), key=lambda item: (-item[1], item[0]))
    ]
    monkeypatch.setattr("tailseg.evaluation.confusions.CLASSES_AT_ONCE", at_once)
    scores = score(data | {"annotations": truth}, found, options=ScoreOptions(analyse=True))
    for kind in ("bbox", "segm"):
        assert scores.analysis[kind]["threshold"]["score"] == 0.9
        assert scores.analysis[kind]["confusions"] == named[:50]
        matrix = scores.analysis[kind]["confusion_matrix"]
        assert sorted(matrix["classes"]) == [f"class {i}" for i in range(1, 9)]
        for name, counts in zip(matrix["classes"], matrix["counts"], strict=True):
            real = 10 * int(name[-1])
            assert sum(counts) == sum(o["category_id"] == real for o in truth)
            assert counts[-2] == 0  # there are no other classes
            for other, count in zip(matrix["classes"], counts, strict=False):
                assert other == name or count == expected.get((real, 10 * int(other[-1])), 0)


def test_nothing_found():
    found = analysis([])["segm"]
    assert found["confusions"] == []
    assert found["errors"]["counts"]["Miss"] == 3
    assert found["calibration"]["ece"] == 0
    assert found["threshold"] is None
    assert found["confusion_matrix"] == {"classes": [], "counts": []}
    assert [(row["name"], row["objects"], row["threshold"]) for row in found["classes"]] == [
        ("cat", 2, None),
        ("dog", 1, None),
    ]
    (worst,) = found["worst"]
    assert (worst["missed"], worst["missed_classes"], worst["found"]) == (3, {"cat": 2, "dog": 1}, [])
    assert found["labels"] == {"count": 0, "first": []}


def test_nothing_to_find():
    found = score(TRUTH | {"annotations": []}, FOUND, options=ScoreOptions(analyse=True)).analysis["segm"]
    assert (found["objects"], found["threshold"], found["curves"], found["frequency"]) == (0, None, {}, [])
    assert [row["curve"] for row in found["classes"]] == [None, None]
    assert found["slices"]["size"] == []


def test_bins_of_frequency():
    images = [0, 3, 4, 100, 101, 100_001, None, 7]
    rows = [{"train_images": n, "segm_AP": None if n == 7 else i / 10} for i, n in enumerate(images)]
    assert [(b["first"], b["last"], b["classes"], b["AP"]) for b in frequency_bins(rows, "segm")] == [
        (0, 3, 2, pytest.approx(0.05)),
        (4, 10, 1, pytest.approx(0.2)),
        (32, 100, 1, pytest.approx(0.3)),
        (101, 316, 1, pytest.approx(0.4)),
        (100_001, None, 1, pytest.approx(0.5)),
    ]
    assert frequency_bins([], "segm") == []


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_are_of_the_scores_that_predict_shows_by(seed):
    """With mask scores beside those of boxes: what `raw.scores >= threshold` leaves has the stated precision."""
    rng = np.random.default_rng(seed)
    places = [[20 * x, 20 * y, 18, 18] for x in range(5) for y in range(5)]
    truth = [row(place, (1, 4)[i % 2], id=i + 1) for i, place in enumerate(places[:20])]
    rows, right = [], []
    for i, place in enumerate(places):
        for category in (1, 4) if rng.random() < 0.5 else ((1, 4)[i % 2],):
            right.append(i < 20 and category == (1, 4)[i % 2])
            box_score = float(rng.integers(40, 60)) / 100 + 0.3 * right[-1] * float(rng.random() < 0.7)
            rows.append(row(place, category, box_score=box_score, score=box_score * float(rng.random())))
    scores = score(TRUTH | {"annotations": truth}, rows, options=ScoreOptions(analyse=True))
    found, right = scores.analysis["segm"], np.array(right)
    shown = np.array([one["box_score"] for one in rows]) >= scores.thresholds["default"]
    stated = {"precision": right[shown].mean(), "recall": right[shown].sum() / 20}
    assert {key: found["threshold"][key] for key in stated} == pytest.approx(stated)
    ranked = np.array([one["score"] for one in rows]) >= found["mask_threshold"]["score"]
    stated = {"precision": right[ranked].mean(), "recall": right[ranked].sum() / 20}
    assert {key: found["mask_threshold"][key] for key in stated} == pytest.approx(stated)
    for about, category in zip(found["classes"], (1, 4), strict=True):
        own = np.array([one["category_id"] == category for one in rows])
        own &= np.array([one["box_score"] for one in rows]) >= about["threshold"]
        assert (about["right"], about["precision"]) == (right[own].sum(), right[own].mean())
    assert found["threshold"] == scores.analysis["bbox"]["threshold"]  # boxes are right where the masks are here
    assert scores.analysis["bbox"]["mask_threshold"] is None
    assert analysis()["segm"]["mask_threshold"] is None
