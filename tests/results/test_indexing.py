"""Every kind of index against a Python list; sentences for the others."""

from typing import Any

import numpy as np
import pytest
import torch

from tailseg.results.indexing import positions


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (0, [0]),
        (4, [4]),
        (-1, [4]),
        (-5, [0]),
        (np.int64(2), [2]),
        (torch.tensor(3), [3]),
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -2), [4, 2, 0]),
        (slice(-2, 100), [3, 4]),
        (slice(torch.tensor(3), None), [3, 4]),
        ([], []),
        ([4, 0, -1], [4, 0, 4]),
        ([True, False, False, True, False], [0, 3]),
        (np.array([1, 1]), [1, 1]),
        (np.array([3], dtype=np.uint8), [3]),
        (np.zeros(5, bool), []),
        (torch.tensor([2, -2]), [2, 3]),
        (torch.tensor([False, True, False, False, True]), [1, 4]),
        (torch.zeros(0, dtype=torch.int64), []),
        ([torch.tensor(1), np.int32(2)], [1, 2]),
    ],
)
def test_positions(index: Any, expected: list[int]) -> None:
    found = positions(index, 5)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_of_nothing() -> None:
    assert positions(slice(None), 0).tolist() == []
    assert positions([], 0).tolist() == []
    assert positions(torch.zeros(0, dtype=torch.bool), 0).tolist() == []
    with pytest.raises(IndexError, match=r"^object 0 of 0 does not exist: there are none$"):
        positions(0, 0)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (5, "object 5 of 5 does not exist: valid are 0 to 4 and -1 to -5"),
        (-6, "object -6 of 5 does not exist: valid are 0 to 4 and -1 to -5"),
        ([0, 7, 9], "object 7 of 5 does not exist: valid are 0 to 4 and -1 to -5"),
        (torch.tensor([True, False]), "5 objects take a mask of 5 bools, received 2"),
    ],
)
def test_out_of_range(index: Any, sentence: str) -> None:
    with pytest.raises(IndexError) as error:
        positions(index, 5)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("index", "received"),
    [
        ("cat", "str 'cat'"),
        (1.0, "float 1.0"),
        (None, "NoneType None"),
        (True, "bool True"),
        (torch.tensor(True), "Tensor of torch.bool ()"),
        ((0, 1), "tuple (0, 1)"),
        ([0.5], "list [0.5]"),
        ([[0], [1, 2]], "list [[0], [1, 2]]"),
        (["x" * 100], "list ['" + "x" * 55 + "..."),
        (np.zeros((2, 2), np.int64), "ndarray of int64 (2, 2)"),
        (torch.zeros(5), "Tensor of torch.float32 (5,)"),
        (slice("a", None), "slice slice('a', None, None)"),
        (slice(None, None, 0), "slice slice(None, None, 0)"),
        (2**70, f"int {2**70}"),
    ],
)
def test_of_another_kind(index: Any, received: str) -> None:
    with pytest.raises(TypeError) as error:
        positions(index, 5)
    assert str(error.value) == (
        "objects are selected by an integer, a slice, or a list, array or tensor of integers or of one bool an "
        f"object, received {received}"
    )
