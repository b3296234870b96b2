"""Box head that classifies and localises from two proposals of its own (TSD, arXiv 2003.07540).

Shape letters: R RoIs, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.losses import Classification
from tailseg.losses.classification import at_least_float32, frozen_statistics
from tailseg.model.box_head import (
    ROI_SIZE,
    BoxPrediction,
    Pool,
    RoITargets,
    box_loss,
    build_classifier,
    build_regressor,
    classify,
    float_deltas,
    own_deltas,
)
from tailseg.model.boxes import Stds, box_areas, decode


class TsdBoxHead(nn.Module):
    """Task-aware spatial disentanglement: what a RoI's feature says shifts the RoI, for each task in a way of its own.

    Classes come from features whose cells have each been shifted (P_c), boxes from the RoI shifted as a whole (P_r),
    which is also what the deltas refine. In training a sibling head, the usual one on the RoI itself, learns beside
    them, and the progressive constraint asks the two to be better than it by a margin.

    Args:
        channels: of the RoI feature.
        classification: owns the number of logits, the loss and the scores, for the sibling too.
        width: of the hidden layers of the three branches.
        normalized: use normalised linear classifiers (report, Eq. 3).
        temperature: τ of Eq. 3.
        class_agnostic: one box a RoI instead of one a class.
        stds: of the deltas.
        box_beta: beta of the Smooth-L1 box losses; 0 is L1.
        tau_norm: at test time classifier rows are divided by their norm to this power; 0 leaves them.
        shift_width: of the layers that shift the proposals.
        gamma: γ, the share of a RoI's side by which a shift of 1 moves.
        class_margin: m_c of the progressive constraint on probabilities.
        box_margin: m_r of the progressive constraint on overlaps.
        constrain_classes: use the former; the report leaves it out with Seesaw Loss.
        zero_init_shifts: both proposals start as the RoI.
        detach_targets: no gradient from the box targets, which depend on P_r, to its shift.
    """

    def __init__(
        self,
        channels: int,
        classification: Classification,
        *,
        width: int,
        normalized: bool,
        temperature: float,
        class_agnostic: bool,
        stds: Stds,
        box_beta: float,
        tau_norm: float,
        shift_width: int,
        gamma: float,
        class_margin: float,
        box_margin: float,
        constrain_classes: bool,
        zero_init_shifts: bool,
        detach_targets: bool,
    ) -> None:
        super().__init__()
        self.classification = classification
        self.tau_norm = tau_norm
        self.stds = stds
        self.box_beta = box_beta
        self.gamma = gamma
        self.class_margin = class_margin
        self.box_margin = box_margin
        self.constrain_classes = constrain_classes
        self.detach_targets = detach_targets
        inputs = channels * ROI_SIZE**2
        self.shared = _layers(inputs, shift_width)
        last_shifts = _linear(shift_width, 2 * ROI_SIZE**2), _linear(shift_width, 2)
        if zero_init_shifts:
            for layer in last_shifts:
                nn.init.zeros_(layer.weight)
        self.class_shift = nn.Sequential(*_layers(shift_width, shift_width), last_shifts[0])
        self.box_shift = nn.Sequential(*_layers(shift_width, shift_width), last_shifts[1])
        boxes = 1 if class_agnostic else classification.num_classes
        self.class_branch = _layers(inputs, width, width)
        self.classifier = build_classifier(width, classification, normalized, temperature)
        self.box_branch = _layers(inputs, width, width)
        self.regressor = build_regressor(width, boxes)
        self.sibling_branch = _layers(inputs, width, width)
        self.sibling_classifier = build_classifier(width, classification, normalized, temperature)
        self.sibling_regressor = build_regressor(width, boxes)

    def forward(self, pool: Pool, rois: Tensor, live: Tensor | None = None) -> BoxPrediction:
        """Classes and boxes of RoIs (R, 5), in training with the sibling's; ``live`` is for heads with batch norm."""
        features = pool(rois).flatten(1)
        hidden = self.shared(features)
        class_shifts = at_least_float32(self.class_shift(hidden)).view(-1, 2, ROI_SIZE, ROI_SIZE) * self.gamma
        box_shifts = at_least_float32(self.box_shift(hidden)) * self.gamma
        # Pooled in one go: every call has a gradient of its own, of the size of the pyramid.
        shifts = torch.cat([class_shifts, box_shifts[:, :, None, None].expand_as(class_shifts)])
        class_features, box_features = pool(rois.repeat(2, 1), shifts).flatten(1).chunk(2)
        boxes = rois[:, 1:]
        moves = box_shifts * (boxes[:, 2:] - boxes[:, :2])
        return BoxPrediction(
            logits=classify(
                self.classifier,
                self.class_branch(class_features),
                self.classification,
                0.0 if self.training else self.tau_norm,
            ),
            deltas=float_deltas(self.regressor(self.box_branch(box_features))),
            boxes=boxes + moves.repeat(1, 2),
            class_features=class_features,
            sibling=self._sibling(features, boxes) if self.training else None,
        )

    def _sibling(self, features: Tensor, boxes: Tensor) -> BoxPrediction:
        hidden = self.sibling_branch(features)
        return BoxPrediction(
            logits=self.sibling_classifier(hidden),
            deltas=float_deltas(self.sibling_regressor(hidden)),
            boxes=boxes,
            class_features=features,
        )

    @property
    def class_layers(self) -> tuple[nn.Linear, ...]:
        """The hidden layers between the class features and the classifier."""
        return tuple(layer for layer in self.class_branch if isinstance(layer, nn.Linear))

    def loss(self, prediction: BoxPrediction, targets: RoITargets) -> dict[str, Tensor]:
        """The classification's losses and ``box``, those of the sibling as ``sibling_...``, ``pc_classes``, ``pc_box``.

        The former are divided by the number of sampled RoIs; see `constraint_means` for the progressive constraint.
        """
        sibling = prediction.sibling
        losses = self.classification.loss(prediction.logits, targets.labels, targets.valid)
        origin = prediction.boxes.detach() if self.detach_targets else prediction.boxes
        losses["box"] = box_loss(replace(prediction, boxes=origin), targets, self.stds, self.box_beta)
        if sibling is None:
            return losses
        with frozen_statistics(self.classification):
            own = self.classification.loss(sibling.logits, targets.labels, targets.valid)
        own["box"] = box_loss(sibling, targets, self.stds, self.box_beta)
        losses |= {f"sibling_{name}": value for name, value in own.items()}
        return losses | self._constraints(prediction, sibling, targets)

    def _constraints(self, prediction: BoxPrediction, sibling: BoxPrediction, targets: RoITargets) -> dict[str, Tensor]:
        class_gaps = None
        if self.constrain_classes:
            scores = self._label_scores(prediction, targets)
            class_gaps = progressive_gaps(scores, self._label_scores(sibling, targets), self.class_margin)
        overlaps = self._overlaps(prediction, targets)
        box_gaps = progressive_gaps(overlaps, self._overlaps(sibling, targets), self.box_margin)
        return constraint_means(class_gaps, box_gaps, targets)

    def _label_scores(self, prediction: BoxPrediction, targets: RoITargets) -> Tensor:
        """Score (R,) of each RoI's label, background included."""
        return self.classification.scores(prediction.logits).gather(1, targets.labels.unsqueeze(1)).squeeze(1)

    def _overlaps(self, prediction: BoxPrediction, targets: RoITargets) -> Tensor:
        """IoU (R,) of each positive's box, decoded but not clipped, with its ground truth."""
        return paired_iou(decode(prediction.boxes, own_deltas(prediction.deltas, targets), self.stds), targets.boxes)

    def decode(self, prediction: BoxPrediction) -> Tensor:
        """Boxes (R, 1 or C, 4), not clipped."""
        return decode(prediction.boxes.unsqueeze(-2), prediction.deltas, self.stds)


