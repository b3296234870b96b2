"""The mask-IoU head: how well a predicted mask fits (Mask Scoring R-CNN, arXiv 1903.00241)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.model.mask_head import ROI_SIZE

THRESHOLD = 0.5  # of a mask's probability
EPS = 1e-7  # added to areas, in pixels, and to the share ρ


class MaskIouHead(nn.Module):
    """Four 3x3 convolutions, the last of stride 2, and three fully connected layers, the last with one row a class.

    Args:
        in_channels: of the RoI feature, that of the mask head.
        num_classes: C.
        channels: of the convolutions.
        width: of the hidden layers.
        class_agnostic: one row for all classes.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int,
        width: int,
        class_agnostic: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels + 1, *[channels] * 4]
        strides = (1, 1, 1, 2)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=stride, padding=1)
            for (a, b), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.fc1 = nn.Linear(channels * (ROI_SIZE // 2) ** 2, width)
        self.fc2 = nn.Linear(width, width)
        self.class_agnostic = class_agnostic
        self.predictor = nn.Linear(width, 1 if class_agnostic else num_classes)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
        """IoU of each mask with its object's whole mask, as far as the head can tell.

        Args:
            features: (M, in_channels, 14, 14), RoI features.
            masks: (M, 28, 28) probabilities of the RoI's own class; gradients pass.
            labels: (M,) int64 in [0, C), that class.

        Returns:
            (M,) float32 also under autocast, not clamped to [0, 1].
        """
        halved = F.max_pool2d(masks.unsqueeze(1), 2).to(features.dtype)
        hidden = torch.cat([features, halved], dim=1).contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            hidden = F.relu(conv(hidden), inplace=True)
        hidden = F.relu(self.fc2(F.relu(self.fc1(hidden.flatten(1)))))
        own = torch.zeros_like(labels) if self.class_agnostic else labels
        weight, bias = self.predictor.weight[own], self.predictor.bias[own]
        return (hidden.to(weight.dtype) * weight).sum(dim=1) + bias


@torch.no_grad()
def mask_iou_targets(
    masks: Tensor, targets: Tensor, rois: Tensor, grids: Tensor, frames: Tensor, image_sizes: Tensor
) -> Tensor:
    """IoU of each predicted mask with the whole mask of its object, which may reach beyond the RoI.

    In cells of the RoI's grid: I / (A_pred + A_gt - I), where A_pred has a probability above 0.5, I is its overlap with
    the target, and A_gt is the target's area divided by ρ, the share of the object that lies in the RoI.

    Args:
        masks: (M, T, T) probabilities.
        targets: (M, T, T) in {0, 1}, see `mask_targets`.
        rois: (M, 4) RoIs, xyxy in pixels.
        grids: (M, S, S) uint8 masks of the matched objects (see `Instances`).
        frames: (M, 4) rectangles that the grids cover, in pixels.
        image_sizes: (M, 2) pixels, size of each RoI's image without padding.

    Returns:
        (M,) in [0, 1], in the dtype of ``frames``; 0 where the masks share no cell.
    """
    shares = share_inside(rois, grids, frames, image_sizes)
    predicted, wanted = masks > THRESHOLD, targets > 0.5
    overlap = (predicted & wanted).sum(dim=(1, 2))
    whole = wanted.sum(dim=(1, 2)) / (shares + EPS)
    # Two empty masks have no union; any other union is at least one cell.
    return overlap / (predicted.sum(dim=(1, 2)) + whole - overlap).clamp(min=0.5)


def share_inside(rois: Tensor, grids: Tensor, frames: Tensor, image_sizes: Tensor) -> Tensor:
    """ρ: the share of an object's area in its image that lies inside the RoI.

    As in the original the RoI's corners are truncated to whole pixels, and it has at least one pixel. Only what lies in
    the image counts: neither the margin of a grid, which may repeat the mask beyond the image's edge, nor what a crop
    has cut off.

    Args:
        rois: (M, 4) xyxy in pixels.
        grids: (M, S, S) uint8 coverage.
        frames: (M, 4) xyxy in pixels, what the whole grids cover; without extent in padding.
        image_sizes: (M, 2) pixels.

    Returns:
        (M,) in [0, 1], in the dtype of ``frames``; 0 where the image shows nothing of the object.
    """
    side = grids.shape[-1]
    steps = torch.arange(side + 1, device=frames.device)
    cell = (frames[:, 2:] - frames[:, :2]) / side
    edges = frames[:, :2, None] + cell.unsqueeze(2) * steps  # (M, 2, S + 1): x, y
    limit = image_sizes.flip(1).unsqueeze(2).to(frames.dtype)
    edges = edges.clamp(min=0).minimum(limit)  # a cell beyond the image shrinks to nothing
    low, high = edges[..., :-1], edges[..., 1:]
    corners = rois.to(frames.dtype).trunc()
    first = corners[:, :2].unsqueeze(2)
    last = corners[:, 2:].unsqueeze(2).maximum(first + 1)
    within = (high.minimum(last) - low.maximum(first)).clamp(min=0)  # (M, 2, S)
    lengths = torch.stack([within, high - low], dim=1)  # (M, 2, 2, S): in the RoI, in the image
    with torch.autocast(frames.device.type, enabled=False):
        areas = torch.einsum("mky,myx,mkx->mk", lengths[:, :, 1], grids.to(frames.dtype), lengths[:, :, 0]) / 255
    return areas[:, 0] / (areas[:, 1] + EPS)


def mask_iou_loss(predicted: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean squared error over rows with weight 1 whose target is above 0.

    Args:
        predicted: (M,).
        targets: (M,) in [0, 1].
        weights: (M,) bool; False rows are empty slots. None left gives 0 with a gradient path.
    """
    counted = weights & (targets > 0)
    return ((predicted - targets) ** 2 * counted).sum() / counted.sum().clamp(min=1)
