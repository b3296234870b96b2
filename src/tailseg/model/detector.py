"""One detector composed of parts.

Mask R-CNN is it with one stage, Cascade Mask R-CNN with three, HTC-Lite with three, a context encoder and one mask head
(report, section 1.2), Hybrid Task Cascade (HTC, arXiv 1901.07518) with three whose mask heads are chained,
SCNet (arXiv 2012.10150) with three, a context encoder, one mask head and a feature relay.

Training and inference are two entrances with one return type each: `forward` gives losses (distributed wrappers see
only that), `detect` gives detections. Both read top to bottom.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tailseg.losses import Classification
from tailseg.model import box_head as box_heads
from tailseg.model import mask_head as mask_heads
from tailseg.model.backbone import Backbone
from tailseg.model.box_head import BoxHead, BoxPrediction, ClassBranch, RoISampler, RoITargets, boxes_to_refine
from tailseg.model.boxes import clip, multiclass_nms
from tailseg.model.context import ContextEncoder
from tailseg.model.fpg import FPG
from tailseg.model.fpn import FPN
from tailseg.model.fpn_carafe import CarafeFPN
from tailseg.model.hrfpn import HRFPN
from tailseg.model.ignored_regions import IgnoredRegions
from tailseg.model.mask_head import MaskHead, last_mask_logits, mask_logits, mask_loss, mask_targets
from tailseg.model.mask_iou import MaskIouHead, mask_iou_loss, mask_iou_targets
from tailseg.model.relay import FeatureRelay
from tailseg.model.roi_features import ImageFeatures, RoIPooler
from tailseg.model.rpn import RPN
from tailseg.model.semantic import SemanticBranch
from tailseg.model.tsd import TsdBoxHead
from tailseg.structures import Batch, Proposals, RawDetections

Neck = FPN | FPG | CarafeFPN | HRFPN


@dataclass(frozen=True, slots=True)
class Wanted:
    """A choice among the detections of an image; None leaves what the detector was built with."""

    min_score: float | None = None  # in [0, 1]; detections score at least this
    class_scores: tuple[float, ...] | None = None  # (C,) in [0, 1]; those of each class score at least this, too
    labels: tuple[int, ...] | None = None  # of these classes only, chosen before NMS and limit
    limit: int | None = None  # most detections

    @property
    def threshold(self) -> float | None:
        """The float32 just below the lowest score: detections score above it."""
        return None if self.min_score is None else float(np.nextafter(np.float32(self.min_score), np.float32(-1)))


EVERYTHING = Wanted()


class Stage(nn.Module):
    """One round in which boxes are classified and refined (Cascade R-CNN, section 4).

    Args:
        sampler: chooses the RoIs that it learns from.
        box_head: of the stage.
        mask_head: of the stage, if it has one.
        second_branch: additional classifier, trained in the finetuning stage (report, section 2.2), if there is one.
        weight: of the losses of classes and boxes.
        mask_weight: of the mask loss.
        interleaved: the mask head learns from boxes that this stage has refined, sampled again, not from those that it
            was given (HTC, section 3.1).
    """

    def __init__(
        self,
        sampler: RoISampler,
        box_head: BoxHead | TsdBoxHead,
        mask_head: MaskHead | None,
        *,
        second_branch: ClassBranch | None = None,
        weight: float,
        mask_weight: float,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.sampler = sampler
        self.box_head = box_head
        self.mask_head = mask_head
        self.second_branch = second_branch
        self.weight = weight
        self.mask_weight = mask_weight
        self.interleaved = interleaved


class Detector(nn.Module):
    """Backbone, neck, RPN and one or more stages of box and mask heads.

    Args:
        backbone, neck, rpn: the parts, built; the neck makes P2..P6 of C2..C5.
        stages: in the order in which they refine the boxes.
        context: its vector of an image is added to the image's RoI features; None adds nothing.
        context_weight: of its loss.
        mask_iou: predicts how good the last stage's masks are, by which they are then ranked; None ranks by box score.
        mask_iou_weight: of its loss.
        semantic: its features are added to those of RoIs, too; None adds nothing. It has no loss of its own.
        relay: adds what the last stage's box head sees in a RoI to the feature that its mask is made of; None: nothing.
        sampling_ratio, aligned: of the RoI pooling (see `RoIPooler`).
        pixel_mean, pixel_std: of RGB in 0..255.
        score_threshold: detections score above this.
        nms_iou: NMS threshold within a class.
        max_detections: of an image, over all classes.
        stage_average: of several stages, the mean of their ``logits`` is turned into scores, or of each stage's, and
            their mean taken (``scores``).
        min_size: boxes with a side of at most this many network pixels are dropped; None drops none.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        rpn: RPN,
        stages: Sequence[Stage],
        *,
        context: ContextEncoder | None = None,
        context_weight: float,
        mask_iou: MaskIouHead | None = None,
        mask_iou_weight: float,
        semantic: SemanticBranch | None = None,
        relay: FeatureRelay | None = None,
        sampling_ratio: int,
        aligned: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        score_threshold: float,
        nms_iou: float,
        max_detections: int,
        stage_average: str,
        min_size: float | None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.divisor = neck.divisor  # pixels: images are padded to multiples of it
        self.rpn = rpn
        self.context = context
        self.context_weight = context_weight
        self.stages = nn.ModuleList(stages)
        self.mask_iou = mask_iou
        self.mask_iou_weight = mask_iou_weight
        self.semantic = semantic
        self.relay = relay
        self.box_pooler = RoIPooler(box_heads.ROI_SIZE, sampling_ratio=sampling_ratio, aligned=aligned)
        self.mask_pooler = RoIPooler(mask_heads.ROI_SIZE, sampling_ratio=sampling_ratio, aligned=aligned)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        self.max_detections = max_detections
        self.stage_average = stage_average
        self.min_size = min_size

    @property
    def device(self) -> torch.device:
        """Device of the pixels' mean, and with it of all else."""
        return self.pixel_mean.device

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses of a step; their sum is the objective."""
        pyramid = self.pyramid(batch.images, batch.image_sizes)
        anchors = self.rpn(pyramid)
        ignored = IgnoredRegions(batch.ignored)
        losses = self.rpn.loss(anchors, batch.image_sizes, batch.boxes, batch.valid, ignored)
        proposals = self.rpn.propose(anchors, batch.image_sizes, training=True)
        context = None
        if self.context is not None:
            present, context = self.context(pyramid[-1], batch.image_sizes)
            loss = self.context.loss(present, batch.labels, batch.valid, batch.absent)
            losses["context"] = loss * self.context_weight
        features = ImageFeatures(pyramid, context, None if self.semantic is None else self.semantic(pyramid))
        for number, stage in enumerate(self._stages(), start=1):
            last = number == len(self.stages)
            targets = stage.sampler(proposals, batch.boxes, batch.labels, batch.valid, ignored)
            prediction = stage.box_head(features.pool(self.box_pooler), targets.rois, targets.valid)
            own = {k: v * stage.weight for k, v in stage.box_head.loss(prediction, targets).items()}
            if not last or stage.interleaved:
                proposals = self.refine_proposals(stage, prediction, targets, batch)
            if stage.mask_head is not None:
                if stage.interleaved:
                    targets = stage.sampler(proposals, batch.boxes, batch.labels, batch.valid, ignored)
                own |= self._mask_losses(number, features, targets, prediction.hidden, batch, with_mask_iou=last)
            losses |= own if len(self.stages) == 1 else {f"stage{number}.{k}": v for k, v in own.items()}
        return losses

    @torch.no_grad()
    def detect(self, batch: Batch, wanted: Wanted = EVERYTHING) -> list[RawDetections]:
        """Detections of each image, in pixels of the image file, best score first."""
        features = self.extract_features(batch)
        proposals = self.rpn.propose(self.rpn(features.pyramid), batch.image_sizes, training=False)
        boxes, scores, labels = self._detect_boxes(features, proposals, batch.image_sizes, wanted)
        counts = [len(found) for found in labels]
        rois = torch.cat([torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(boxes)])
        all_masks, ious = self.predict_masks(features, rois, torch.cat(labels))
        masks = all_masks.split(counts)
        mask_scores = None if ious is None else (torch.cat(scores) * ious).split(counts)
        factors = (batch.original_sizes / batch.image_sizes).flip(1).repeat(1, 2).to(rois)
        return [
            RawDetections(
                image_hw=(int(hw[0]), int(hw[1])),
                boxes=boxes[i] * factors[i],
                scores=scores[i],
                labels=labels[i],
                masks=masks[i],
                mask_scores=None if mask_scores is None else mask_scores[i],
            )
            for i, hw in enumerate(batch.original_sizes.tolist())
        ]

    def extract_features(self, batch: Batch) -> ImageFeatures:
        """Compute the features that the heads pool from: P2..P6, and what the context and semantic parts add."""
        return self.image_features(batch.images, batch.image_sizes)

    def image_features(self, images: Tensor, image_sizes: Tensor) -> ImageFeatures:
        """The same of images (B, 3, H, W) with sizes (B, 2) before padding."""
        pyramid = self.pyramid(images, image_sizes)
        context = None if self.context is None else self.context(pyramid[-1], image_sizes)[1]
        return ImageFeatures(pyramid, context, None if self.semantic is None else self.semantic(pyramid))

    def pyramid(self, images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        """P2..P6 of images (B, 3, H, W) with sizes (B, 2) before padding, channels_last."""
        return list(self.neck(self.backbone(self.normalized(images, image_sizes))))

    def normalized(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """(B, 3, H, W) float32 with mean 0 and deviation 1; 0 in the padding."""
        rows = torch.arange(images.shape[2], device=images.device) < image_sizes[:, :1]
        columns = torch.arange(images.shape[3], device=images.device) < image_sizes[:, 1:]
        inside = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
        pixels = images.float().contiguous(memory_format=torch.channels_last)
        return torch.where(inside, (pixels - self.pixel_mean) / self.pixel_std, 0.0)

    def _stages(self) -> Iterator[Stage]:
        return cast("Iterator[Stage]", iter(self.stages))

    def _mask_heads(self, stages: int | None = None) -> list[MaskHead]:
        """The mask heads of the first so many stages, or of all."""
        return [stage.mask_head for stage in list(self._stages())[:stages] if stage.mask_head is not None]

    @torch.no_grad()
    def refine_proposals(self, stage: Stage, prediction: BoxPrediction, targets: RoITargets, batch: Batch) -> Proposals:
        """The next stage's proposals: this stage's RoIs moved by what it says, without the objects put among them."""
        shape = (len(batch), -1)
        decoded, classification = stage.box_head.decode(prediction), stage.box_head.classification
        boxes = boxes_to_refine(decoded, prediction.logits, classification, targets.labels)
        boxes = clip(boxes.view(*shape, 4), batch.image_sizes)
        valid = (targets.valid & ~targets.is_ground_truth).view(shape)
        return Proposals(boxes=boxes, scores=torch.zeros_like(boxes[..., 0]), valid=valid)

    def _mask_losses(
        self,
        number: int,
        features: ImageFeatures,
        targets: RoITargets,
        hidden: Tensor | None,
        batch: Batch,
        *,
        with_mask_iou: bool,
    ) -> dict[str, Tensor]:
        """Losses of the positives' masks in stage ``number`` and, ``with_mask_iou``, of their mask IoU.

        A relay reads ``hidden`` (R, width), the box head's features of the same RoIs.

        Positives come first, so only the first rows of an image can hold any.
        """
        stage = list(self._stages())[number - 1]
        front = min(stage.sampler.max_positive, stage.sampler.num_samples)
        num_samples = targets.positive.shape[0] // len(batch)
        could = targets.positive.clone().view(len(batch), num_samples)[:, :front]
        offsets = torch.arange(len(batch), device=could.device).unsqueeze(1) * num_samples
        positions = (offsets + torch.arange(could.shape[1], device=could.device)).flatten()
        rows = positions[rows_to_compute(could)]
        weights = targets.positive[rows]
        labels = torch.where(weights, targets.labels[rows], 0)
        rois = targets.rois[rows]
        seen = features.pool(self.mask_pooler)(rois)
        if self.relay is not None and hidden is not None:
            seen = seen + self.relay(hidden[rows])
        logits = last_mask_logits(self._mask_heads(number), seen, labels, weights)
        objects = targets.objects[rows]
        grids, frames = batch.masks.flatten(0, 1)[objects], batch.mask_frames.flatten(0, 1)[objects]
        goal = mask_targets(rois[:, 1:], grids, frames)
        losses = {"mask": mask_loss(logits, goal, weights) * stage.mask_weight}
        if with_mask_iou and self.mask_iou is not None:
            masks = logits.sigmoid()
            image_sizes = batch.image_sizes[rois[:, 0].long()]
            wanted = mask_iou_targets(masks, goal, rois[:, 1:], grids, frames, image_sizes)
            loss = mask_iou_loss(self.mask_iou(seen, masks, labels), wanted, weights)
            losses["mask_iou"] = loss * self.mask_iou_weight
        return losses

    def _detect_boxes(
        self, features: ImageFeatures, proposals: Proposals, image_sizes: Tensor, wanted: Wanted
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes (n, 4) in network pixels, scores (n,) and labels (n,) of each image."""
        num_samples = proposals.valid.shape[1]
        rows = rows_to_compute(proposals.valid)
        image, valid = rows // num_samples, proposals.valid.flatten()[rows]
        boxes = proposals.boxes.flatten(0, 1)[rows]
        decoded, scores = self.predict_boxes(
            features, torch.cat([image.unsqueeze(1).to(boxes), boxes], dim=1), image_sizes
        )
        scores = torch.where(valid.unsqueeze(1), scores, -1.0)
        if len(rows) == proposals.valid.numel():  # on a device, where picking the valid ones would wait for it
            counts = [num_samples] * len(image_sizes)
        else:
            counts = image.bincount(minlength=len(image_sizes)).tolist()
        found = [
            self.select_detections(*own, wanted=wanted)
            for own in zip(decoded.split(counts), scores.split(counts), strict=True)
        ]
        return [f[0] for f in found], [f[1] for f in found], [f[2] for f in found]

    def predict_boxes(self, features: ImageFeatures, rois: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """RoIs (K, 5) through all stages: their boxes (K, 1 or C, 4), clipped, and their class scores (K, C)."""
        image = rois[:, 0].long()
        all_logits, second_logits = [], []
        for number, stage in enumerate(self._stages(), start=1):
            prediction = stage.box_head(features.pool(self.box_pooler), rois)
            all_logits.append(prediction.logits)
            if stage.second_branch is not None:
                second_logits.append(stage.second_branch(prediction.class_features))
            decoded = clip(stage.box_head.decode(prediction), image_sizes[image])
            if number < len(self.stages):
                own = boxes_to_refine(decoded, prediction.logits, stage.box_head.classification)
                rois = torch.cat([rois[:, :1], own], dim=1)
        scores = self._mean_scores(stage.box_head.classification, all_logits)
        if stage.second_branch is not None:
            scores = (scores + self._mean_scores(stage.second_branch.classification, second_logits)) / 2
        return decoded, scores[:, :-1]

    def _mean_scores(self, classification: Classification, logits: list[Tensor]) -> Tensor:
        """Scores (K, C + 1) of the stages' logits (K, num_logits) each."""
        if self.stage_average == "logits":
            return classification.scores(torch.stack(logits).mean(dim=0))
        return torch.stack([classification.scores(own) for own in logits]).mean(dim=0)

    def select_detections(
        self, boxes: Tensor, scores: Tensor, *, wanted: Wanted = EVERYTHING
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The detections of an image among boxes (K, 1 or C, 4) with scores (K, C): see `multiclass_nms`."""
        if wanted.labels is not None:
            chosen = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            chosen[list(wanted.labels)] = True
            scores = torch.where(chosen, scores, -1.0)
        if wanted.class_scores is not None:
            scores = torch.where(scores >= scores.new_tensor(wanted.class_scores), scores, -1.0)
        return multiclass_nms(
            boxes,
            scores,
            score_threshold=self.score_threshold if wanted.threshold is None else wanted.threshold,
            iou=self.nms_iou,
            limit=wanted.limit or self.max_detections,
            min_size=self.min_size,
        )

    def predict_masks(self, features: ImageFeatures, rois: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities (n, 28, 28) of each RoI's own class, averaged over the mask heads, and their IoU (n,)."""
        seen = features.pool(self.mask_pooler)(rois)
        if self.relay is not None:
            last = list(self._stages())[-1].box_head(features.pool(self.box_pooler), rois)
            seen = seen + self.relay(last.hidden)
        masks = torch.stack([own.sigmoid() for own in mask_logits(self._mask_heads(), seen, labels)]).mean(dim=0)
        return masks, None if self.mask_iou is None else self.mask_iou(seen, masks, labels).clamp(0, 1)


def rows_to_compute(valid: Tensor) -> Tensor:
    """Positions (K,) of the True entries of ``valid`` (any shape, flattened), for work that a row costs dearly.

    On CPU only the True ones. On a device all of them: their number would have to be waited for, so the caller
    weights every row by ``valid`` and pays for the empty ones.
    """
    flat = valid.flatten()
    if flat.device.type == "cpu":
        return flat.nonzero().squeeze(1)
    return torch.arange(flat.shape[0], device=flat.device)
