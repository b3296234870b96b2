"""Feature pyramid network (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers.norm import Norm, build_norm


class FPN(nn.Module):
    """Five maps of equal width from C2..C5.

    Args:
        in_channels: channels of C2..C5.
        channels: channels of P2..P6.
        norm: batch norm over all processes after each convolution, or group norm; the convolution has no bias then.
    """

    divisor = 32  # pixels: images are padded to multiples of it

    def __init__(self, in_channels: Sequence[int], channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.channels = channels
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, channels, 1, bias=not norm) for c in in_channels)
        self.output_convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=not norm) for _ in in_channels
        )
        self.lateral_norms = nn.ModuleList(build_norm(norm, channels) for _ in in_channels)
        self.output_norms = nn.ModuleList(build_norm(norm, channels) for _ in in_channels)
        for conv in (*self.lateral_convs, *self.output_convs):
            assert isinstance(conv, nn.Conv2d)
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """P2..P6, (B, channels, H / stride, W / stride) at strides 4..64, of C2..C5."""
        lateral = zip(self.lateral_convs, self.lateral_norms, features, strict=True)
        merged = [norm(conv(feature)) for conv, norm, feature in lateral]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:])
        output = zip(self.output_convs, self.output_norms, merged, strict=True)
        pyramid = [norm(conv(feature)) for conv, norm, feature in output]
        return [*pyramid, F.max_pool2d(pyramid[-1], 1, stride=2)]
