"""Pictures are checked by their pixels: what is filled, what stays, and where labels may stand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailseg.structures import Instances, RawDetections
from tailseg.visualize import draw as draw_module
from tailseg.visualize.colours import PALETTE
from tailseg.visualize.draw import (
    FILL_OPACITY,
    Drawn,
    contact_sheet,
    draw,
    draw_detections,
    draw_instances,
    draw_objects,
    enlargement,
)
from tailseg.visualize.label_placement import place_labels

NAMES = [f"class_{i}" for i in range(80)]


def found(boxes: list[list[float]], hw: tuple[int, int] = (400, 500), scores=None) -> RawDetections:
    n = len(boxes)
    return RawDetections(
        image_hw=hw,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(n, 4),
        scores=torch.full((n,), 0.9) if scores is None else torch.tensor(scores),
        labels=torch.arange(n) % 80,
        masks=torch.ones(n, 28, 28),
    )


def grey(height: int = 400, width: int = 500) -> np.ndarray:
    return np.full((height, width, 3), 100, dtype=np.uint8)


def overlap(a, b) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def test_no_detections_leave_the_image_as_it_is():
    image = grey()
    drawn = draw_detections(image, found([]), NAMES)
    np.testing.assert_array_equal(drawn, image)
    assert drawn is not image


def test_fill_blends_the_class_colour_inside_only():
    image = grey()
    drawn = draw_detections(image, found([[100, 100, 300, 300]]), NAMES)
    expected = np.float32(100) * (1 - FILL_OPACITY) + np.float32(PALETTE[0]) * FILL_OPACITY
    np.testing.assert_allclose(drawn[200, 200], expected, atol=1)
    np.testing.assert_array_equal(drawn[350, 450], [100, 100, 100])
    assert (image == 100).all()  # the caller's image is not drawn on


def test_outline_follows_the_mask_and_not_the_box():
    probs = torch.zeros(1, 28, 28)
    probs[:, :, :14] = 1
    detections = found([[100, 100, 300, 300]])
    half = RawDetections(
        image_hw=(400, 500),
        boxes=detections.boxes,
        scores=detections.scores,
        labels=detections.labels,
        masks=probs,
    )
    drawn = draw_detections(grey(), half, NAMES)
    assert (np.abs(drawn[200, 195:203].astype(int) - PALETTE[0]).sum(axis=1) < 12).any()
    np.testing.assert_array_equal(drawn[200, 250], [100, 100, 100])


def test_scores_below_the_threshold_are_not_drawn():
    detections = found([[100, 100, 300, 300]], scores=[0.49])
    np.testing.assert_array_equal(draw_detections(grey(), detections, NAMES), grey())
    assert (draw_detections(grey(), detections, NAMES, min_score=0.49) != 100).any()


def test_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match="received"):
        draw_detections(grey(300, 500), found([]), NAMES)
    with pytest.raises(ValueError, match="uint8"):
        draw_detections(grey().astype(np.float32), found([]), NAMES)


@pytest.mark.parametrize(
    ("hw", "factor"), [((128, 128), 4), ((100, 200), 5), ((320, 640), 1), ((1080, 1920), 1), ((4, 4000), 1)]
)
def test_small_images_are_enlarged(hw, factor):
    assert enlargement(hw) == factor
    drawn = draw_detections(grey(*hw), found([], hw), NAMES)
    assert drawn.shape == (factor * hw[0], factor * hw[1], 3)


def test_enlarged_masks_cover_the_same_part():
    drawn = draw_detections(grey(100, 100), found([[25, 25, 75, 75]], (100, 100)), NAMES, scale=6)
    assert drawn.shape == (600, 600, 3)
    assert not (drawn[300, 300] == 100).all()
    assert (drawn[560, 560] == 100).all()


def test_degenerate_boxes_are_drawn_without_fault():
    boxes = [
        [0, 0, 1, 1],
        [499, 399, 500, 400],
        [0, 0, 500, 400],
        [-5, -5, 3, 3],
        [10, 10, 10, 10],
        [3, 0, 4, 400],
    ]
    drawn = draw_detections(grey(), found(boxes), NAMES)
    assert drawn.shape == (400, 500, 3)
    assert (drawn[399, 499] != 100).any()


def test_three_hundred_detections():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=generator) * torch.tensor([450.0, 350.0])
    boxes = torch.cat([corner, corner + 40], dim=1).tolist()
    drawn = draw_detections(grey(), found(boxes), NAMES)
    assert (drawn != 100).any(axis=2).mean() > 0.5


def test_instances_and_full_masks_give_the_same_fill():
    box = np.array([[100.0, 100.0, 300.0, 260.0]], dtype=np.float32)
    mask = np.zeros((1, 400, 500), dtype=bool)
    mask[0, 100:260, 100:300] = True
    instances = Instances(
        boxes=torch.from_numpy(box),
        labels=torch.tensor([3]),
        masks=torch.full((1, 28, 28), 255, dtype=torch.uint8),
        mask_frames=torch.from_numpy(box),
    )
    by_grid = draw_instances(grey(), instances, NAMES)
    by_mask = draw_objects(grey(), box, np.array([3]), mask, NAMES)
    # A grid ends in zeros, so its corners are a little rounder.
    assert (by_grid != by_mask).any(axis=2).mean() < 0.001
    assert (by_mask[150, 150] != 100).any()


def test_enlarged_full_mask_keeps_its_place_and_size():
    mask = np.zeros((1, 120, 120), dtype=bool)
    mask[0, 40:80, 30:90] = True
    drawn = draw_objects(grey(120, 120), np.array([[30.0, 40, 90, 80]]), np.array([0]), mask, NAMES)
    assert drawn.shape == (480, 480, 3)
    assert (drawn[240, 240] != 100).any()
    assert (drawn[340, 240] == 100).all()  # outside box, outline and label


def test_no_objects_by_full_masks():
    none = np.zeros((0, 4), dtype=np.float32)
    drawn = draw_objects(grey(), none, np.zeros(0, dtype=int), np.zeros((0, 400, 500), dtype=bool), NAMES)
    np.testing.assert_array_equal(drawn, grey())


def test_small_objects_are_drawn_over_large_ones():
    big = Drawn((0, 0, 400, 400), np.ones((400, 400), dtype=bool), (0, 0), "", PALETTE[0])
    small = Drawn((100, 100, 140, 140), np.ones((40, 40), dtype=bool), (100, 100), "", PALETTE[1])
    small_last, small_first = draw(grey(), [big, small]), draw(grey(), [small, big])
    np.testing.assert_array_equal(small_last[110:130, 110:130], small_first[110:130, 110:130])


def test_neighbours_whose_labels_lie_a_palette_apart_differ_in_the_picture():
    boxes = np.array([[0.0, 0, 200, 400], [200, 0, 400, 400]])
    masks = np.zeros((2, 400, 500), dtype=bool)
    masks[0, :, :200] = masks[1, :, 200:400] = True
    names = [""] * 1203
    for labels in ([3, 3 + len(PALETTE)], [9, 9 + 2 * len(PALETTE)]):
        drawn = draw_objects(grey(), boxes, np.array(labels), masks, names)
        assert (drawn[300, 100] != drawn[300, 300]).any()


def test_a_label_stands_above_its_box_where_there_is_room():
    assert place_labels(np.array([[100.0, 100, 200, 200]]), [(60, 18)], (400, 500), gap=2) == [(100, 80, 160, 98)]


def test_a_box_at_the_upper_edge_is_labelled_below():
    assert place_labels(np.array([[100.0, 0, 200, 50]]), [(60, 18)], (400, 500), gap=2) == [(100, 52, 160, 70)]


def test_a_box_over_the_whole_image_is_labelled_inside():
    assert place_labels(np.array([[0.0, 0, 500, 400]]), [(60, 18)], (400, 500)) == [(0, 0, 60, 18)]


def test_labels_without_room_are_left_out():
    boxes = np.array([[0.0, 0, 40, 20], [0, 0, 40, 20]])
    assert place_labels(boxes, [(40, 20), (40, 20)], (20, 40)) == [(0, 0, 40, 20), None]
    assert place_labels(np.zeros((0, 4)), [], (20, 40)) == []


@given(
    st.lists(
        st.tuples(st.integers(0, 470), st.integers(0, 370), st.integers(1, 300), st.integers(1, 300)),
        max_size=25,
    )
)
def test_labels_stay_inside_and_apart(rows):
    boxes = np.array([[x, y, min(x + w, 500), min(y + h, 400)] for x, y, w, h in rows], dtype=float).reshape(-1, 4)
    plates = [plate for plate in place_labels(boxes, [(80, 18)] * len(rows), (400, 500)) if plate]
    assert len(plates) > 0 or not rows
    for index, plate in enumerate(plates):
        assert min(plate[:2]) >= 0
        assert plate[2] <= 500
        assert plate[3] <= 400
        assert all(overlap(plate, other) == 0 for other in plates[:index])


def test_two_small_boxes_far_apart_never_lie_under_their_labels():
    boxes = np.array([[50.0, 50, 90, 90], [300, 300, 340, 340]])
    for box, plate in zip(boxes, place_labels(boxes, [(80, 18)] * 2, (400, 500)), strict=True):
        assert overlap(box, plate) == 0


def test_contact_sheet_lays_pictures_in_rows():
    red, blue = grey(200, 400), grey(100, 400)
    red[:], blue[:] = (255, 0, 0), (0, 0, 255)
    sheet = contact_sheet([red, blue, red], ["first", "second", "third"], 2)
    assert sheet.shape[1] == 2 * 400 + 3 * 12
    np.testing.assert_array_equal(sheet[100, 100], [255, 0, 0])
    np.testing.assert_array_equal(sheet[50, 600], [0, 0, 255])
    np.testing.assert_array_equal(sheet[-1, -1], [255, 255, 255])


def test_contact_sheet_of_nothing_and_of_a_wrong_count():
    assert (contact_sheet([], [], 3) == 255).all()
    with pytest.raises(ValueError, match="1 pictures, 0 captions"):
        contact_sheet([grey()], [], 3)


def test_a_long_name_is_cut_in_its_middle_by_few_measurements() -> None:
    measured = 0

    class Counting:
        """A font of which each letter is 7 pixels wide."""

        def getlength(self, text: str) -> float:
            nonlocal measured
            measured += 1
            return 7.0 * len(text)

    for length in (1, 20, 60, 5000):
        text = "".join(chr(97 + i % 26) for i in range(length)) + " 0.50"
        for width in (0, 30, 43, 70, 240, 300):
            measured = 0
            short = draw_module._shortened(text, Counting(), width)  # type: ignore[arg-type]
            letters = width // 7
            if len(text) <= letters:
                assert short == text
            elif letters < 7:
                assert short == "0.50"
            else:
                assert short == f"{text[: letters - 6]}… 0.50"
            assert measured < 20
