"""`tailseg score` as a user meets it: its files, its options, and one sentence for whatever is wrong with the input."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Done, tailseg

from tailseg import jobs

MASK = {"size": [10, 10], "counts": [0, 40, 60]}  # the left four columns
Content = dict[str, Any]


def score(folder: Path, *options: object) -> Done:
    return tailseg("score", "data.json", "found.json", *options, cwd=folder)


@pytest.fixture
def data() -> Content:
    place = {"image_id": 7, "category_id": 3, "bbox": [0, 0, 4, 10], "area": 40, "segmentation": MASK}
    return {
        "images": [{"id": 7, "height": 10, "width": 10, "neg_category_ids": [5], "not_exhaustive_category_ids": []}],
        "categories": [
            {"id": 3, "name": "cat", "frequency": "c", "image_count": 20},
            {"id": 5, "name": "dog", "frequency": "r", "image_count": 2},
        ],
        "annotations": [{"id": 1, **place}],
    }


def row(**changes: Any) -> Content:
    return {"image_id": 7, "category_id": 3, "bbox": [0, 0, 4, 10], "score": 0.5, "segmentation": MASK} | changes


def write(folder: Path, data: Content, rows: list[Content]) -> None:
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "found.json").write_text(json.dumps(rows))


def test_files(tmp_path: Path, data: Content) -> None:
    write(tmp_path, data, [row(), row(category_id=5), row(category_id=5, score=0.4)])
    done = score(tmp_path, "--out", "m.json", "--analyse", "--boundary", "--max-dets", 2)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert list(metrics) == ["bbox", "segm", "boundary"]
    for values in metrics.values():
        assert [values[name] for name in ("AP", "APc", "AR2")] == pytest.approx([1, 1, 1])
        assert values["APr"] is None
    with (tmp_path / "m.classes.csv").open(newline="") as file:
        cat, dog = csv.DictReader(file)
    assert cat | {"bbox_AP": ""} == {
        "id": "3", "name": "cat", "frequency": "c", "train_images": "20", "instances": "1", "bbox_AP": "",
        "segm_AP": cat["bbox_AP"],
    }  # fmt: skip
    assert dog["segm_AP"] == ""
    assert set(json.loads((tmp_path / "m.analysis.json").read_text())) == {"bbox", "segm"}
    page = (tmp_path / "m.analysis.html").read_text()
    assert "Analysis of found.json on data.json" in page
    assert "the best 2 of an image" in page
    assert "Analysis: m.analysis.html" in done.stdout
    # One object is found: too little for a threshold of the class, which therefore gets the default.
    assert json.loads((tmp_path / "m.thresholds.json").read_text()) == {"default": 0.5, "classes": {}}


def test_fixed_ap(tmp_path: Path, data: Content) -> None:
    write(tmp_path, data, [row(category_id=5, score=0.9)] * 300 + [row()])
    assert score(tmp_path, "--out", "m.json").returncode == 0
    assert json.loads((tmp_path / "m.json").read_text())["segm"]["AP"] == 0
    assert score(tmp_path, "--out", "m.json", "--fixed-ap").returncode == 0
    metrics = json.loads((tmp_path / "m.json").read_text())["segm"]
    assert [metrics["AP"], metrics["AR"]] == pytest.approx([1, 1])


def test_scoring_does_not_wait_for_pytorch() -> None:
    code = "import sys, tailseg.cli.main, tailseg.evaluation.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found.json: the file is empty"),
        (json.dumps([row(score=float("nan"))]), "found.json: not valid JSON at line 1, byte 67: NaN is no JSON number"),
        (json.dumps([row(image_id="7")]), "found.json: image_id of row 0 is '7', expected a whole number"),
        (json.dumps([row(), row(category_id="3")]), "found.json: category_id of row 1 is '3'"),
        (
            json.dumps([row(category_id=4)]),
            "found.json: row 0 names category 4, which the annotation file does not have",
        ),
        (json.dumps([row(image_id=8)]), "found.json: row 0 names image 8, which the annotation file does not have"),
        (json.dumps([row(segmentation=MASK | {"size": [9, 10]})]), "segmentation of row 0 has the size [9, 10]"),
        (json.dumps({"annotations": []}), "found.json: expected a list of results rows, found an object"),
    ],
)
def test_faulty_results(tmp_path: Path, data: Content, text: str, message: str) -> None:
    write(tmp_path, data, [])
    (tmp_path / "found.json").write_text(text)
    done = score(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("tailseg: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["annotations"][0].update(category_id=99), "annotation 1: there is no category with the"),
        (lambda data: data["images"][0].update(id="a7"), "image 'a7': its id is 'a7'; number them"),
        (lambda data: data.pop("categories"), "'categories' is missing"),
    ],
)
def test_faulty_annotations(tmp_path: Path, data: Content, change: Callable[[Content], object], message: str) -> None:
    change(data)
    write(tmp_path, data, [row()])
    done = score(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("tailseg: data.json: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_options_that_do_not_go_together(tmp_path: Path, data: Content) -> None:
    write(tmp_path, data, [row()])
    assert score(tmp_path, "--analyse").returncode == 2
    done = score(tmp_path, "--iou", "bbox", "--boundary")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "add segm" in done.stderr


def test_what_finds_nothing_is_said(tmp_path: Path, data: Content) -> None:
    write(tmp_path, data, [row(category_id=4, score=0.9), row(), row(segmentation=[], score=0.1)])
    done = score(tmp_path, "--out", "m.json")
    assert done.returncode == 0
    assert "found.json: 1 of 3 rows have an unknown category (row 0 names category 4, which" in done.stderr
    assert "found.json: 1 of 3 rows have no mask (first: row 2)" in done.stderr
    assert json.loads((tmp_path / "m.json").read_text())["segm"]["AP"] == pytest.approx(1)
    done = score(tmp_path, "--max-dets", 1, "--out", "m.json")
    assert json.loads((tmp_path / "m.json").read_text())["segm"]["AP"] == 0


def test_what_cannot_be_written_is_told_before_scoring(tmp_path: Path, data: Content) -> None:
    write(tmp_path, data, [])
    (tmp_path / "found.json").write_text("not read yet")
    for out, sentence in (
        (".", ".: is a folder; name a file for the metrics, such as metrics.json"),
        ("no/m.json", "no/m.json: No such file or directory; make its folder, or name another"),
    ):
        done = score(tmp_path, "--out", out)
        assert (done.returncode, done.stderr) == (1, f"tailseg: {sentence}\n")


@pytest.mark.parametrize("number", [0, -1, 10**30, 2.5, True])
def test_numbers_of_detections_that_make_no_sense(tmp_path: Path, data: Content, number: Any) -> None:
    write(tmp_path, data, [row()])
    with pytest.raises(ValueError, match=r"^max_dets is .*, expected a whole number from 1 to 1,000,000,000$"):
        jobs.score(tmp_path / "data.json", tmp_path / "found.json", max_dets=number)
    scores = jobs.score(tmp_path / "data.json", tmp_path / "found.json", max_dets=1_000_000_000)
    assert scores.metrics["segm"]["AP"] == pytest.approx(1)
