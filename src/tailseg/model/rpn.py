"""Region proposal network (Faster R-CNN, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tailseg.model.boxes import Stds, anchor_grid, base_anchors, clip, decode, encode, keep_within_levels, smooth_l1
from tailseg.model.ignored_regions import NOWHERE, IgnoredRegions
from tailseg.model.matching import Matcher, sample
from tailseg.structures import Proposals

STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)
NO_STDS: Stds = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RpnOutput:
    """The RPN's output for every anchor; A anchors over all levels, finest level first."""

    logits: Tensor  # (B, A) float32 objectness
    deltas: Tensor  # (B, A, 4) float32
    anchors: Tensor  # (A, 4)
    level_sizes: list[int]  # anchors of each level
    grid_hws: list[tuple[int, int]]  # cells of each level
    stride_hws: list[tuple[int, int]]  # pixels between the anchors of each level


class RPN(nn.Module):
    """Objectness and box deltas for three anchors in every cell of P2..P6.

    Args:
        channels: width of the pyramid.
        convs: 3x3 convolutions, each with ReLU, before objectness and deltas.
        width: channels of these convolutions; None for those of the pyramid.
        anchor_scale: an anchor's side is this many strides.
        pre_nms_train, pre_nms_test: anchors kept of each level before NMS.
        post_nms_train, post_nms_test: proposals of an image.
        nms_iou: NMS threshold within a level.
        box_beta: beta of the Smooth-L1 box loss; 0 is L1.
        inside_image: train only anchors that lie inside the image.
        rounded_anchors: the corners of the anchors around (0, 0) are whole pixels.
        fitted_strides: anchors of a level stand (image side // grid side) pixels apart instead of its stride.
        size_divisor: images count as padded to multiples of this; anchors beyond are not trained.
    """

    def __init__(
        self,
        channels: int,
        *,
        convs: int,
        width: int | None,
        anchor_scale: float,
        pre_nms_train: int,
        pre_nms_test: int,
        post_nms_train: int,
        post_nms_test: int,
        nms_iou: float,
        box_beta: float,
        inside_image: bool,
        rounded_anchors: bool,
        fitted_strides: bool,
        size_divisor: int,
    ) -> None:
        super().__init__()
        widths = [channels, *[width or channels] * convs]
        *first, self.conv = (nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.first_convs = nn.ModuleList(first)
        self.objectness = nn.Conv2d(widths[-1], len(RATIOS), 1)
        self.deltas = nn.Conv2d(widths[-1], len(RATIOS) * 4, 1)
        for layer in (*self.first_convs, self.conv, self.objectness, self.deltas):
            assert isinstance(layer, nn.Conv2d)
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        base = torch.stack([base_anchors(anchor_scale * s, RATIOS, rounded=rounded_anchors) for s in STRIDES])
        self.register_buffer("base_anchors", base, persistent=False)
        self.base_anchors: Tensor
        self.pre_nms = {True: pre_nms_train, False: pre_nms_test}
        self.post_nms = {True: post_nms_train, False: post_nms_test}
        self.nms_iou = nms_iou
        self.box_beta = box_beta
        self.inside_image = inside_image
        self.fitted_strides = fitted_strides
        self.size_divisor = size_divisor
        self.matcher = Matcher(positive_iou=0.7, negative_iou=0.3, low_quality_iou=0.3)
        self.num_samples, self.max_positive = 256, 128

    def forward(self, pyramid: Sequence[Tensor]) -> RpnOutput:
        """Score and adjust all anchors of P2..P6, (B, channels, h, w) each."""
        logits, deltas, anchors = [], [], []
        grid_hws = [(features.shape[2], features.shape[3]) for features in pyramid]
        stride_hws = self._stride_hws(grid_hws)
        for level, features in enumerate(pyramid):
            batch = features.shape[0]
            objectness, shifts = self._head(features)
            logits.append(objectness.permute(0, 2, 3, 1).reshape(batch, -1).float())
            deltas.append(shifts.permute(0, 2, 3, 1).reshape(batch, -1, 4).float())
            anchors.append(anchor_grid(self.base_anchors[level], stride_hws[level], grid_hws[level]))
        return RpnOutput(
            logits=torch.cat(logits, dim=1),
            deltas=torch.cat(deltas, dim=1),
            anchors=torch.cat(anchors),
            level_sizes=[a.shape[0] for a in anchors],
            grid_hws=grid_hws,
            stride_hws=stride_hws,
        )

    def _stride_hws(self, grid_hws: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Pixels between neighbouring anchors of each level."""
        if not self.fitted_strides:
            return [(stride, stride) for stride in STRIDES]
        height, width = (side * STRIDES[0] for side in grid_hws[0])  # of the padded image
        return [(height // h, width // w) for h, w in grid_hws]

    def _head(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness (B, 3, h, w) and deltas (B, 12, h, w) of one level (B, channels, h, w)."""
        for conv in self.first_convs:
            features = F.relu(conv(features), inplace=True)
        if features.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            parts = [self.conv, self.objectness, self.deltas]
            weights = [tensor for part in parts for tensor in (part.weight, part.bias)]
            pair: tuple[Tensor, Tensor] = SparselyTrainedHead.apply(features, *weights)
            return pair
        hidden = F.relu(self.conv(features), inplace=True)
        return self.objectness(hidden), self.deltas(hidden)

    def loss(
        self, output: RpnOutput, image_sizes: Tensor, boxes: Tensor, valid: Tensor, ignored: IgnoredRegions = NOWHERE
    ) -> dict[str, Tensor]:
        """``rpn_objectness`` and ``rpn_box``: sums over sampled anchors divided by their number.

        Args:
            output: from `forward`.
            image_sizes: (B, 2) sizes before padding.
            boxes: (B, G, 4) ground truth.
            valid: (B, G) bool.
            ignored: where anchors are no negatives.
        """
        usable = self.trained_anchors(output, image_sizes)
        anchors = output.anchors.unsqueeze(0)
        matched = ignored.spare(self.matcher(anchors, usable, boxes, valid), anchors)
        drawn = sample(matched, self.num_samples, self.max_positive)
        negative = drawn.valid & ~drawn.positive
        total = (drawn.positive.sum(1).clamp(min=1) + negative.sum(1).clamp(min=1)).sum()

        logits = output.logits.gather(1, drawn.index)
        bce = F.binary_cross_entropy_with_logits(logits, drawn.positive.float(), reduction="none")
        anchors = output.anchors[drawn.index]
        target_boxes = boxes.gather(1, drawn.matched.unsqueeze(2).expand(-1, -1, 4))
        # Rows that are no positives get a harmless target: their own anchor.
        target_boxes = torch.where(drawn.positive.unsqueeze(2), target_boxes, anchors)
        targets = encode(anchors, target_boxes, NO_STDS)
        deltas = output.deltas.gather(1, drawn.index.unsqueeze(2).expand(-1, -1, 4))
        distance = smooth_l1(deltas, targets, self.box_beta).sum(2)
        return {
            "rpn_objectness": (bce * drawn.valid).sum() / total,
            "rpn_box": (distance * drawn.positive).sum() / total,
        }

    def trained_anchors(self, output: RpnOutput, image_sizes: Tensor) -> Tensor:
        """(B, A) bool: anchors whose cell lies in the image padded to a multiple of `size_divisor`.

        With `inside_image` they also lie wholly in the image itself, their right and lower edges short of its own.
        """
        padded = (image_sizes + self.size_divisor - 1) // self.size_divisor * self.size_divisor
        parts = []
        for (h, w), (stride_h, stride_w) in zip(output.grid_hws, output.stride_hws, strict=True):
            rows = torch.arange(h, device=padded.device) * stride_h < padded[:, :1]
            columns = torch.arange(w, device=padded.device) * stride_w < padded[:, 1:]
            cells = rows.unsqueeze(2) & columns.unsqueeze(1)
            parts.append(cells.flatten(1).repeat_interleave(len(RATIOS), dim=1))
        trained = torch.cat(parts, dim=1)
        if self.inside_image:
            x1, y1, x2, y2 = output.anchors.unbind(1)
            trained &= (x1 >= 0) & (y1 >= 0) & (x2 < image_sizes[:, 1:]) & (y2 < image_sizes[:, :1])
        return trained

    @torch.no_grad()
    def propose(self, output: RpnOutput, image_sizes: Tensor, *, training: bool) -> Proposals:
        """The best boxes of each image: top of each level, NMS within the level, best over all levels.

        Args:
            output: from `forward`.
            image_sizes: (B, 2) sizes before padding.
            training: as many as in training, not as at test time.
        """
        scores = output.logits.sigmoid()
        top_scores, top_boxes, sizes = [], [], []
        start = 0
        for size in output.level_sizes:
            stop = start + size
            own, kept = scores[:, start:stop], self.pre_nms[training]
            if isinstance(cast("int | torch.SymInt", size), torch.SymInt):
                # Traced for pictures of any size: short levels are filled up with what is no proposal.
                best, index = F.pad(own, (0, kept), value=-1.0).topk(kept, dim=1)
                index = index.clamp(max=size - 1)
            else:
                kept = min(kept, size)
                best, index = own.topk(kept, dim=1)
            deltas = output.deltas[:, start:stop].gather(1, index.unsqueeze(2).expand(-1, -1, 4))
            top_boxes.append(decode(output.anchors[start:stop][index], deltas, NO_STDS))
            top_scores.append(best)
            sizes.append(kept)
            start = stop
        boxes = clip(torch.cat(top_boxes, dim=1), image_sizes)
        merged = torch.cat(top_scores, dim=1)
        valid = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
        keep = keep_within_levels(boxes, merged, valid, sizes, self.nms_iou)
        best, index = merged.masked_fill(~keep, -1.0).topk(min(self.post_nms[training], merged.shape[1]), dim=1)
        boxes = boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4))
        return Proposals(boxes=boxes, scores=best, valid=best >= 0)


