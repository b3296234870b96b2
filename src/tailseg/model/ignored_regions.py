"""Regions of a batch's images in which nothing counts as background: crowds and objects with ``"ignore"``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.model.matching import IGNORED, NEGATIVE
from tailseg.structures import IGNORED_CELL

LEAST_SHARE = 0.5  # of a prior's area in such regions, from which on it is no negative


class IgnoredRegions:
    """Takes negatives out of the training that lie, by at least half of their area, in regions to be ignored.

    Positives stay: an object that is annotated inside a crowd is learnt.

    Args:
        cells: (B, h, w) uint8, 1 inside; (B, 0, 0) without any region.
    """

    def __init__(self, cells: Tensor) -> None:
        self.sums: Tensor | None = None
        if cells.shape[-1] > 0:
            # Integers below 2^24 in float32: exact.
            self.sums = F.pad(cells.float().cumsum(1).cumsum(2), (1, 0, 1, 0)).unsqueeze(1)

    def spare(self, matched: Tensor, priors: Tensor) -> Tensor:
        """The assignment (B, N) of priors (B or 1, N, 4), with `IGNORED` instead of `NEGATIVE` in such regions."""
        if self.sums is None:
            return matched
        inside = self.share(priors.expand(matched.shape[0], -1, -1)) >= LEAST_SHARE
        return torch.where(inside & (matched == NEGATIVE), IGNORED, matched)

    def share(self, boxes: Tensor) -> Tensor:
        """(B, N) the share of the area of boxes (B, N, 4) that lies in the regions, to the part of a cell.

        Within a cell the sum up to a corner is bilinear in the corner's place, so interpolating sums is exact.
        """
        assert self.sums is not None
        height, width = self.sums.shape[2] - 1, self.sums.shape[3] - 1
        # Side by side and not by a tensor of both: that would be copied to the device, and waited for.
        x1, x2 = (boxes[..., i].clamp(0, width * IGNORED_CELL) / (width * IGNORED_CELL) * 2 - 1 for i in (0, 2))
        y1, y2 = (boxes[..., i].clamp(0, height * IGNORED_CELL) / (height * IGNORED_CELL) * 2 - 1 for i in (1, 3))
        corners = (x2, y2), (x1, y2), (x2, y1), (x1, y1)
        places = torch.stack([torch.stack(corner, dim=-1) for corner in corners], dim=1)
        sums = F.grid_sample(self.sums, places, mode="bilinear", padding_mode="border", align_corners=True).squeeze(1)
        covered = (sums[:, 0] - sums[:, 1] - sums[:, 2] + sums[:, 3]) * IGNORED_CELL**2
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        return torch.where(area > 0, covered / area.clamp(min=1e-6), 0.0)


NOWHERE = IgnoredRegions(torch.zeros(0, 0, 0))
