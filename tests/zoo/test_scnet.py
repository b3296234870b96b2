"""SCNet of mmdetection, with and without its semantic branch, against a plain statement of its heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmdet_layout import SMALL_CASCADE, Layout, State, assert_same, converted, lively, meta, save, state_of
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from tailseg.checkpoint import load_weights
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.roi_features import ImageFeatures
from tailseg.zoo.mmdet import read_mmdet

SCNET = replace(
    SMALL_CASCADE, scnet=True, semantic=True, context="residual", one_mask_head=True, logits=1, counts=False
)
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
# The second of a residual pair is slower, as its shortcut has its size already.
SLOWER = {"fc_reg.weight": 0.3, "conv2.weight": 0.3, "conv_logits.weight": 0.1, "fc_cls.weight": 0.1}
IMAGE = (64, 128)  # a whole number of P6's cells, so that padding plays no part


class Statement:
    """SCNet's heads, from the pyramid of one image and the tensors of a checkpoint."""

    def __init__(self, state: State, pyramid: list[Tensor]) -> None:
        self.state, self.pyramid = state, pyramid
        self.semantic = None
        if "roi_head.semantic_head.conv_embedding.conv.weight" in state:
            resized = [F.interpolate(x, pyramid[1].shape[2:], mode="bilinear", align_corners=True) for x in pyramid]
            laterals = [F.relu(self.conv(x, f"semantic_head.lateral_convs.{i}.conv")) for i, x in enumerate(resized)]
            deep = self.blocks(torch.stack(laterals).sum(0), "semantic_head", 2)
            self.semantic = F.relu(self.conv(deep, "semantic_head.conv_embedding.conv"))
        self.context = self.blocks(pyramid[4], "glbctx_head", 2).mean((2, 3), keepdim=True)

    def conv(self, x: Tensor, name: str) -> Tensor:
        weight = self.state[f"roi_head.{name}.weight"]
        return F.conv2d(x, weight, self.state[f"roi_head.{name}.bias"], padding=weight.shape[2] // 2)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"roi_head.{name}.weight"], self.state[f"roi_head.{name}.bias"])

    def blocks(self, x: Tensor, head: str, count: int) -> Tensor:
        for i in range(count):
            inner = F.relu(self.conv(x, f"{head}.convs.{i}.conv1"))
            x = x + self.conv(inner, f"{head}.convs.{i}.conv2")
        return x

    def pooled(self, roi: Tensor, size: int) -> Tensor:
        """One RoI (1, 5): of its level, of the semantic branch, and the global context."""
        side = ((roi[0, 3] - roi[0, 1]) * (roi[0, 4] - roi[0, 2])).sqrt()
        level = int((side / 56 + 1e-6).log2().floor().clamp(0, 3))
        found = roi_align(self.pyramid[level], roi, size, 1 / 2 ** (level + 2), 0, True)
        if self.semantic is not None:
            found = found + F.avg_pool2d(roi_align(self.semantic, roi, 14, 1 / 8, 0, True), 14 // size)
        return found + self.context

    def hidden(self, roi: Tensor, stage: int) -> Tensor:
        head = f"bbox_head.{stage}.shared_fcs"
        return F.relu(self.linear(F.relu(self.linear(self.pooled(roi, 7).flatten(1), f"{head}.0")), f"{head}.1"))

    def box(self, roi: Tensor) -> tuple[Tensor, Tensor]:
        """The last stage's box (4,) and softmax (C,) of the stages' mean logits."""
        logits = []
        for stage, stds in enumerate(STDS):
            hidden = self.hidden(roi, stage)
            logits.append(self.linear(hidden, f"bbox_head.{stage}.fc_cls"))
            deltas = self.linear(hidden, f"bbox_head.{stage}.fc_reg") * torch.tensor(stds)
            size, centre = roi[:, 3:] - roi[:, 1:3], (roi[:, 1:3] + roi[:, 3:]) / 2
            centre, half = centre + deltas[:, :2] * size, size * deltas[:, 2:].clamp(-4.135, 4.135).exp() / 2
            corners = torch.cat([centre - half, centre + half], dim=1).clamp(min=0)
            roi = torch.cat([roi[:, :1], torch.minimum(corners, torch.tensor([IMAGE[1], IMAGE[0]] * 2))], dim=1)
        return roi[0, 1:], torch.stack(logits).mean(0).softmax(1)[0, :-1]

    def masks(self, roi: Tensor) -> Tensor:
        """Probabilities (C, 28, 28): what the last box head saw in the same RoI is added, at twice the size."""
        relayed = self.linear(self.hidden(roi, 2), "feat_relay_head.fc").view(1, -1, 7, 7)
        larger = F.interpolate(relayed, scale_factor=2, mode="bilinear", align_corners=True)
        x = self.blocks(self.pooled(roi, 14) + larger, "mask_head", 3)
        up = (self.state[f"roi_head.mask_head.upsample.{part}"] for part in ("weight", "bias"))
        return self.conv(F.relu(F.conv_transpose2d(x, *up, stride=2)), "mask_head.conv_logits").sigmoid()[0]


def detector_of(layout: Layout, state: State, folder: Path) -> Detector:
    recipe, ours = converted({"state_dict": state, **meta()}, folder)
    assert_same(layout, state, ours)
    assert recipe.model.mask_head.residual
    assert (recipe.model.mask_head.convs, recipe.model.context.convs) == (6, 4)
    assert recipe.model.context.residual
    assert recipe.model.relay.enabled
    assert [stage.mask_weight for stage in recipe.model.stages] == [0, 0, 1.75]
    detector = build_detector(recipe, 5)
    load_weights(detector, ours, folder)
    return detector.eval()


@pytest.mark.parametrize("semantic", [True, False])
def test_boxes_and_masks(tmp_path: Path, semantic: bool) -> None:
    layout = replace(SCNET, semantic=semantic)
    state = lively(layout, SLOWER)
    detector = detector_of(layout, state, tmp_path)
    assert (detector.semantic is not None) == semantic
    sizes = torch.tensor([IMAGE])
    image = torch.randint(0, 256, (1, 3, *IMAGE), dtype=torch.uint8)
    rois = torch.tensor([[0, 5, 7, 40, 60], [0, 30, 10, 120, 60], [0, 64, 50, 80, 63], [0, 0, 0, 128, 64]]).float()
    labels = torch.tensor([0, 4, 2, 1])
    with torch.no_grad():
        features = detector.image_features(image, sizes)
        statement = Statement(state, list(features.pyramid))
        boxes, scores = detector.predict_boxes(features, rois, sizes)
        masks, _ = detector.predict_masks(features, rois, labels)
        stated = [statement.box(roi[None]) for roi in rois]
        expected = torch.stack([statement.masks(roi[None])[label] for roi, label in zip(rois, labels, strict=True)])
        bare = detector.predict_masks(ImageFeatures(features.pyramid), rois, labels)[0]
        relay, detector.relay = detector.relay, None
        unrelayed = detector.predict_masks(features, rois, labels)[0]
        detector.relay = relay
    expected_boxes = torch.stack([box for box, _ in stated])
    assert (expected_boxes - rois[:, 1:]).abs().max() > 1  # something moves
    assert (boxes[:, 0] - expected_boxes).abs().max() < 0.01
    assert (scores - torch.stack([own for _, own in stated])).abs().max() < 1e-4
    assert (masks - expected).abs().max() < 1e-4
    assert expected.std() > 0.05
    for without in (bare, unrelayed):
        assert (masks - without).abs().max() > 0.01


def test_a_global_context_of_one_class_too_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As SCNet was published: 81 rows for COCO's 80 classes."""
    state = state_of(SCNET)
    fc = "roi_head.glbctx_head.fc"
    more = {f"{fc}.{part}": torch.cat([state[f"{fc}.{part}"], torch.ones(1, *s)]) for part, s in PARTS}
    _, ours = converted({"state_dict": state | more, **meta()}, tmp_path)
    assert_same(SCNET, state, ours)
    assert "has a global context of one class more than the model" in caplog.text


PARTS: tuple[tuple[str, tuple[int, ...]], ...] = (("weight", (8,)), ("bias", ()))
CONFIG = """
model = dict(type='SCNet', roi_head=dict(
    type='SCNetRoIHead', stage_loss_weights=[1, 0.5, 0.25],
    bbox_head=[dict(type='SCNetBBoxHead', loss_bbox=dict(type='SmoothL1Loss', beta=1.0))] * 3,
    mask_head=dict(type='SCNetMaskHead', num_convs=6, conv_to_res=True),
    semantic_roi_extractor=dict(type='SingleRoIExtractor', featmap_strides=[8]),
    semantic_head=dict(type='SCNetSemanticHead', num_ins=5, fusion_level=1, num_convs=4, conv_to_res=True),
    glbctx_head=dict(type='GlobalContextHead', num_convs=4, loss_weight=2.0, conv_to_res=True),
    feat_relay_head=dict(type='FeatureRelayHead', in_channels=16, roi_feat_size={}, scale_factor={})))
"""


def test_a_configuration(tmp_path: Path) -> None:
    recipe, _ = converted({"state_dict": state_of(SCNET), **meta(cfg=CONFIG.format(7, 2))}, tmp_path)
    assert [stage.weight for stage in recipe.model.stages] == [1, 0.5, 0.25]
    assert [stage.mask_weight for stage in recipe.model.stages] == [0, 0, 1.75]
    assert recipe.model.context.weight == 2
    assert recipe.model.semantic.model_dump() == {"enabled": True, "convs": 4, "residual": True}
    for sizes, named in (((14, 2), "roi_feat_size = 14"), ((7, 1), "scale_factor = 1")):
        path = save({"state_dict": state_of(SCNET), **meta(cfg=CONFIG.format(*sizes))}, tmp_path / "other.pth")
        assert f"model.roi_head.feat_relay_head.{named}" in str(read_mmdet(path).refusal)
