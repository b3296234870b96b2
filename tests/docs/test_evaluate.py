"""The Python of the page on evaluating and predicting runs, from top to bottom in one session."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SMALL_RECIPE

from tailseg.checkpoint import save_model
from tailseg.data.annotations.annotations import Category
from tailseg.model.build import build_detector
from tailseg.predict.video import VideoFile
from tailseg.recipes.resolve import resolve

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
CATEGORIES = (Category(5, "fork", "f", 9, 9), Category(7, "egg_cup", "r", 1, 1), Category(40, "owl", "c", 3, 3))


def test_the_python_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("supervision")
    pytest.importorskip("pandas")
    torch.manual_seed(0)
    recipe = resolve("demo/cross-entropy", SMALL_RECIPE)
    detector = build_detector(recipe, len(CATEGORIES))
    with torch.no_grad():  # random weights, but sure of one class, and that masks are full
        detector.stages[0].box_head.classifier.bias[1] += 6
        detector.stages[0].mask_head.predictor.bias += 2
    (tmp_path / "runs" / "seesaw").mkdir(parents=True)
    save_model(tmp_path / "runs" / "seesaw" / "best.safetensors", detector, recipe, CATEGORIES, step=0)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    Image.fromarray(np.tile(pixels, (2, 20, 1))).save(tmp_path / "aerial.png")
    with VideoFile(tmp_path / "clip.mp4", 5) as video:
        for _ in range(3):
            video.add(pixels)
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, session)
    found, sure = session["found"], session["sure"]
    assert len(found) > 0
    assert sorted(path.name for path in tmp_path.glob("drawn-*")) == ["drawn-a.png", "drawn-b.png"]
    assert [len(part) for part in session["pair"]] == [len(found)] * 2
    assert len(session["owls"]) == 3
    assert session["large"].image_hw == (120, 1600)
    assert session["mask"].shape == (60, 80)
    assert json.loads(Path("results.json").read_text()) == found.to_coco(1)
    assert session["areas"] == sure.to_pandas()["area"].tolist()
    assert len(session["corners"]) >= len(session["areas"])
    assert Path("photo-drawn.png").stat().st_size > 0
    assert set(session["table"].index) == set(found.names)
    assert session["annotated"].shape == (60, 80, 3)
    assert capsys.readouterr().out == f"{len(found)} {sure!r}\n"
