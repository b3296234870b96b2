"""Where the validation set's results come from, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from checked_browser import write_set
from predictions import save_random_model
from tiny import assert_refused, tailseg

import tailseg as package
from tailseg.app import validation
from tailseg.app.browser import Query
from tailseg.app.validation import open_browser, read_browser
from tailseg.data.annotations.annotations import load_annotations
from tailseg.errors import UserError
from tailseg.evaluation.findings import RIGHT


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a data set, and an evaluation of it."""
    folder = tmp_path_factory.mktemp("written")
    save_random_model(folder / "m.safetensors")
    write_set(folder / "discs")
    return folder


@pytest.fixture
def place(written: Path, tmp_path: Path) -> Path:
    """A copy of them that may be changed."""
    return Path(shutil.copytree(written, tmp_path / "place"))


@pytest.fixture
def model(place: Path) -> package.Model:
    return package.load(place / "m.safetensors", "cpu")


def never(*_: object, **__: object) -> None:
    raise AssertionError("evaluated")


def test_newer_results_beside_the_model_are_taken(
    model: package.Model, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, scratch = str(place / "discs"), place / "scratch"
    (place / "discs" / "saved").rename(place / "eval-discs-val")
    with monkeypatch.context() as patched:
        patched.setattr(validation, "evaluate", never)
        browser = open_browser(model, data, scratch, show=False)
    assert [browser.name(image) for image in browser.images(Query()).tolist()] == ["5.png", "9.png"]
    os.utime(place / "m.safetensors", (2e9, 2e9))  # the model was trained again: it is evaluated
    browser = open_browser(model, data, scratch, show=False)
    assert (browser.findings.kind == RIGHT).sum() == 0  # its weights are random
    threshold = json.loads((scratch / "analysis.json").read_text())["segm"]["threshold"]
    assert browser.findings.threshold == (0.5 if threshold is None else threshold["score"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("analysis.json", "{"),
        ("analysis.json", "[]"),
        ("analysis.json", '{"segm": {"threshold": null}}'),
        ("analysis.json", '{"segm": {"threshold": null, "classes": [{"id": 5}]}}'),
        ("metrics.json", '{"bbox": {}}'),
    ],
)
def test_damaged_results_are_named(place: Path, name: str, content: str) -> None:
    data = place / "discs"
    (data / "saved" / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: is not what `tailseg eval --analyse` writes .*; evaluate again"):
        read_browser(load_annotations(data / "val.json", data / "images"), data / "saved")


def test_data_without_a_validation_split_is_one_sentence(place: Path) -> None:
    about = place / "discs" / "data.yaml"
    about.write_text("train: val.json\nimages: images\n")
    done = tailseg("app", place / "m.safetensors", "--data", about, "--port", 0, "--device", "cpu")
    assert_refused(done, f"{about}: the entry 'val' is missing; add it")


def test_a_validation_split_without_annotations(model: package.Model, place: Path) -> None:
    val = place / "discs" / "val.json"
    val.write_text(json.dumps(json.loads(val.read_text()) | {"annotations": []}))
    with pytest.raises(UserError, match=r"val\.json: has no annotations to compare with; give a validation split"):
        open_browser(model, str(place / "discs"), place / "scratch", show=False)
