"""HTC of mmdetection, with and without its semantic branch, against a plain statement of its heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmdet_layout import SMALL_CASCADE, Layout, State, assert_same, converted, lively, meta, state_of
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from tailseg.checkpoint import load_model, load_weights
from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.roi_features import ImageFeatures
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import override
from tailseg.structures import Batch
from tailseg.training.weight_init import init_weights, require_sound_start

PLAIN = replace(SMALL_CASCADE, flow=True, logits=1, counts=False)
WITH_SEMANTIC = replace(PLAIN, semantic=True)
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
IMAGE = (96, 128)


def model_of(layout: Layout, folder: Path) -> tuple[State, Detector]:
    state = lively(layout, {"fc_reg.weight": 0.3})
    content = {"state_dict": state, **meta()}
    recipe, ours = converted(content, folder)
    assert_same(layout, state, ours)
    detector = build_detector(recipe, 5)
    load_weights(detector, ours, folder)
    return state, detector.eval()


def conv(state: State, x: Tensor, name: str) -> Tensor:
    weight = state[f"roi_head.{name}.weight"]
    return F.conv2d(x, weight, state[f"roi_head.{name}.bias"], padding=weight.shape[2] // 2)


def semantic_features(state: State, pyramid: list[Tensor]) -> Tensor:
    size, head = pyramid[1].shape[2:], "semantic_head"
    resized = [F.interpolate(maps, size, mode="bilinear", align_corners=True) for maps in pyramid]
    x = sum(F.relu(conv(state, maps, f"{head}.lateral_convs.{i}.conv")) for i, maps in enumerate(resized))
    for i in range(4):
        x = F.relu(conv(state, x, f"{head}.convs.{i}.conv"))
    return F.relu(conv(state, x, f"{head}.conv_embedding.conv"))


def pooled(state: State, pyramid: list[Tensor], rois: Tensor, size: int) -> Tensor:
    """Of each RoI's level, and of the semantic branch if there is one: 14 cells, averaged to the size asked for."""
    rows = []
    for roi in rois:
        side = ((roi[3] - roi[1]) * (roi[4] - roi[2])).sqrt()
        level = int((side / 56 + 1e-6).log2().floor().clamp(0, 3))
        row = roi_align(pyramid[level], roi[None], size, 1 / 2 ** (level + 2), 0, True)
        if "roi_head.semantic_head.conv_embedding.conv.weight" in state:
            own = roi_align(semantic_features(state, pyramid), roi[None], 14, 1 / 8, 0, True)
            row = row + F.avg_pool2d(own, 14 // size)
        rows.append(row)
    return torch.cat(rows)


def stated_boxes(state: State, pyramid: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes of the last stage and softmax of the stages' mean logits."""
    logits = []
    for stage, stds in enumerate(STDS):
        head = f"roi_head.bbox_head.{stage}"
        hidden = pooled(state, pyramid, rois, 7).flatten(1)
        for layer in ("shared_fcs.0", "shared_fcs.1"):
            hidden = F.relu(F.linear(hidden, state[f"{head}.{layer}.weight"], state[f"{head}.{layer}.bias"]))
        logits.append(F.linear(hidden, state[f"{head}.fc_cls.weight"], state[f"{head}.fc_cls.bias"]))
        deltas = F.linear(hidden, state[f"{head}.fc_reg.weight"], state[f"{head}.fc_reg.bias"]) * torch.tensor(stds)
        size = rois[:, 3:] - rois[:, 1:3]
        centre = (rois[:, 1:3] + rois[:, 3:]) / 2 + deltas[:, :2] * size
        half = size * deltas[:, 2:].clamp(-4.135, 4.135).exp() / 2
        corners = torch.cat([centre - half, centre + half], dim=1)
        limits = torch.tensor([IMAGE[1], IMAGE[0]] * 2)
        rois = torch.cat([rois[:, :1], torch.minimum(corners.clamp(min=0), limits)], dim=1)
    return rois[:, 1:], torch.stack(logits).mean(0).softmax(1)[:, :-1]


def stated_masks(state: State, pyramid: list[Tensor], rois: Tensor) -> Tensor:
    """Probabilities (R, C, 28, 28): each head sees what the one before it made of the RoI; all are averaged."""
    features, before, masks = pooled(state, pyramid, rois, 14), None, []
    for stage in range(3):
        head = f"mask_head.{stage}"
        x = features if before is None else features + F.relu(conv(state, before, f"{head}.conv_res.conv"))
        for i in range(4):
            x = F.relu(conv(state, x, f"{head}.convs.{i}.conv"))
        before = x
        up = (state[f"roi_head.{head}.upsample.{part}"] for part in ("weight", "bias"))
        masks.append(conv(state, F.relu(F.conv_transpose2d(x, *up, stride=2)), f"{head}.conv_logits").sigmoid())
    return torch.stack(masks).mean(0)


@pytest.mark.parametrize("layout", [PLAIN, WITH_SEMANTIC], ids=["plain", "semantic"])
def test_boxes_and_masks(tmp_path: Path, layout: Layout) -> None:
    state, detector = model_of(layout, tmp_path)
    assert [stage.interleaved for stage in detector.stages] == [True] * 3
    assert (detector.semantic is not None) == layout.semantic
    image = torch.randint(0, 256, (1, 3, *IMAGE), dtype=torch.uint8)
    rois = torch.tensor([[0, 5, 7, 40, 90], [0, 30, 10, 120, 60], [0, 64, 50, 80, 66], [0, 0, 0, 128, 96]]).float()
    labels = torch.tensor([0, 4, 2, 1])
    batch = batch_of(image)
    with torch.no_grad():
        features = detector.extract_features(batch)
        pyramid = list(features.pyramid)
        boxes, scores = detector.predict_boxes(features, rois, batch.image_sizes)
        masks, _ = detector.predict_masks(features, rois, labels)
        expected_boxes, expected_scores = stated_boxes(state, pyramid, rois)
        expected_masks = stated_masks(state, pyramid, rois)[torch.arange(4), labels]
        without = detector.predict_masks(ImageFeatures(pyramid), rois, labels)[0]
    assert (expected_boxes - rois[:, 1:]).abs().max() > 1  # something moves
    assert (boxes[:, 0] - expected_boxes).abs().max() < 0.01
    assert (scores - expected_scores).abs().max() < 1e-4
    assert (masks - expected_masks).abs().max() < 1e-4
    assert expected_masks.std() > 0.05
    assert ((masks - without).abs().max() > 0.01) == layout.semantic
    (found,) = detector.detect(batch)
    assert len(found.labels) > 0


def batch_of(image: Tensor) -> Batch:
    sizes = torch.tensor([image.shape[2:]])
    return Batch(
        images=image,
        image_sizes=sizes,
        original_sizes=sizes,
        image_ids=torch.arange(1),
        boxes=torch.zeros(1, 1, 4),
        labels=torch.zeros(1, 1, dtype=torch.int64),
        valid=torch.zeros(1, 1, dtype=torch.bool),
        masks=torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        mask_frames=torch.zeros(1, 1, 4),
        absent=torch.zeros(1, 0, dtype=torch.bool),
        ignored=torch.zeros(1, 0, 0, dtype=torch.uint8),
    )


def test_the_prediction_of_stuff_is_not_needed(tmp_path: Path) -> None:
    prediction = {"weight": torch.randn(183, 8, 1, 1), "bias": torch.randn(183)}
    theirs = {f"roi_head.semantic_head.conv_logits.{part}": tensor for part, tensor in prediction.items()}
    state = state_of(WITH_SEMANTIC)
    recipe, ours = converted({"state_dict": state | theirs, **meta()}, tmp_path)
    assert_same(WITH_SEMANTIC, state, ours)
    assert recipe.model.semantic.enabled


CONFIG = """
model = dict(roi_head=dict(
    type='HybridTaskCascadeRoIHead', interleaved={}, mask_info_flow={}, stage_loss_weights=[1, 0.5, 0.25],
    semantic_roi_extractor=dict(type='SingleRoIExtractor', featmap_strides=[{}],
                                roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0)),
    semantic_head=dict(type='FusedSemanticHead', num_ins=5, fusion_level=1, num_convs=4)))
"""


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_configuration(tmp_path: Path, interleaved: bool) -> None:
    about = meta(cfg=CONFIG.format(interleaved, True, 8))
    recipe, _ = converted({"state_dict": state_of(WITH_SEMANTIC), **about}, tmp_path)
    assert recipe.model.mask_head.interleaved is interleaved
    assert recipe.model.mask_head.flow
    assert recipe.model.semantic.model_dump() == {"enabled": True, "convs": 4, "residual": False}


@pytest.mark.parametrize(
    ("flow", "stride", "named"),
    [(False, 8, "mask_info_flow = False"), (True, 4, "model.roi_head.semantic_roi_extractor.featmap_strides = [4]")],
)
def test_another_configuration(tmp_path: Path, flow: bool, stride: int, named: str) -> None:
    about = meta(cfg=CONFIG.format(True, flow, stride))
    with pytest.raises(UserError) as caught:
        converted({"state_dict": state_of(WITH_SEMANTIC), **about}, tmp_path)
    assert named in str(caught.value)


def test_training_goes_on_without_the_semantic_branch(tmp_path: Path) -> None:
    """It is left out, and the run says so."""
    converted({"state_dict": state_of(WITH_SEMANTIC), **meta()}, tmp_path)
    path = tmp_path / "converted.safetensors"
    checkpoint = load_model(path)
    recipe = override(checkpoint.recipe, ("model.semantic.enabled=false",))
    require_sound_start(recipe, path, resume=False)
    detector = build_detector(recipe, 5)
    note = init_weights(detector, recipe, checkpoint.categories, checkpoint)
    assert "they were trained with model.semantic.enabled = True (here False)" in note
    own = detector.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in checkpoint.state.items() if key in own)
    assert {key.split(".")[0] for key in checkpoint.state.keys() - own.keys()} == {"semantic"}


def test_its_semantic_branch_is_not_trained() -> None:
    recipe = resolve("htc", ("model.semantic.enabled=true",))
    with pytest.raises(UserError, match=r"^model\.semantic: .*set model\.semantic\.enabled=false, or train"):
        require_sound_start(recipe, None, resume=False)
