"""Pictures that users drop: what is kept, chosen, drawn and listed."""

import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
from colour_model import CATEGORIES, COLOURS, colour_model, drawn
from numpy.typing import NDArray
from PIL import Image

import tailseg
from tailseg.app import pictures
from tailseg.app.pictures import Choice, Seen, classes_found, frequency_groups, look, picture_shown, sentence, table

# A fork of 0.9 and an owl of 0.9; an egg cup at the edge, of 0.6.
DISCS = [(40, 30, 12, 0), (96, 60, 16, 2), (4, 80, 10, 1)]


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model() -> tailseg.Model:
    return colour_model(96)


@pytest.fixture(scope="module")
def seen(model: tailseg.Model) -> Seen:
    (one,), faults = look(model, [("folder/photo.png", png(drawn(96, 128, DISCS)))])
    assert not faults
    return one


def test_all_detections_are_kept_with_the_area_of_their_masks(seen: Seen) -> None:
    assert seen.name == "photo.png"
    assert seen.found.names == ["fork", "owl", "egg_cup"]
    bitmap = (abs(drawn(96, 128, DISCS).astype(int) - COLOURS[2]) < 60).all(2)
    assert seen.areas[1] == pytest.approx(bitmap.sum(), rel=0.05)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (Choice(0.0), ["fork", "owl", "egg_cup"]),
        (Choice(0.7), ["fork", "owl"]),
        (Choice(0.95), []),
        (Choice(0.0, frozenset({1, 2})), ["owl", "egg_cup"]),
        (Choice(0.7, frozenset({1})), []),
        (Choice(0.0, frozenset({1, 7, -1, 1 << 64})), ["egg_cup"]),  # there are no such classes
        (Choice(0.0, frozenset({7})), []),
    ],
)
def test_a_choice_is_by_score_and_class(seen: Seen, choice: Choice, names: list[str]) -> None:
    assert seen.found[choice.of(seen.found)].names == names
    assert [row[0] for row in table(seen, choice)] == names


def test_a_row_of_the_table_has_class_group_score_box_and_area(seen: Seen) -> None:
    name, group, score, x, y, width, height, area = table(seen, Choice(0.0))[2]
    assert (name, group, score) == ("egg_cup", "rare", 0.6)
    assert (x, y) == (0, 70)
    assert (width, height) == (15, 21)  # cut by the left edge
    assert area == seen.areas[2]


def test_a_model_that_does_not_know_its_training_images_has_no_groups() -> None:
    assert frequency_groups(CATEGORIES) == ["frequent", "rare", "common"]
    converted = [replace(category, image_count=0) for category in CATEGORIES]
    assert frequency_groups(converted) == ["–", "–", "–"]
    assert frequency_groups([]) == []


def test_classes_are_listed_by_their_best_score_with_their_labels(seen: Seen) -> None:
    assert classes_found([seen, seen]) == [("fork", 0), ("owl", 2), ("egg_cup", 1)]
    assert classes_found([]) == []


def pixels_of(jpeg: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(jpeg)))


def test_the_picture_shows_the_chosen_objects_alone(seen: Seen) -> None:
    none, all_of_them = pixels_of(picture_shown(seen, Choice(1.0))), pixels_of(picture_shown(seen, Choice(0.0)))
    assert none.shape == all_of_them.shape == (480, 640, 3)  # a small picture is enlarged, so that names have room
    plain = cv2.resize(drawn(96, 128, DISCS), (640, 480), interpolation=cv2.INTER_CUBIC)
    assert np.abs(none.astype(int) - plain).mean() < 2
    owls = pixels_of(picture_shown(seen, Choice(0.0, frozenset({2}))))
    changed = np.abs(owls.astype(int) - none).max(2) > 60
    assert changed[200:400, 390:570].any()  # the owl's surroundings
    assert not changed[:120, :240].any()  # the fork's


def test_nothing_is_computed_when_the_choice_changes(
    model: tailseg.Model, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(model.detector, "detect", lambda *arguments: asked.append(arguments))
    few, many = table(seen, Choice(1.0)), table(seen, Choice(0.0))
    assert len(few) < len(many)
    assert picture_shown(seen, Choice(1.0)) != picture_shown(seen, Choice(0.0))
    assert asked == []


def test_a_large_picture_is_shown_smaller_with_its_objects_in_place(model: tailseg.Model) -> None:
    (one,), _ = look(model, [("large.png", png(drawn(800, 2560, [(2000, 400, 90, 0)])))])
    assert one.small.shape == (400, 1280, 3)
    assert one.small_found.image_hw == (400, 1280)
    x1, y1, x2, y2 = one.small_found.boxes[0].tolist()
    assert (x1 + x2) / 2 == pytest.approx(1000, abs=6)
    assert (y1 + y2) / 2 == pytest.approx(200, abs=6)
    whole = one.whole(Choice(0.0))
    assert whole.picture.shape == (800, 2560, 3)


def test_a_picture_without_objects(model: tailseg.Model) -> None:
    (one,), _ = look(model, [("empty.png", png(drawn(64, 64, [])))])
    assert table(one, Choice(0.0)) == []
    assert picture_shown(one, Choice(0.0))
    assert sentence([one], Choice(0.5), 0) == "empty.png: 0 objects, at whatever score"


def test_the_sentence_counts_and_says_how_to_see_more(seen: Seen) -> None:
    assert sentence([seen], Choice(0.0), 0) == "photo.png: 3 objects"
    assert sentence([seen], Choice(0.7, frozenset({2})), 0) == "photo.png: 1 object"
    low = sentence([seen], Choice(0.95), 0)
    assert low == "photo.png: 0 objects; the best score is 0.9, so lower the lowest score"


def test_faulty_files_are_named_and_the_others_seen(model: tailseg.Model) -> None:
    good = png(drawn(64, 64, DISCS[:1]))
    seen, faults = look(
        model, [("a.png", good), ("../../etc/passwd", b"root:x:0:0"), ("cut.png", good[:200]), ("C:\\b.png", good)]
    )
    assert [one.name for one in seen] == ["a.png", "b.png"]
    assert faults[0] == "passwd: not an image that can be read; replace it by a JPEG or PNG file"
    assert faults[1].startswith("cut.png: the image is broken or cut off")
    assert len(faults) == 2


def test_the_sentences_are_those_of_predict(model: tailseg.Model) -> None:
    for content in (b"", b"no image", png(drawn(64, 64, []))[:90]):
        with pytest.raises(tailseg.UserError) as refused:
            model.predict(content)
        _, (fault,) = look(model, [("image", content)])
        assert fault == str(refused.value)


def test_files_and_pictures_that_are_too_large(model: tailseg.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS", 64 * 63)
    _, faults = look(model, [("a.png", png(drawn(64, 64, [])))])
    assert faults == [
        "a.png: the image is too large (4,096 pixels, the limit is 4,032); shrink it or cut it into pieces"
    ]
    monkeypatch.setattr(pictures, "MOST_BYTES", 9)
    _, faults = look(model, [("a.png", b"0123456789")])
    assert faults == ["a.png: the file is too large (10 bytes, the limit is 9); shrink the picture"]


def test_more_pictures_than_are_taken_at_a_time(model: tailseg.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_PICTURES", 1)
    good = png(drawn(64, 64, []))
    seen, faults = look(model, [("a.png", good), ("b.png", good)])
    assert len(seen) == 1
    assert faults == ["b.png: 1 pictures at a time are the most; drop the others by themselves"]
