"""Comparisons of runs: values of the scorer, differences on the same sets, and what cannot be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federated_sets import Content, Rows, federated_data
from tiny import score_of

from tailseg.data.annotations.annotations import load_annotations
from tailseg.errors import UserError
from tailseg.evaluation import paired
from tailseg.evaluation.bootstrap import ObjectCounts, class_aps, resampled
from tailseg.evaluation.ground_truth import ground_truth_of
from tailseg.evaluation.paired import compare
from tailseg.evaluation.ranked_matches import ranked_matches
from tailseg.evaluation.reading import Cut, read_results


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def worse(rows: Rows) -> Rows:
    """Every third detection is missing, the others are shifted."""
    kept = [row for i, row in enumerate(rows) if i % 3]
    return [{**row, "bbox": [row["bbox"][0] + 2, *row["bbox"][1:]]} for row in kept]


def compared(folder: Path, data: Content, *runs: Rows) -> dict[str, Any]:
    paths = [write(folder, f"run{i}.json", rows) for i, rows in enumerate(runs)]
    return compare(paths, write(folder, "data.json", data), "val", show=False)


def test_values_are_those_of_the_scorer(tmp_path: Path) -> None:
    data, rows = federated_data(5, images=20)
    runs = [rows, worse(rows), rows[::2]]
    content = compared(tmp_path, data, *runs)
    assert content["data"] == "data.json"
    assert (content["images"], content["sets"], content["confidence"]) == (20, 1000, 0.95)
    assert list(content["kinds"]) == ["bbox", "segm"]
    for kind, tables in content["kinds"].items():
        scores = [score_of(data, run) for run in runs]
        for row in tables["metrics"]:
            values = [score.metrics[kind][row["metric"]] for score in scores]
            assert row["runs"] == values  # to the last digit
            for value, difference in zip(values[1:], row["differences"], strict=True):
                assert difference["value"] == (None if value is None else value - values[0])
        categories = [c for c in zip(*(score.per_category for score in scores), strict=True) if c[0]["instances"]]
        assert [row["name"] for row in tables["classes"]] == [of_runs[0]["name"] for of_runs in categories]
        for row, of_runs in zip(tables["classes"], categories, strict=True):
            assert row["runs"] == [category[f"{kind}_AP"] for category in of_runs]
            assert row["instances"] == of_runs[0]["instances"]
    json.dumps(content, allow_nan=False)


def test_values_on_lvis(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "lvis-val-100"
    annotations, found = folder / "lvis_val_100.json", folder / "dets_bbox_segm.json.gz"
    none = write(tmp_path, "none.json", [])
    content = compare([found, none], annotations, "val", show=False)
    scores = score_of(annotations, found)
    for kind, tables in content["kinds"].items():
        assert {row["metric"]: row["runs"] for row in tables["metrics"]} == {
            metric: [scores.metrics[kind][metric], 0.0] for metric in paired.METRICS
        }
        measured = [row for row in scores.per_category if row[f"{kind}_AP"] is not None]
        assert [row["runs"][0] for row in tables["classes"]] == [row[f"{kind}_AP"] for row in measured]


def test_intervals_are_percentiles_of_differences_on_the_same_sets(tmp_path: Path) -> None:
    data, rows = federated_data(8, images=30)
    runs = [rows, worse(rows)]
    content = compared(tmp_path, data, *runs)
    truth = ground_truth_of(load_annotations(tmp_path / "data.json", tmp_path), with_masks=True)
    weights, objects = resampled(30, 1000, 0), ObjectCounts.of(truth)
    aps = []
    for run in runs:
        columns = read_results(run, "rows", truth.known, ("bbox",), Cut())
        dataset = truth.dataset(columns.images, columns.categories)
        aps.append(class_aps(ranked_matches(truth, dataset, columns, "bbox", 300), objects, weights)[0])
    difference = np.nanmean(aps[1], axis=0) - np.nanmean(aps[0], axis=0)
    by_metric = {row["metric"]: row for row in content["kinds"]["bbox"]["metrics"]}
    (found,) = by_metric["AP"]["differences"]
    assert found["interval"] == pytest.approx(np.percentile(difference, [2.5, 97.5]).tolist(), abs=1e-12)
    assert found["beyond_chance"] is True
    assert found["interval"][1] < 0
    (of_common,) = by_metric["APc"]["differences"]  # c2 is the only one that occurs
    common = np.nanpercentile(aps[1][1] - aps[0][1], [2.5, 97.5])
    assert of_common["interval"] == pytest.approx(common.tolist(), abs=1e-12)
    assert (by_metric["APc"]["classes"], by_metric["AP"]["classes"]) == (1, 3)
    class_row = content["kinds"]["bbox"]["classes"][1]
    assert class_row["differences"][0]["interval"] == pytest.approx(common.tolist(), abs=1e-12)
    of_class = [o for o in data["annotations"] if o["category_id"] == 6 and not o["iscrowd"]]
    assert (class_row["images"], class_row["instances"]) == (len({o["image_id"] for o in of_class}), len(of_class))


def test_equal_runs_differ_by_nothing(tmp_path: Path) -> None:
    data, rows = federated_data(8, images=30)
    content = compared(tmp_path, data, rows, [dict(row) for row in rows])
    for tables in content["kinds"].values():
        for row in (*tables["metrics"], *tables["classes"]):
            (difference,) = row["differences"]
            assert difference == {"value": 0, "interval": [0, 0], "beyond_chance": False}


def test_few_images_cannot_tell(tmp_path: Path) -> None:
    """A class whose only image favours one run does so in every set that holds the image."""
    data, rows = federated_data(8, images=30)
    first = min(o["image_id"] for o in data["annotations"] if o["category_id"] == 3 and not o["iscrowd"])
    data["annotations"] = [o for o in data["annotations"] if o["category_id"] != 3 or o["image_id"] == first]
    content = compared(tmp_path, data, rows, [row for row in rows if row["category_id"] != 3])
    by_metric = {row["metric"]: row for row in content["kinds"]["segm"]["metrics"]}
    (difference,) = by_metric["APr"]["differences"]
    assert difference["value"] < 0
    assert (difference["interval"], difference["beyond_chance"]) == (None, None)
    assert by_metric["APr"]["images"] == 1
    assert by_metric["AP"]["differences"][0]["interval"] is not None


def test_many_images_have_fewer_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, rows = federated_data(1, images=7)
    monkeypatch.setattr(paired, "MANY_IMAGES", 6)
    assert compared(tmp_path, data, rows, worse(rows))["sets"] == 200


def test_runs_without_masks_are_compared_by_boxes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, rows = federated_data(1)
    boxes = [{key: value for key, value in row.items() if key != "segmentation"} for row in worse(rows)]
    content = compared(tmp_path, data, rows, boxes)
    assert list(content["kinds"]) == ["bbox"]
    assert f"{tmp_path / 'run1.json'} has no masks, so masks are not compared." in caplog.text
    masks = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    assert list(compared(tmp_path, data, rows, masks)["kinds"]) == ["segm"]
    with pytest.raises(
        UserError, match=r"the runs have neither boxes nor masks in common: .*run0.json has bbox, .*segm"
    ):
        compared(tmp_path, data, boxes, masks)


def test_groups_are_those_of_the_first_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, rows = federated_data(5, images=20)
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, groups, run in zip(folders, ("frcf", "rrcf"), (rows, worse(rows)), strict=True):
        folder.mkdir()
        write(folder, "detections.json", run)
        lines = [f"{3 * i},c{i},{group}" for i, group in enumerate(groups, start=1)]
        (folder / "classes.csv").write_text("\n".join(["id,name,frequency", *lines]))
    content = compare(folders, write(tmp_path, "data.json", data), "val", show=False)
    assert [row["frequency"] for row in content["kinds"]["segm"]["classes"]] == ["f", "r", "f"]
    assert "1 classes are in another frequency group in another run's evaluation" in caplog.text
    (of_rare,) = [row for row in content["kinds"]["segm"]["metrics"] if row["metric"] == "APr"]
    assert of_rare["runs"] == content["kinds"]["segm"]["classes"][1]["runs"]


def test_faults(tmp_path: Path) -> None:
    data, rows = federated_data(1)
    with pytest.raises(UserError, match=r"run1.json: row 0 names image 99, which the annotation file does not have"):
        compared(tmp_path, data, rows, [{**rows[0], "image_id": 99}])
    with pytest.raises(UserError, match=r"run1.json: row 0 names category 4"):
        compared(tmp_path, data, rows, [{**rows[0], "category_id": 4}])
    with pytest.raises(UserError, match=r"data.json: has no annotations, so there is nothing to compare"):
        compared(tmp_path, data | {"annotations": []}, rows, worse(rows))
    folder = tmp_path / "evaluated"
    folder.mkdir()
    write(folder, "detections.json", rows)
    write(folder, "metrics.json", {"bbox": {"AP": 0.123, "AR300": 0.2}})
    with pytest.raises(UserError, match=r"metrics.json: its bbox AP is 12.30, but its detections have"):
        compare([folder, tmp_path / "run0.json"], write(tmp_path, "data.json", data), "val", show=False)
