import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailseg.data.annotations.columns import IdLists, Texts, starts_of, take_rows


@settings(derandomize=True, deadline=None, max_examples=100)
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
