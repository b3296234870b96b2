"""With a detector that finds everything of one colour in a crop, exactly, and knows of nothing beside it."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tailseg.layers.paste import mask_crop
from tailseg.predict.joining import join_windows, sample_grid
from tailseg.predict.slices import detect_slices
from tailseg.structures import RawDetections

Picture = NDArray[np.uint8]
GREY = (120, 120, 120)
COLOURS = [(250, 30, 20), (10, 40, 240), (30, 200, 30), (240, 240, 20), (200, 20, 200), (20, 220, 220)]
LABELS = [0, 0, 0, 1, 1, 2]  # of the colours: a class has several


def grid_of(mask: NDArray[np.bool_], side: int = 28) -> NDArray[np.float32]:
    return cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)


def find_colours(pictures: Sequence[Picture], largest: int = 10_000, score: float = 0.9) -> list[RawDetections]:
    """Each colour is an object. In pictures with a side beyond ``largest`` nothing is seen."""
    found = []
    for picture in pictures:
        boxes, labels, masks = [], [], []
        for colour, label in zip(COLOURS, LABELS, strict=True):
            mask = (picture == colour).all(axis=2)
            if mask.any() and max(picture.shape) <= largest:
                ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
                boxes.append([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
                masks.append(grid_of(mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]))
                labels.append(label)
        found.append(
            RawDetections(
                image_hw=picture.shape[:2],
                boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
                scores=torch.full((len(boxes),), score),
                labels=torch.tensor(labels, dtype=torch.int64),
                masks=torch.from_numpy(np.array(masks, np.float32).reshape(-1, 28, 28)),
            )
        )
    return found


def pasted(raw: RawDetections, row: int) -> NDArray[np.bool_]:
    full = np.zeros(raw.image_hw, bool)
    crop, (y, x) = mask_crop(raw.masks[row], raw.boxes[row], raw.image_hw)
    full[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    return full


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


def draw(size: tuple[int, int], *shapes: Callable[[ImageDraw.ImageDraw], None]) -> Picture:
    image = Image.new("RGB", size, GREY)
    for shape in shapes:
        shape(ImageDraw.Draw(image))
    return np.asarray(image)


def check(picture: Picture, raw: RawDetections, least: float) -> None:
    """One detection for each colour of the picture, with its label, box and mask."""
    wanted = {i: (picture == colour).all(axis=2) for i, colour in enumerate(COLOURS)}
    wanted = {i: mask for i, mask in wanted.items() if mask.any()}
    assert sorted(raw.labels.tolist()) == sorted(LABELS[i] for i in wanted)
    left = list(range(len(raw)))
    for i, mask in wanted.items():
        row = max(left, key=lambda row: overlap(pasted(raw, row), mask))
        left.remove(row)
        assert int(raw.labels[row]) == LABELS[i]
        assert overlap(pasted(raw, row), mask) >= least
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert raw.boxes[row].tolist() == [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]


SCENES = {
    "a bar over all slices": draw((700, 90), lambda d: d.rectangle((20, 30, 680, 60), fill=COLOURS[0])),
    "a bar up and down": draw((60, 500), lambda d: d.rectangle((5, 7, 50, 480), fill=COLOURS[4])),
    "an ellipse over four slices": draw((180, 180), lambda d: d.ellipse((20, 20, 160, 160), fill=COLOURS[0])),
    "a diagonal": draw((400, 400), lambda d: d.line((10, 10, 390, 390), fill=COLOURS[5], width=30)),
    "two of a class side by side over one cut": draw(
        (300, 100),
        lambda d: d.rectangle((40, 10, 260, 45), fill=COLOURS[0]),
        lambda d: d.rectangle((40, 50, 260, 90), fill=COLOURS[1]),
    ),
    "two of a class end to end": draw(
        (400, 60),
        lambda d: d.rectangle((10, 10, 185, 50), fill=COLOURS[0]),
        lambda d: d.rectangle((190, 10, 390, 50), fill=COLOURS[1]),
    ),
    "two classes on one place": draw(
        (300, 200),
        lambda d: d.ellipse((20, 20, 280, 180), fill=COLOURS[0]),
        lambda d: d.ellipse((100, 60, 200, 140), fill=COLOURS[3]),
    ),
    "small ones in the overlap": draw(
        (180, 100),
        lambda d: d.rectangle((82, 20, 92, 30), fill=COLOURS[2]),
        lambda d: d.rectangle((84, 60, 94, 70), fill=COLOURS[1]),
    ),
    "nothing": draw((250, 250)),
}


@pytest.mark.parametrize("largest", [100, 10_000], ids=["seen in slices alone", "seen as a whole too"])
@pytest.mark.parametrize("name", SCENES)
def test_objects_across_cuts_are_whole_again(name: str, largest: int) -> None:
    detect = lambda pictures: find_colours(pictures, largest)  # noqa: E731
    raw = detect_slices(detect, SCENES[name], side=100, overlap=0.25, iou=0.5, batch=4)
    check(SCENES[name], raw, 0.9)


def test_the_better_view_wins() -> None:
    """Slices with the higher score are joined to the exact shape; the whole picture's coarse mask is not needed."""
    picture = SCENES["a bar over all slices"]

    def detect(pictures: Sequence[Picture]) -> list[RawDetections]:
        return [find_colours([part], score=0.4 if max(part.shape) > 100 else 0.8)[0] for part in pictures]

    (one,) = detect_slices(detect, picture, side=100, overlap=0.25, iou=0.5, batch=4).scores.tolist()
    assert one == pytest.approx(0.8)


