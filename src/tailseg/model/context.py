"""The context encoder: one vector an image, taught by which classes are in it (report, 1.2)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers.norm import BatchNorm2d
from tailseg.layers.residual import require_pairs, residual_pairs

RARE_PRIOR = math.log(0.01 / 0.99)  # an image holds few of the classes: starting at 1/2, they would be unlearnt first
Unlabelled = Literal["negative", "ignored"]


class ContextEncoder(nn.Module):
    """3x3 convolutions on the coarsest level, the mean over the image, and a linear multi-label classifier.

    Args:
        channels: of the level, of the hidden maps and of the context vector, which the RoI features have to share.
        num_classes: C.
        convs: number of convolutions.
        residual: pairs of them as x + conv(ReLU(conv x)), without a ReLU after the sum, instead of conv and ReLU each.
        norm: batch norm after each of them.
        unlabelled: what a class counts as that nobody annotated in an image or looked for there: ``negative`` (as in
            public code), or ``ignored``, which suits data sets in which each image is checked for a few classes only.

    Raises:
        ValueError: residual pairs of an odd number of convolutions.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        convs: int,
        residual: bool,
        norm: bool,
        unlabelled: Unlabelled,
    ) -> None:
        super().__init__()
        if residual:
            require_pairs(convs)
        self.residual = residual
        self.unlabelled = unlabelled
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=not norm) for _ in range(convs))
        self.norms = nn.ModuleList(BatchNorm2d(channels) for _ in range(convs if norm else 0))
        self.classifier = nn.Linear(channels, num_classes)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.constant_(self.classifier.bias, RARE_PRIOR)

    def forward(self, coarsest: Tensor, image_sizes: Tensor, stride: int = 64) -> tuple[Tensor, Tensor]:
        """Predict the classes in the images, and the context vectors for their RoIs.

        Args:
            coarsest: (B, channels, h, w), the pyramid's last level.
            image_sizes: (B, 2) int, pixels, sizes before padding.
            stride: pixels from one cell of the level to the next.

        Returns:
            Logits (B, C) and context (B, channels), float32 also under autocast.
        """
        hidden = coarsest.contiguous(memory_format=torch.channels_last)
        if self.residual:
            hidden = residual_pairs(hidden, len(self.convs), self._convolve)
        else:
            for number in range(len(self.convs)):
                hidden = F.relu(self._convolve(number, hidden), inplace=True)
        with torch.autocast(hidden.device.type, enabled=False):
            context = mean_inside(hidden.to(self.classifier.weight.dtype), image_sizes, stride)
            return self.classifier(context), context

    def _convolve(self, number: int, x: Tensor) -> Tensor:
        x = self.convs[number](x)
        if not self.norms:
            return x
        # Given rows, batch norm also takes the single cell of a single small image.
        every = torch.ones(len(x), dtype=torch.bool, device=x.device)
        normed: Tensor = self.norms[number](x, every)
        return normed

    def loss(self, logits: Tensor, labels: Tensor, valid: Tensor, absent: Tensor) -> Tensor:
        """Binary cross-entropy with whether a class is among the image's objects, averaged over images and classes.

        With ``unlabelled="ignored"`` the mean is over what is known: classes that are annotated or verified absent.

        Args:
            logits: (B, C).
            labels: (B, G) int64 in [0, C) where valid.
            valid: (B, G) bool, False in the padding.
            absent: (B, C) bool, classes verified to be absent; an annotated class is present whatever this says.

        Returns:
            A scalar, to be weighted; 0 with a gradient path where nothing is known.
        """
        present = classes_present(labels, valid, logits.shape[1])
        entropies = F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype), reduction="none")
        if self.unlabelled == "negative":
            return entropies.sum() / max(entropies.numel(), 1)
        known = present | absent
        return (entropies * known).sum() / known.sum().clamp(min=1)


def mean_inside(maps: Tensor, image_sizes: Tensor, stride: int) -> Tensor:
    """Mean (B, channels) of maps (B, channels, h, w) over the cells whose centre lies in the image or on its border.

    So padding does not enter the mean, though convolutions before it may see some of it. The border
    counts since an image of 32·k pixels needs no padding, and for odd k its last cell at stride 64 is centred there.
    The first row and column always count. ``image_sizes`` is (B, 2) in pixels.
    """

    def inside(cells: int, extent: Tensor) -> Tensor:
        index = torch.arange(cells, device=maps.device)
        return (index == 0) | (stride * (2 * index + 1) <= 2 * extent.unsqueeze(1))

    rows, columns = (inside(cells, image_sizes[:, i]) for i, cells in enumerate(maps.shape[2:]))
    weights = (rows.unsqueeze(2) & columns.unsqueeze(1)).to(maps.dtype)
    return (maps * weights.unsqueeze(1)).sum(dim=(2, 3)) / weights.sum(dim=(1, 2)).unsqueeze(1)


def classes_present(labels: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """(B, C) bool: classes among the valid ones of labels (B, G)."""
    present = torch.zeros(labels.shape[0], num_classes + 1, dtype=torch.bool, device=labels.device)
    return present.scatter_(1, torch.where(valid, labels, num_classes), True)[:, :num_classes]


@torch.no_grad()
def multilabel_average_precision(logits: Tensor, present: Tensor, known: Tensor | None = None) -> Tensor:
    """Average precision of each class over images: the mean of the precision at each of its images, best score first.

    Args:
        logits: (N, C), or scores; of equal ones the earlier image comes first.
        present: (N, C) bool.
        known: (N, C) bool, images that count for a class; all of them if None.

    Returns:
        (C,) float64 in (0, 1], NaN for classes that no counted image contains.
    """
    order = logits.argsort(dim=0, descending=True, stable=True)
    counted = torch.ones_like(present) if known is None else known.gather(0, order)
    hits = present.gather(0, order) & counted
    precision = hits.cumsum(0) / counted.cumsum(0).clamp(min=1).double()
    return (precision * hits).sum(0) / hits.sum(0)
