"""The two-layer box head: classes and boxes of RoIs (Fast R-CNN)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.layers.norm import Norm, build_norm
from tailseg.layers.normalized import NormalizedLinear
from tailseg.losses import Classification, tau_normalize
from tailseg.model.boxes import Stds, constant, decode, encode, smooth_l1
from tailseg.model.ignored_regions import NOWHERE, IgnoredRegions
from tailseg.model.matching import IGNORED, Matcher, sample
from tailseg.structures import Proposals

ROI_SIZE = 7


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoITargets:
    """Sampled RoIs of a batch and what each shall learn; R = B·S rows, image by image, positives first."""

    rois: Tensor  # (R, 5): image, x1, y1, x2, y2
    labels: Tensor  # (R,) int64 in [0, C], C = background
    positive: Tensor  # (R,) bool
    valid: Tensor  # (R,) bool, False in rows that could not be filled
    is_ground_truth: Tensor  # (R,) bool: the RoI is a ground-truth box, put among the proposals
    objects: Tensor  # (R,) int64 position in the batch's flattened (B·G) objects; 0 where not positive
    boxes: Tensor  # (R, 4) box of that object; the RoI itself where not positive


class RoISampler(nn.Module):
    """Turns proposals into a fixed number of labelled RoIs an image.

    Args:
        matcher: thresholds of the assignment.
        num_classes: C.
        num_samples: RoIs an image.
        max_positive: most positives among them.
    """

    def __init__(self, matcher: Matcher, num_classes: int, *, num_samples: int, max_positive: int) -> None:
        super().__init__()
        self.matcher = matcher
        self.num_classes = num_classes
        self.num_samples = num_samples
        self.max_positive = max_positive

    @torch.no_grad()
    def forward(
        self, proposals: Proposals, boxes: Tensor, labels: Tensor, valid: Tensor, ignored: IgnoredRegions = NOWHERE
    ) -> RoITargets:
        """Sample among the proposals and the ground-truth boxes (B, G, 4) themselves, which are put in front.

        Only proposals are matched; each object has itself, also where two objects have the same box. Proposals in
        ``ignored`` regions are no negatives.
        """
        candidates = torch.cat([boxes, proposals.boxes], dim=1)
        itself = torch.arange(boxes.shape[1], device=boxes.device)
        own = torch.where(valid & (boxes[..., 2:] > boxes[..., :2]).all(dim=2), itself, IGNORED)
        matched = self.matcher(proposals.boxes, proposals.valid, boxes, valid)
        matched = torch.cat([own, ignored.spare(matched, proposals.boxes)], dim=1)
        drawn = sample(matched, self.num_samples, self.max_positive)
        batch, num_samples = drawn.index.shape
        rois = candidates.gather(1, drawn.index.unsqueeze(2).expand(-1, -1, 4))
        own_boxes = boxes.gather(1, drawn.matched.unsqueeze(2).expand(-1, -1, 4))
        image = torch.arange(batch, device=boxes.device).unsqueeze(1)
        positive = drawn.positive
        return RoITargets(
            rois=torch.cat([image.expand(-1, num_samples).unsqueeze(2).to(rois), rois], dim=2).flatten(0, 1),
            labels=torch.where(positive, labels.gather(1, drawn.matched), self.num_classes).flatten(),
            positive=positive.flatten(),
            valid=drawn.valid.flatten(),
            is_ground_truth=(drawn.index < boxes.shape[1]).flatten(),
            objects=torch.where(positive, drawn.matched + image * boxes.shape[1], 0).flatten(),
            boxes=torch.where(positive.unsqueeze(2), own_boxes, rois).flatten(0, 1),
        )


class Pool(Protocol):
    """RoI pooling of a batch, as a head is given it: features of any RoIs that it asks for."""

    def __call__(self, rois: Tensor, shifts: Tensor | None = None) -> Tensor:
        """Features (R, channels, 7, 7) of RoIs (R, 5), with the shifts of `tailseg.model.roi_features` if given."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BoxPrediction:
    """A box head's output for R RoIs."""

    logits: Tensor  # (R, num_logits)
    deltas: Tensor  # (R, 1 or C, 4) float32
    boxes: Tensor  # (R, 4) pixels: the boxes that the deltas refine
    class_features: Tensor  # (R, F): what the classes were read off, by hidden layers and a classifier
    hidden: Tensor | None = None  # (R, width): what the last hidden layer says; TSD has no such features
    sibling: BoxPrediction | None = None  # of a head that is trained beside this one (TSD)