def record(
    *rows: tuple[float, float, float, float],
    scores: Sequence[float] | None = None,
    labels: Sequence[int] | None = None,
    mask_scores: Sequence[float] | None = None,
    image_hw: tuple[int, int] = (100, 200),
) -> RawDetections:
    """Detections with masks that fill their boxes."""
    count = len(rows)
    return RawDetections(
        image_hw=image_hw,
        boxes=torch.tensor(rows, dtype=torch.float32).view(-1, 4),
        scores=torch.tensor([0.5] * count if scores is None else scores),
        labels=torch.tensor([0] * count if labels is None else labels),
        masks=torch.ones(count, 28, 28),
        mask_scores=None if mask_scores is None else torch.tensor(mask_scores),
    )


WINDOWS = np.array([[0, 0, 120, 100], [80, 0, 200, 100]])  # both show x from 80 to 120


def test_duplicates_are_dropped_as_by_nms() -> None:
    left = record((85, 10, 105, 30), (85, 60, 105, 90), scores=[0.9, 0.3], labels=[0, 1])
    right = record((86, 10, 106, 30), (85, 60, 105, 90), scores=[0.7, 0.4], labels=[0, 0])
    joined = join_windows([left, right], WINDOWS, 0.5)
    assert joined.boxes.tolist() == [[85, 10, 105, 30], [85, 60, 105, 90], [85, 60, 105, 90]]
    assert joined.scores.tolist() == pytest.approx([0.9, 0.4, 0.3])
    assert joined.labels.tolist() == [0, 0, 1]  # another class is another object
    assert joined.masks.shape == (3, 28, 28)


def test_pieces_are_joined_and_the_best_scores_kept() -> None:
    left = record((30, 10, 120, 30), scores=[0.6], mask_scores=[0.5])
    right = record((80, 10, 190, 30), (150, 60, 180, 90), scores=[0.8, 0.7], mask_scores=[0.3, 0.2])
    joined = join_windows([left, right], WINDOWS, 0.5)
    assert joined.boxes.tolist() == [[30, 10, 190, 30], [150, 60, 180, 90]]
    assert joined.scores.tolist() == pytest.approx([0.8, 0.7])
    assert joined.mask_scores is not None
    assert joined.mask_scores.tolist() == pytest.approx([0.5, 0.2])
    assert joined.masks.shape == (2, 84, 84)
    assert bool((joined.masks == 1).all())


def test_pieces_that_do_not_meet_stay_apart() -> None:
    left = record((30, 10, 120, 30))
    right = record((80, 50, 190, 80))
    assert len(join_windows([left, right], WINDOWS, 0.5)) == 2


def test_what_a_window_keeps_apart_stays_apart() -> None:
    left = record((30, 10, 120, 50))
    right = record((80, 10, 190, 50), (80, 35, 190, 75), scores=[0.8, 0.4])
    joined = join_windows([left, right], WINDOWS, 0.5)
    assert joined.boxes.tolist() == [[30, 10, 190, 50], [80, 35, 190, 75]]


