"""Feature pyramid network (arXiv 1612.03144; spec, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """Five maps of equal width from C2..C5.

    Args:
        in_channels: channels of C2..C5.
        channels: channels of P2..P6.
    """

    divisor = 32  # pixels: images are padded to multiples of it

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for conv in (*self.lateral_convs, *self.output_convs):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """P2..P6, (B, channels, H / stride, W / stride) at strides 4..64, of C2..C5."""
        merged = [conv(feature) for conv, feature in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:])
        pyramid = [conv(feature) for conv, feature in zip(self.output_convs, merged, strict=True)]
        return [*pyramid, F.max_pool2d(pyramid[-1], 1, stride=2)]
