"""A cascade of mmdetection with a box for each class, taught by GIoU: of a RoI, the likeliest class's box goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmdet_layout import SMALL_CASCADE, assert_same, converted, lively, meta
from tiny import noise_batch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from tailseg.checkpoint import load_weights
from tailseg.model.build import build_detector

LAYOUT = replace(SMALL_CASCADE, specific_boxes=True, logits=1, counts=False)
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
CODERS = [f"dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds={list(s)})" for s in STDS]
HEAD = "dict(type='Shared2FCBBoxHead', reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss'), bbox_coder={})"
HEADS = ", ".join(HEAD.format(coder) for coder in CODERS)
CONFIG = f"model = dict(roi_head=dict(type='CascadeRoIHead', bbox_head=[{HEADS}]))"
IMAGE = (64, 96)


def test_boxes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = lively(LAYOUT)
    recipe, ours = converted({"state_dict": state, **meta(cfg=CONFIG)}, tmp_path)
    assert_same(LAYOUT, state, ours)
    assert "was trained with GIoULoss of boxes in the box heads (here L1 of deltas); detections are" in caplog.text
    assert (recipe.model.box_head.class_agnostic, recipe.model.box_head.box_beta) == (False, 0)
    detector = build_detector(recipe, 5)
    load_weights(detector, ours, tmp_path)
    detector.eval()
    rois = torch.tensor([[0, 5, 7, 40, 60], [0, 30, 10, 90, 60], [0, 64, 50, 80, 63], [0, 0, 0, 96, 64]]).float()
    with torch.no_grad():
        features = detector.image_features(torch.randint(0, 256, (1, 3, *IMAGE)).byte(), torch.tensor([IMAGE]))
        boxes, scores = detector.predict_boxes(features, rois, torch.tensor([IMAGE]))
        refined = [stated(state, features.pyramid, roi) for roi in rois]
    assert len({name for _, _, names in refined for name in names}) > 1  # not always the same class
    assert (boxes - torch.stack([own for own, _, _ in refined])).abs().max() < 0.01
    assert (scores - torch.stack([own for _, own, _ in refined])).abs().max() < 1e-4

    losses = detector.train()(noise_batch((64, 96), (64, 64), objects=3, num_classes=5, seed=1))
    assert all(loss.isfinite() for loss in losses.values())


def stated(state: dict[str, Tensor], pyramid: list[Tensor], roi: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """A RoI's boxes (C, 4) and scores (C,) after three stages, and the classes whose boxes went on."""
    logits, chosen, limits = [], [], torch.tensor([IMAGE[1], IMAGE[0]] * 2)
    for stage, stds in enumerate(STDS):
        level = int((((roi[3] - roi[1]) * (roi[4] - roi[2])).sqrt() / 56 + 1e-6).log2().floor().clamp(0, 3))
        hidden = roi_align(pyramid[level], roi[None], 7, 1 / 2 ** (level + 2), 0, True).flatten()

        def linear(x: Tensor, layer: str, head: str = f"roi_head.bbox_head.{stage}") -> Tensor:
            return F.linear(x, state[f"{head}.{layer}.weight"], state[f"{head}.{layer}.bias"])

        for layer in ("shared_fcs.0", "shared_fcs.1"):
            hidden = F.relu(linear(hidden, layer))
        logits.append(linear(hidden, "fc_cls"))
        deltas = linear(hidden, "fc_reg").view(5, 4) * torch.tensor(stds)
        size = roi[3:] - roi[1:3]
        centres = (roi[1:3] + roi[3:]) / 2 + deltas[:, :2] * size
        halves = size * deltas[:, 2:].clamp(-4.135, 4.135).exp() / 2
        boxes = torch.minimum(torch.cat([centres - halves, centres + halves], dim=1).clamp(min=0), limits)
        chosen.append(int(logits[-1][:5].argmax()))
        roi = torch.cat([roi[:1], boxes[chosen[-1]]])
    return boxes, torch.stack(logits).mean(0).softmax(0)[:5], chosen
