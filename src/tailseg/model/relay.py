"""SCNet's feature relay: what the last box head saw in a RoI, for its mask (arXiv 2012.10150, section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.model import box_head, mask_head


class FeatureRelay(nn.Module):
    """A linear layer that makes a 7x7 map of a box head's hidden features, and bilinear upsampling by two.

    Args:
        width: of the hidden features.
        channels: of the map, which the RoI features of the mask head have to share.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.fc = nn.Linear(width, channels * box_head.ROI_SIZE**2)
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps (M, channels, 14, 14) of hidden features (M, width), to be added to the RoI features."""
        maps = self.fc(hidden).view(-1, self.channels, box_head.ROI_SIZE, box_head.ROI_SIZE)
        return F.interpolate(maps, size=mask_head.ROI_SIZE, mode="bilinear", align_corners=True)
