"""Scores against recorded values, against lvis-api and pycocotools on random data, and by hand."""

import copy
import gzip
import json
import tracemalloc

import numpy as np
import pytest
from lvis import LVIS, LVISEval, LVISResults
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from tiny import score_of as score

from tailseg.data.annotations.annotations import load_annotations
from tailseg.errors import UserError
from tailseg.evaluation import metrics as metrics_module
from tailseg.evaluation.metrics import ScoreOptions, format_table


@pytest.fixture(scope="module")
def lvis_val(shared):
    folder = shared / "data" / "lvis-val-100"
    expected = json.loads((folder / "expected.json").read_text())
    return folder / "lvis_val_100.json", folder / "dets_bbox_segm.json.gz", expected


def test_recorded_scores(lvis_val):
    annotations, detections, expected = lvis_val
    scores = score(annotations, detections)
    for kind in ("bbox", "segm"):
        assert scores.metrics[kind] == pytest.approx(
            {name.replace("@", ""): value for name, value in expected[kind].items()}, abs=1e-9
        )
    shark = next(row for row in scores.per_category if row["frequency"] == "r" and row["instances"])
    assert shark["name"] == "shark"
    assert shark["bbox_AP"] == pytest.approx(expected["bbox"]["APr"], abs=1e-9)  # it is alone in its group
    measured = [row["segm_AP"] for row in scores.per_category if row["segm_AP"] is not None]
    assert len(measured) == 190
    assert np.mean(measured) == pytest.approx(expected["segm"]["AP"], abs=1e-9)


def test_recorded_scores_by_mask_area(lvis_val):
    annotations, detections, expected = lvis_val
    expected = {name.replace("@", ""): value for name, value in expected["segm_bbox_removed"].items()}
    rows = json.loads(gzip.decompress(detections.read_bytes()))
    assert score(annotations, rows, mask_areas=True).metrics["segm"] == pytest.approx(expected, abs=1e-9)
    for row in rows:
        del row["bbox"]
    without = score(annotations, rows, iou_types=["segm"]).metrics
    assert without == {"segm": pytest.approx(expected, abs=1e-9)}


