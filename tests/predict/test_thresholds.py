"""Lowest scores by class: what a file may hold, and that pictures, JSON, sets and videos follow it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from predictions import CATEGORIES
from tiny import assert_done, assert_refused
from tiny import tailseg as tailseg_command

from tailseg.errors import UserError
from tailseg.predict import Model
from tailseg.predict.thresholds import class_scores
from tailseg.predict.video import VideoFile
from tailseg.predict.writing import Request, predict_files


def test_scores_by_label(tmp_path: Path) -> None:
    content = {"default": 0.25, "classes": {"owl": 1, "egg_cup": 0}}
    assert class_scores(content, CATEGORIES) == (0.25, 0.0, 1.0)
    assert class_scores({"default": 0.5}, CATEGORIES) == (0.5, 0.5, 0.5)
    (tmp_path / "thresholds.json").write_text(json.dumps(content))
    assert class_scores(tmp_path / "thresholds.json", CATEGORIES) == (0.25, 0.0, 1.0)
    assert class_scores({"default": 0.5, "classes": {"Egg cup": 0.1}}, CATEGORIES) == (0.5, 0.1, 0.5)
    twins = (*CATEGORIES, CATEGORIES[0])
    assert class_scores({"default": 0.5, "classes": {"fork": 0.1}}, twins) == (0.1, 0.5, 0.5, 0.1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"default": 0.5, "classes": {"oul": 0.1}}, "the model has no class 'oul'; the nearest is 'owl'"),
        ({"default": 1.5}, "'default' is 1.5, expected a score from 0 to 1"),
        ({"default": 0.5, "classes": {"owl": -0.1}}, "the threshold of 'owl' is -0.1, expected a score from 0 to 1"),
        ({"default": 0.5, "classes": {"owl": "0.4"}}, "the threshold of 'owl' is '0.4', expected a score"),
        ({"default": True}, "'default' is True, expected a score"),
        ({"default": math.nan}, "'default' is nan, expected a score"),
        ({"default": 0.5, "classes": ["owl"]}, r"'classes' is \['owl'\], expected names with scores"),
        ({"classes": {"owl": 0.4}}, "expected an object with 'default', such as"),
        ({"default": 0.5, "owl": 0.4}, "unknown entry 'owl'; there are 'default' and 'classes'"),
    ],
)
def test_faulty_content(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^thresholds: {message}"):
        class_scores(content, CATEGORIES)


def test_faulty_files(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(UserError, match=r"t\.json: cannot be read \(No such file or directory\)"):
        class_scores(path, CATEGORIES)
    for text, message in (("{", "is not JSON"), ("[0.5]", "expected an object"), ("[" * 100_000, "is not JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"t\.json: {message}"):
            class_scores(path, CATEGORIES)


@pytest.fixture
def content(model: Model, picture: np.ndarray) -> dict[str, Any]:
    """Thresholds just at the score of an object of the most frequent class, and above all others."""
    found = model.predict(picture, score=0)
    label = int(found.labels.mode().values)
    scores = found.scores[found.labels == label]
    return {"default": 1.0, "classes": {model.names[label]: float(scores[len(scores) // 2])}}


def expected(model: Model, content: dict[str, Any], source: Any, **options: Any) -> torch.Tensor:
    """Scores of the objects that reach their class's threshold."""
    found = model.predict(source, score=0, max_detections=1000, **options)
    least = torch.tensor([content["classes"].get(name, content["default"]) for name in found.names])
    return found.scores[found.scores >= least]


def test_from_python(model: Model, picture: np.ndarray, content: dict[str, Any], tmp_path: Path) -> None:
    found = model.predict(picture, thresholds=content, max_detections=1000)
    assert 0 < len(found) < len(model.predict(picture, score=0))
    assert torch.equal(found.scores, expected(model, content, picture))
    assert set(found.names) == set(content["classes"])
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert torch.equal(model.predict(picture, thresholds=tmp_path / "t.json").scores, found.scores[:9])
    (listed,) = model.predict([picture], thresholds=str(tmp_path / "t.json"))
    assert torch.equal(listed.scores, found.scores[:9])
    everything = model.predict(picture, thresholds={"default": 0})
    assert torch.equal(everything.scores, model.predict(picture, score=0).scores)
    with pytest.raises(ValueError, match=r"score=0.5 and thresholds: each states the lowest score; give one"):
        model.predict(picture, thresholds=content, score=0.5)


