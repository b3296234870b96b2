"""The script behind docs/results/table1.md: its rows are recipes, its differences are paired, its page holds both."""

import json
import math
from pathlib import Path

import pytest

from tailseg.data.sources import open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.recipes.classifiers import CLASSIFIERS
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import diff

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def table1(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import table1

    return table1


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    settings = SyntheticSettings(classes=24, train_images=60, val_images=4, size=32)
    return open_data(str(write_synthetic(tmp_path_factory.mktemp("set") / "data", settings))).train


def test_rows_differ_in_the_classifier_only_and_cover_every_loss(table1, train):
    rows = table1.methods(train)
    trained = [row for row in rows.values() if row.tested_from is None]
    recipes = [resolve(row.recipe, row.settings) for row in trained]
    assert {recipe.classifier.loss for recipe in recipes} == set(CLASSIFIERS)
    sampling = {"data.sampler", "data.repeat_threshold", "data.epoch_images"}
    for name, row in rows.items():
        if row.tested_from is None:
            keys = {key for key, _, _ in diff(resolve("demo/cross-entropy"), resolve(row.recipe, row.settings))}
            others = {key for key in keys if not key.startswith("classifier.")}
            assert others == (sampling if name.endswith(table1.RFS) else set())
    for row in rows.values():
        if row.tested_from is not None:
            resolve(rows[row.tested_from].recipe, (*rows[row.tested_from].settings, *row.settings))


def test_constants_stand_where_they_stand_on_lvis(table1, train):
    rows = table1.methods(train)
    eql = resolve(rows["eql"].recipe, rows["eql"].settings).classifier
    images = len(train) - train.report.empty_images
    spared = [category.frequency != "f" for category in train.categories]
    assert [category.image_count / images < eql.threshold for category in train.categories] == spared
    groups = resolve(rows["group-softmax"].recipe, rows["group-softmax"].settings).classifier.thresholds
    sizes = [sum(category.instance_count < limit for category in train.categories) for limit in groups]
    # 17, 51 and 79 per cent of 24 classes; classes of equal counts cannot be parted.
    assert all(abs(size - share * 24) <= 4 for size, share in zip(sizes, (0.166, 0.509, 0.786), strict=True))


def results(table1) -> dict:
    def runs(*ap: float) -> list[dict]:
        values = {"AP": 0, "APr": 0, "APc": 0, "APf": 0}
        return [{kind: values | {"AP": a, "APr": a / 2} for kind in ("bbox", "segm")} for a in ap]

    def row(title: str, *ap: float) -> dict:
        seeds = list(range(1, len(ap) + 1))
        return {"title": title, "command": "a", "seeds": seeds, "runs": runs(*ap), "machine": "one"}

    return {
        "data": {
            "classes": 3,
            "classes_by_frequency": {"r": 1, "c": 1, "f": 1},
            "train_images": 5,
            "val_images": 4,
            "size": 32,
            **{"objects": 9, "fewest_images": 1, "most_images": 1000, "fewest_objects": 2, "most_objects": 1200},
        },
        "seeds": 3,
        "images_seen": 3600,
        "not_run": ["Focal loss"],
        "methods": {
            "cross-entropy": row("Cross-entropy", 0.1, 0.2, 0.3),
            "eql": row("EQL", 0.2, 0.1, 0.2),
            "seesaw-p0": row("Seesaw with p = 0", 0.2, 0.3, 0.4),
            "seesaw": row("Seesaw", 0.21, 0.32, 0.43),
        },
        "fixed": {"cross-entropy": row("Cross-entropy", 0.5, 0.6), "seesaw": row("Seesaw", 0.7, 0.9)},
    }


def test_page(table1):
    page = table1.page(results(table1))
    assert "| Cross-entropy | 20.0 ± 10.0 | 20.0 ± 10.0 | 10.0 ± 5.0 |" in page
    # 11, 12 and 13 points: deviation 1 of the differences, times 4.303 (Student's t, two degrees of freedom), by √3.
    assert "| Seesaw − Cross-entropy | +12.0 [9.5, 14.5] | +12.0 [9.5, 14.5] | +6.0 [4.8, 7.2] |" in page
    assert "| EQL − Cross-entropy | −3.3 [−32.0, 25.4] |" in page
    assert "Cross-entropy has mask AP 0.0 on frequent classes and 10.0 on rare ones" in page
    assert "APr 15.0, with it (p = 0.8) 16.0: +1.0 points, 95 % interval [−0.2, 2.2]" in page
    assert "cross-entropy has 27.5 on rare classes and Seesaw 40.0" in page
    assert "| Seesaw | 80.0 ± 14.1 | 80.0 ± 14.1 | 40.0 ± 7.1 | 0.0 ± 0.0 | 0.0 ± 0.0 | 1, 2 |" in page
    assert "with 1 to 1,000 training images and 2 to 1,200 objects a class" in page
    assert "Not run on this set yet: Focal loss." in page
    assert "| Seesaw | 24.3 | 32.0 | 23.3 | 32.0 | 13.0 | 16.0 | 22.9 | 0.0 | 28.2 | 0.0 |" in page
    assert "## What was tried" in page


def test_picture(table1, tmp_path):
    table1.draw(results(table1)["methods"], tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_missing_groups_are_no_number(table1):
    assert math.isnan(table1.values({"runs": [{"segm": {"APr": None}}]}, "segm", "APr")[0])


def test_commands(table1, train, tmp_path):
    import miniature

    rows = table1.methods(train)
    fresh = miniature.command(rows["eql"], "eql", 2, tmp_path)
    assert fresh[1:7] == ["train", "demo/cross-entropy", "--data", "synthetic", "--out", str(tmp_path / "eql-2")]
    assert "--resume" not in fresh
    (tmp_path / "eql-2").mkdir()
    (tmp_path / "eql-2" / "trainer.safetensors").touch()
    assert miniature.command(rows["eql"], "eql", 2, tmp_path)[-1] == "--resume"
    tested = miniature.command(rows["tau-norm"], "tau-norm", 2, tmp_path)
    assert tested[1:3] == ["eval", str(tmp_path / "cross-entropy-2" / "last.safetensors")]
    assert tested[-2:] == ["--set", "test.tau_norm=1"]
    tests = table1.fixed(rows)
    unlimited = miniature.command(tests["eql-fixed"], "eql-fixed", 2, tmp_path)
    assert unlimited[2] == str(tmp_path / "eql-2" / "last.safetensors")
    assert unlimited[-4:] == ["--quiet", "--max-dets", "300", "--fixed-ap"]
    of_a_test = miniature.command(tests["tau-norm-fixed"], "tau-norm-fixed", 2, tmp_path)
    assert of_a_test[2] == str(tmp_path / "cross-entropy-2" / "last.safetensors")
    assert of_a_test[-3:] == ["--fixed-ap", "--set", "test.tau_norm=1"]


def test_other_rows_stay_as_recorded_if_they_are_of_the_same_data(table1):
    rows = {name: table1.Method(name) for name in ("cross-entropy", "eql", "seesaw-p0", "seesaw", "focal")}
    new = results(table1)
    focal = {key: value for key, value in new["methods"]["eql"].items() if key != "machine"} | {"title": "Focal loss"}
    new |= {"methods": {"focal": focal}, "fixed": {}, "machine": "another"}
    found = table1.merged(dict(new), results(table1), rows)
    assert table1.machines(found["methods"]) == "one. On another: Focal loss"
    assert list(found["methods"]) == ["cross-entropy", "eql", "seesaw-p0", "seesaw", "focal"]
    assert list(found["fixed"]) == ["cross-entropy", "seesaw"]
    assert found["not_run"] == []
    other = table1.merged(dict(new), results(table1) | {"images_seen": 1}, rows)
    assert list(other["methods"]) == ["focal"]
    assert other["not_run"] == ["cross-entropy", "eql", "seesaw-p0", "seesaw"]


def test_the_page_in_the_docs_is_that_of_the_recorded_results(table1):
    recorded = json.loads((FOLDER / "results" / "table1.json").read_text())
    assert (FOLDER.parent / "docs" / "results" / "table1.md").read_text() == table1.page(recorded)
