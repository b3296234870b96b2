"""Where the validation set's results come from, and what is refused."""

import json
import os
from pathlib import Path

import pytest
from checked_browser import write_set
from predictions import save_random_model
from tiny import assert_refused, tailseg

import tailseg as package
from tailseg.app import validation
from tailseg.app.browser import Query
from tailseg.app.validation import open_browser
from tailseg.errors import UserError
from tailseg.evaluation.findings import RIGHT


@pytest.fixture
def model(tmp_path: Path) -> package.Model:
    save_random_model(tmp_path / "m.safetensors")
    return package.load(tmp_path / "m.safetensors", "cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_set(tmp_path / "discs")
    return tmp_path / "discs"


def never(*_: object, **__: object) -> None:
    raise AssertionError("evaluated")


def test_newer_results_beside_the_model_are_taken(
    model: package.Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "saved").rename(tmp_path / "eval-discs-val")
    with monkeypatch.context() as patched:
        patched.setattr(validation, "evaluate", never)
        browser = open_browser(model, str(data), tmp_path / "scratch", show=False)
    assert [browser.name(image) for image in browser.images(Query()).tolist()] == ["5.png", "9.png"]
    os.utime(tmp_path / "m.safetensors", (2e9, 2e9))  # the model was trained again
    browser = open_browser(model, str(data), tmp_path / "scratch", show=False)
    assert (tmp_path / "scratch" / "analysis.json").is_file()
    assert (browser.findings.kind == RIGHT).sum() == 0  # its weights are random


def test_without_results_the_model_is_evaluated(model: package.Model, data: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    browser = open_browser(model, str(data), scratch, show=False)
    threshold = json.loads((scratch / "analysis.json").read_text())["segm"]["threshold"]
    assert browser.findings.threshold == (0.5 if threshold is None else threshold["score"])
    assert not (tmp_path / "eval-discs-val").exists()


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
def test_damaged_results_are_named(model: package.Model, data: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = tmp_path / "eval-discs-val"
    (data / "saved").rename(folder)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: is not what `tailseg eval --analyse` writes .*; evaluate again"):
        open_browser(model, str(data), tmp_path / "scratch", show=False)


def test_data_without_a_validation_split_is_one_sentence(model: package.Model, data: Path, tmp_path: Path) -> None:
    about = data / "data.yaml"
    about.write_text("train: val.json\nimages: images\n")
    done = tailseg("app", tmp_path / "m.safetensors", "--data", about, "--port", 0, "--device", "cpu")
    assert_refused(done, f"{about}: the entry 'val' is missing; add it")


def test_a_validation_split_without_annotations(model: package.Model, data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "val.json").read_text()) | {"annotations": []}
    (data / "val.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"val\.json: has no annotations to compare with; give a validation split"):
        open_browser(model, str(data), tmp_path / "scratch", show=False)
