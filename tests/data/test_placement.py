"""Groups of overlapping objects, and where they are moved."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.placement import Placement, draw_placement, group_box, groups_of, near_sides


@pytest.mark.parametrize(
    ("scale", "degrees", "point", "read"),
    [
        (1.0, 0, (23, 24), (20, 25)),  # the shifted centre shows the centre
        (1.0, 0, (13, 19), (10, 20)),  # and the corner the corner
        (2.0, 0, (27, 24), (22, 25)),  # four pixels to the right at twice the size are two
        (0.5, 0, (24, 23), (22, 23)),
        (1.0, 90, (23, 28), (24, 25)),  # X = 0, Y = 4: u = 4 + 20 / 2, v = 0 + 10 / 2
        (1.0, 90, (25, 24), (20, 23)),
        (2.0, 180, (25, 30), (19, 22)),
    ],
)
def test_inverse_by_hand(scale, degrees, point, read):
    """A group of 20 x 10 pixels at (10, 20), moved by (3, -1)."""
    matrix = Placement((10, 20, 30, 30), scale, degrees, (3, -1)).inverse()
    np.testing.assert_allclose(matrix @ [*point, 1], read, atol=1e-12)


def test_what_is_drawn():
    """All values of the ranges, and nothing else; a group of 47 x 30 pixels moves by at most 3 and 2."""
    rng = np.random.default_rng(0)
    drawn = [draw_placement((20, 30, 67, 60), (100, 100), rng) for _ in range(600)]
    assert {p.shift[0] for p in drawn} == set(range(-3, 4))
    assert {p.shift[1] for p in drawn} == set(range(-2, 3))
    assert {p.degrees for p in drawn} == {-1, 0, 1}
    scales = np.array([p.scale for p in drawn])
    assert 0.8 <= scales.min() < 0.81
    assert 1.19 < scales.max() <= 1.2
    assert abs(scales.mean() - 1) < 0.02
    small = [draw_placement((20, 30, 34, 44), (100, 100), rng).shift for _ in range(20)]
    assert set(small) == {(0, 0)}  # 14 // 15


@pytest.mark.parametrize(
    ("box", "near"),
    [
        ((10, 10, 90, 70), ((False, False), (False, False))),
        ((9, 10, 90, 70), ((True, False), (False, False))),
        ((10, 10, 91, 70), ((False, True), (False, False))),
        ((10, 9, 90, 70), ((False, False), (True, False))),
        ((10, 10, 90, 71), ((False, False), (False, True))),
        ((0, 0, 100, 80), ((True, True), (True, True))),
    ],
)
def test_groups_near_a_side(box, near):
    """In an image of 80 x 100: neither smaller nor turned, and not moved away from that side."""
    assert near_sides(box, (80, 100)) == near
    rng = np.random.default_rng(1)
    drawn = [draw_placement(box, (80, 100), rng) for _ in range(300)]
    edge = any(near[0] + near[1])
    assert min(p.scale for p in drawn) < 0.9 or edge
    if edge:
        assert {p.degrees for p in drawn} == {0}
        assert min(p.scale for p in drawn) == 1.0
    for axis, (low, high) in enumerate(near):
        shifts = {p.shift[axis] for p in drawn}
        assert (max(shifts) <= 0) == low or high
        assert (min(shifts) >= 0) == high or low
        assert (shifts == {0}) == (low and high)


def test_group_box_is_rounded_and_inside():
    def box(*boxes, image_hw=(50, 60)):
        return group_box(np.array(boxes, np.float32), image_hw)

    assert box((1.4, 2.5, 10.6, 20.49)) == (1, 3, 11, 20)
    assert box((1, 2, 3, 4), (2.6, 1, 2.7, 9)) == (1, 1, 3, 9)
    assert box((11.5, 11.5, 12.5, 12.5)) == (12, 12, 13, 13)  # a pixel is not lost by rounding to even numbers
    assert box((59.8, 0, 60, 0.3)) == (59, 0, 60, 1)
    assert box((0, 0, 60, 50)) == (0, 0, 60, 50)


@given(st.lists(st.tuples(*[st.integers(0, 12)] * 4), max_size=12))
def test_groups_are_the_transitive_closure(corners):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in corners], np.float32).reshape(-1, 4)
    count = len(boxes)
    linked = [
        [i == j or (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]) for j, b in enumerate(boxes)]
        for i, a in enumerate(boxes)
    ]
    for k in range(count):
        for i in range(count):
            for j in range(count):
                linked[i][j] = linked[i][j] or (linked[i][k] and linked[k][j])
    groups = [group.tolist() for group in groups_of(boxes)]
    assert sorted(i for group in groups for i in group) == list(range(count))
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    for group in groups:
        assert group == [j for j in range(count) if linked[group[0]][j]]
