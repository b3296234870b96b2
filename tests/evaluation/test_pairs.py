import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailseg.evaluation.pairs import Pairs

NONE = np.zeros(0, np.int64)


def matrix_of(pairs: Pairs) -> np.ndarray:
    shape = (len(pairs.whole), pairs.categories)
    images, categories = np.indices(shape).reshape(2, -1)
    return pairs.has(images, categories).reshape(shape)


places = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)))


@given(places, places, st.lists(st.booleans(), min_size=4, max_size=4))
def test_as_a_matrix_has_them(some, more, whole):
    images, categories = np.array(some, np.int64).reshape(-1, 2).T
    pairs = Pairs.of(images, categories, 5, np.array(whole))
    expected = np.zeros((4, 5), bool)
    expected[images, categories] = True
    assert pairs.lists() == [np.flatnonzero(row).tolist() for row in expected]
    images, categories = np.array(more, np.int64).reshape(-1, 2).T
    expected[images, categories] = True
    expected[np.array(whole)] = True
    np.testing.assert_array_equal(matrix_of(pairs.and_of(images, categories)), expected)


@pytest.mark.parametrize("images", [0, 2])
def test_nothing_in_it(images):
    pairs = Pairs.of(NONE, NONE, 3, np.zeros(images, bool))
    assert pairs.has(NONE, NONE).tolist() == []
    assert pairs.lists() == [[]] * images
    assert not matrix_of(pairs).any()


def test_more_pairs_than_a_matrix_could_hold():
    pairs = Pairs.of(np.array([99_999]), np.array([9_999_999]), 10_000_000, np.zeros(100_000, bool))
    assert pairs.has(np.array([99_999, 99_999, 0]), np.array([9_999_999, 0, 9_999_999])).tolist() == [
        True,
        False,
        False,
    ]
