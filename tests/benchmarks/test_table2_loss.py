"""The script behind docs/results/table2-loss.md: one change a row, and a page of what was found."""

from itertools import pairwise
from pathlib import Path

import pytest

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
