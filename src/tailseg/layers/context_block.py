"""The global context block of GCNet (arXiv 1904.11492, section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ContextBlock(nn.Module):
    """Adds one vector an image to its maps: their mean under learnt weights, through two 1x1 convolutions.

    Args:
        channels: of the maps.
        ratio: hidden channels, as a share of them.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.attention = nn.Conv2d(channels, 1, 1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.norm = nn.LayerNorm([hidden, 1, 1])
        self.expand = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.expand.weight)  # at the start the maps are passed on
        assert self.expand.bias is not None
        nn.init.zeros_(self.expand.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, channels, h, w), of the same shape."""
        weights = self.attention(maps).flatten(1).softmax(dim=1)
        context = (maps.flatten(2) @ weights.unsqueeze(2)).unsqueeze(3)
        added: Tensor = self.expand(F.relu(self.norm(self.reduce(context))))
        return maps + added
