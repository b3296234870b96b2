import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predictions import rectangles

import tailseg
from tailseg.predict.slices import slice_windows

Window = tuple[int, int, int, int]


def windows(hw: tuple[int, int], side: int, overlap: float) -> list[Window]:
    return [tuple(row) for row in slice_windows(hw, side, overlap).tolist()]


def test_slices_by_hand() -> None:
    assert windows((100, 100), 100, 0.2) == [(0, 0, 100, 100)]
    assert windows((30, 250), 100, 0.25) == [(0, 0, 100, 30), (75, 0, 175, 30), (150, 0, 250, 30)]
    assert windows((200, 101), 100, 0) == [(0, 0, 100, 100), (1, 0, 101, 100), (0, 100, 100, 200), (1, 100, 101, 200)]
    assert windows((1, 3), 1, 0.9) == [(0, 0, 1, 1), (1, 0, 2, 1), (2, 0, 3, 1)]


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 150), st.floats(0, 0.9))
def test_slices_cover_the_picture_with_the_overlap(height: int, width: int, side: int, overlap: float) -> None:
    found = windows((height, width), side, overlap)
    for axis, length in ((0, width), (1, height)):
        spans = sorted({(window[axis], window[axis + 2]) for window in found})
        assert spans[0][0] == 0
        assert spans[-1][1] == length
        assert {stop - start for start, stop in spans} == {min(side, length)}
        for (_, stop), (start, _) in itertools.pairwise(spans):
            assert stop - start >= min(overlap * side - 1, side - 1) - 1e-9


def test_a_picture_of_one_slice_is_predicted_as_it_is(model: tailseg.Model) -> None:
    picture = rectangles()
    plain = model.predict(picture)
    for found in (model.predict(picture, slices=80), model.predict([picture], slices=4000)[0]):
        for field in ("boxes", "scores", "labels", "masks"):
            assert torch.equal(getattr(found.raw, field), getattr(plain.raw, field))


def test_slices_find_what_the_whole_picture_does_not(model: tailseg.Model) -> None:
    """Nine of the objects are kept of a whole picture and of each slice."""
    picture = np.tile(rectangles(), (3, 3, 1))
    found = model.predict(picture, slices=80, overlap=0.3, batch=4)
    assert found.image_hw == (180, 240)
    assert len(found) > 9
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    assert bool((found.boxes >= 0).all())
    assert bool((found.boxes <= torch.tensor([240.0, 180, 240, 180]) + 1e-3).all())
    alone = model.predict(picture, slices=80, overlap=0.3, batch=1)
    torch.testing.assert_close(found.boxes, alone.boxes, rtol=1e-4, atol=1e-2)
    few = model.predict(picture, slices=80, overlap=0.3, max_detections=4, classes=["owl", "fork"])
    assert len(few) == 4
    assert "egg_cup" not in few.names
    assert [len(one) for one in model.predict([picture, rectangles()], slices=80, score=1)] == [0, 0]


def test_slices_of_averaged_views(path: object) -> None:
    views = tailseg.load(str(path), "cpu", ["test.tta=true", "test.tta_long_edges=[48, 64]"])
    found = views.predict(np.tile(rectangles(), (1, 2, 1)), slices=100)
    assert len(found) > 0


@pytest.mark.parametrize("hw", [(1, 90), (90, 1), (41, 41)])
def test_thin_pictures(model: tailseg.Model, hw: tuple[int, int]) -> None:
    found = model.predict(np.full((*hw, 3), 90, np.uint8), slices=40)
    assert found.image_hw == hw
    assert bool(found.boxes.isfinite().all())
