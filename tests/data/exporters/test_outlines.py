import cv2
import numpy as np
import pytest
from export_sets import code_of, mask_of, polygons, segmentations
from hotcoco import mask as hotcoco
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from tailseg.data.annotations.masks import Bitmap
from tailseg.data.exporters.outlines import (
    as_one_polygon,
    as_polygons,
    editable,
    in_thousandths,
    joined,
    outlines_of,
)

bitmaps = arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 1))


def drawn(rings, image_hw, tool=coco):
    """(H, W) numbers of the rings that cover each pixel."""
    flat = [np.asarray(ring, np.float64).ravel().tolist() for ring in rings]
    return tool.decode(tool.frPyObjects(flat, *image_hw)).sum(axis=2) if flat else np.zeros(image_hw)


@given(bitmaps, st.tuples(*[st.integers(0, 2)] * 4))
def test_an_outline_gives_exactly_its_mask(pixels, margin):
    """In the middle of an image and at its edges; by pycocotools and by hotcoco."""
    top, left, bottom, right = margin
    full = np.pad(pixels, ((top, bottom), (left, right)))
    found = outlines_of(Bitmap(pixels, left, top))
    assert len(found.pieces) == cv2.connectedComponents(full, connectivity=8)[0] - 1
    assert found.holes == cv2.connectedComponents(np.pad(1 - full, 1, constant_values=1), connectivity=4)[0] - 2
    for tool in (coco, hotcoco):
        assert np.array_equal(drawn(found.pieces, full.shape, tool), full)
        one = joined(found.pieces)
        assert np.array_equal(drawn([one] if len(one) else [], full.shape, tool), full)


def test_outlines_by_hand():
    pixels = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]], np.uint8)
    (piece,) = outlines_of(Bitmap(pixels, 10, 20)).pieces
    assert piece.tolist() == [
        *([10, 20], [13, 20], [13, 22], [14, 22], [14, 23], [10, 23]),  # around, from the top left
        *([10, 21], [11, 21], [11, 22], [12, 22], [12, 21], [11, 21], [10, 21]),  # into the hole and back
    ]
    (square,) = outlines_of(Bitmap(np.ones((3, 5), np.uint8), 0, 0)).pieces
    assert square.tolist() == [[0, 0], [5, 0], [5, 3], [0, 3]]
    assert outlines_of(Bitmap(np.zeros((1, 1), np.uint8), 0, 0)).pieces == []
    assert joined([]).shape == (0, 2)


def test_bridges_join_near_corners():
    left, right, below = ([[x, y], [x + 2, y], [x + 2, y + 2], [x, y + 2]] for x, y in ((0, 0), (5, 0), (5, 9)))
    ring = joined([np.array(part) for part in (left, right, below)])
    lengths = np.abs(ring - np.roll(ring, -1, axis=0)).sum(axis=1)
    assert lengths.sum() == 3 * 8 + 2 * 3 + 2 * 7
    assert drawn([ring], (12, 8)).sum() == 12


def test_noise_takes_bounded_time():
    """90,000 pixels in thousands of pieces and holes, none of them joined to the wrong one."""
    pixels = (np.random.default_rng(0).random((300, 300)) < 0.45).astype(np.uint8)
    found = outlines_of(Bitmap(pixels, 0, 0))
    assert (len(found.pieces) > 500, found.holes > 3000) == (True, True)
    assert np.array_equal(drawn([joined(found.pieces)], pixels.shape), pixels)


@given(st.lists(st.floats(-3, 70_000) | st.integers(0, 1000).map(lambda n: n / 10), min_size=1))
def test_thousandths_fall_on_the_same_fifth(values):
    values = np.array(values)
    written = in_thousandths(values)
    assert np.array_equal(np.trunc(5 * values + 0.5), np.trunc(5 * written + 0.5))
    assert np.array_equal(np.round(written, 3), written)
    assert np.abs(written - values).max() <= 0.001 + 1e-9


def test_thousandths_by_hand():
    assert in_thousandths(np.array([10.1, 10.09999, 3.14159, 7.0])).tolist() == [10.1, 10.099, 3.142, 7.0]


@given(st.tuples(st.integers(2, 40), st.integers(2, 40)).flatmap(lambda hw: st.tuples(st.just(hw), segmentations(hw))))
def test_one_polygon_has_the_mask(case):
    image_hw, segmentation = case
    one = as_one_polygon(segmentation, image_hw)
    assert len(one) >= 6
    assert (one.reshape(-1, 2) >= 0).all()
    assert (one.reshape(-1, 2) <= image_hw[::-1]).all()
    assert np.array_equal(mask_of([one], image_hw), mask_of(segmentation, image_hw))
    several = as_polygons(segmentation, image_hw)
    assert np.array_equal(mask_of(several, image_hw), mask_of(segmentation, image_hw))


@given(polygons((50, 60)))
def test_a_polygon_inside_of_the_image_keeps_its_corners(polygon):
    assert np.abs(as_one_polygon([polygon], (50, 60)) - polygon).max() <= 0.001 + 1e-9


def test_several_polygons_keep_their_corners_unless_they_overlap():
    one, two = np.array([1.25, 1, 9, 1, 9, 9]), np.array([20.5, 1, 29, 1, 29, 9])
    pairs = as_one_polygon([one, two], (30, 40)).reshape(-1, 2).tolist()
    assert {tuple(pair) for pair in pairs} == {(1.25, 1), (9, 1), (9, 9), (20.5, 1), (29, 1), (29, 9)}
    assert len(pairs) == 6 + 2
    overlapping = as_one_polygon([one, one + 2], (30, 40))
    assert np.array_equal(overlapping, np.round(overlapping))
    assert mask_of([overlapping], (30, 40)).sum() == mask_of([one, one + 2], (30, 40)).sum()


def test_empty_masks_have_no_polygon():
    empty = code_of(np.zeros((5, 5)))
    assert as_one_polygon(empty, (5, 5)).shape == (0,)
    assert as_polygons(empty, (5, 5)) == []
    assert as_one_polygon([], (5, 5)).shape == (0,)
    assert editable(empty, (5, 5)) == empty


@pytest.mark.parametrize(("radius", "corners", "overlap"), [(4, 30, 1.0), (30, 16, 0.98), (200, 32, 0.99)])
def test_an_editable_outline_has_few_corners(radius, corners, overlap):
    y, x = np.mgrid[: 2 * radius + 9, : 2 * radius + 9] - radius - 4
    disc = (x**2 + y**2 <= radius**2).astype(np.uint8)
    (polygon,) = editable(code_of(disc), disc.shape)
    again = mask_of([polygon], disc.shape)
    assert len(polygon) // 2 <= corners
    assert (again & disc).sum() / (again | disc).sum() >= overlap
    ring = disc & (x**2 + y**2 > 4)
    assert editable(code_of(ring), disc.shape) == code_of(ring)


@given(bitmaps)
def test_an_editable_outline_is_never_degenerate(pixels):
    code = code_of(pixels)
    found = editable(code, pixels.shape)
    if not isinstance(found, bytes):
        assert all(len(polygon) >= 6 for polygon in found)
        assert len(found) == len(outlines_of(Bitmap(pixels, 0, 0)).pieces)
