"""torchvision's Mask R-CNN R50-FPN with the settings and the weights of ours, to compare speed on equal work."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from tailseg.model.box_head import BoxHead
from tailseg.model.detector import Detector, Stage
from tailseg.model.fpn import FPN
from tailseg.structures import Batch


def build_twin(detector: Detector, image_hw: tuple[int, int]) -> MaskRCNN:
    """torchvision's model for images of one size, with the weights of a cross-entropy ``detector`` (ResNet-50).

    Same image size, anchors, thresholds, proposals, sampled RoIs, classes and detections; stem and first stage
    frozen in both. Differences that remain: torchvision freezes batch norm's scale and shift (we train them), takes
    2 x 2 samples a cell in RoIAlign (we take as many as the cell has pixels), and computes 1204 masks a RoI.
    """
    rpn, sampler = detector.rpn, stages_of(detector)[0].sampler
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    twin = MaskRCNN(
        backbone,
        num_classes=sampler.num_classes + 1,
        min_size=min(image_hw),
        max_size=max(image_hw),
        image_mean=[value / 255 for value in detector.pixel_mean.flatten().tolist()],
        image_std=[value / 255 for value in detector.pixel_std.flatten().tolist()],
        rpn_pre_nms_top_n_train=rpn.pre_nms[True],
        rpn_pre_nms_top_n_test=rpn.pre_nms[False],
        rpn_post_nms_top_n_train=rpn.post_nms[True],
        rpn_post_nms_top_n_test=rpn.post_nms[False],
        rpn_nms_thresh=rpn.nms_iou,
        rpn_batch_size_per_image=rpn.num_samples,
        rpn_positive_fraction=rpn.max_positive / rpn.num_samples,
        box_score_thresh=detector.score_threshold,
        box_nms_thresh=detector.nms_iou,
        box_detections_per_img=detector.max_detections,
        box_batch_size_per_image=sampler.num_samples,
        box_positive_fraction=sampler.max_positive / sampler.num_samples,
    )
    copy_weights(detector, twin)
    return twin


def build_stock(detector: Detector, image_hw: tuple[int, int]) -> MaskRCNN:
    """torchvision's model with default settings, for our classes, image size, score threshold and number of detections.

    Without pretrained weights it trains all of its backbone, batch statistics included, on 2000 proposals; at test it
    keeps to 1000.
    """
    model: MaskRCNN = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=stages_of(detector)[0].sampler.num_classes + 1,
        min_size=min(image_hw),
        max_size=max(image_hw),
        box_score_thresh=detector.score_threshold,
        box_detections_per_img=detector.max_detections,
    )
    return model


def stages_of(detector: Detector) -> list[Stage]:
    """The stages as what they are: PyTorch's module list has items of any kind."""
    return [stage for stage in detector.stages if isinstance(stage, Stage)]


@torch.no_grad()
def copy_weights(detector: Detector, twin: MaskRCNN) -> None:
    """Our weights into torchvision's modules; its background is class 0, ours the last."""
    stored = {k: v for k, v in detector.backbone.net.state_dict().items() if "num_batches" not in k}
    twin.backbone.body.load_state_dict(stored)
    neck, fpn = detector.neck, twin.backbone.fpn
    stage = stages_of(detector)[0]
    heads, head, mask = twin.roi_heads, stage.box_head, stage.mask_head
    assert isinstance(neck, FPN)
    assert isinstance(head, BoxHead)
    assert head.fc2 is not None
    assert mask is not None
    pairs: list[tuple[nn.Module, nn.Module]] = [
        *zip(neck.lateral_convs, (block[0] for block in fpn.inner_blocks), strict=True),
        *zip(neck.output_convs, (block[0] for block in fpn.layer_blocks), strict=True),
        (detector.rpn.conv, twin.rpn.head.conv[0][0]),
        (detector.rpn.objectness, twin.rpn.head.cls_logits),
        (detector.rpn.deltas, twin.rpn.head.bbox_pred),
        (head.fc1, heads.box_head.fc6),
        (head.fc2, heads.box_head.fc7),
        *zip(mask.convs, (block[0] for block in heads.mask_head), strict=True),
        (mask.upsample, heads.mask_predictor.conv5_mask),
    ]
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
    for ours, theirs, rows in (
        (head.regressor, heads.box_predictor.bbox_pred, 4),
        (mask.predictor, heads.mask_predictor.mask_fcn_logits, 1),
    ):
        for name, values in ours.state_dict().items():
            theirs.state_dict()[name][rows:] = values  # the rows of the background stay as they are: nothing reads them
    for name, values in head.classifier.state_dict().items():
        heads.box_predictor.cls_score.state_dict()[name].copy_(values.roll(1, 0))


def twin_inputs(batch: Batch, bitmaps: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch without padding as torchvision wants it: images in [0, 1], targets with whole bitmaps (G, H, W)."""
    images = [image.float() / 255 for image in batch.images]
    targets = [
        {"boxes": boxes, "labels": labels + 1, "masks": masks}
        for boxes, labels, masks in zip(batch.boxes, batch.labels, bitmaps, strict=True)
    ]
    return images, targets