def test_what_misses_its_threshold_takes_no_place(model: Model, picture: np.ndarray) -> None:
    """The limit counts what is shown: the best class is turned off, and as many of the others come."""
    found = model.predict(picture, score=0, max_detections=1000)
    best = found.names[0]
    shown = model.predict(picture, thresholds={"default": 0, "classes": {best: 1}}, max_detections=3)
    others = found[torch.tensor([name != best for name in found.names])]
    assert len(others) > 3
    assert torch.equal(shown.scores, others.scores[:3])


def test_in_slices(model: Model, picture: np.ndarray, content: dict[str, Any]) -> None:
    large = np.tile(picture, (2, 2, 1))
    found = model.predict(large, thresholds=content, slices=64)
    assert set(found.names) <= set(content["classes"])
    (threshold,) = content["classes"].values()
    assert bool((found.scores >= torch.tensor(threshold)).all())
    everything = model.predict(large, thresholds={"default": 0}, slices=64)
    assert torch.equal(everything.scores, model.predict(large, score=0, slices=64).scores)


def test_files_and_pictures_follow(model: Model, picture: np.ndarray, content: dict[str, Any], tmp_path: Path) -> None:
    Image.fromarray(picture).save(tmp_path / "p.png")
    with VideoFile(tmp_path / "clip.mp4", 5) as video:
        for _ in range(2):
            video.add(picture)
    (tmp_path / "t.json").write_text(json.dumps(content))
    request = Request([tmp_path / "p.png", tmp_path / "clip.mp4"], thresholds=tmp_path / "t.json", show=False)
    tally = predict_files(model, request, tmp_path / "out")
    wanted = expected(model, content, picture)[:9]
    rows = json.loads((tmp_path / "out" / "p.json").read_text())["detections"]
    assert [row["score"] for row in rows] == pytest.approx(wanted.tolist())
    drawn = np.array(Image.open(tmp_path / "out" / "p.png").convert("RGB"))
    np.testing.assert_array_equal(drawn, np.array(model.predict(picture, thresholds=content).plot()))
    frames = [json.loads(line) for line in (tmp_path / "out" / "clip.jsonl").read_text().splitlines()]
    assert len(frames) == 2
    names = {row["category"] for frame in frames for row in frame["detections"]}
    assert names <= set(content["classes"])
    assert tally.pictures == 3
    (tmp_path / "none.json").write_text('{"default": 1}')
    nothing = predict_files(model, Request([tmp_path / "p.png"], thresholds=tmp_path / "none.json"), tmp_path / "none")
    assert nothing.sentence().endswith(f"nothing there reaches its class's score in {tmp_path / 'none.json'}")


def test_the_command(path: Path, model: Model, picture: np.ndarray, content: dict[str, Any], tmp_path: Path) -> None:
    Image.fromarray(picture).save(tmp_path / "p.png")
    (tmp_path / "t.json").write_text(json.dumps(content))
    line = ("predict", path, "p.png", "--device", "cpu", "--thresholds", "t.json")
    assert_done(tailseg_command(*line, cwd=tmp_path))
    rows = json.loads((tmp_path / "predictions" / "p.json").read_text())["detections"]
    assert [row["score"] for row in rows] == pytest.approx(expected(model, content, picture)[:9].tolist())
    assert_done(tailseg_command(*line, "--format", "coco", "--out", "set", cwd=tmp_path))
    (written,) = [file for file in (tmp_path / "set").rglob("*.json") if "annotations" in json.loads(file.read_text())]
    assert len(json.loads(written.read_text())["annotations"]) == len(rows)
    both = tailseg_command(*line, "--score", "0.3", cwd=tmp_path)
    assert both.returncode == 2
    assert "--thresholds" in both.stderr
    assert "as --score does; give one" in both.stderr
    (tmp_path / "t.json").write_text('{"default": 0.5, "classes": {"oul": 0.4}}')
    faulty = tailseg_command(*line, "--out", "other", cwd=tmp_path)
    assert_refused(faulty, "t.json: the model has no class 'oul'; the nearest is 'owl'")
    assert not (tmp_path / "other").exists()
