"""The pyramid of HRNet (HRFPN, arXiv 1904.04514, section 3.2): all maps side by side, averaged to each size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 5


class HRFPN(nn.Module):
    """Five maps of equal width from C2..C5.

    Args:
        in_channels: channels of C2..C5.
        channels: channels of P2..P6.
    """

    divisor = 32  # pixels: images are padded to multiples of it

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.reduction = nn.Conv2d(sum(in_channels), channels, 1)
        self.output_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(LEVELS))
        for conv in (self.reduction, *self.output_convs):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """P2..P6, (B, channels, H / stride, W / stride) at strides 4..64, rounded down, of C2..C5.

        Args:
            features: of images whose sides are multiples of 32.
        """
        size = features[0].shape[-2:]
        same = [F.interpolate(maps, size=size, mode="bilinear") for maps in features[1:]]
        reduced = self.reduction(torch.cat([features[0], *same], dim=1))
        pooled = [reduced, *(F.avg_pool2d(reduced, 2**i, 2**i) for i in range(1, LEVELS))]
        return [conv(maps) for conv, maps in zip(self.output_convs, pooled, strict=True)]
