from pathlib import Path

import numpy as np
import pytest
from colour_model import colour_model, drawn, example
from PIL import Image
from predictions import save_random_model

pytest.importorskip("supervision")
slices = example("supervision_slices")

# 5 x 4 discs of radius 8 to 27: many are cut by slices of 128 pixels, but none is wider than twice their overlap of 26.
DISCS = [(60 + 120 * i, 60 + 110 * j, 8 + 4 * i + j, (i + j) % 3) for i in range(5) for j in range(4)]


def test_every_object_of_a_large_picture_is_found_once_and_whole() -> None:
    picture = drawn(470, 600, DISCS)
    found = slices.slicer(colour_model(128), 128)(picture)
    names = ["fork", "egg_cup", "owl"]
    boxes = {(x - r, y - r, x + r + 1, y + r + 1, names[label]) for x, y, r, label in DISCS}
    rows = [(*box, name) for box, name in zip(found.xyxy.tolist(), found["class_name"].tolist(), strict=True)]
    assert len(rows) == len(DISCS)
    assert set(rows) == boxes
    assert [names[label] for label in found.class_id] == found["class_name"].tolist()
    masks = np.array([found.mask[i] for i in range(len(found))])
    assert masks.shape == (20, 470, 600)
    coloured = (picture != 120).any(axis=2)
    assert (masks.any(axis=0) & coloured).sum() > 0.97 * (masks.any(axis=0) | coloured).sum()


def test_what_is_much_wider_than_the_overlap_stays_in_parts_other_than_with_our_slices() -> None:
    """As the page says."""
    picture, model = drawn(470, 600, [(230, 240, 70, 0)]), colour_model(128)
    assert len(slices.slicer(model, 128)(picture)) == 2
    (ours,) = model.predict(picture, score=0.5, slices=128)
    assert ours.boxes.tolist() == [pytest.approx([160, 170, 301, 311], abs=3)]


def test_the_score_is_the_lowest_of_an_object() -> None:
    picture = drawn(100, 100, [(30, 30, 9, 0), (99, 60, 9, 1)])  # the second touches the edge: 0.6
    model = colour_model(100)
    assert slices.slicer(model, 128, score=0.5)(picture)["class_name"].tolist() == ["fork", "egg_cup"]
    assert slices.slicer(model, 128, score=0.7)(picture)["class_name"].tolist() == ["fork"]


def test_a_picture_without_objects() -> None:
    assert len(slices.slicer(colour_model(128), 128)(drawn(300, 300, []))) == 0


def test_the_command_counts_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(drawn(300, 400, [(50, 50, 20, 0), (300, 200, 20, 0), (100, 200, 20, 2)])).save(tmp_path / "in.png")
    monkeypatch.setattr(slices.tailseg, "load", lambda path: colour_model(128))
    slices.main(["m.safetensors", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--side", "128"])
    assert capsys.readouterr().out == "    2 fork\n    1 owl\n"
    out = np.asarray(Image.open(tmp_path / "out.png"))
    assert out.shape == (300, 400, 3)
    assert (out[200, 300] != (250, 30, 20)).any()  # painted over
    assert (out[280, 10] == 120).all()


def test_the_command_takes_a_model_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of random weights, whose objects are many and overlap."""
    save_random_model(tmp_path / "m.safetensors")
    Image.fromarray(drawn(150, 200, [(50, 50, 20, 0)])).save(tmp_path / "in.jpg")
    paths = [str(tmp_path / name) for name in ("m.safetensors", "in.jpg", "out.jpg")]
    slices.main([*paths, "--side", "96", "--score", "0.001"])
    counts = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sum(int(count) for count, _ in counts) > 0
    assert {name for _, name in counts} <= {"fork", "egg_cup", "owl"}
    assert Image.open(tmp_path / "out.jpg").size == (200, 150)