def rectangle(box, size=(64, 64)):
    x, y, w, h = box
    mask = np.zeros(size, dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    code = coco_mask.encode(mask)
    return {"size": list(size), "counts": code["counts"].decode()}


def random_box(rng):
    x, y = rng.integers(0, 40, 2)
    return [int(x), int(y), int(rng.integers(0, 24)), int(rng.integers(1, 24))]  # width 0 happens


def random_data(seed, federated=True):
    """Four classes on five images; detections are shaken copies and noise, with many tied scores."""
    rng = np.random.default_rng(seed)
    categories = [{"id": i, "name": f"c{i}", "frequency": "rccf"[i - 1]} for i in (1, 2, 3, 4)]
    images = [{"id": int(i), "height": 64, "width": 64} for i in rng.permutation(np.arange(1, 6))]
    annotations, rows = [], []
    for image in images:
        present = set()
        for _ in range(rng.integers(0, 6)):
            box, category = random_box(rng), int(rng.choice([1, 2, 4]))
            present.add(category)
            place = {"image_id": image["id"], "category_id": category}
            shape = {"bbox": box, "segmentation": rectangle(box)}
            annotations.append({"id": len(annotations) + 1, **place, **shape, "area": box[2] * box[3]})
            for _ in range(rng.integers(0, 4)):
                near = [max(0, v + int(d)) for v, d in zip(box, rng.integers(-2, 3, 4), strict=True)]
                rows.append({**place, "bbox": near, "segmentation": rectangle(near)})
        for _ in range(rng.integers(0, 6)):
            box, category = random_box(rng), int(rng.integers(1, 5))
            found = {"image_id": image["id"], "category_id": category, "bbox": box}
            rows.append({**found, "segmentation": rectangle(box)})
        if federated:
            absent = sorted({1, 2, 3, 4} - present)
            image["neg_category_ids"] = absent[: rng.integers(0, 3)]
            image["not_exhaustive_category_ids"] = [int(c) for c in rng.choice([1, 2, 4], rng.integers(0, 2))]
    for row in rows:
        row["score"] = float(rng.integers(0, 8) / 8)
    return {"images": images, "annotations": annotations, "categories": categories}, rows


def official(data, rows, iou_type, max_dets, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis-api is older than NumPy 1.24
    (tmp_path / "data.json").write_text(json.dumps(data))
    truth = LVIS(str(tmp_path / "data.json"))
    evaluation = LVISEval(truth, LVISResults(truth, copy.deepcopy(rows), max_dets=max_dets), iou_type)
    evaluation.run()
    return [None if value == -1 else pytest.approx(value, abs=1e-9) for value in evaluation.results.values()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_equals_lvis_api_with_categories_that_are_not_listed(seed, tmp_path, monkeypatch, caplog):
    data, rows = random_data(seed)
    rng = np.random.default_rng(seed)
    unlisted = rng.random(len(rows)) < 0.3
    for i in np.flatnonzero(unlisted):
        rows[i] |= {"category_id": int(rng.choice([0, 5, 77])), "score": rows[i]["score"] + 0.4}
    scores = score(data, rows, options=ScoreOptions(max_dets=2))
    listed = [row for row, odd in zip(rows, unlisted, strict=True) if not odd]
    without = score(data, listed, options=ScoreOptions(max_dets=2))
    assert scores.metrics != without.metrics  # they take places
    for kind in ("bbox", "segm"):
        assert list(scores.metrics[kind].values()) == official(data, rows, kind, 2, tmp_path, monkeypatch)
    assert f"{unlisted.sum()} of {len(rows)} rows have an unknown category" in caplog.text


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_equals_lvis_api_on_random_data(seed, tmp_path, monkeypatch):
    data, rows = random_data(seed)
    max_dets = (300, 5)[seed % 2]
    scores = score(data, rows, options=ScoreOptions(max_dets=max_dets))
    for kind in ("bbox", "segm"):
        ours = scores.metrics[kind]
        expected = official(data, rows, kind, max_dets, tmp_path, monkeypatch)
        assert list(ours.values()) == expected
    for row in rows:
        del row["bbox"]
    ours = score(data, rows, iou_types=["segm"], options=ScoreOptions(max_dets=max_dets)).metrics["segm"]
    assert list(ours.values()) == official(data, rows, "segm", max_dets, tmp_path, monkeypatch)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_equals_coco_where_every_image_was_searched_for_every_class(seed):
    data, rows = random_data(seed, federated=False)
    data["annotations"] = [row for row in data["annotations"] if row["area"]]
    rows = [row for row in rows if row["bbox"][2] * row["bbox"][3]]  # LVIS drops what has no area
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 0
    truth = COCO()
    truth.dataset = copy.deepcopy(data)
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(rows)), "bbox")
    evaluation.params.maxDets = [300]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    ours = score(data, rows, iou_types=["bbox"])
    assert ours.metrics["bbox"]["AP"] == pytest.approx(precision[precision > -1].mean(), abs=1e-9)
    for index, row in enumerate(ours.per_category):
        theirs = precision[:, :, index]
        assert row["bbox_AP"] == (None if (theirs == -1).all() else pytest.approx(theirs.mean(), abs=1e-9))


@pytest.mark.parametrize("federated", [True, False])
def test_classes_taken_in_turn_are_classes_taken_at_once(federated, monkeypatch):
    data, rows = random_data(3, federated=federated)
    options = ScoreOptions(analyse=True)
    at_once = score(data, rows, options=options)
    monkeypatch.setattr("tailseg.evaluation.metrics.CLASSES_AT_ONCE", 2)
    assert score(data, rows, options=options) == at_once  # to the last digit
    assert at_once.metrics["bbox"]["AP"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_classes_that_do_not_occur_change_no_digit(seed):
    data, rows = random_data(seed)
    options = ScoreOptions(analyse=True, boundary=True)
    few = score(data, rows, options=options)
    more = [{"id": 100 + i, "name": f"more {i}", "frequency": "r"} for i in range(3000)]
    tracemalloc.start()
    many = score(data | {"categories": [*more, *data["categories"]]}, rows, options=options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20  # curves of all would be 97 MB
    assert (many.metrics, many.analysis, many.thresholds) == (few.metrics, few.analysis, few.thresholds)
    assert many.per_category[:4] == few.per_category
    assert {row["segm_AP"] for row in many.per_category[4:]} == {None}


def one_class(**image):
    boxes = [[0, 0, 20, 20], [40, 40, 20, 20]]
    return {
        "images": [{"id": 1, "height": 64, "width": 64, **image}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {
                "id": i,
                "image_id": 1,
                "category_id": 3,
                "bbox": box,
                "area": 400,
                "segmentation": rectangle(box),
            }
            for i, box in enumerate(boxes)
        ],
    }


def found(box, score, category=3):
    return {
        "image_id": 1,
        "category_id": category,
        "bbox": box,
        "score": score,
        "segmentation": rectangle(box),
    }


def test_by_hand():
    # The first is right, the second wrong, the third right at IoUs up to 16 / 20, 7 of the 10 thresholds.
    rows = [found([0, 0, 20, 20], 0.9), found([20, 20, 20, 20], 0.8), found([40, 40, 16, 20], 0.7)]
    scores = score(one_class(), rows)
    half = 51 / 101  # precision 1 at recalls 0 to 0.5
    lucky = half + 50 / 101 * 2 / 3  # and 2/3 beyond
    for kind in ("bbox", "segm"):
        assert scores.metrics[kind]["AP50"] == pytest.approx(lucky)
        assert scores.metrics[kind]["AP"] == pytest.approx(0.7 * lucky + 0.3 * half)
        assert scores.metrics[kind]["AR300"] == pytest.approx(0.7 * 1 + 0.3 * 0.5)
        assert scores.metrics[kind]["APs"] == scores.metrics[kind]["AP"]
        for name in ("APm", "APl", "APr", "APc", "APf", "ARm300", "ARl300"):
            assert scores.metrics[kind][name] is None
    assert scores.per_category == [
        {"id": 3, "name": "cat", "frequency": None, "train_images": None, "instances": 2}
        | {f"{kind}_AP": scores.metrics[kind]["AP"] for kind in ("bbox", "segm")},
        {"id": 5, "name": "dog", "frequency": None, "train_images": None, "instances": 0}
        | {"bbox_AP": None, "segm_AP": None},
    ]


def test_frequencies_can_come_from_elsewhere():
    metrics = score(one_class(), [found([0, 0, 20, 20], 0.9)], frequencies={3: "r", 5: "f"}).metrics
    assert metrics["bbox"]["APr"] == metrics["bbox"]["AP"] == pytest.approx(51 / 101)
    assert metrics["bbox"]["APf"] is None


def test_without_lists_of_searched_classes_every_false_positive_counts():
    data = one_class()
    data["images"].append({"id": 2, "height": 64, "width": 64})
    rows = [found([0, 0, 20, 20], 0.5), found([40, 40, 20, 20], 0.5)]
    wrong = found([0, 0, 20, 20], 0.9) | {"image_id": 2}
    assert score(data, rows).metrics["bbox"]["AP"] == pytest.approx(1)
    assert score(data, [wrong, *rows]).metrics["bbox"]["AP"] == pytest.approx(2 / 3)
    data["images"][1] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}  # nobody looked
    assert score(data, [wrong, *rows]).metrics["bbox"]["AP"] == pytest.approx(1)


def test_crowd_regions_are_ignored():
    data = one_class()
    data["annotations"][1]["iscrowd"] = 1
    scores = score(data, [found([0, 0, 20, 20], 0.5), found([45, 45, 9, 9], 0.9)])
    assert scores.metrics["bbox"]["AP"] == scores.metrics["segm"]["AP"] == pytest.approx(1)
    assert scores.per_category[0]["instances"] == 1


def test_no_detections_score_zero_and_nothing_to_find_scores_none():
    metrics = score(one_class(), []).metrics
    assert metrics["bbox"]["AP"] == metrics["segm"]["AR300"] == metrics["bbox"]["APs"] == 0
    assert metrics["bbox"]["APl"] is None
    empty = one_class() | {"annotations": []}
    for rows in ([], [found([0, 0, 20, 20], 0.5)]):
        assert set(score(empty, rows).metrics["segm"].values()) == {None}


def test_input_is_left_as_it_was():
    data, rows = random_data(0)
    before = copy.deepcopy((data, rows))
    score(data, rows)
    assert (data, rows) == before


def test_areas_left_out_of_the_annotations_are_measured():
    data = one_class()
    for annotation in data["annotations"]:
        del annotation["area"]
    metrics = score(data, [found([0, 0, 20, 20], 0.9)]).metrics
    assert metrics == score(one_class(), [found([0, 0, 20, 20], 0.9)]).metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("images"), "'images' is missing"),
        (lambda d: d["images"][0].pop("height"), "image 1: it has height missing and width 64"),
        (lambda d: d["images"].append(3), r"images\[1\] is 3; it must be an object"),
        (lambda d: d["images"][0].update(id="a"), "image 'a': its id is 'a'; number them"),
        (lambda d: d["categories"][1].update(id="b"), "category 'b': its id is 'b'"),
        (lambda d: d["annotations"][1].update(category_id=9), "annotation 1: there is no category"),
    ],
)
def test_faulty_annotations_are_named(change, message):
    data = one_class()
    change(data)
    with pytest.raises(UserError, match=message):
        score(data, [found([0, 0, 20, 20], 0.9)])


