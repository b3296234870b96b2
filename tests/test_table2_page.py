"""The script behind docs/results/table2.md: its rows are recipes, its differences are from row to row."""

import json
from pathlib import Path

import pytest

from tailseg.recipe_values import resolve

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def table2(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import table2

    return table2


def runs(*ap: float) -> list[dict]:
    values = [{"AP": a, "APr": a / 2, "APc": a / 4, "APf": a} for a in ap]
    return [{"bbox": of_seed, "segm": of_seed} for of_seed in values]


def found(table2) -> dict:
    return {
        name: {"title": table2.REPORT[name][0], "command": "", "runs": runs(0.10 + 0.01 * row, 0.20 + 0.03 * row)}
        for row, name in enumerate(table2.STEPS)
    }


def test_rows_are_recipes_of_one_budget(table2):
    recipes = [resolve(row.recipe, row.settings) for row in table2.rows().values()]
    assert len(recipes) == len(table2.REPORT) == 6
    first = recipes[0]
    for recipe in recipes:
        assert (recipe.data, recipe.schedule, recipe.training) == (first.data, first.schedule, first.training)
        assert recipe.optimizer == first.optimizer
        assert recipe.classifier == first.classifier


def test_differences_are_from_row_to_row_and_seed_to_seed(table2):
    lines = table2.steps(found(table2))
    assert len(lines) == 2 + 5
    # In seed 1 a row gains 1 point, in seed 2 it gains 3; the report's second row gains 0.1 box AP, loses 0.3 APr.
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[0] == "+ SyncBN"
    assert cells[1:5] == ["+0.1", "+2.0 ± 1.4", "+0.2", "+2.0 ± 1.4"]
    assert cells[5:7] == ["−0.3", "+1.0 ± 0.7"]


def test_the_report_is_quoted_as_it_stands(table2):
    lines = table2.beside_the_report(found(table2))
    assert lines[2] == "| Mask R-CNN | 20.1 | 18.7 | 1.0 | 16.1 | 29.4 |"
    assert lines[-1] == "| + Mask scoring | 25.6 | 23.9 | 2.8 | 22.4 | 35.0 |"


def test_sizes_are_those_of_the_detectors(table2):
    sizes = table2.sizes()
    assert sizes["02-sync-bn"]["table2"] - sizes["01-mask-rcnn"]["table2"] == 4 * (2 - 1) * 256  # bias -> scale, shift
    # A transposed convolution goes, CARAFE's two convolutions come.
    carafe = (256 * 64 + 64) + (64 * 9 * 100 + 100)
    assert sizes["03-carafe"]["table2"] - sizes["02-sync-bn"]["table2"] == carafe - (256 * 256 * 4 + 256)
    lines = table2.size_table(sizes)
    assert len(lines) == 2 + 6
    assert "−188,252" in lines[4]


def test_the_page_in_the_docs_is_that_of_the_recorded_results(table2):
    recorded = json.loads((FOLDER / "results" / "table2.json").read_text())
    assert (FOLDER.parent / "docs" / "results" / "table2.md").read_text() == table2.page(recorded)
