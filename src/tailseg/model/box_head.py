"""The two-layer box head: classes and boxes of RoIs (Fast R-CNN; spec, sections 6 and 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers.normalized import NormalizedLinear
from tailseg.losses import Classification, tau_normalize
from tailseg.model.boxes import Stds, constant, decode, encode
from tailseg.model.matching import Matcher, sample
from tailseg.model.rpn import Proposals, smooth_l1

ROI_SIZE = 7


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoITargets:
    """Sampled RoIs of a batch and what each shall learn; R = B·S rows, image by image, positives first."""

    rois: Tensor  # (R, 5): image, x1, y1, x2, y2
    labels: Tensor  # (R,) int64 in [0, C], C = background
    positive: Tensor  # (R,) bool
    valid: Tensor  # (R,) bool, False in slots that could not be filled
    given: Tensor  # (R,) bool: the RoI is a ground-truth box, put among the proposals
    objects: Tensor  # (R,) int64 position in the batch's flattened (B·G) objects; 0 where not positive
    boxes: Tensor  # (R, 4) box of that object; the RoI itself where not positive


class RoISampler(nn.Module):
    """Turns proposals into a fixed number of labelled RoIs an image.

    Args:
        matcher: thresholds of the assignment.
        num_classes: C.
        slots: RoIs an image.
        max_positive: most positives among them.
    """

    def __init__(self, matcher: Matcher, num_classes: int, *, slots: int = 512, max_positive: int = 128) -> None:
        super().__init__()
        self.matcher = matcher
        self.num_classes = num_classes
        self.slots = slots
        self.max_positive = max_positive

    @torch.no_grad()
    def forward(self, proposals: Proposals, boxes: Tensor, labels: Tensor, valid: Tensor) -> RoITargets:
        """Sample among the proposals and the ground-truth boxes (B, G, 4) themselves, which are put in front."""
        candidates = torch.cat([boxes, proposals.boxes], dim=1)
        usable = torch.cat([valid, proposals.valid], dim=1)
        drawn = sample(self.matcher(candidates, usable, boxes, valid), self.slots, self.max_positive)
        batch, slots = drawn.index.shape
        rois = candidates.gather(1, drawn.index.unsqueeze(2).expand(-1, -1, 4))
        own_boxes = boxes.gather(1, drawn.matched.unsqueeze(2).expand(-1, -1, 4))
        image = torch.arange(batch, device=boxes.device).unsqueeze(1)
        positive = drawn.positive
        return RoITargets(
            rois=torch.cat([image.expand(-1, slots).unsqueeze(2).to(rois), rois], dim=2).flatten(0, 1),
            labels=torch.where(positive, labels.gather(1, drawn.matched), self.num_classes).flatten(),
            positive=positive.flatten(),
            valid=drawn.valid.flatten(),
            given=(drawn.index < boxes.shape[1]).flatten(),
            objects=torch.where(positive, drawn.matched + image * boxes.shape[1], 0).flatten(),
            boxes=torch.where(positive.unsqueeze(2), own_boxes, rois).flatten(0, 1),
        )


class BoxHead(nn.Module):
    """RoI feature -> two fully connected layers -> class logits and box deltas.

    Args:
        channels: of the RoI feature.
        classification: owns the number of logits, the loss and the scores.
        width: of the hidden layers.
        normalized: use a normalised linear classifier (report, Eq. 3).
        temperature: τ of Eq. 3.
        class_agnostic: one box a RoI instead of one a class.
        stds: of the deltas.
        box_beta: beta of the Smooth-L1 box loss; 0 is L1.
        tau_norm: at test time classifier rows are divided by their norm to this power; 0 leaves them.
    """

    def __init__(
        self,
        channels: int,
        classification: Classification,
        *,
        width: int = 1024,
        normalized: bool = False,
        temperature: float = 20.0,
        class_agnostic: bool = False,
        stds: Stds = (0.1, 0.1, 0.2, 0.2),
        box_beta: float = 0.0,
        tau_norm: float = 0.0,
    ) -> None:
        super().__init__()
        self.classification = classification
        self.tau_norm = tau_norm
        self.fc1 = nn.Linear(channels * ROI_SIZE**2, width)
        self.fc2 = nn.Linear(width, width)
        self.classifier: nn.Linear | NormalizedLinear
        if normalized:
            self.classifier = NormalizedLinear(width, classification.num_logits, temperature)
        else:
            self.classifier = nn.Linear(width, classification.num_logits)
            nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.constant_(self.classifier.bias, classification.initial_bias)
        self.regressor = nn.Linear(width, 4 if class_agnostic else 4 * classification.num_classes)
        nn.init.normal_(self.regressor.weight, std=0.001)
        nn.init.zeros_(self.regressor.bias)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.class_agnostic = class_agnostic
        self.stds = stds
        self.box_beta = box_beta

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, num_logits) and deltas (R, 1 or C, 4) of RoI features (R, channels, 7, 7)."""
        hidden = F.relu(self.fc2(F.relu(self.fc1(features.flatten(1)))))
        deltas = self.regressor(hidden).float()
        return self._classify(hidden), deltas.unflatten(1, (-1, 4))

    def _classify(self, hidden: Tensor) -> Tensor:
        if self.training or self.tau_norm == 0:
            logits: Tensor = self.classifier(hidden)
            return logits
        layer = self.classifier
        weight, bias = tau_normalize(layer.weight, layer.bias, self.classification.num_classes, self.tau_norm)
        return F.linear(hidden, weight, bias)

    def loss(self, logits: Tensor, deltas: Tensor, targets: RoITargets) -> dict[str, Tensor]:
        """The classification's losses and ``box``, each divided by the number of sampled RoIs."""
        losses = self.classification.loss(logits, targets.labels, targets.valid)
        if self.class_agnostic:
            own = deltas[:, 0]
        else:
            column = torch.where(targets.positive, targets.labels, 0)
            own = deltas.gather(1, column[:, None, None].expand(-1, 1, 4)).squeeze(1)
        boxes = targets.rois[:, 1:]
        # A slot that is no positive may hold a box without extent; its target is replaced before the logarithm.
        harmless = constant((0.0, 0.0, 1.0, 1.0), boxes.device, boxes.dtype)
        safe = torch.where(targets.positive.unsqueeze(1), boxes, harmless)
        goal = torch.where(targets.positive.unsqueeze(1), targets.boxes, safe)
        distance = smooth_l1(own, encode(safe, goal, self.stds), self.box_beta).sum(1)
        losses["box"] = (distance * targets.positive).sum() / targets.valid.sum().clamp(min=1)
        return losses

    def decode(self, boxes: Tensor, deltas: Tensor) -> Tensor:
        """Boxes (..., 1 or C, 4), not clipped, of RoIs (..., 4) and their deltas (..., 1 or C, 4)."""
        return decode(boxes.unsqueeze(-2), deltas, self.stds)