def test_faulty_requests_are_named(tmp_path):
    with pytest.raises(UserError, match="found keypoints"):
        score(one_class(), [], iou_types=["keypoints"])
    with pytest.raises(UserError, match=r"gone\.json"):
        score(one_class(), tmp_path / "gone.json")
    with pytest.raises(UserError, match=r"gone\.json"):
        score(tmp_path / "gone.json", [])
    with pytest.raises(UserError, match="row 0 has no 'bbox'; "):
        score(one_class(), [{"image_id": 1, "category_id": 3, "score": 0.5}])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="expected an object with images, annotations and categories, found a list"):
        score(tmp_path / "list.json", [])


def test_table_in_percent():
    console = Console(width=60, record=True)
    console.print(format_table({"bbox": {"AP": 0.2346, "APr": None}, "segm": {"AP": 0.0, "APr": 1.0}}))
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in console.export_text().splitlines()]
    assert ["AP", "23.5", "0.0"] in lines
    assert ["APr", "–", "100.0"] in lines


def test_more_than_300_detections_count_if_asked_for():
    rows = [found([20, 20, 20, 20], 0.9)] * 310 + [found([0, 0, 20, 20], 0.5)]
    assert score(one_class(), rows).metrics["bbox"]["AR300"] == 0
    assert score(one_class(), rows, options=ScoreOptions(max_dets=311)).metrics["bbox"]["AR311"] == 0.5
    assert score(one_class(), rows, options=ScoreOptions(max_dets=310)).metrics["bbox"]["AR310"] == 0


