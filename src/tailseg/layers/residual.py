"""Convolutions in pairs, each pair with a shortcut (SCNet, arXiv 2012.10150)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def residual_pairs(x: Tensor, convs: int, convolve: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Maps x as x + conv(ReLU(conv x)), pair after pair, without a ReLU after the sum.

    Args:
        x: maps (B, channels, h, w); it is not changed.
        convs: number of convolutions; even.
        convolve: the convolution of a number from 0 on, with its norm if it has one; its result may be changed.

    Raises:
        ValueError: an odd number of convolutions.
    """
    require_pairs(convs)
    for first in range(0, convs, 2):
        x = x + convolve(first + 1, F.relu(convolve(first, x), inplace=True))
    return x


def require_pairs(convs: int) -> None:
    """Raise ValueError for an odd number of convolutions."""
    if convs % 2:
        raise ValueError(f"residual pairs need an even number of convolutions, received {convs}")
