"""The semantic branch of HTC (arXiv 1901.07518, section 3.3) and SCNet (arXiv 2012.10150).

It makes features of stuff and things, which are added to those of RoIs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers.residual import require_pairs, residual_pairs

LEVELS = 5
FUSED = 1  # the level of stride 8, to whose size the others are brought
STRIDE = 8
ROI_SIZE = 14


class SemanticBranch(nn.Module):
    """A 1x1 convolution of each level, their sum at stride 8, 3x3 convolutions, and a 1x1 convolution; ReLU after each.

    Its prediction of a class at each place, which only its own loss reads, is left out.

    Args:
        in_channels: of P2..P6.
        channels: of the 3x3 convolutions and of the result, which the RoI features have to share.
        convs: number of 3x3 convolutions.
        residual: pairs of them with a shortcut, as `tailseg.layers.residual`, instead of a ReLU after each (SCNet);
            then all maps have the same number of channels.

    Raises:
        ValueError: residual pairs of an odd number of convolutions.
    """

    def __init__(self, in_channels: int, channels: int, *, convs: int, residual: bool) -> None:
        super().__init__()
        if residual:
            require_pairs(convs)
        self.residual = residual
        self.lateral_convs = nn.ModuleList(nn.Conv2d(in_channels, in_channels, 1) for _ in range(LEVELS))
        widths = [in_channels, *[channels] * convs]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.embedding = nn.Conv2d(channels, channels, 1)
        for conv in (*self.lateral_convs, *self.convs, self.embedding):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Features (B, channels, H / 8, W / 8) of P2..P6."""
        size = pyramid[FUSED].shape[-2:]
        total = F.relu(self.lateral_convs[FUSED](pyramid[FUSED]))
        for level, maps in enumerate(pyramid):
            if level != FUSED:
                resized = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
                total = total + F.relu(self.lateral_convs[level](resized))
        if self.residual:
            total = residual_pairs(total, len(self.convs), lambda number, maps: self.convs[number](maps))
        else:
            for conv in self.convs:
                total = F.relu(conv(total))
        embedded: Tensor = F.relu(self.embedding(total))
        return embedded