def test_fixed_ap_limits_classes_instead_of_images(monkeypatch):
    monkeypatch.setattr(metrics_module, "FIXED_AP_DETECTIONS", 311)
    data = one_class()
    data["images"].append({"id": 2, "height": 64, "width": 64})
    noise = [found([20, 20, 20, 20], 0.9) | {"image_id": 1 + i % 2} for i in range(310)]
    others = [found([20, 20, 20, 20], 0.9, category=5)] * 500
    rows = [*others, *noise, found([0, 0, 20, 20], 0.5), found([40, 40, 20, 20], 0.4)]
    scores = score(data, rows, options=ScoreOptions(fixed_ap=True)).metrics["bbox"]
    assert scores["AR"] == 0.5  # the 311th of its class counts, the 312th does not
    assert score(data, rows).metrics["bbox"]["AR300"] == 0


def test_fixed_ap_without_a_limit_reached_is_plain_ap():
    for seed in range(4):
        data, rows = random_data(seed)
        plain, fixed = (score(data, rows, options=ScoreOptions(fixed_ap=f)).metrics["segm"] for f in (False, True))
        assert [*fixed.values()] == [*plain.values()]


def ranked_twice(box, box_score, score):
    return found(box, score) | {"box_score": box_score}


THREE_FINDS = [
    ranked_twice([0, 0, 20, 20], 0.9, 0.1),  # right
    ranked_twice([20, 20, 20, 20], 0.5, 0.8),  # wrong
    ranked_twice([40, 40, 20, 20], 0.4, 0.5),  # right
]