def test_a_joined_object_is_there_once() -> None:
    """As a whole, or as two of which each window shows both."""
    whole = record((30, 10, 190, 40), scores=[0.3])
    left = record((30, 10, 120, 30), scores=[0.8])
    right = record((80, 10, 190, 30), scores=[0.7])
    windows = np.concatenate([[[0, 0, 200, 100]], WINDOWS])
    joined = join_windows([whole, left, right], windows, 0.7)
    assert joined.boxes.tolist() == [[30, 10, 190, 30], [30, 10, 190, 40]]
    assert join_windows([whole, left, right], windows, 0.6).boxes.tolist() == [[30, 10, 190, 40]]
    twice = record((30, 10, 120, 30), (30, 12, 120, 34), scores=[0.8, 0.6])
    again = record((80, 10, 190, 30), (80, 12, 190, 34), scores=[0.7, 0.5])
    assert len(join_windows([twice, again], WINDOWS, 0.65)) == 1
    assert len(join_windows([twice, again], WINDOWS, 0.85)) == 2


def test_a_sliver_of_what_another_window_shows_is_dropped() -> None:
    """The right window sees the last six pixels of an object, and takes them for a third of its height."""
    left = record((30, 10, 86, 70))
    right = record((80, 10, 86, 30), scores=[0.9])
    assert join_windows([left, right], WINDOWS, 0.5).boxes.tolist() == [[30, 10, 86, 70]]
    beside = record((80, 75, 86, 95))
    assert len(join_windows([left, beside], WINDOWS, 0.5)) == 2


def test_windows_without_objects() -> None:
    nothing = record()
    assert len(join_windows([nothing, nothing], WINDOWS, 0.5)) == 0
    one = join_windows([nothing, record((90, 10, 100, 20))], WINDOWS, 0.5)
    assert one.boxes.tolist() == [[90, 10, 100, 20]]
    scored = record(mask_scores=[])
    assert join_windows([scored, scored], WINDOWS, 0.5).mask_scores is not None


def test_masks_take_no_more_than_their_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar of 40 slices among others: grids of 252 cells, or fewer where that would be too many values."""
    picture = draw((3000, 90), lambda d: d.rectangle((20, 30, 2980, 60), fill=COLOURS[0]))
    detect = lambda pictures: find_colours(pictures, 100)  # noqa: E731
    raw = detect_slices(detect, picture, side=100, overlap=0.25, iou=0.5, batch=8)
    assert raw.masks.shape == (1, 252, 252)
    check(picture, raw, 0.9)
    monkeypatch.setattr("tailseg.predict.joining.MOST_VALUES", 28 * 28 * 16)
    assert detect_slices(detect, picture, side=100, overlap=0.25, iou=0.5, batch=8).masks.shape == (1, 84, 84)


def test_grids_are_sampled_bilinearly() -> None:
    grid, box = np.arange(9.0).reshape(3, 3), np.array([10.0, 20, 40, 50])
    xs, ys = np.array([9.0, 15, 20, 25, 35, 40, 41]), np.array([25.0, 30, 50])
    assert sample_grid(grid, box, xs, ys).tolist() == [
        [0, 0, 0.5, 1, 2, 2, 0], [0, 1.5, 2, 2.5, 3.5, 3.5, 0], [0, 6, 6.5, 7, 8, 8, 0],
    ]  # fmt: skip
    assert not sample_grid(grid, np.array([10.0, 20, 10, 50]), xs, ys).any()


def test_slivers_of_two_slices_are_no_object_of_their_own() -> None:
    """The ellipse's topmost row ends two slices, before another one shows it whole."""
    picture = draw((600, 400), lambda d: d.ellipse((46, 278, 74, 302), fill=COLOURS[3]))
    detect = lambda pictures: find_colours(pictures, 140)  # noqa: E731
    check(picture, detect_slices(detect, picture, side=97, overlap=0.3, iou=0.5, batch=8), 0.9)


@given(st.data())
def test_any_scene_is_found_again(data: st.DataObject) -> None:
    """Up to six objects, one in each cell of a grid, of any place and size in it."""
    side = data.draw(st.integers(70, 140))
    image = Image.new("RGB", (600, 400), GREY)
    pen = ImageDraw.Draw(image)
    for i in data.draw(st.lists(st.integers(0, 5), unique=True)):
        x, y = 200 * (i % 3), 200 * (i // 3)
        x1, y1 = x + data.draw(st.integers(1, 90)), y + data.draw(st.integers(1, 90))
        x2, y2 = x1 + data.draw(st.integers(20, 100)), y1 + data.draw(st.integers(20, 100))
        (pen.rectangle if data.draw(st.booleans()) else pen.ellipse)((x1, y1, x2, y2), fill=COLOURS[i])
    picture = np.asarray(image)
    detect = lambda pictures: find_colours(pictures, 140)  # noqa: E731
    raw = detect_slices(detect, picture, side=side, overlap=0.3, iou=0.5, batch=8)
    check(picture, raw, 0.8)
