"""Features of a batch from which the heads pool their RoIs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

from torch import Tensor

from tailseg.layers.roi_pooling import RoIPooler, planar
from tailseg.layers.shifted_pooling import PyramidRows, pyramid_rows, shifted_roi_align
from tailseg.model.box_head import Pool


class ImageFeatures:
    """The pyramid of a batch and, if there is a context encoder, its vectors, which are added to all RoI features.

    Args:
        pyramid: P2..P6, (B, channels, h, w) each.
        context: (B, channels), or None.
    """

    def __init__(self, pyramid: Sequence[Tensor], context: Tensor | None = None) -> None:
        self.pyramid = pyramid
        self.context = context

    def pool(self, pooler: RoIPooler) -> Pool:
        """The function that makes features of RoIs with this pooler's size, levels and sampling."""
        return partial(self._pooled, pooler)

    def _pooled(self, pooler: RoIPooler, rois: Tensor, shifts: Tensor | None = None) -> Tensor:
        if shifts is None:
            pooled: Tensor = pooler(self._planar, rois)
        else:
            pooled = shifted_roi_align(self._rows, rois, shifts, pooler.output_size)
        if self.context is None:
            return pooled
        return pooled + self.context[rois[:, 0].long()][:, :, None, None]

    @cached_property
    def _planar(self) -> list[Tensor]:
        return planar(self.pyramid)

    @cached_property
    def _rows(self) -> PyramidRows:
        return pyramid_rows(self.pyramid)
