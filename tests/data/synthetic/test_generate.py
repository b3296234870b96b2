"""The built-in data set as files."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lvis import LVIS
from pycocotools import mask as coco_mask

from tailseg.data.synthetic import generate as synthetic
from tailseg.data.synthetic.generate import (
    SyntheticSettings,
    default_synthetic_folder,
    frequency_thresholds,
    image_counts,
    lvis_curve,
    open_synthetic,
    plan_images,
    write_synthetic,
)
from tailseg.data.synthetic.scenes import MAX_OBJECTS, ObjectClass
from tailseg.errors import UserError

SMALL = SyntheticSettings(classes=20, train_images=120, val_images=60, size=64)
TINY = SyntheticSettings(classes=3, train_images=3, val_images=2, size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("synthetic") / "set", SMALL)


@pytest.fixture(scope="module", params=["train", "val"])
def content(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / f"{request.param}.json").read_text())
    return loaded


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kind_of(name: str) -> ObjectClass:
    texture, colour, shape = name.split("_")
    return ObjectClass(shape=shape, colour=colour, texture=texture)


# The curve


def test_the_curve_is_that_of_lvis(shared: Path) -> None:
    with (shared / "data" / "lvis_v1_categories.csv").open() as file:
        real = np.sort([int(row["image_count"]) for row in csv.DictReader(file)])[::-1]
    ours = lvis_curve(np.linspace(0, 1, len(real)))
    assert np.corrcoef(np.log(ours), np.log(real))[0, 1] > 0.995
    assert np.abs(np.log(ours / real)).mean() < 0.06
    assert ours.sum() == pytest.approx(real.sum(), rel=0.03)


def test_groups_have_the_shares_of_lvis() -> None:
    counts = image_counts(1203, 100_000, 1)
    rare_max, common_max = frequency_thresholds(1203, 100_000, 1)
    assert np.mean(counts <= rare_max) == pytest.approx(337 / 1203, abs=0.04)
    assert np.mean(counts > common_max) == pytest.approx(405 / 1203, abs=0.04)


@pytest.mark.parametrize(("classes", "images"), [(2, 1), (2, 500), (40, 800), (1203, 50), (300, 5000)])
def test_counts_fall_with_the_rank_and_fill_the_images(classes: int, images: int) -> None:
    counts = image_counts(classes, images, 3)
    assert len(counts) == classes
    assert (np.diff(counts) <= 0).all()
    assert counts.min() >= 1
    assert counts.max() <= images
    if (classes, images) in {(40, 800), (300, 5000)}:
        assert counts.sum() == pytest.approx(3.2 * images, rel=0.02)
        assert counts.min() == 3


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 9))
def test_plans_hold_each_class_once_an_image(counts: list[int], images: int, seed: int) -> None:
    wanted = np.minimum(np.sort(counts)[::-1], images)
    plan = plan_images(wanted, images, np.random.default_rng(seed))
    assert len(plan) == images
    assert all(len(set(labels)) == len(labels) <= MAX_OBJECTS for labels in plan)
    got = Counter(label for labels in plan for label in labels)
    assert all(got[rank] <= count for rank, count in enumerate(wanted))
    if wanted.sum() <= images:  # room enough wherever the classes fall
        assert [got[rank] for rank in range(len(wanted))] == wanted.tolist()


# The files


def test_the_lvis_package_reads_both_files(folder: Path) -> None:
    for split, number in (("train", 120), ("val", 60)):
        lvis = LVIS(str(folder / f"{split}.json"))
        assert len(lvis.get_img_ids()) == number
        assert len(lvis.get_cat_ids()) == 20
        annotation = lvis.load_anns(lvis.get_ann_ids()[:1])[0]
        assert lvis.ann_to_mask(annotation).sum() == annotation["area"]


def test_boxes_are_tight_and_masks_apart(content: dict[str, Any]) -> None:
    taken: dict[int, np.ndarray] = {}
    for row in content["annotations"]:
        mask = coco_mask.decode(row["segmentation"])
        ys, xs = np.nonzero(mask)
        x, y, w, h = row["bbox"]
        assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert row["area"] == mask.sum() >= 10
        whole = taken.setdefault(row["image_id"], np.zeros_like(mask))
        whole += mask
        assert whole.max() == 1  # a pixel shows one object
    ids = [row["id"] for row in content["annotations"]]
    assert len(set(ids)) == len(ids)


def test_masks_lie_on_the_objects_of_the_written_picture(content: dict[str, Any], folder: Path) -> None:
    """Inside its mask a plain object has the colour it is named after."""
    names = {row["id"]: row["name"] for row in content["categories"]}
    files = {row["id"]: row["file_name"] for row in content["images"]}
    seen = 0
    for row in content["annotations"]:
        if names[row["category_id"]].startswith("plain_red"):
            image = cv2.imread(str(folder / "images" / files[row["image_id"]])).astype(int)
            inside = image[coco_mask.decode(row["segmentation"]).astype(bool)]
            assert np.mean(inside[:, 2] > inside[:, :2].max(axis=1) + 60) > 0.9
            seen += 1
    assert seen > 5


def test_counts_and_groups_are_those_of_the_annotations(folder: Path) -> None:
    train, val = (json.loads((folder / f"{split}.json").read_text()) for split in ("train", "val"))
    for content in (train, val):
        pairs = {(row["category_id"], row["image_id"]) for row in content["annotations"]}
        images = Counter(category for category, _ in pairs)
        instances = Counter(row["category_id"] for row in content["annotations"])
        for row in content["categories"]:
            assert row["image_count"] == images[row["id"]]
            assert row["instance_count"] == instances[row["id"]]
        names = [row["name"] for row in content["categories"]]
        assert names == sorted(names)
        assert [row["id"] for row in content["categories"]] == list(range(1, 21))
    rare_max, common_max = train["info"]["rare_max_images"], train["info"]["common_max_images"]
    for row in train["categories"]:
        count = row["image_count"]
        assert row["frequency"] == ("r" if count <= rare_max else "c" if count <= common_max else "f")
    assert [r["frequency"] for r in val["categories"]] == [r["frequency"] for r in train["categories"]]
    assert {row["frequency"] for row in train["categories"]} == {"r", "c", "f"}
    assert min(row["image_count"] for row in train["categories"]) == 1


def test_the_default_set_has_the_depth_of_lvis() -> None:
    """LVIS v1: 1 to 1,980 training images a class; here as many times fewer at the top as there are images."""
    made = SyntheticSettings()
    counts = image_counts(made.classes, made.train_images, made.rarest)
    assert counts[-1] == 1
    assert 900 < counts[0] < 1100
    assert frequency_thresholds(made.classes, made.train_images, made.rarest) == (8, 66)
    assert image_counts(made.classes, made.train_images, 5).min() == 5


def test_every_class_has_validation_images(folder: Path) -> None:
    val = json.loads((folder / "val.json").read_text())
    assert min(row["image_count"] for row in val["categories"]) >= 6


def test_rare_classes_have_frequent_look_alikes(folder: Path) -> None:
    rows = json.loads((folder / "train.json").read_text())["categories"]
    frequent = [kind_of(row["name"]) for row in rows if row["frequency"] == "f"]
    rare = [kind_of(row["name"]) for row in rows if row["frequency"] == "r"]
    assert len(rare) >= 4
    assert all(any(kind.differs_by_one(other) for other in frequent) for kind in rare)


def test_negatives_are_absent_and_unlabelled_classes_present(content: dict[str, Any]) -> None:
    present: dict[int, set[int]] = {row["id"]: set() for row in content["images"]}
    for row in content["annotations"]:
        present[row["image_id"]].add(row["category_id"])
    for row in content["images"]:
        assert len(row["neg_category_ids"]) == 8
        assert not present[row["id"]] & set(row["neg_category_ids"])
        assert set(row["not_exhaustive_category_ids"]) <= present[row["id"]]
    assert any(row["not_exhaustive_category_ids"] for row in content["images"])


def test_pictures_are_there_and_of_the_size(content: dict[str, Any], folder: Path) -> None:
    for row in content["images"]:
        image = cv2.imread(str(folder / "images" / row["file_name"]))
        assert image.shape == (row["height"], row["width"], 3) == (64, 64, 3)
    assert len(list((folder / "images").iterdir())) == 180


# Determinism


def test_equal_settings_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (read_all(write_synthetic(tmp_path / name, TINY)) for name in ("a", "b"))
    assert first == second
    assert len(first) == 7


def test_another_seed_gives_other_pictures_of_the_same_classes(tmp_path: Path) -> None:
    other = SyntheticSettings(classes=3, train_images=3, val_images=2, size=32, seed=1)
    a, b = write_synthetic(tmp_path / "a", TINY), write_synthetic(tmp_path / "b", other)
    first, second = read_all(a), read_all(b)
    assert all(first[name] != second[name] for name in first)
    names = [[row["name"] for row in json.loads(files["train.json"])["categories"]] for files in (first, second)]
    assert names[0] == names[1]


def test_train_and_val_differ(folder: Path) -> None:
    pictures = [path.read_bytes() for path in (folder / "images").iterdir()]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize(
    "few",
    [
        SyntheticSettings(classes=2, train_images=1, val_images=1, size=32),
        SyntheticSettings(classes=1203, train_images=2, val_images=1, size=48),
    ],
)
def test_very_small_sets_are_valid(few: SyntheticSettings, tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path / "set", few)
    train = json.loads((folder / "train.json").read_text())
    assert len(train["categories"]) == few.classes
    assert len(train["annotations"]) >= 1


# Folders and errors


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_synthetic(tmp_path / "set", TINY, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 5) for i in range(1, 6)]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "set", TINY, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_only_new_or_empty_folders_are_written(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_synthetic(empty, TINY) == empty
    assert (empty / "train.json").is_file()
    with pytest.raises(UserError, match="not empty"):
        write_synthetic(empty, TINY)
    with pytest.raises(UserError, match="already"):
        write_synthetic(empty / "train.json", TINY)
    with pytest.raises(UserError, match="no folder can be made"):
        write_synthetic(empty / "train.json" / "set", TINY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", 1),
        ("classes", 1204),
        ("train_images", 0),
        ("val_images", 0),
        ("size", 31),
        ("rarest", 0),
        ("seed", -1),
    ],
)
def test_impossible_settings_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}"):
        SyntheticSettings(**{name: value})


def test_the_cache_folder_depends_on_settings_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path))
    folder = default_synthetic_folder(TINY)
    assert folder.parent == tmp_path
    assert folder.name.startswith("synthetic-")
    assert folder != default_synthetic_folder(SMALL)
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    assert folder != default_synthetic_folder(TINY)
    monkeypatch.delenv("TAILSEG_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert default_synthetic_folder(TINY).parent == tmp_path / "home" / ".cache" / "tailseg"


def test_open_draws_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    calls: list[int] = []
    first = open_synthetic(TINY, progress=lambda done, total: calls.append(done))
    assert open_synthetic(TINY, progress=lambda done, total: calls.append(done)) == first
    assert calls == [1, 2, 3, 4, 5]


def test_the_second_of_two_writers_takes_the_first_ones_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path))

    def other_process_finishes(done: int, total: int) -> None:
        if done == total:
            write_synthetic(default_synthetic_folder(TINY), TINY)

    folder = open_synthetic(TINY, progress=other_process_finishes)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]
    assert len(read_all(folder)) == 7


def test_two_processes_may_open_at_once(tmp_path: Path) -> None:
    code = (
        "from tailseg.data.synthetic.generate import SyntheticSettings, open_synthetic;"
        "print(open_synthetic(SyntheticSettings(classes=3, train_images=40, val_images=2, size=32)))"
    )
    env = {**os.environ, "TAILSEG_CACHE": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = {run.communicate(timeout=60)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert len(outputs) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".hash"]
