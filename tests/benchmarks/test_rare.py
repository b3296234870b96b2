"""The script behind docs/results/rare.md: one budget for all rows, and a page that says what the numbers say."""

import json
from pathlib import Path

import pytest

from tailseg.data.dataset import trained_images
from tailseg.data.sampling import TrainSampler, epoch_draw
from tailseg.data.sources import open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import diff
from tailseg.training.schedule_checks import RunLength

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def rare(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import rare

    return rare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    settings = SyntheticSettings(classes=24, train_images=60, val_images=4, size=32)
    return write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)


def test_every_row_makes_the_same_number_of_steps(rare, folder):
    train = open_data(str(folder)).train
    images = trained_images(train)
    rows = rare.rows_for(len(images))
    assert next(iter(rows)) == rare.BASELINE
    steps, longer = set(), []
    for name, row in rows.items():
        recipe = resolve(row.recipe, row.settings)
        draw = epoch_draw(train, images, recipe.data)
        sampler = TrainSampler(train.image_sizes[images, 0] > 0, recipe.data.batch_per_device, draw=draw)
        steps.add(RunLength.of(recipe, sampler).total_steps)
        if draw.draw.length > len(images):
            longer.append(name)
    assert steps == {2 * -(-len(images) // 8)}
    assert longer == ["rfs", "irfs", "rfs-copy-paste"]


def test_rows_differ_in_data_only(rare):
    rows = rare.rows_for(6000)
    plain = resolve(rows["seesaw"].recipe, rows["seesaw"].settings)
    assert plain.data.epoch_images == 6000
    for row in rows.values():
        assert row.recipe == "demo/seesaw"
        assert all(key.startswith("data.") for key, _, _ in diff(plain, resolve(row.recipe, row.settings)))
    changed = {name: {k for k, _, _ in diff(plain, resolve(row.recipe, row.settings))} for name, row in rows.items()}
    assert changed["copy-paste-uniform"] == {"data.copy_paste", "data.copy_paste_draw"}
    assert changed["colour"] == {"data.colour_jitter"}


def results(rare) -> dict:
    def row(title: str, *rare_aps: float, frequent: float = 0.4) -> dict:
        metrics = {"AP": 0.3, "APc": 0.3, "APf": frequent}
        runs = [{kind: metrics | {"APr": ap} for kind in ("bbox", "segm")} for ap in rare_aps]
        return {"title": title, "command": f"tailseg train {title}", "seeds": [1, 2, 3], "runs": runs}

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
        "images_seen": 12000,
        "machine": "none",
        "not_run": ["+ colour jitter"],
        "rows": {
            "seesaw": row("Seesaw", 0.1, 0.2, 0.3),
            "rfs": row("+ repeat factors", 0.21, 0.32, 0.43, frequent=0.39),
            "irfs": row("+ IRFS", 0.31, 0.42, 0.53),
            "lsj": row("+ jitter", 0.05, 0.15, 0.25, frequent=0.45),
            "copy-paste": row("+ Copy-Paste", 0.3, 0.1, 0.4),
        },
    }


def test_page(rare):
    page = rare.page(results(rare))
    assert "Seesaw Loss alone has APr 20.0 here." in page
    assert (
        "- **Rare classes gain** (the 95 % interval of APr lies above 0), the largest gain first: "
        "IRFS (APr +22.0, APf +0.0); repeat factors (APr +12.0, APf −1.0).\n" in page
    )
    assert "**No difference that these seeds can show**: Copy-Paste (APr +6.7, APf +0.0).\n" in page
    assert "**Rare classes lose** (the interval lies below 0): jitter (APr −5.0, APf +5.0).\n" in page
    assert "| + repeat factors | 30.0 ± 0.0 | 30.0 ± 0.0 | 32.0 ± 11.0 | 30.0 ± 0.0 | 39.0 ± 0.0 |" in page
    # Differences of 11, 12 and 13 points: deviation 1, times 4.303, by √3. Sorted by what the rare classes gain.
    gained = page[page.index("Mean difference") :]
    assert "| + repeat factors | +0.0 [0.0, 0.0] | +0.0 [0.0, 0.0] | +12.0 [9.5, 14.5] |" in gained
    order = [gained.index(f"| {title} |") for title in ("+ IRFS", "+ repeat factors", "+ Copy-Paste", "+ jitter")]
    assert order == sorted(order)
    assert "12,000 images seen in steps of eight" in page
    assert "Not run on this set yet: + colour jitter." in page


def test_page_of_a_set_without_rare_classes(rare):
    """No AP of rare classes is no gain and no loss."""
    found = results(rare)
    for row in found["rows"].values():
        for run in row["runs"]:
            run["segm"]["APr"] = run["bbox"]["APr"] = None
    page = rare.page(found)
    assert "Seesaw Loss alone has no rare class here." in page
    assert "**Rare classes gain** (the 95 % interval of APr lies above 0), the largest gain first: none." in page
    assert "**Rare classes lose** (the interval lies below 0): none." in page


def test_other_rows_stay_as_recorded_if_they_are_of_the_same_data(rare):
    rows = rare.rows_for(6000)
    new = results(rare) | {"rows": {"colour": results(rare)["rows"]["lsj"]}}
    found = rare.merged(new, results(rare), rows)
    assert list(found["rows"]) == ["seesaw", "rfs", "irfs", "copy-paste", "lsj", "colour"]
    assert found["not_run"] == [rows[name].title for name in ("copy-paste-uniform", "rfs-copy-paste")]
    for recorded in ({}, results(rare) | {"images_seen": 1}):
        assert list(rare.merged(new, recorded, rows)["rows"]) == ["colour"]


def test_the_page_in_the_docs_is_that_of_the_recorded_results(rare):
    file, page = FOLDER / "results" / "rare.json", FOLDER.parent / "docs" / "results" / "rare.md"
    assert file.is_file() == page.is_file()
    if file.is_file():
        assert page.read_text() == rare.page(json.loads(file.read_text()))


def test_the_script_runs_goes_on_and_writes(rare, folder, tmp_path, monkeypatch, capsys):
    """With the training itself left out: what a run leaves is written here."""
    started = []

    def run_all(rows, seeds, jobs, out, first):
        started.append((list(rows), seeds, jobs))
        for name in rows:
            for seed in range(1, 1 + seeds):
                run = out / f"{name}-{seed}"
                run.mkdir(parents=True, exist_ok=True)
                scores = {"AP": 0.1, "APr": 0.1 * seed, "APc": 0.1, "APf": 0.1}
                (run / "metrics.json").write_text(json.dumps({"bbox": scores, "segm": scores}))
                (run / "metrics.jsonl").write_text('{"step": 15}\n')

    monkeypatch.setattr(rare, "run_all", run_all)
    files = ["--data", str(folder), "--json", str(tmp_path / "r.json"), "--page", str(tmp_path / "r.md")]
    common = ["rare", *files, "--out", str(tmp_path / "runs"), "--seeds", "2"]
    monkeypatch.setattr("sys.argv", [*common, "--rows", "colour", "--jobs", "5"])
    rare.main()
    assert not (tmp_path / "r.md").exists()  # there is nothing to compare with yet
    monkeypatch.setattr("sys.argv", [*common, "--rows", "seesaw"])
    rare.main()
    assert started == [(["colour"], 2, 5), (["seesaw"], 2, 2)]
    found = json.loads((tmp_path / "r.json").read_text())
    assert list(found["rows"]) == ["seesaw", "colour"]
    assert found["images_seen"] == 120
    assert (tmp_path / "r.md").read_text() == rare.page(found)
    assert "| + colour jitter | 10.0 ± 0.0 | 10.0 ± 0.0 | 15.0 ± 7.1 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*common, "--rows", "rsf"])
    with pytest.raises(SystemExit):
        rare.main()
    assert "unknown rows rsf; there are seesaw, rfs, irfs," in capsys.readouterr().err
