"""RoI features from a pyramid (RoIAlign of Mask R-CNN, section 3; levels as in FPN, Eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align


def roi_levels(boxes: Tensor, levels: int, finest_scale: float = 56.0) -> Tensor:
    """Pyramid level (N,) int64 of boxes (N, 4): clamp(floor(log2(sqrt(w·h) / 56 + 1e-6)), 0, levels - 1)."""
    scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    # A box that is no number belongs somewhere too: so a diverged model shows in its losses, not as a broken shape.
    return torch.log2(scale / finest_scale + 1e-6).floor().nan_to_num(0).clamp(0, levels - 1).long()


def planar(pyramid: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, channels, h, w) as RoIAlign reads them, float32 and one channel after the other.

    It would convert by itself, but again in every pooling.
    """
    return [features.float().contiguous() for features in pyramid]


class RoIPooler(nn.Module):
    """RoIAlign, each RoI from the level of its size.

    Args:
        output_size: S.
        strides: stride of each level, finest first.
        sampling_ratio: sampling points along each side of a cell; 0 takes as many as the cell has feature pixels.
        aligned: a pixel's value stands at its centre, not at its upper left corner.
    """

    def __init__(
        self,
        output_size: int,
        strides: Sequence[int] = (4, 8, 16, 32),
        *,
        sampling_ratio: int = 0,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = tuple(strides)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, pyramid: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Features (R, channels, S, S).

        Args:
            pyramid: at least as many maps (B, channels, h, w) as there are strides.
            rois: (R, 5): image index, x1, y1, x2, y2 in pixels.
        """
        levels = roi_levels(rois[:, 1:], len(self.strides))
        form = self._level_by_level if rois.device.type == "cpu" else self._at_every_level
        return form(pyramid, rois, levels)

    def _at_every_level(self, pyramid: Sequence[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
        # A RoI of another level is given no extent: it has no sampling points, costs next to nothing and adds zero.
        # Unlike picking the rows of a level, that does not wait for their number.
        parts = []
        for level, stride in enumerate(self.strides):
            here = (levels == level).unsqueeze(1)
            own = torch.cat([rois[:, :1], torch.where(here, rois[:, 1:], rois[:, 1:3].repeat(1, 2))], dim=1)
            pooled = self._align(pyramid[level], own, stride)
            if self.sampling_ratio > 0 or not self.aligned:  # then even a RoI without extent is sampled
                pooled = torch.where(here[:, :, None, None], pooled, 0.0)
            parts.append(pooled)
        return torch.stack(parts).sum(dim=0)

    def _level_by_level(self, pyramid: Sequence[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
        order, parts = [], []
        for level, stride in enumerate(self.strides):
            rows = (levels == level).nonzero().squeeze(1)
            order.append(rows)
            parts.append(self._align(pyramid[level], rois[rows], stride))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _align(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        pooled: Tensor = roi_align(
            features.float(), rois.float(), self.output_size, 1 / stride, self.sampling_ratio, self.aligned
        )
        return pooled
