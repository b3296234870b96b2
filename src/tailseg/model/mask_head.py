"""The mask head: a 28 x 28 mask of a RoI (Mask R-CNN, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from tailseg.layers.carafe import CarafeUpsample
from tailseg.layers.norm import Norm, build_norm
from tailseg.layers.normalized import normalize
from tailseg.layers.residual import require_pairs, residual_pairs

ROI_SIZE = 14
MASK_SIZE = 28
EPS = 1e-6  # added to the norms of a normalised predictor


class MaskHead(nn.Module):
    """3x3 convolutions, upsampling by two, and a 1x1 convolution whose rows belong to classes.

    Only the row of the class that is asked for is evaluated: with 1203 classes and 300 boxes, the full output would
    take 1.1 GB.

    Args:
        in_channels: of the RoI feature.
        num_classes: C.
        channels: of the hidden maps.
        convs: number of 3x3 convolutions.
        residual: pairs of them with a shortcut, as `tailseg.layers.residual`, instead of a ReLU after each (SCNet);
            then ``channels`` are ``in_channels``.
        norm: batch norm after each of them, or group norm.
        upsample: ``deconv`` (transposed convolution) or ``carafe`` (content-aware reassembly, without a ReLU after it).
        class_agnostic: one row for all classes.
        normalized: the 1x1 convolution compares directions, as `tailseg.layers.normalized.NormalizedConv2d`.
        temperature: τ of a normalised one.
        flow: the hidden maps of the stage before, through a 1x1 convolution and ReLU, are added to the RoI feature
            (HTC, arXiv 1901.07518, section 3.2), which has as many channels.

    Raises:
        ValueError: residual pairs of an odd number of convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        flow: bool = False,
        channels: int,
        convs: int,
        residual: bool,
        norm: Norm,
        upsample: str,
        class_agnostic: bool,
        normalized: bool,
        temperature: float,
    ) -> None:
        super().__init__()
        if residual:
            require_pairs(convs)
        self.residual = residual
        widths = [in_channels, *[channels] * convs]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=not norm) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(build_norm(norm, channels) for _ in range(convs if norm else 0))
        self.flow = nn.Conv2d(channels, channels, 1) if flow else None
        self.upsample: nn.ConvTranspose2d | CarafeUpsample
        if upsample == "carafe":
            self.upsample = CarafeUpsample(channels)  # it has its own initial weights
        else:
            self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
            _init_kaiming(self.upsample)
        self.class_agnostic = class_agnostic
        self.normalized, self.temperature = normalized, temperature
        self.predictor = nn.Conv2d(channels, 1 if class_agnostic else num_classes, 1)
        for layer in (*self.convs, *([] if self.flow is None else [self.flow]), self.predictor):
            _init_kaiming(layer)
        if class_agnostic or normalized:  # by the fan-out of a single row, logits would start at ±10
            nn.init.normal_(self.predictor.weight, std=0.01)

    def forward(self, features: Tensor, labels: Tensor, live: Tensor | None = None) -> Tensor:
        """Logits (M, 28, 28) float32 of the class ``labels`` (M,) from RoI features (M, in_channels, 14, 14).

        Rows that are not ``live`` (M,) are left out of batch statistics.
        """
        return self.logits(self.hidden_maps(features, live), labels)

    def hidden_maps(self, features: Tensor, live: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """Maps (M, channels, 14, 14) after the 3x3 convolutions; with ``flow``, those of the stage ``before`` count."""
        hidden = features.contiguous(memory_format=torch.channels_last)
        if self.flow is not None and before is not None:
            hidden = hidden + F.relu(self.flow(before))

        def convolve(number: int, maps: Tensor) -> Tensor:
            maps = self.convs[number](maps)
            return self.norms[number](maps, live) if self.norms else maps

        if self.residual:
            return residual_pairs(hidden, len(self.convs), convolve)
        for number in range(len(self.convs)):
            hidden = F.relu(convolve(number, hidden), inplace=True)
        return hidden

    def logits(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Logits (M, 28, 28) float32 of the class ``labels`` (M,) from hidden maps (M, channels, 14, 14)."""
        hidden = self.upsample(hidden)
        if isinstance(self.upsample, nn.ConvTranspose2d):
            hidden = F.relu(hidden, inplace=True)
        own = torch.zeros_like(labels) if self.class_agnostic else labels
        assert self.predictor.bias is not None
        # Cells as rows of channels: so the gradient is channels_last, as the maps are.
        logits = self._own_logits(self.predictor.weight.flatten(1)[own], hidden.permute(0, 2, 3, 1).flatten(1, 2))
        return (logits + self.predictor.bias[own].unsqueeze(1)).view(-1, *hidden.shape[2:])

    def _own_logits(self, rows: Tensor, cells: Tensor) -> Tensor:
        """<row, cell> (M, cells) float32 of each RoI's row (M, channels) and its cells (M, cells, channels)."""
        if not self.normalized:
            return torch.bmm(cells, rows.unsqueeze(2)).squeeze(2).float()
        with torch.autocast(cells.device.type, enabled=False):
            directions = normalize(rows.float(), 1, EPS) * self.temperature
            return torch.bmm(normalize(cells.float(), 2, EPS), directions.unsqueeze(2)).squeeze(2)


def mask_logits(heads: Sequence[MaskHead], features: Tensor, labels: Tensor) -> list[Tensor]:
    """Logits (M, 28, 28) of each head, which is given the hidden maps of the one before it if they are chained.

    Args:
        heads: in the order of their stages.
        features: (M, in_channels, 14, 14) of RoIs.
        labels: (M,) int64, classes of the masks.
    """
    if all(head.flow is None for head in heads):
        return [head(features, labels) for head in heads]
    return [head.logits(maps, labels) for head, maps in zip(heads, _chained(heads, features, None), strict=True)]


def last_mask_logits(heads: Sequence[MaskHead], features: Tensor, labels: Tensor, live: Tensor | None = None) -> Tensor:
    """The last of `mask_logits`, without the others."""
    last = heads[-1]
    if last.flow is None:
        return cast("Tensor", last(features, labels, live))
    return last.logits(_chained(heads, features, live)[-1], labels)


def _chained(heads: Sequence[MaskHead], features: Tensor, live: Tensor | None) -> list[Tensor]:
    """Hidden maps of each head, given those of the one before it."""
    maps: list[Tensor] = []
    for head in heads:
        maps.append(head.hidden_maps(features, live, maps[-1] if maps else None))
    return maps


def _init_kaiming(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def mask_targets(boxes: Tensor, masks: Tensor, frames: Tensor, size: int = MASK_SIZE) -> Tensor:
    """The mask that each RoI shall show: RoIAlign of its object's mask inside the RoI, >= 0.5.

    Args:
        boxes: (M, 4) RoIs clipped to the image, in the image's pixels.
        masks: (M, S, S) uint8 grids of the matched objects (see `Instances`).
        frames: (M, 4) the rectangles that the grids cover, in the same pixels.
        size: side of the target.

    Returns:
        (M, size, size) float32, 0 or 1.
    """
    side = masks.shape[-1]
    origin, extent = frames[:, :2].repeat(1, 2), (frames[:, 2:] - frames[:, :2]).repeat(1, 2)
    # The frame of a padded object has no extent; whatever is laid over it gets no sampling points.
    in_grid = torch.where(extent > 0, (boxes - origin) / extent * side, 0.0)
    rows = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype).unsqueeze(1)
    grids = masks.unsqueeze(1).float().div(255)
    inside: Tensor = roi_align(grids, torch.cat([rows, in_grid], dim=1), size, 1.0, sampling_ratio=0, aligned=True)
    return (inside.squeeze(1) >= 0.5).float()


def mask_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy averaged over all cells of the rows with weight 1.

    Args:
        logits: (M, S, S).
        targets: (M, S, S) in {0, 1}.
        weights: (M,) bool; False rows are empty slots. None left gives 0 with a gradient path.
    """
    cells = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=(1, 2))
    return (cells * weights).sum() / weights.sum().clamp(min=1)