def progressive_gaps(values: Tensor, sibling: Tensor, margin: float) -> Tensor:
    """Gaps (R,) of values (R,) in [0, 1] to the sibling's (R,) plus a margin: max(0, sib + min(1 - sib, m) - value).

    The sibling's get no gradient.
    """
    return F.relu((sibling.detach() + margin).clamp(max=1) - values)


def constraint_means(class_gaps: Tensor | None, box_gaps: Tensor, targets: RoITargets) -> dict[str, Tensor]:
    """``pc_classes`` (if there are ``class_gaps``) and ``pc_box``, the losses of the progressive constraint.

    The former is the mean gap (R,) of the sampled RoIs of images that have a positive, the latter of positives. Every
    image without a positive puts one 0 into both means.
    """
    image = targets.rois[:, 0].long()
    # Images are numbered from 0 and each has a row, so that there are not more of them than rows.
    positives = torch.zeros_like(image).index_add_(0, image, targets.positive.long())
    exists = torch.zeros_like(targets.positive).index_fill_(0, image, True)
    zeros = (exists & (positives == 0)).sum()
    means = {}
    if class_gaps is not None:
        counted = targets.valid & (positives > 0)[image]
        means["pc_classes"] = (class_gaps * counted).sum() / (counted.sum() + zeros).clamp(min=1)
    means["pc_box"] = (box_gaps * targets.positive).sum() / (targets.positive.sum() + zeros).clamp(min=1)
    return means


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union (R,) of each of boxes (R, 4) with the box of the same row in others (R, 4)."""
    sides = torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])
    width, height = sides.clamp(min=0).unbind(1)
    intersection = width * height
    return intersection / (box_areas(boxes) + box_areas(others) - intersection).clamp(min=1e-6)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Started as Kaiming's normal of slope 1 over the inputs, as TSD's authors do."""
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
    return layer


def _layers(*widths: int) -> nn.Sequential:
    """Linear layers from each width to the next, each followed by ReLU."""
    layers = [_linear(*pair) for pair in pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
