"""Residual pairs of convolutions against their formula."""

import pytest
import torch
from torch import Tensor

from tailseg.layers.residual import residual_pairs


def test_two_pairs() -> None:
    """With factors in the place of convolutions, x + b · max(a x, 0) for each pair; x stays as it was."""
    factors = (2.0, 3.0, -1.0, 0.5)

    def convolve(number: int, x: Tensor) -> Tensor:
        return factors[number] * x

    x = torch.tensor([1.0, -1.0])
    # 1 + 3 · 2 = 7, and 7 + 0.5 · 0; -1 + 3 · 0 = -1, and -1 + 0.5 · 1
    assert residual_pairs(x, 4, convolve).tolist() == [7.0, -0.5]
    assert x.tolist() == [1.0, -1.0]


def test_an_odd_number() -> None:
    with pytest.raises(ValueError, match="an even number of convolutions, received 3"):
        residual_pairs(torch.zeros(1), 3, lambda _number, x: x)
