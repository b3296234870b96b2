"""`tailseg compare` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from federated_sets import federated_data
from PIL import Image
from tiny import Done, assert_done, assert_refused, tailseg

import tailseg as package


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set without its pictures' content, results of two runs, and an evaluation's folder."""
    data, rows = federated_data(8, images=30)
    data["images"] = [image | {"file_name": f"{image['id']}.png"} for image in data["images"]]
    (tmp_path / "photos" / "images").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "photos" / f"{split}.json").write_text(json.dumps(data))
    write(tmp_path / "a.json", rows)
    write(tmp_path / "b.json", [row for i, row in enumerate(rows) if i % 3])
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "detections.json", rows[:40])
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def compare(folder: Path, *arguments: object) -> Done:
    return tailseg("compare", *arguments, cwd=folder)


def test_files_and_words(folder: Path) -> None:
    done = compare(folder, "a.json", "b.json", "--annotations", "photos/val.json")
    assert_done(done)
    content = json.loads((folder / "comparison" / "comparison.json").read_text())
    assert [run["name"] for run in content["runs"]] == ["a.json", "b.json"]
    scored = tailseg("score", "photos/val.json", "b.json", "--out", "m.json", cwd=folder)
    assert_done(scored)
    metrics = json.loads((folder / "m.json").read_text())
    for kind, tables in content["kinds"].items():
        for row in tables["metrics"]:
            assert row["runs"][1] == metrics[kind][row["metric"]]
    (of_ap, *_) = content["kinds"]["segm"]["metrics"]
    assert f"{100 * of_ap['runs'][1]:.1f}" in done.stdout
    assert "b.json against a.json, masks: AP " in done.stdout
    assert "Written: comparison/comparison.json, comparison/comparison.html" in done.stdout
    assert "2 runs on val.json" in (folder / "comparison" / "comparison.html").read_text()


def test_a_data_set_needs_no_pictures(folder: Path) -> None:
    done = compare(folder, "a.json", "run", "b.json", "--data", "photos", "--out", "new/out", "--quiet")
    assert_done(done)
    assert done.stderr == ""
    content = json.loads((folder / "new" / "out" / "comparison.json").read_text())
    assert content["data"] == "photos, val"
    assert content["runs"][1] == {"name": "run", "detections": "run/detections.json"}
    assert len(content["kinds"]["bbox"]["metrics"][0]["differences"]) == 2
    assert done.stdout.count(" against a.json, masks: ") == 2


def test_from_python(folder: Path) -> None:
    compared = package.compare([folder / "a.json", folder / "b.json"], folder / "photos", folder / "out", show=False)
    assert compared.files == (folder / "out" / "comparison.json", folder / "out" / "comparison.html")
    assert json.loads(compared.files[0].read_text()) == compared.content
    for image in json.loads((folder / "photos" / "val.json").read_text())["images"]:
        Image.new("RGB", (64, 64)).save(folder / "photos" / "images" / image["file_name"])
    opened = package.open_data(folder / "photos", need=("val",), show=False)
    runs = [str(folder / "a.json"), str(folder / "b.json")]
    assert package.compare(runs, opened, folder / "out", show=False).content == compared.content
    with pytest.raises(ValueError, match="split is 'train' or 'val', received 'test'"):
        package.compare(runs, opened, split="test")
    with pytest.raises(ValueError, match="give either data or annotations"):
        package.compare(runs)
    with pytest.raises(package.UserError, match=r"photos: was opened without its split train; open it with need="):
        package.compare(runs, opened, split="train", show=False)


def test_refusals(folder: Path) -> None:
    truth = ("--quiet", "--annotations", "photos/val.json")
    assert_refused(compare(folder, "a.json", *truth), "a.json: a comparison needs two runs or more")
    assert_refused(compare(folder, "a.json", "gone", *truth), "gone: no such folder or file")
    assert_refused(compare(folder, "a.json", "b.json", "--data", "gone"), "gone: no such folder or file")
    assert_refused(compare(folder, "a.json", "b.json", "--annotations", "gone.json"), "gone.json: ")
    write(
        folder / "other.json",
        [{"image_id": 4, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.5, "segmentation": []}],
    )
    assert_refused(compare(folder, "a.json", "other.json", *truth), "other.json: row 0 names image 4")
    write(folder / "object.json", {"annotations": []})
    assert_refused(compare(folder, "a.json", "object.json", *truth), "object.json: expected a list of results rows")
    (folder / "run" / "classes.csv").write_text("id,name,frequency\n3,wolf,r\n")
    assert_refused(compare(folder, "a.json", "run", *truth), "run/classes.csv: category 3 is 'wolf' there but 'c1' in")
    assert not (folder / "comparison").exists()


def test_usage(folder: Path) -> None:
    for options in ((), ("--data", "photos", "--annotations", "photos/val.json")):
        done = compare(folder, "a.json", "b.json", *options)
        assert done.returncode == 2
        assert "give either --data or --annotations" in done.stderr
    done = compare(folder, "a.json", "b.json", "--data", "photos", "--split", "test")
    assert (done.returncode, "'test' is not one of train, val" in done.stderr) == (2, True)


def test_names_do_no_harm(folder: Path) -> None:
    data = json.loads((folder / "photos" / "val.json").read_text())
    for category in data["categories"]:
        category["name"] = f"[red]{category['name']}\x1b[2J"
    write(folder / "photos" / "val.json", data)
    done = compare(folder, "a.json", "b.json", "--annotations", "photos/val.json")
    assert_done(done)
    assert "\x1b[2J" not in done.stdout
    assert r"[red]c1\x1b[2J" in done.stdout
