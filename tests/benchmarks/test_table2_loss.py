"""The script behind docs/results/table2-loss.md: one change a row, and a page of what was found."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tailseg.data.sources import open_data
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import diff

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import table2_loss

    return table2_loss


def test_one_change_a_row(script):
    recipes = [resolve(row.recipe, row.settings) for row in script.rows().values()]
    assert [[change[0] for change in diff(*pair)] for pair in pairwise(recipes)] == [
        ["classifier.normalized"],
        # With p = q = 0 Seesaw Loss is cross-entropy, beside which it has the objectness branch.
        ["classifier.loss", "classifier.objectness", "classifier.p", "classifier.q"],
        ["classifier.p"],
        ["model.tsd.constrain_classes"],
    ]
    assert (recipes[2].classifier.p, recipes[2].classifier.q) == (0, 0)
    assert {recipe.schedule.epochs for recipe in recipes} == {1}


def test_page(script):
    def method(title: str, *rare: float):
        runs = [
            {kind: {"AP": 0.3, "APr": value, "APc": 0.2, "APf": 0.4} for kind in ("bbox", "segm")} for value in rare
        ]
        return {"title": title, "command": title, "seeds": [1, 2], "runs": runs}

    rare = ((0.01, 0.03), (0.11, 0.13), (0.11, 0.11), (0.2, 0.24), (0.21, 0.23))
    found = {name: method(row.title, *r) for (name, row), r in zip(script.rows().items(), rare, strict=True)}
    data = {"classes": 120, "classes_by_frequency": {"r": 1, "c": 2, "f": 3}, "train_images": 6000, "val_images": 400}
    data |= {"size": 128, "fewest_images": 1, "most_images": 7, "fewest_objects": 1, "most_objects": 9}
    written = script.page({"methods": found, "data": data, "seeds": 2, "images_seen": 6000, "machine": "here"})
    assert "APr goes from 2.0 to 22.0 (in the report from 4.2 to 25.5)" in written
    assert "Of this, +10.0 come" in written
    assert "−1.0 with the objectness branch, +11.0 with Seesaw's factor S, and +0.0 with" in written
    last = next(line for line in written.splitlines() if line.startswith("| Row 10 − row 9 |"))
    assert last.split(" | ")[3] == "+20.0 [20.0, 20.0]"


def test_recorded_runs_are_taken_up_and_complete_ones_recorded(script, monkeypatch, tmp_path):
    data = open_data("synthetic", show=False)
    results, first, second = tmp_path / "results.json", tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(script, "RESULTS", results)
    assert script.record(data, 2, first) == {"methods": {}}
    assert not results.exists()
    for name, seed in (("normalized", 2), ("factor", 1), ("factor", 2)):
        folder = first / f"{name}-{seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 20}\n{"step": 30}\n')
        (folder / "metrics.json").write_text(json.dumps({"segm": {"AP": seed / 10}}))
    recorded = script.record(data, 2, first)
    assert json.loads(results.read_text()) == recorded
    assert recorded["images_seen"] == 240
    assert {name: method["seeds"] for name, method in recorded["methods"].items()} == {
        "normalized": [2],
        "factor": [1, 2],
    }
    # Elsewhere, where one of these runs was begun again and another row is complete.
    for name in ("factor-1", "seesaw-1"):
        (second / name).mkdir(parents=True)
    (second / "seesaw-1" / "metrics.json").write_text('{"segm": {"AP": 0.5}}')
    script.take_up(recorded, script.about_data(data), second)
    assert not (second / "factor-1" / "metrics.json").exists()
    again = script.record(data, 2, second)
    found = {name: [run["segm"]["AP"] for run in method["runs"]] for name, method in again["methods"].items()}
    assert found == {"normalized": [0.2], "factor": [0.2], "seesaw": [0.5]}
    assert {key: again[key] for key in ("data", "images_seen")} == {
        key: recorded[key] for key in ("data", "images_seen")
    }
    script.take_up(recorded | {"data": {}}, script.about_data(data), tmp_path / "third")
    assert not (tmp_path / "third").exists()
