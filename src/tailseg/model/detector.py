"""One detector composed of parts; Mask R-CNN is it with one stage, Cascade Mask R-CNN with three.

Training and inference are two entrances with one return type each: `forward` gives losses (distributed wrappers see
only that), `detect` gives detections. Both read top to bottom.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tailseg.layers.roi_pooling import RoIPooler, planar
from tailseg.model import box_head as box_heads
from tailseg.model import mask_head as mask_heads
from tailseg.model.backbone import Backbone
from tailseg.model.box_head import BoxHead, RoISampler, RoITargets
from tailseg.model.boxes import clip
from tailseg.model.fpn import FPN
from tailseg.model.mask_head import MaskHead, mask_loss, mask_targets
from tailseg.model.matching import live_rows
from tailseg.model.nms import best_per_class
from tailseg.model.rpn import RPN, Proposals
from tailseg.structures import Batch, Detections


class Stage(nn.Module):
    """One round in which boxes are classified and refined (Cascade R-CNN, section 4; spec, section 12).

    Args:
        sampler: chooses the RoIs that it learns from.
        box_head: of the stage.
        mask_head: of the stage, if it has one.
        weight: of the losses of classes and boxes.
        mask_weight: of the mask loss.
    """

    def __init__(
        self,
        sampler: RoISampler,
        box_head: BoxHead,
        mask_head: MaskHead | None,
        *,
        weight: float = 1.0,
        mask_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.sampler = sampler
        self.box_head = box_head
        self.mask_head = mask_head
        self.weight = weight
        self.mask_weight = mask_weight


class Detector(nn.Module):
    """Backbone, neck, RPN and one or more stages of box and mask heads.

    Args:
        backbone, neck, rpn: the parts, built.
        stages: in the order in which they refine the boxes.
        sampling_ratio, aligned: of the RoI pooling (see `RoIPooler`).
        pixel_mean, pixel_std: of RGB in 0..255.
        score_threshold: detections score above this.
        nms_iou: NMS threshold within a class.
        max_detections: of an image, over all classes.
        min_size: boxes with a side of at most this many network pixels are dropped; None drops none.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: FPN,
        rpn: RPN,
        stages: Sequence[Stage],
        *,
        sampling_ratio: int = 0,
        aligned: bool = True,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        score_threshold: float = 1e-4,
        nms_iou: float = 0.5,
        max_detections: int = 300,
        min_size: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.stages = nn.ModuleList(stages)
        self.box_pooler = RoIPooler(box_heads.ROI_SIZE, sampling_ratio=sampling_ratio, aligned=aligned)
        self.mask_pooler = RoIPooler(mask_heads.ROI_SIZE, sampling_ratio=sampling_ratio, aligned=aligned)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        self.max_detections = max_detections
        self.min_size = min_size

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses of a step; their sum is the objective."""
        pyramid = self.features(batch)
        anchors = self.rpn(pyramid)
        losses = self.rpn.loss(anchors, batch.image_hws, batch.boxes, batch.valid)
        proposals = self.rpn.propose(anchors, batch.image_hws)
        pyramid = planar(pyramid)
        for number, stage in enumerate(self._stages(), start=1):
            targets = stage.sampler(proposals, batch.boxes, batch.labels, batch.valid)
            logits, deltas = stage.box_head(self.box_pooler(pyramid, targets.rois))
            own = {k: v * stage.weight for k, v in stage.box_head.loss(logits, deltas, targets).items()}
            if stage.mask_head is not None:
                own["mask"] = self._mask_loss(stage, stage.mask_head, pyramid, targets, batch) * stage.mask_weight
            losses |= own if len(self.stages) == 1 else {f"stage{number}.{k}": v for k, v in own.items()}
            if number < len(self.stages):
                proposals = self._refined(stage, deltas, targets, batch)
        return losses

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[Detections]:
        """Detections of each image, in pixels of the image file, best score first."""
        pyramid = self.features(batch)
        proposals = self.rpn.propose(self.rpn(pyramid), batch.image_hws)
        pyramid = planar(pyramid)
        boxes, scores, labels = self._detect_boxes(pyramid, proposals, batch.image_hws)
        counts = [len(found) for found in labels]
        rois = torch.cat([torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(boxes)])
        masks = self._detect_masks(pyramid, rois, torch.cat(labels)).split(counts)
        factors = (batch.original_hws / batch.image_hws).flip(1).repeat(1, 2).to(rois)
        return [
            Detections(
                image_hw=(int(hw[0]), int(hw[1])),
                boxes=boxes[i] * factors[i],
                scores=scores[i],
                labels=labels[i],
                masks=masks[i],
            )
            for i, hw in enumerate(batch.original_hws.tolist())
        ]

    def features(self, batch: Batch) -> list[Tensor]:
        """P2..P6 of the batch, channels_last."""
        return list(self.neck(self.backbone(self.normalized(batch.images, batch.image_hws))))

    def normalized(self, images: Tensor, image_hws: Tensor) -> Tensor:
        """(B, 3, H, W) float32 with mean 0 and deviation 1; 0 in the padding."""
        rows = torch.arange(images.shape[2], device=images.device) < image_hws[:, :1]
        columns = torch.arange(images.shape[3], device=images.device) < image_hws[:, 1:]
        inside = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
        pixels = images.float().contiguous(memory_format=torch.channels_last)
        return torch.where(inside, (pixels - self.pixel_mean) / self.pixel_std, 0.0)

    def _stages(self) -> Iterator[Stage]:
        return cast("Iterator[Stage]", iter(self.stages))

    @torch.no_grad()
    def _refined(self, stage: Stage, deltas: Tensor, targets: RoITargets, batch: Batch) -> Proposals:
        """The next stage's proposals: this stage's RoIs moved by what it says, without the objects put among them."""
        shape = (len(batch), -1)
        boxes = clip(stage.box_head.decode(targets.rois[:, 1:], deltas).view(*shape, 4), batch.image_hws)
        valid = (targets.valid & ~targets.given).view(shape)
        return Proposals(boxes=boxes, scores=torch.zeros_like(boxes[..., 0]), valid=valid)

    def _mask_loss(
        self, stage: Stage, mask_head: MaskHead, pyramid: list[Tensor], targets: RoITargets, batch: Batch
    ) -> Tensor:
        """Loss of the positives' own masks. Positives come first, so only the first slots can hold any."""
        front = min(stage.sampler.max_positive, stage.sampler.slots)
        slots = targets.positive.shape[0] // len(batch)
        could = targets.positive.clone().view(len(batch), slots)[:, :front]
        offsets = torch.arange(len(batch), device=could.device).unsqueeze(1) * slots
        positions = (offsets + torch.arange(could.shape[1], device=could.device)).flatten()
        rows = positions[live_rows(could)]
        weights = targets.positive[rows]
        labels = torch.where(weights, targets.labels[rows], 0)
        logits = mask_head(self.mask_pooler(pyramid, targets.rois[rows]), labels)
        objects = targets.objects[rows]
        goal = mask_targets(
            targets.rois[rows, 1:],
            batch.masks.flatten(0, 1)[objects],
            batch.mask_frames.flatten(0, 1)[objects],
        )
        return mask_loss(logits, goal, weights)

    def _detect_boxes(
        self, pyramid: list[Tensor], proposals: Proposals, image_hws: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes (n, 4) in network pixels, scores (n,) and labels (n,) of each image."""
        slots = proposals.valid.shape[1]
        rows = live_rows(proposals.valid)
        image, valid = rows // slots, proposals.valid.flatten()[rows]
        boxes = proposals.boxes.flatten(0, 1)[rows]
        all_logits = []
        for number, stage in enumerate(self._stages(), start=1):
            rois = torch.cat([image.unsqueeze(1).to(boxes), boxes], dim=1)
            logits, deltas = stage.box_head(self.box_pooler(pyramid, rois))
            all_logits.append(logits)
            decoded = clip(stage.box_head.decode(boxes, deltas), image_hws[image])
            if number < len(self.stages):
                boxes = decoded[:, 0]
        # Not the scores but the logits of the stages are averaged, and turned into scores once.
        logits = torch.stack(all_logits).mean(dim=0)
        scores = stage.box_head.classification.scores(logits)[:, :-1]
        found: list[tuple[Tensor, ...]] = []
        for i in range(len(image_hws)):
            own = (image == i) & valid
            found.append(
                best_per_class(
                    decoded[own],
                    scores[own],
                    score_threshold=self.score_threshold,
                    iou=self.nms_iou,
                    limit=self.max_detections,
                    min_size=self.min_size,
                )
            )
        return [f[0] for f in found], [f[1] for f in found], [f[2] for f in found]

    def _detect_masks(self, pyramid: list[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Probabilities (n, 28, 28) of each RoI's (n, 5) own class, averaged over the mask heads."""
        features = self.mask_pooler(pyramid, rois)
        heads = [stage.mask_head for stage in self._stages() if stage.mask_head is not None]
        return torch.stack([head(features, labels).sigmoid() for head in heads]).mean(dim=0)