class SparselyTrainedHead(torch.autograd.Function):
    """The RPN's last three convolutions on one level, with a backward pass over the cells that have a gradient.

    Of 25,000 cells of an image at most 256 are sampled for the loss, all others pass zeros on. Visiting the sampled
    ones alone gives the same gradients and saves a tenth of a training step on CPU. On a device, their number would
    have to be waited for.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness and deltas of features (B, channels, h, w); weight and bias of each convolution in order."""
        conv, conv_bias, objectness, objectness_bias, deltas, deltas_bias = weights
        hidden = F.relu(F.conv2d(features, conv, conv_bias, padding=1), inplace=True)
        ctx.save_for_backward(features, hidden, conv, objectness, deltas)
        return F.conv2d(hidden, objectness, objectness_bias), F.conv2d(hidden, deltas, deltas_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_objectness: Tensor, grad_deltas: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all inputs; K cells have one, and each has 9 neighbours, itself included."""
        features, hidden, conv, objectness, deltas = ctx.saved_tensors
        batch, channels, height, width = features.shape
        grad = _cells(torch.cat([grad_objectness, grad_deltas], dim=1))
        rows = grad.any(dim=1).nonzero().squeeze(1)
        grad, active = grad[rows], _cells(hidden)[rows]
        grad_hidden = (grad @ torch.cat([objectness, deltas]).flatten(1)) * (active > 0)

        step = torch.arange(-1, 2)
        y = (rows // width % height)[:, None, None] + step[:, None]  # (K, 3, 1)
        x = (rows % width)[:, None, None] + step  # (K, 1, 3)
        inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width)).flatten(1)  # (K, 9), False in the zero padding
        neighbours = (rows[:, None] + (step[:, None] * width + step).flatten()).where(inside, 0)
        patches = _cells(features)[neighbours] * inside.unsqueeze(2)  # (K, 9, channels)
        grad_conv = (grad_hidden.T @ patches.flatten(1)).view(-1, 3, 3, channels).permute(0, 3, 1, 2)
        grad_patches = (grad_hidden @ conv.permute(0, 2, 3, 1).flatten(1)).view(-1, 9, channels)
        grad_features = features.new_zeros(batch * height * width, channels)
        for place in range(9):  # within a place no neighbour comes twice, which spares a slow scatter-add
            here = inside[:, place]
            grad_features[neighbours[here, place]] += grad_patches[here, place]

        grad_heads = (grad.T @ active)[:, :, None, None].split([len(objectness), len(deltas)])
        grad_biases = grad.sum(0).split([len(objectness), len(deltas)])
        return (
            grad_features.view(batch, height, width, channels).permute(0, 3, 1, 2),
            grad_conv,
            grad_hidden.sum(0),
            grad_heads[0],
            grad_biases[0],
            grad_heads[1],
            grad_biases[1],
        )


def _cells(maps: Tensor) -> Tensor:
    """Maps (B, channels, h, w) as rows (B·h·w, channels)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
