"""The script behind docs/results/table2.md: its rows are recipes, its differences are from row to row."""

import json
from pathlib import Path

import pytest
from tiny import meta_without_values

from tailseg.recipes.resolve import resolve

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


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
        name: {"title": table2.REPORT[name].title, "command": "", "runs": runs(0.10 + 0.01 * row, 0.20 + 0.03 * row)}
        for row, name in enumerate(table2.REPORT)
    }


def test_rows_are_recipes_of_one_budget(table2):
    rows = table2.rows()
    assert list(rows) == list(table2.REPORT)
    assert len(rows) == 12
    trained = [resolve(row.recipe, row.settings) for name, row in rows.items() if name < "11"]
    first = trained[0]
    for recipe in trained:
        assert (recipe.schedule, recipe.training, recipe.optimizer) == (first.schedule, first.training, first.optimizer)
        assert recipe.data.batch_per_device == first.data.batch_per_device
        assert recipe.data.test_short_edge == first.data.test_short_edge
    assert [recipe.data == first.data for recipe in trained] == [True] * 6 + [False] * 4
    assert [recipe.classifier == first.classifier for recipe in trained] == [True] * 9 + [False]
    assert (rows["11-finetune"].init_from, rows["12-tta"].tested_from) == ("10-seesaw", "11-finetune")


def test_commands_of_rows_made_of_others(table2, tmp_path):
    from miniature import command

    rows = table2.rows()
    started = command(rows["11-finetune"], "11-finetune", 2, tmp_path)
    assert started[started.index("--init") + 1] == str(tmp_path / "10-seesaw-2" / "last.safetensors")
    assert "--resume" not in started
    (tmp_path / "11-finetune-2").mkdir()
    (tmp_path / "11-finetune-2" / "trainer.safetensors").touch()
    resumed = command(rows["11-finetune"], "11-finetune", 2, tmp_path)
    assert "--resume" in resumed
    assert "--init" not in resumed
    tested = command(rows["12-tta"], "12-tta", 2, tmp_path)
    assert tested[1:3] == ["eval", str(tmp_path / "11-finetune-2" / "last.safetensors")]
    assert "test.tta_long_edges=[120, 140, 160, 180, 200]" in tested


def test_a_row_waits_for_the_one_it_is_made_of(table2, tmp_path):
    import miniature

    rows = {"12-tta": table2.rows()["12-tta"]}
    with pytest.raises(SystemExit, match="12-tta-1 is made of 11-finetune; train that row first"):
        miniature.run_all(rows, 1, 1, tmp_path)


def test_differences_are_from_row_to_row_and_seed_to_seed(table2):
    lines = table2.steps(found(table2))
    assert len(lines) == 2 + 11
    # In seed 1 a row gains 1 point, in seed 2 it gains 3; the report's second row gains 0.1 box AP, loses 0.3 APr.
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[0] == "+ SyncBN"
    assert cells[1:5] == ["+0.1", "+2.0 ± 1.4", "+0.2", "+2.0 ± 1.4"]
    assert cells[5:7] == ["−0.3", "+1.0 ± 0.7"]


def test_runs_between_two_rows_take_their_step_apart(table2):
    methods, rows = table2.aside(), found(table2)
    row, between = (resolve(f"demo-table2/{name}") for name in ("09-backbone", "10-seesaw"))
    normalized = resolve(methods["09-normalized"].recipe, methods["09-normalized"].settings)
    context = row.model.context.model_copy(update={"weight": 50})
    assert normalized.model == row.model.model_copy(update={"context": context})
    assert normalized.classifier == row.classifier.model_copy(update={"normalized": True})
    assert normalized.classifier.normalized == between.classifier.normalized
    assert methods["11-larger"].tested_from == "11-finetune"
    assert table2.taken_apart(rows, {}) == []
    ap = 0.20 + 0.03 * 9 - 0.01, 0.10 + 0.01 * 9 - 0.01  # of row 10, a point less in each seed
    between = {"09-normalized": {"title": "", "command": "", "runs": runs(*reversed(ap))}}
    lines = table2.taken_apart(rows, between)
    assert [line.split("|")[1:4] for line in lines[4:-1]] == [
        [" 10 ", " normalised classifiers ", " +1.0 ± 1.4 "],
        [" 10 ", " Seesaw Loss, objectness branch, no constraint on classes ", " +1.0 ± 0.0 "],
    ]


def test_a_row_is_compared_to_the_one_before_it_or_to_none(table2):
    rows = found(table2)
    del rows["08-neck"]
    titles = [line.split("|")[1].strip() for line in table2.steps(rows)[2:]]
    assert "+ Training-time augmentation" in titles
    assert "+ Better backbone" not in titles
    assert len(titles) == 11 - 2


def test_the_report_is_quoted_as_it_stands(table2):
    lines = table2.beside_the_report(found(table2))
    assert lines[2] == "| Mask R-CNN | 20.1 | 18.7 | 1.0 | 16.1 | 29.4 |"
    assert lines[-1] == "| + Test-time augmentation | 41.5 | 38.8 | 26.4 | 38.3 | 44.9 |"


def test_sizes_are_those_of_the_detectors(table2):
    with meta_without_values():
        sizes = table2.sizes()
    assert sizes["02-sync-bn"]["table2"] - sizes["01-mask-rcnn"]["table2"] == 4 * (2 - 1) * 256  # bias -> scale, shift
    # A transposed convolution goes, CARAFE's two convolutions come.
    carafe = (256 * 64 + 64) + (64 * 9 * 100 + 100)
    assert sizes["03-carafe"]["table2"] - sizes["02-sync-bn"]["table2"] == carafe - (256 * 256 * 4 + 256)
    lines = table2.size_table(sizes)
    assert len(lines) == 2 + 12
    assert "−188,252" in lines[4]


def test_the_page_in_the_docs_is_that_of_the_recorded_results(table2):
    recorded = json.loads((FOLDER / "results" / "table2.json").read_text())
    assert (FOLDER.parent / "docs" / "results" / "table2.md").read_text() == table2.page(recorded)