@pytest.mark.parametrize(
    ("max_dets", "boxes", "masks"),
    [
        # Boxes: right, wrong, right. Masks: wrong, right, right, so that precision rises to 2/3 at the end.
        (300, 51 / 101 + 50 / 101 * 2 / 3, 2 / 3),
        (2, 51 / 101, 51 / 101 / 2),
        (1, 51 / 101, 0),
    ],
)
def test_boxes_rank_by_their_score_and_masks_by_theirs(max_dets, boxes, masks):
    options = ScoreOptions(max_dets=max_dets, boundary=True)
    metrics = score(one_class(), THREE_FINDS, options=options).metrics
    assert metrics["bbox"]["AP"] == pytest.approx(boxes)
    assert metrics["segm"]["AP"] == metrics["boundary"]["AP"] == pytest.approx(masks)
    found_of_two = {300: (2, 2), 2: (1, 1), 1: (1, 0)}[max_dets]
    recalls = [metrics[kind][f"AR{max_dets}"] for kind in ("bbox", "segm")]
    assert recalls == [n / 2 for n in found_of_two]
    for kind, expected in (("bbox", boxes), ("segm", masks)):
        alone = score(one_class(), THREE_FINDS, iou_types=[kind], options=ScoreOptions(max_dets=max_dets)).metrics
        assert alone[kind]["AP"] == pytest.approx(expected)


def test_both_rankings_under_a_limit_of_each_class(monkeypatch):
    monkeypatch.setattr(metrics_module, "FIXED_AP_DETECTIONS", 2)
    metrics = score(one_class(), THREE_FINDS, options=ScoreOptions(fixed_ap=True)).metrics
    assert metrics["bbox"]["AP"] == pytest.approx(51 / 101)
    assert metrics["segm"]["AP"] == pytest.approx(51 / 101 / 2)


@pytest.mark.parametrize("seed", range(6))
def test_two_scores_in_a_row_are_two_files(seed):
    """Boxes score as if the box score were the only one, masks as if there were none."""
    data, rows = random_data(seed)
    rng = np.random.default_rng(seed)
    both = [row | {"box_score": float(rng.integers(0, 8) / 8)} for row in rows]
    of_boxes = [row | {"score": other["box_score"]} for row, other in zip(rows, both, strict=True)]
    for options in (ScoreOptions(max_dets=(300, 4)[seed % 2]), ScoreOptions(fixed_ap=True, analyse=True)):
        scores = score(data, both, options=options)
        boxes, masks = (score(data, r, iou_types=[k], options=options) for r, k in ((of_boxes, "bbox"), (rows, "segm")))
        assert scores.metrics == boxes.metrics | masks.metrics
        if options.analyse:
            assert scores.analysis["bbox"] == boxes.analysis["bbox"]
            ours, alone = scores.analysis["segm"], masks.analysis["segm"]
            # Thresholds are of the scores by which `predict` shows objects, those of boxes: see test_analysis.py.
            assert ours.pop("mask_threshold") == alone["threshold"]
            assert alone.pop("mask_threshold") is None
            for found in (ours, alone):
                del found["threshold"]
                for of_class in found["classes"]:
                    for key in ("threshold", "precision", "recall", "right"):
                        del of_class[key]
            assert ours == alone


