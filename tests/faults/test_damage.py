"""Every file that we write, damaged at any place: refused in a sentence, made again, or read with the right values."""

import copy
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_tools import TINY, damaged, differences, run, stderr_of, times
from foreign_files import attempt, coco_set
from tiny import SMALL_RECIPE, assert_done, tailseg

from tailseg.checkpoint import load_model, save_model
from tailseg.data.annotations import cache
from tailseg.data.annotations.annotations import Category, load_annotations
from tailseg.data.importers.in_place import import_in_place
from tailseg.data.synthetic.generate import SyntheticSettings, open_synthetic, write_synthetic
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve
from tailseg.training.class_statistics import class_statistics
from tailseg.training.feature_cache import FeatureCache
from tailseg.training.optimizer import build_optimizer
from tailseg.training.resumption import is_recorded, load_trainer, read_trainer
from tailseg.training.run_log import RunLog

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
    write_synthetic(folder / "data", SyntheticSettings(classes=4, train_images=12, val_images=4, size=64, rarest=3))
    assert run(folder / "whole", folder / "data") == 0
    total = int((folder / "whole.events").read_text())
    assert run(folder / "killed", folder / "data", fault="killed", at=total * 3 // 4) == -9
    return folder / "data", folder / "whole", folder / "killed"


# What stands in the folder of a run that was killed, and how often each is tried in `make soak`.
OF_A_RUN = {
    "trainer.safetensors": 5,  # refused where it is damaged
    "last.safetensors": 5,  # written again, as all others
    "best.safetensors": 5,
    "metrics.jsonl": 5,
    "recipe.yaml": 2,
    "detections.json": 2,
    "metrics.json": 2,
    "classes.csv": 2,
}


@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_run_to_be_resumed(runs: tuple[Path, Path, Path], tmp_path: Path, name: str) -> None:
    """A damaged trainer file is refused; what it can make again, the run makes again."""
    data, whole, killed = runs
    rng = random.Random(name)
    for number in range(times(int(name in ("trainer.safetensors", "metrics.jsonl")), OF_A_RUN[name])):
        out = tmp_path / f"run-{number}"
        shutil.copytree(killed, out)
        fault, content = damaged((out / name).read_bytes(), rng)
        (out / name).write_bytes(content)
        code = run(out, data)
        if name == "trainer.safetensors" and code:
            assert code == 1, fault
            assert stderr_of(out).startswith(f"tailseg: {out / name}: "), fault
            continue
        assert code == 0, (fault, stderr_of(out))
        found = differences(out, whole)
        if name == "best.safetensors" and found:  # no later model was better: it stands there, and is refused
            found = [what for what in found if not what.startswith(name)]
            assert attempt(load_model, out / name)[1].startswith(f"{out / name}: "), fault
        assert found in ([], ["metrics.jsonl"] if name == "metrics.jsonl" else []), fault


def test_a_trainer_file(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    recipe = resolve("demo/seesaw", TINY)
    statistics = class_statistics(load_annotations(runs[0] / "train.json", runs[0] / "images"))
    detector = build_detector(recipe, 4, statistics)
    optimizer = build_optimizer(detector, recipe.optimizer)

    def load(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[int, Any]]:
        tensors, about = read_trainer(path)
        load_trainer(path, tensors, detector, optimizer, None)
        return about, copy.deepcopy(detector.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])

    path = tmp_path / "trainer.safetensors"
    shutil.copy(runs[2] / path.name, path)
    about, weights, states = load(path)
    sound, rng = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(sound[:8], "little")
    for number in range(PLACES):
        part = sound[:header] if number % 2 else sound
        fault, content = damaged(part, rng)
        path.write_bytes(content + sound[len(part) :])
        found, sentence = attempt(load, path)
        if found is None:
            assert sentence.startswith(f"{path}: "), fault
            continue
        assert found[0] == about, fault
        assert all(found[1][key].equal(weights[key]) for key in weights), fault
        assert all(found[2][i][key].equal(states[i][key]) for i in states for key in states[i]), fault


def test_a_log(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A line of losses may be wrong or lost; an evaluation counts only as it was."""
    _, whole, _ = runs
    shutil.copy(whole / "best.safetensors", tmp_path)
    path = tmp_path / "metrics.jsonl"
    sound, rng = (whole / path.name).read_bytes(), random.Random(0)
    about = load_model(whole / "best.safetensors")
    path.write_bytes(sound)
    assert is_recorded(tmp_path, about.step, None, RunLog(path, writes=True).metrics_at(about.step))
    lines = set(sound.splitlines())
    for _ in range(PLACES):
        fault, content = damaged(sound, rng)
        path.write_bytes(content)
        log = RunLog(path, writes=True)
        metrics = log.metrics_at(about.step)
        if metrics is not None and is_recorded(tmp_path, about.step, None, metrics):
            assert metrics == about.metrics, fault
        log.cut(10**9)
        assert fault == "cut off" or len(lines - set(path.read_bytes().splitlines())) <= 8, fault


def test_a_file_of_the_feature_cache(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    tensors = {"0.features": torch.rand(7, 5), "0.labels": torch.arange(7)}
    cache.write(3, 11, tensors)
    path = cache.path(3, 11)
    sound, rng = path.read_bytes(), random.Random(0)
    for _ in range(PLACES):
        fault, content = damaged(sound, rng)
        path.write_bytes(content)
        found = cache.read(3, 11, list(tensors))  # None: it is computed again
        assert found is None or all(found[name].equal(value) for name, value in tensors.items()), fault


def test_the_built_in_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path))
    settings = SyntheticSettings(classes=3, train_images=2, val_images=1, size=32)
    folder = open_synthetic(settings)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    rng = random.Random(0)
    for _ in range(PLACES):
        path = rng.choice(sorted(files))
        fault, content = damaged(files[path], rng)
        path.write_bytes(content)
        assert open_synthetic(settings) == folder
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files, fault


def test_there_is_no_other_file(runs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training, an evaluation, a prediction and an import write, and nobody else: the list of this file.

    What they write for others, in formats that have no checksum, is refused or read as it stands (`test_fuzz.py`).
    """
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST", 0)
    monkeypatch.setattr(cache, "_SETTLED", -1e9)
    data, whole, killed = runs
    for folder in (whole, killed):
        assert {path.name for path in folder.rglob("*") if not path.name.startswith(".")} == set(OF_A_RUN)
    model = whole / "last.safetensors"
    assert_done(tailseg("eval", model, "--data", data, "--out", tmp_path / "eval"))
    assert names_in(tmp_path / "eval") == {"detections.json", "metrics.json", "classes.csv"}
    image = next((data / "images").iterdir())
    assert_done(tailseg("predict", model, image, "--out", tmp_path / "predict"))
    assert names_in(tmp_path / "predict") == {f"{image.stem}.json", f"{image.stem}.png"}
    source = coco_set(tmp_path / "set", "result.json", "images", range(6))
    assert_done(tailseg("data", "convert", "coco", source, tmp_path / "converted"))
    assert {name for name in names_in(tmp_path / "converted") if not name.endswith(".jpg")} == {
        "train.json",
        "val.json",
    }
    assert_done(tailseg("data", "check", source))
    open_synthetic(SyntheticSettings(classes=3, train_images=2, val_images=1, size=32))
    kinds = {re.sub(r"[0-9a-f]{12,}", "*", name) for name in names_in(tmp_path / "cache")}
    assert kinds - {name for name in kinds if name.endswith((".jpg", ".png"))} == {
        *("*.columns", "*.stamp", "import.json", "train.json", "val.json", "synthetic-*.hash"),
    }


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}
