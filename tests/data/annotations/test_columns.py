import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.annotations import columns
from tailseg.data.annotations.columns import IdLists, Segmentations, Texts, in_full, starts_of, take_rows


@given(parts=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=9), data=st.data())
def test_rows_are_taken_in_any_order(parts, data):
    order = data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=12) if parts else st.just([]))
    values = np.array([x for part in parts for x in part], np.int16)
    starts = starts_of(np.array([len(part) for part in parts], np.int64))
    expected = [x for i in order for x in parts[i]]
    assert take_rows(values, starts, np.array(order, np.int64)).tolist() == expected


def test_flat_columns_are_sequences():
    texts = Texts(np.frombuffer("aé".encode(), np.uint8), np.array([0, 1, 1, 3]))
    assert list(texts) == ["a", None, "é"]
    assert texts[-1] == "é"
    assert len(Texts(np.zeros(0, np.uint8), np.zeros(1, np.int64))) == 0
    lists = IdLists(np.array([4, 5]), np.array([0, 2, 2]))
    assert [ids.tolist() for ids in lists] == [[4, 5], []]
    with pytest.raises(IndexError, match="below 2, received 2"):
        lists[2]


@given(parts=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=9), data=st.data())
def test_rows_are_taken_across_pieces(parts, data):
    """Many rows are moved some at a time; the seams do not show."""
    order = data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=12))
    values = np.array([x for part in parts for x in part], np.int16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(columns, "_PIECE", data.draw(st.integers(1, 4)))
        taken = take_rows(values, starts_of(np.array(list(map(len, parts)))), np.array(order, np.int64))
    assert taken.tolist() == [x for i in order for x in parts[i]]
    assert taken.dtype == np.int16


def test_starts_by_hand():
    assert starts_of(np.array([2, 0, 3], np.int32)).tolist() == [0, 2, 2, 5]
    assert starts_of(np.zeros(0, np.int64)).tolist() == [0]
    assert starts_of(np.array([2**31 - 1] * 2, np.int32))[-1] == 2**32 - 2  # counted in 64 bits


@given(st.lists(st.text(max_size=5) | st.none(), max_size=6))
def test_texts_come_back(stated):
    encoded = [(text or "").encode() for text in stated]
    texts = Texts(np.frombuffer(b"".join(encoded), np.uint8), starts_of(np.array(list(map(len, encoded)), np.int64)))
    expected = [text or None for text in stated]
    assert list(texts) == expected
    assert [texts[i - len(texts)] for i in range(len(texts))] == expected


@pytest.mark.parametrize("row", [2, -3, 100])
def test_rows_beyond_the_ends_are_refused(row):
    starts = np.array([0, 0, 0])
    for flat in (Texts(np.zeros(0, np.uint8), starts), IdLists(np.zeros(0, np.int64), starts)):
        with pytest.raises(IndexError, match=f"expected a row below 2, received {row}"):
            flat[row]


def test_segmentations_are_polygons_or_a_code():
    polygons = [[0, 0, 4, 0, 4, 4], [1.25, 1, 2, 1, 2, 2.5, 1, 2], [5, 5, 6, 5, 6, 6]]
    flat = Segmentations(
        np.array([x for polygon in polygons for x in polygon], np.float32),
        polygon_starts=np.array([0, 6, 14, 20]),
        first_polygon=np.array([0, 2, 2, 3, 3]),
        rle_bytes=np.frombuffer(b"abc", np.uint8),
        rle_starts=np.array([0, 0, 3, 3, 3]),
    )
    assert len(flat) == 4
    assert [polygon.tolist() for polygon in flat[0]] == polygons[:2]
    assert flat[1] == b"abc"
    assert [polygon.tolist() for polygon in flat[2]] == polygons[2:]
    assert flat[3] == []
    assert flat[0][0].dtype == np.float64
    with pytest.raises(IndexError, match="below 4, received 4"):
        flat[4]


@given(st.lists(st.integers(-6_553_500, 6_553_500).map(lambda n: n / 100), max_size=20))
def test_two_decimals_survive_float32(numbers):
    assert in_full(np.array(numbers, np.float32)).tolist() == numbers


def test_coordinates_in_full_stay_as_they_are():
    numbers = np.array([1 / 3, 12.345, -7.0])
    assert in_full(numbers).tolist() == numbers.tolist()
    for kind in (np.float32, np.float64):
        assert in_full(np.zeros(0, kind)).dtype == np.float64