def test_a_row_without_the_box_score_of_the_others_is_named():
    rows = copy.deepcopy(THREE_FINDS)
    del rows[1]["box_score"]
    with pytest.raises(UserError, match=r"^detections: row 1 has no 'box_score'; every row needs one here$"):
        score(one_class(), rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_objects_thinner_than_a_pixel_count_as_in_lvis_api(tmp_path, monkeypatch):
    """They are not trained on, but the official evaluation wants them found."""
    data, rows = random_data(3)
    thin = [a for a in data["annotations"] if a["area"]][::2]
    for annotation in thin:
        annotation["bbox"][2] = 0.75
    for kind in ("bbox", "segm"):
        ours = score(data, rows, iou_types=[kind]).metrics[kind]
        assert list(ours.values()) == official(data, rows, kind, 300, tmp_path, monkeypatch)


def test_ids_of_any_size_and_sign_score_as_small_ones():
    data, rows = random_data(5)
    plain = score(data, rows)
    large = {1: -7, 2: 2**53, 3: 2**53 + 1, 4: 2**62, 5: 2**63 - 1}  # ties go by the order of ids
    renamed = {c["id"]: c["id"] - 2**60 for c in data["categories"]}
    images = [
        {**image, "id": large[image["id"]]}
        | {key: [renamed[i] for i in image[key]] for key in ("neg_category_ids", "not_exhaustive_category_ids")}
        for image in data["images"]
    ]
    changed = {
        "images": images,
        "annotations": [
            {**a, "image_id": large[a["image_id"]], "category_id": renamed[a["category_id"]]}
            for a in data["annotations"]
        ],
        "categories": [{**c, "id": renamed[c["id"]]} for c in data["categories"]],
    }
    found = [{**row, "image_id": large[row["image_id"]], "category_id": renamed[row["category_id"]]} for row in rows]
    assert score(changed, found).metrics == plain.metrics


def test_byte_order_mark_before_the_truth(tmp_path):
    (tmp_path / "val.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(one_class()).encode())
    rows = [found([0, 0, 20, 20], 0.9)]
    assert score(tmp_path / "val.json", rows).metrics == score(one_class(), rows).metrics


ODD = {
    "empty": ("no_mask", {"segmentation": []}),
    "missing": ("no_mask", {"segmentation": None}),
    "three numbers": ("bad_mask", {"segmentation": [[1, 2, 3]]}),
    "broken code": ("bad_mask", {"segmentation": {"size": [64, 64], "counts": "oo"}}),
    "another size": ("bad_mask", {"segmentation": {"size": [1, 2], "counts": "2"}}),
    "another image": ("no_image", {"image_id": 9}),
    "no image": ("no_image", {"image_id": "x"}),
}


@pytest.mark.parametrize("name", ODD)
def test_what_training_leaves_out_scoring_leaves_out_with_a_warning(tmp_path, caplog, name):
    """An object without a mask used to count as one that nobody can find; boxes can still be scored."""
    kind, changes = ODD[name]
    data, rest = one_class(), one_class()
    data["annotations"][1] |= changes
    del rest["annotations"][1]
    rows = [found([0, 0, 20, 20], 0.9)]
    (tmp_path / "val.json").write_text(json.dumps(data))
    assert [oddity.kind for oddity in load_annotations(tmp_path / "val.json", tmp_path).report.oddities] == [kind]
    assert metrics_module.score(tmp_path / "val.json", rows).metrics == score(rest, rows).metrics
    assert "1 annotations" in caplog.text
    assert "left out (annotation 1" in caplog.text
    if "mask" in kind:
        boxes = score(data, rows, iou_types=["bbox"]).metrics
        assert boxes == score(one_class(), rows, iou_types=["bbox"]).metrics


def test_boxes_and_areas_that_are_no_numbers_are_those_of_the_masks():
    rows = [found([0, 0, 20, 20], 0.9), found([40, 40, 20, 18], 0.8)]
    data = one_class()
    data["annotations"][0] |= {"bbox": [1, 2, 3], "area": "x"}
    data["images"][0]["neg_category_ids"] = 5
    assert score(data, rows).metrics == score(one_class(neg_category_ids=[]), rows).metrics


def as_other_tools_write_it(data, seed):
    """The same objects: ids, sizes and masks in other forms, gaps that the masks fill, and things to leave out."""
    rng = np.random.default_rng(seed)
    odd = copy.deepcopy(data)
    for row in odd["images"]:
        row |= {"id": (str, float)[rng.integers(2)](row["id"]), "height": "64", "width": 64.0}
        row["neg_category_ids"] = list(map(str, row["neg_category_ids"]))
    for row in odd["annotations"]:
        for key in ("image_id", "category_id"):
            row[key] = (str, float, int)[rng.integers(3)](row[key])
        code = row["segmentation"]
        runs = [
            float(run)
            for run in np.diff(np.flatnonzero(np.diff(coco_mask.decode(code).ravel("F"), prepend=2, append=2)))
        ]
        row["segmentation"] = [
            [code],
            code | {"counts": str(code["counts"].encode())},
            code | {"size": [64.0, 64.0]},
            {"size": [64, 64], "counts": runs if coco_mask.decode(code)[0, 0] == 0 else [0.0, *runs]},
        ][rng.integers(4)]
        row |= {"area": float("nan")} if rng.integers(2) else {"bbox": [float("nan")] * 4}
        row |= {"id": "x", "iscrowd": False, "score": 0.5}
    odd["annotations"] += [
        None,
        {"image_id": 99, "category_id": 1},
        {**odd["annotations"][0], "segmentation": [[1, 2]]},
    ]
    odd["categories"] = [{**row, "id": str(row["id"])} for row in odd["categories"]] + odd["categories"][:1]
    return odd


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_as_other_tools_write_it_scores_as_its_plain_twin_by_lvis_api(seed, tmp_path, monkeypatch):
    data, rows = random_data(seed)
    data["annotations"] = [row for row in data["annotations"] if row["area"]]
    scores = score(as_other_tools_write_it(data, seed), rows)
    for kind in ("bbox", "segm"):
        assert list(scores.metrics[kind].values()) == official(data, rows, kind, 300, tmp_path, monkeypatch)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ignored_objects_are_what_lvis_api_makes_of_them(seed, iou_type, tmp_path, monkeypatch):
    data, rows = random_data(seed)
    rng = np.random.default_rng(seed)
    for annotation in data["annotations"]:
        annotation["ignore"] = int(rng.integers(0, 2))
    expected = official(data, rows, iou_type, 300, tmp_path, monkeypatch)
    assert list(score(data, rows).metrics[iou_type].values()) == expected
    unmarked = copy.deepcopy(data)
    for annotation in unmarked["annotations"]:
        del annotation["ignore"]
    assert list(score(unmarked, rows).metrics[iou_type].values()) != expected


@pytest.mark.parametrize(
    "number",
    [
        lambda i: 1_700_000_000_000_000_000 + i,
        lambda i: 2**63 - 3 + i,  # some need all of 64 bits
        lambda i: 2**64 - 7 + i,
        lambda i: -(2**63) + i,
        lambda i: 3 - i,
        float,
    ],
)
def test_ids_are_names(number):
    """Nanosecond time stamps, hashes of 64 bits, floats: the numbers say nothing but which image is meant."""
    data, rows = random_data(3)
    for i, row in enumerate(rows):
        row["score"] += 1e-6 * i  # no ties, which go by the order of ids
    expected = score(data, rows).metrics
    assert expected["segm"]["AP"] > 0
    for image in data["images"]:
        image["id"] = number(image["id"])
    for row in (*data["annotations"], *rows):
        row["image_id"] = number(row["image_id"])
    assert score(data, rows).metrics == expected