class BoxHead(nn.Module):
    """RoI feature -> two fully connected layers -> class logits and box deltas.

    Args:
        channels: of the RoI feature.
        classification: owns the number of logits, the loss and the scores.
        width: of the hidden layers.
        convs: 3x3 convolutions of the feature's width before the hidden layers; with any, one hidden layer follows
            instead of two (four are the usual number).
        norm: batch norm after each of them, group norm, or none.
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
        width: int,
        convs: int,
        norm: Norm,
        normalized: bool,
        temperature: float,
        class_agnostic: bool,
        stds: Stds,
        box_beta: float,
        tau_norm: float,
    ) -> None:
        super().__init__()
        self.classification = classification
        self.tau_norm = tau_norm
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=not norm) for _ in range(convs))
        self.norms = nn.ModuleList(build_norm(norm, channels) for _ in range(convs if norm else 0))
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        self.fc1 = nn.Linear(channels * ROI_SIZE**2, width)
        self.fc2 = nn.Linear(width, width) if convs == 0 else None
        self.classifier = build_classifier(width, classification, normalized, temperature)
        self.regressor = build_regressor(width, 1 if class_agnostic else classification.num_classes)
        for layer in (self.fc1, self.fc2):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.stds = stds
        self.box_beta = box_beta
        self.silent: Tensor | None = None  # of the last training batch, the share of RoIs without an active hidden unit

    def forward(self, pool: Pool, rois: Tensor, live: Tensor | None = None) -> BoxPrediction:
        """Classes and boxes of RoIs (R, 5); rows that are not ``live`` (R,) are left out of batch statistics."""
        maps = pool(rois)
        for number, conv in enumerate(self.convs):
            maps = conv(maps.contiguous(memory_format=torch.channels_last))
            maps = F.relu(self.norms[number](maps, live) if self.norms else maps)
        features = maps.flatten(1)
        hidden = F.relu(self.fc1(features))
        if self.fc2 is not None:
            hidden = F.relu(self.fc2(hidden))
        if self.training:
            self.silent = (hidden.detach() == 0).all(dim=1).float().mean()
        return BoxPrediction(
            logits=classify(self.classifier, hidden, self.classification, 0.0 if self.training else self.tau_norm),
            deltas=float_deltas(self.regressor(hidden)),
            boxes=rois[:, 1:],
            class_features=features,
            hidden=hidden,
        )

    @property
    def class_layers(self) -> tuple[nn.Linear, ...]:
        """The hidden layers between the class features and the classifier."""
        return (self.fc1,) if self.fc2 is None else (self.fc1, self.fc2)

    def loss(self, prediction: BoxPrediction, targets: RoITargets) -> dict[str, Tensor]:
        """The classification's losses and ``box``, each divided by the number of sampled RoIs."""
        losses = self.classification.loss(prediction.logits, targets.labels, targets.valid)
        losses["box"] = box_loss(prediction, targets, self.stds, self.box_beta)
        return losses

    def decode(self, prediction: BoxPrediction) -> Tensor:
        """Boxes (R, 1 or C, 4), not clipped."""
        return decode(prediction.boxes.unsqueeze(-2), prediction.deltas, self.stds)


class ClassBranch(nn.Module):
    """Hidden layers and a classifier, as those of a box head: an additional classifier of the same class features.

    Args:
        inputs: F.
        classification: owns the number of logits, the loss and the scores; its own, as it counts for itself.
        width: of the hidden layers.
        hidden_layers: number of them.
        normalized, temperature, tau_norm: as in `BoxHead`.
    """

    def __init__(
        self,
        inputs: int,
        classification: Classification,
        *,
        width: int,
        hidden_layers: int,
        normalized: bool,
        temperature: float,
        tau_norm: float,
    ) -> None:
        super().__init__()
        self.classification = classification
        self.tau_norm = tau_norm
        sizes = [inputs, *[width] * hidden_layers]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.classifier = build_classifier(width, classification, normalized, temperature)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, class_features: Tensor) -> Tensor:
        """Logits (R, num_logits) of class features (R, F)."""
        hidden = class_features
        for layer in self.layers:
            hidden = F.relu(layer(hidden))
        return classify(self.classifier, hidden, self.classification, 0.0 if self.training else self.tau_norm)


