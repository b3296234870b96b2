"""Feature pyramid network whose maps are enlarged by CARAFE (arXiv 1905.02188, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tailseg.layers.carafe import CarafeUpsample


class CarafeFPN(nn.Module):
    """Five maps of equal width from C2..C5.

    Unlike in `FPN`, P6 starts as a 3x3 convolution of stride 2 on C5, and adds to P5 as each level does to the next.

    Args:
        in_channels: channels of C2..C5.
        channels: channels of P2..P6.
    """

    divisor = 64  # pixels: images are padded to multiples of it, so that all levels halve exactly

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.lateral_convs.append(nn.Conv2d(in_channels[-1], channels, 3, stride=2, padding=1))
        self.output_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in self.lateral_convs)
        self.upsamplers = nn.ModuleList(CarafeUpsample(channels) for _ in in_channels)
        for conv in (*self.lateral_convs, *self.output_convs):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """P2..P6, (B, channels, H / stride, W / stride) at strides 4..64, of C2..C5."""
        merged = [conv(feature) for conv, feature in zip(self.lateral_convs, [*features, features[-1]], strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            height, width = merged[i - 1].shape[-2:]
            merged[i - 1] = merged[i - 1] + self.upsamplers[i - 1](merged[i])[..., :height, :width]
        return [conv(feature) for conv, feature in zip(self.output_convs, merged, strict=True)]
