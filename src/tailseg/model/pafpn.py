"""Path aggregation on top of a feature pyramid (PANet, arXiv 1803.01534, section 3.1), as mmdetection builds it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers.norm import Norm, build_norm
from tailseg.model.fpn import FPN


class PAFPN(FPN):
    """The FPN's P2..P5, a path that leads from each to the next by a 3x3 convolution with stride 2, and outputs of it.

    There is no ReLU in the path, unlike in the paper. P2 stays as it is, P6 is every second cell of P5.

    Args:
        in_channels, channels, norm: as in `FPN`; the further convolutions have the same norm.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, *, norm: Norm) -> None:
        super().__init__(in_channels, channels, norm=norm)
        steps = range(len(in_channels) - 1)
        self.down_convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=not norm) for _ in steps
        )
        self.path_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=not norm) for _ in steps)
        self.down_norms = nn.ModuleList(build_norm(norm, channels) for _ in steps)
        self.path_norms = nn.ModuleList(build_norm(norm, channels) for _ in steps)
        for conv in (*self.down_convs, *self.path_convs):
            assert isinstance(conv, nn.Conv2d)
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """P2..P6, (B, channels, H / stride, W / stride) at strides 4..64, of C2..C5."""
        path = super().forward(features)[:-1]
        for i, (conv, norm) in enumerate(zip(self.down_convs, self.down_norms, strict=True)):
            path[i + 1] = path[i + 1] + norm(conv(path[i]))
        outputs = zip(self.path_convs, self.path_norms, path[1:], strict=True)
        pyramid = [path[0], *(norm(conv(level)) for conv, norm, level in outputs)]
        return [*pyramid, F.max_pool2d(pyramid[-1], 1, stride=2)]
