import re
from pathlib import Path

import numpy as np
import pytest
from colour_model import CATEGORIES, colour_model, drawn, example
from PIL import Image
from predictions import save_random_model

pytest.importorskip("sahi")
slices = example("sahi_slices")

# 5 x 4 discs of radius 8 to 27: many are cut by slices of 128 pixels.
DISCS = [(60 + 120 * i, 60 + 110 * j, 8 + 4 * i + j, (i + j) % 3) for i in range(5) for j in range(4)]


def sliced(model: object, picture: object, **options: object) -> list[object]:
    wrapped = slices.TailsegModel(model=model, confidence_threshold=0.5)
    return slices.get_sliced_prediction(picture, wrapped, 128, 128, verbose=0, **options).object_prediction_list


@pytest.mark.parametrize("batch_size", [1, 7])
def test_sahi_finds_every_object_once_as_our_slices_do(batch_size: int) -> None:
    picture, model = drawn(470, 600, DISCS), colour_model(128)
    theirs = sliced(model, picture, batch_size=batch_size)
    # SAHI's boxes end at the last pixel, ours beyond it.
    wanted = {(x - r, y - r, x + r, y + r, CATEGORIES[label].name) for x, y, r, label in DISCS}
    assert len(theirs) == len(DISCS)
    for one in theirs:
        close = [row for row in wanted if np.abs(np.subtract(one.bbox.to_xyxy(), row[:4])).max() <= 3]
        assert [row[4] for row in close] == [one.category.name]
        assert one.category.id == {c.name: c.id for c in CATEGORIES}[one.category.name]
        x1, _, x2, _, _ = close[0]
        disc = np.pi * ((x2 - x1 + 1) / 2) ** 2
        assert one.mask.bool_mask.shape == (470, 600)
        assert one.mask.bool_mask.sum() == pytest.approx(disc, rel=0.1)
    ours = model.predict(picture, score=0.5, slices=128)
    assert sorted(ours.names) == sorted(one.category.name for one in theirs)


def test_a_whole_picture_and_its_score() -> None:
    picture = drawn(100, 100, [(30, 30, 9, 0), (99, 60, 9, 1)])  # the second touches the edge: 0.6
    for least, names in ((0.5, ["fork", "egg_cup"]), (0.7, ["fork"])):
        wrapped = slices.TailsegModel(model=colour_model(100), confidence_threshold=least)
        slices_of_one = slices.get_sliced_prediction(picture, wrapped, 128, 128, verbose=0)
        found = slices_of_one.object_prediction_list
        assert [one.category.name for one in found] == names
        assert found[0].score.value == pytest.approx(0.9)
        assert found[0].bbox.to_xyxy() == [21, 21, 39, 39]
    assert wrapped.category_mapping == {"5": "fork", "7": "egg_cup", "40": "owl"}


def test_an_object_too_thin_for_an_outline_keeps_its_box() -> None:
    picture = drawn(100, 100, [])
    picture[50, 20:40] = (250, 30, 20)
    (one,) = slices.get_sliced_prediction(
        picture, slices.TailsegModel(model=colour_model(100), confidence_threshold=0.5), 128, 128, verbose=0
    ).object_prediction_list
    assert one.mask is None
    assert one.bbox.to_xyxy() == [20, 50, 40, 51]


def test_a_picture_without_objects() -> None:
    assert sliced(colour_model(128), drawn(300, 300, [])) == []


def test_a_model_file_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of random weights."""
    path = tmp_path / "m.safetensors"
    save_random_model(path)
    wrapped = slices.TailsegModel(model_path=str(path), device="cpu", confidence_threshold=0.001)
    picture = drawn(150, 200, [(50, 50, 20, 0)])
    wrapped.perform_inference(picture)
    wrapped.convert_original_predictions()
    found = wrapped.object_prediction_list
    ours = wrapped.model.predict(picture, score=0.001)
    assert [one.category.id for one in found] == ours.category_ids
    assert [one.score.value for one in found] == ours.scores.tolist()
    Image.fromarray(picture).save(tmp_path / "in.png")
    slices.main([str(path), str(tmp_path / "in.png"), "--side", "96", "--score", "0.001"])
    lines = capsys.readouterr().out.splitlines()
    assert [bool(re.fullmatch(r"(SAHI|tailseg): [1-9]\d* objects, \d+\.\d\d s", line)) for line in lines] == [True] * 2
