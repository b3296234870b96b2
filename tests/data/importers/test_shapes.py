import tracemalloc

import numpy as np
import pytest
from foreign_files import attempt
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as rle

from tailseg.data.annotations.masks import Bitmap
from tailseg.data.importers.foreign import rectangle
from tailseg.data.importers.shapes import (
    TOLERANCE,
    ObjectList,
    OddObjectError,
    ellipse,
    label_of,
    number_of,
    polygon_of,
    require_mask_fits,
    rotated,
    size_of,
)
from tailseg.errors import UserError

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)


@given(anything)
def test_values_of_files_are_read_or_refused(value):
    """Never another exception than the one that is counted."""
    for function in (label_of, polygon_of):
        found, refused = attempt(function, value)
        assert found is not None or refused.endswith(": left out")
    assert isinstance(number_of(value), float)
    assert size_of(value, value) is None or min(size_of(value, value)) > 0


def test_labels_have_one_unicode_form():
    assert [label_of(value) for value in ("cafe\u0301", "caf\u00e9", 7, 2.5)] == ["caf\u00e9", "caf\u00e9", "7", "2.5"]


@pytest.mark.parametrize(
    ("value", "number"), [(3, 3), ("3.5", 3.5), (" 4 ", 4), ("x", None), (None, None), (True, None), (10**400, None)]
)
def test_numbers(value, number):
    assert number_of(value) == number or (number is None and np.isnan(number_of(value)))


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (40, 80, (40, 80)),
        ("40", 80.0, (40, 80)),
        (40.5, 80, None),
        (0, 80, None),
        (None, 80, None),
        (65_535, 1, (65_535, 1)),
        (65_536, 1, None),
        (float("inf"), 1, None),
    ],
)
def test_sizes(height, width, size):
    assert size_of(height, width) == size


def test_polygons_by_hand():
    assert polygon_of([[1, 2], [3, 4.5], [-5, 65_535]]).tolist() == [[1, 2], [3, 4.5], [-5, 65_535]]
    assert polygon_of([[1, 2]], least=1).shape == (1, 2)
    with pytest.raises(OddObjectError, match="too few points"):
        polygon_of(np.zeros((2, 2)))
    assert issubclass(OddObjectError, UserError)


def test_an_outline_that_takes_gigabytes_to_draw():
    with pytest.raises(OddObjectError, match="an outline of more than 10,000,000 pixels: left out"):
        polygon_of([[0, 0], [65_000, 2]] * 80)


def test_a_turn_is_clockwise_about_the_middle():
    turned = rotated(rectangle(0, 0, 4, 2), 90)
    assert turned == pytest.approx(np.array([[3, -1], [3, 3], [1, 3], [1, -1]]))
    assert rotated(turned, -90) == pytest.approx(rectangle(0, 0, 4, 2))


@pytest.mark.parametrize("radii", [(0, 0), (0.01, 0.01), (1, 1), (100, 100), (1000, 30), (5, 400)])
def test_ellipses_are_close(radii):
    """Distances from points of the ellipse to the polygon's edges; the polygon lies inside."""
    corners = ellipse(np.array([7.0, 9.0]), radii) - [7, 9]
    angles = np.linspace(0, 2 * np.pi, 400)
    points = np.stack([radii[0] * np.cos(angles), radii[1] * np.sin(angles)], axis=1)
    starts, edges = corners, np.roll(corners, -1, axis=0) - corners
    lengths = np.maximum((edges**2).sum(axis=1), 1e-30)
    along = (((points[:, None] - starts) * edges).sum(axis=2) / lengths).clip(0, 1)
    gaps = np.linalg.norm(points[:, None] - (starts + along[..., None] * edges), axis=2).min(axis=1)
    assert gaps.max() <= TOLERANCE
    assert 8 <= len(corners) <= 400


@pytest.mark.parametrize(
    ("height", "width", "fits"), [(1, 1, True), (41, 81, True), (42, 1, False), (1, 82, False), (0, 5, False)]
)
def test_masks_fit_into_their_image_but_for_rounding(height, width, fits):
    assert (attempt(lambda: require_mask_fits(height, width, (40, 80)) or True)[0] is True) == fits


def test_pieces_of_a_group_are_one_object():
    square, wide = rectangle(0, 0, 2, 2), rectangle(5, 5, 9, 7)
    objects = ObjectList((10, 10))
    for name, piece, group in (
        ("a", square, None),
        ("a", wide, 1),
        ("b", wide, 1),
        ("a", square, 1),
        ("a", wide, None),
    ):
        objects.add(name, piece, group)
    assert objects.names == ["a", "a", "b", "a"]
    assert [[piece.tolist() for piece in shape] for shape in objects.shapes()] == [
        [square.tolist()],
        [wide.tolist(), square.tolist()],
        [wide.tolist()],
        [wide.tolist()],
    ]
    assert ObjectList((3, 3)).shapes() == []


def test_pixels_and_polygons_of_a_group_are_joined():
    objects = ObjectList((6, 8))
    pieces = (
        Bitmap(np.ones((2, 3), np.uint8), -1, 4),
        rectangle(1, 4, 4, 6),
        Bitmap(np.ones((3, 3), np.uint8), 7, -2),
        rectangle(20, 20, 30, 30),  # outside
    )
    for piece in pieces:
        objects.add("a", piece, "x")
    (code,) = objects.shapes()
    expected = np.zeros((6, 8), np.uint8)
    expected[4:6, 0:4] = expected[0, 7] = 1
    assert np.array_equal(rle.decode({"size": [6, 8], "counts": code}), expected)


def test_many_objects_of_pixels_take_little_memory():
    """A compressed mask of a few hundred bytes may cover a whole photograph, thousands of times in one file."""
    objects = ObjectList((1000, 1000))
    tracemalloc.start()
    for number in range(30):
        objects.add("a", Bitmap(np.ones((1000, 1000), np.uint8), 0, 0), number % 2)
    assert tracemalloc.get_traced_memory()[0] < 1 << 20
    tracemalloc.stop()
    assert [rle.area({"size": [1000, 1000], "counts": code}) for code in objects.shapes()] == [10**6] * 2