def build_classifier(
    width: int, classification: Classification, normalized: bool, temperature: float
) -> nn.Linear | NormalizedLinear:
    """The layer that makes a classification's logits of hidden features (R, width)."""
    layer: nn.Linear | NormalizedLinear
    if normalized:
        layer = NormalizedLinear(width, classification.num_logits, temperature)
    else:
        layer = nn.Linear(width, classification.num_logits)
        nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, classification.initial_bias)
    return layer


def float_deltas(flat: Tensor) -> Tensor:
    """Deltas (R, 1 or C, 4) of a regressor's output, in float32 at least, also under autocast."""
    deltas: Tensor = flat.to(torch.promote_types(flat.dtype, torch.float32)).unflatten(1, (-1, 4))
    return deltas


def build_regressor(width: int, boxes: int) -> nn.Linear:
    """The layer that makes the deltas of 1 or C boxes of hidden features (R, width)."""
    layer = nn.Linear(width, 4 * boxes)
    nn.init.normal_(layer.weight, std=0.001)
    nn.init.zeros_(layer.bias)
    return layer


def classify(
    layer: nn.Linear | NormalizedLinear, hidden: Tensor, classification: Classification, tau_norm: float
) -> Tensor:
    """Logits (R, num_logits) of hidden features (R, width), with rows divided by their norm to the power τ."""
    if tau_norm == 0:
        logits: Tensor = layer(hidden)
        return logits
    weight, bias = tau_normalize(layer.weight, layer.bias, classification.num_classes, tau_norm)
    return F.linear(hidden, weight, bias)


def box_loss(prediction: BoxPrediction, targets: RoITargets, stds: Stds, beta: float) -> Tensor:
    """L1 or Smooth-L1 of the positives' deltas, summed over the four, divided by the number of sampled RoIs."""
    own = own_deltas(prediction.deltas, targets)
    # A slot that is no positive may hold a box without extent; its target is replaced before the logarithm.
    positive = targets.positive.unsqueeze(1)
    harmless = constant((0.0, 0.0, 1.0, 1.0), own.device, own.dtype)
    safe = torch.where(positive, prediction.boxes, harmless)
    goal = torch.where(positive, targets.boxes, safe)
    distance = smooth_l1(own, encode(safe, goal, stds), beta).sum(1)
    return (distance * targets.positive).sum() / targets.valid.sum().clamp(min=1)


def boxes_to_refine(
    boxes: Tensor, logits: Tensor, classification: Classification, labels: Tensor | None = None
) -> Tensor:
    """A box (R, 4) of each RoI for the next stage: its only one, or that of its likeliest class.

    Args:
        boxes: (R, 1 or C, 4).
        logits: (R, num_logits) of the same RoIs.
        classification: whose logits they are.
        labels: (R,) int64 in [0, C], C = background: where it is a class, its box is taken instead.
    """
    if boxes.shape[1] == 1:
        return boxes[:, 0]
    own = classification.scores(logits)[:, :-1].argmax(dim=1)
    if labels is not None:
        own = torch.where(labels < boxes.shape[1], labels, own)
    return boxes.gather(1, own[:, None, None].expand(-1, 1, 4)).squeeze(1)


def own_deltas(deltas: Tensor, targets: RoITargets) -> Tensor:
    """Deltas (R, 4) of each positive's own class out of (R, 1 or C, 4)."""
    if deltas.shape[1] == 1:
        return deltas[:, 0]
    column = torch.where(targets.positive, targets.labels, 0)
    return deltas.gather(1, column[:, None, None].expand(-1, 1, 4)).squeeze(1)
