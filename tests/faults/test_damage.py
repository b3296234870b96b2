"""Every file that we write, damaged at any place: refused in a sentence, made again, or read with the right values."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_tools import damaged, differences, run, times
from foreign_files import attempt, coco_set
from tiny import SMALL_RECIPE

from tailseg.checkpoint import load_model, save_model
from tailseg.data.annotations import cache
from tailseg.data.annotations.annotations import Category, load_annotations
from tailseg.data.importers.in_place import import_in_place
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve

PLACES = times(20, 200)


def columns_of(path: Path) -> dict[str, Any]:
    found = load_annotations(path, path.parent)
    names = ("image_ids", "boxes", "labels", "areas", "crowd", "first_annotation")
    values = {name: np.asarray(getattr(found, name)).tolist() for name in names}
    values["masks"] = [[p.tolist() for p in found.segmentation(row)] for row in range(len(found.labels))]
    return values | {"names": list(found.file_names), "categories": found.categories}


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, dict[str, Any]]:
    """An annotation file, its cache file, and what stands in it."""
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST", 0)
    monkeypatch.setattr(cache, "_SETTLED", -1e9)
    path = coco_set(tmp_path / "set", "train.json", "images", range(40)) / "train.json"
    values = columns_of(path)
    (columns,) = (tmp_path / "cache" / "annotations").glob("*.columns")
    return path, columns, values


@pytest.mark.parametrize("kind", ["columns", "stamp"])
def test_the_cache_of_annotations(opened: tuple[Path, Path, dict[str, Any]], kind: str) -> None:
    path, columns, values = opened
    (file,) = columns.parent.glob(f"*.{kind}")
    sound, rng = file.read_bytes(), random.Random(kind)
    for _ in range(PLACES):
        fault, content = damaged(sound, rng)
        file.write_bytes(content)
        assert columns_of(path) == values, fault


def test_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    source = coco_set(tmp_path / "set", "result.json", "images", range(6))
    found = import_in_place("coco", source)
    files = {path: path.read_bytes() for path in found.train.parent.iterdir()}
    rng = random.Random(0)
    for _ in range(PLACES):
        path = rng.choice(sorted(files))
        fault, content = damaged(files[path], rng)
        path.write_bytes(content)
        assert import_in_place("coco", source) == found, fault
        assert {path: path.read_bytes() for path in found.train.parent.iterdir()} == files, fault


def test_a_model(tmp_path: Path) -> None:
    recipe = resolve("demo/seesaw", SMALL_RECIPE)
    categories = (Category(3, "cat", "r", 1, 2), Category(5, "owl", "f", 200, 300))
    path = tmp_path / "model.safetensors"
    save_model(path, build_detector(recipe, 2), recipe, categories, step=7)
    model = load_model(path)
    sound, rng = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(sound[:8], "little")
    for number in range(PLACES):
        fault, content = damaged(sound[:header] if number % 2 else sound, rng)
        path.write_bytes(content + sound[header:] if number % 2 else content)
        found, sentence = attempt(load_model, path)
        if found is None:
            assert sentence.startswith(f"{path}: "), fault
            continue
        assert (found.recipe, found.categories, found.step) == (recipe, categories, 7), fault
        assert found.state.keys() == model.state.keys(), fault
        assert all(found.state[key].equal(model.state[key]) for key in model.state), fault


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A data set, a run that was killed in its second epoch, and one that was not."""
    folder = tmp_path_factory.mktemp("runs")
    write_synthetic(folder / "data", SyntheticSettings(classes=4, train_images=12, val_images=4, size=64))
    assert run(folder / "whole", folder / "data") == 0
    total = int((folder / "whole.events").read_text())
    assert run(folder / "killed", folder / "data", fault="killed", at=total * 3 // 4) == -9
    return folder / "data", folder / "whole", folder / "killed"


@pytest.mark.parametrize("name", ["trainer.safetensors", "metrics.jsonl", "last.safetensors"])
def test_a_run_to_be_resumed(runs: tuple[Path, Path, Path], tmp_path: Path, name: str) -> None:
    """A damaged trainer file is refused; what it can make again, the run makes again."""
    data, whole, killed = runs
    rng = random.Random(name)
    for number in range(times(2, 40)):
        out = tmp_path / f"run-{number}"
        shutil.copytree(killed, out)
        fault, content = damaged((out / name).read_bytes(), rng)
        (out / name).write_bytes(content)
        code = run(out, data)
        if code == 0:
            found = [] if name == "metrics.jsonl" else differences(out, whole)
            assert found == [], fault
        else:
            assert code == 1, fault
