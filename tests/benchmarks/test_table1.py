"""The script behind docs/results/table1.md: its rows are recipes, its differences are paired, its page holds both."""

import json
import math
from pathlib import Path

import pytest

from tailseg.data.sources import open_source
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
    return open_source(str(write_synthetic(tmp_path_factory.mktemp("set") / "data", settings))).train


def test_rows_differ_in_the_classifier_only_and_cover_every_loss(table1, train):
    rows = table1.methods(train)
    trained = [row for row in rows.values() if row.tested_from is None]
    recipes = [resolve(row.recipe, row.settings) for row in trained]
    assert {recipe.classifier.loss for recipe in recipes} == set(CLASSIFIERS)
    for recipe in recipes:
        assert all(key.startswith("classifier.") for key, _, _ in diff(resolve("demo/cross-entropy"), recipe))
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

    return {
        "data": {
            "classes": 3,
            "classes_by_frequency": {"r": 1, "c": 1, "f": 1},
            "train_images": 5,
            "val_images": 4,
            "size": 32,
        },
        "seeds": 3,
        "images_seen": 3600,
        "machine": "none",
        "methods": {
            "cross-entropy": {"title": "Cross-entropy", "command": "a", "runs": runs(0.1, 0.2, 0.3)},
            "eql": {"title": "EQL", "command": "b", "runs": runs(0.2, 0.1, 0.2)},
            "seesaw": {"title": "Seesaw", "command": "c", "runs": runs(0.21, 0.32, 0.43)},
        },
    }


def test_page(table1):
    page = table1.page(results(table1))
    assert "| Cross-entropy | 20.0 ± 10.0 | 20.0 ± 10.0 | 10.0 ± 5.0 |" in page
    # 11, 12 and 13 points: the spread of the differences, not the difference of the spreads.
    assert "| Seesaw | +12.0 ± 1.0 | +12.0 ± 1.0 | +6.0 ± 0.5 |" in page
    assert "| EQL | −3.3 ± 11.5 |" in page
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


def test_the_page_in_the_docs_is_that_of_the_recorded_results(table1):
    recorded = json.loads((FOLDER / "results" / "table1.json").read_text())
    assert (FOLDER.parent / "docs" / "results" / "table1.md").read_text() == table1.page(recorded)
