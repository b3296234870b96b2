"""Feature pyramid grid (arXiv:2004.03580), plain and with DCNv2 and CARAFE (report, section 2.1).

Pyramids of five levels stand side by side, the pathways. Each runs from fine to coarse and sees the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers.carafe import CarafeDownsample
from tailseg.layers.deform_conv import ModulatedDeformConv2d

LEVELS = 5


class FPG(nn.Module):
    """Five maps of equal width from C2..C5.

    A cell of the grid (pathway s, level i, both from 0) is active if s + i >= 4; any other passes on what its level was
    in the pathway before. An active cell is a sum of up to four terms, each with a batch norm at its end:

    - same-up (i > 0): level i - 1 of this pathway, halved by a 3x3 convolution;
    - across-lateral: level i of the pathway before, through a 1x1 convolution;
    - across-down (i < 4): level i + 1 of the pathway before, enlarged, through a 3x3 convolution;
    - across-skip: level i before the first pathway, through a 1x1 convolution (an identity in the paper, a convolution
      in its released configuration).

    ReLU comes before all of these and before the last convolutions, one a level.

    Args:
        in_channels: channels of C2..C5.
        channels: of the grid and of its five outputs.
        pathways: how many pyramids; with fewer than 5, the finest levels have no active cell.
        deformable: across-down has DCNv2 for its convolution.
        carafe: same-up halves with CARAFE, before a 3x3 convolution that keeps the size.
    """

    divisor = 64  # pixels: images are padded to multiples of it, so that all levels halve exactly

    def __init__(
        self, in_channels: Sequence[int], channels: int, *, pathways: int, deformable: bool, carafe: bool
    ) -> None:
        super().__init__()
        self.channels = channels
        self.lateral_convs = nn.ModuleList(_conv(c, channels, 1, bias=True) for c in in_channels)
        self.pathways = nn.ModuleList()
        for pathway in range(pathways):
            active = [level for level in range(LEVELS) if pathway + level >= LEVELS - 1]
            cells = {str(level): _Cell(channels, level, deformable=deformable, carafe=carafe) for level in active}
            self.pathways.append(nn.ModuleDict(cells))
        self.output_convs = nn.ModuleList(_conv(channels, channels, 3, bias=True) for _ in range(LEVELS))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, channels, H / stride, W / stride) at strides 4..64 of C2..C5, the sizes rounded up."""
        base = [conv(feature) for conv, feature in zip(self.lateral_convs, features, strict=True)]
        base.append(F.max_pool2d(base[-1], 1, stride=2))
        # Whatever reads a map rectifies it first: so it is rectified once, where it is made, and kept as that.
        base = [F.relu(level) for level in base]
        grid = base
        for cells in self.pathways:
            assert isinstance(cells, nn.ModuleDict)
            before, grid = grid, list(grid)
            for key, cell in cells.items():  # from fine to coarse
                level = int(key)
                finer = grid[level - 1] if level > 0 else None
                coarser = before[level + 1] if level + 1 < LEVELS else None
                grid[level] = F.relu(cell(base[level], before[level], finer, coarser))
        return [conv(level) for conv, level in zip(self.output_convs, grid, strict=True)]


class _Cell(nn.Module):
    """An active cell: the sum of its terms."""

    def __init__(self, channels: int, level: int, *, deformable: bool, carafe: bool) -> None:
        super().__init__()
        self.across_skip = _Term(_conv(channels, channels, 1), channels)
        self.across_lateral = _Term(_conv(channels, channels, 1), channels)
        self.same_up = self.across_down = None
        if level > 0 and carafe:
            self.same_up = _Term(_conv(channels, channels, 3), channels, shrink=CarafeDownsample(channels))
        elif level > 0:
            self.same_up = _Term(_conv(channels, channels, 3, stride=2), channels)
        if level + 1 < LEVELS and deformable:
            # It keeps its own initial weights. That it starts with half a response, the batch norm makes up for.
            self.across_down = _Term(ModulatedDeformConv2d(channels, channels, 3, padding=1, bias=False), channels)
        elif level + 1 < LEVELS:
            self.across_down = _Term(_conv(channels, channels, 3), channels)

    def forward(self, base: Tensor, same: Tensor, finer: Tensor | None, coarser: Tensor | None) -> Tensor:
        """(B, channels, h, w) from rectified maps: two of that size, one twice as large and one half as large."""
        total: Tensor = self.across_skip(base) + self.across_lateral(same)
        if self.same_up is not None:
            assert finer is not None
            total = total + self.same_up(finer)
        if self.across_down is not None:
            assert coarser is not None
            # Copies need no float32, which autocast would make of them on CUDA, and with them of the grid.
            with torch.autocast(coarser.device.type, enabled=False):
                # To the exact size, which is twice or one less: images need not be padded to multiples of 64.
                larger = F.interpolate(coarser, size=same.shape[2:], mode="nearest")
            total = total + self.across_down(larger)
        return total


class _Term(nn.Module):
    """Convolution and batch norm of a map that may have to shrink first."""

    def __init__(self, conv: nn.Module, channels: int, *, shrink: nn.Module | None = None) -> None:
        super().__init__()
        self.shrink = shrink
        self.conv = conv
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w)."""
        if self.shrink is not None:
            x = self.shrink(x)
        normalized: Tensor = self.norm(self.conv(x))
        return normalized


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size, or divides it by the stride, with Caffe2's initial weights."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=bias)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
