"""The script behind docs/results/photographs.md: its divisions, and a page that says what the numbers say."""

import json
from pathlib import Path

import pytest

from tailseg.data.sources import open_splits
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import diff

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def photographs(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import photographs

    return photographs


def test_a_division_shares_out_all_pictures_and_keeps_every_class_in_training(photographs, tmp_path):
    settings = SyntheticSettings(classes=8, train_images=40, val_images=8, size=32)
    source = write_synthetic(tmp_path / "set", settings)
    whole = [json.loads((source / f"{split}.json").read_text()) for split in ("train", "val")]
    divided = []
    for seed in (1, 2):
        data = open_splits(photographs.divide(source, tmp_path / "out", seed))
        ids = [set(part.image_ids.tolist()) for part in (data.train, data.val)]
        assert not ids[0] & ids[1]
        assert len(ids[0] | ids[1]) == 48
        assert sum(len(part.labels) for part in (data.train, data.val)) == sum(len(w["annotations"]) for w in whole)
        assert all(category.image_count for category in data.train.categories)
        divided.append(ids[1])
    assert divided[0] != divided[1]


def test_the_two_recipes_differ_in_the_classifier_alone(photographs, tmp_path):
    plain, seesaw = photographs.split_rows(tmp_path / "data.yaml", 1).values()
    recipes = [resolve(row.recipe, row.settings) for row in (plain, seesaw)]
    assert all(key.startswith("classifier.") for key, _, _ in diff(*recipes))


def test_the_page_says_what_the_numbers_say(photographs):
    def runs(*aps):
        names = ("AP", "APr", "APc", "APf")
        return [{kind: dict.fromkeys(names, ap) for kind in ("bbox", "segm")} for ap in aps]

    found = {
        name: {"title": title, "command": f"tailseg train small/{name}", "seeds": [1, 2, 3], "runs": runs(*aps)}
        for (name, title), aps in zip(
            photographs.RECIPES.items(), ((0.03, 0.04, 0.05), (0.04, 0.06, 0.05)), strict=True
        )
    }
    data = {"classes": 80, "images": 128, "val_images": [30, 31, 30]}
    results = {"data": data, "splits": 3, "images_seen": 1920, "machine": "a machine", "methods": found}
    page = photographs.page(results)
    assert "Seesaw minus cross-entropy is +1.0 points of mask AP, 95 % interval [−1.5, 3.5]" in page
    assert "it is ahead in 2 of 3 divisions" in page
    assert "30 to 31 pictures" in page
    assert "as the weights of their network want it (`model.pixel_mean` of 127.5): models of" in page
    assert "scaled pixels" not in photographs.page(results | {"pixel_mean": [127.5] * 3})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--data", "nowhere"), "nowhere: holds no train.json"), (("--splits", "1"), "--splits: at least 2")],
)
def test_wrong_calls(photographs, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr("sys.argv", ["photographs.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        photographs.main()
    assert words in str(stopped.value.code) + capsys.readouterr().err
