"""DCNv1 as DCNv2 with every tap counted whole."""

from pathlib import Path

import pytest
import torch

from tailseg.errors import UserError
from tailseg.zoo.deformable import modulate

PATH = Path("m.pth")


def test_rows_are_added_to_the_first_generation_only() -> None:
    state = {
        "a.conv_offset.weight": torch.ones(18, 4, 3, 3),
        "a.conv_offset.bias": torch.arange(18.0),
        "b.conv_offset.weight": torch.ones(27, 4, 3, 3),
        "b.conv_offset.bias": torch.ones(27),
        "c.weight": torch.ones(18),
    }
    kept = {key: value for key, value in state.items() if key[0] != "a"}
    modulate(state, {}, PATH)
    assert all(state[key] is value for key, value in kept.items())
    assert state["a.conv_offset.weight"].shape == (27, 4, 3, 3)
    assert state["a.conv_offset.weight"].flatten(1).any(dim=1).tolist() == [True] * 18 + [False] * 9
    assert state["a.conv_offset.bias"].tolist() == [*map(float, range(18)), *[30.0] * 9]
    assert (state["a.conv_offset.bias"][18:].sigmoid() == 1).all()


@pytest.mark.parametrize("shape", [(), (0,), (9,), (36, 4, 3, 3)])
def test_other_numbers_of_rows(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"^m\.pth: 'theirs' has \d+ rows; .* 18 rows \(DCNv1\) or 27 \(DCNv2\)$"):
        modulate({"a.conv_offset.weight": torch.zeros(shape)}, {"a.conv_offset.weight": "theirs"}, PATH)
