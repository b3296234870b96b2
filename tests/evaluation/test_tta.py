"""Test-time augmentation against its definition written out, and against what must not change."""

import json
import math
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import orjson
import pytest
import torch
from click.testing import Result
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image as PillowImage
from torch import Tensor, nn
from typer.testing import CliRunner

from tailseg.checkpoint import load_model, save_model
from tailseg.cli.main import app, main
from tailseg.data.batches import batch_of
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.data.transforms import fit_transform
from tailseg.evaluation.tta import View, ViewFeatures, detect_views, pooled, view_edges, views_of
from tailseg.model.backbone import Backbone
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.roi_features import ImageFeatures
from tailseg.predict import load
from tailseg.recipes.resolve import resolve
from tailseg.structures import Batch, Proposals, RawDetections

CLASSES = 5
SMALL = (
    "model.backbone={name: resnet18, frozen_stages: 1, pretrained: false, options: {channels: [8, 16, 24, 32]}}",
    "model.neck.channels=16",
    "model.rpn={pre_nms_train: 60, post_nms_train: 50, pre_nms_test: 12, post_nms_test: 25, anchor_scale: 8}",
    "model.box_head={width: 24, rois: 64, max_positive: 24}",
    "model.mask_head={channels: 16, convs: 1, class_agnostic: false}",
    "model.mask_iou={channels: 8, width: 12}",
    "model.tsd.shift_width=12",
    "test.max_detections=40",
)
SEESAW = "classifier={loss: seesaw, normalized: true}"
MASK_RCNN = ("demo/cross-entropy", "model.box_head.class_agnostic=false")
WHOLE = ("demo-table2/06-mask-scoring", SEESAW)
SECOND = "finetune.enabled=true"
KINDS = {
    "Mask R-CNN": MASK_RCNN,
    "HTC-Lite, TSD, mask scoring": WHOLE,
    "Mask R-CNN, second branch": (*MASK_RCNN, SECOND),
    "HTC-Lite, TSD, mask scoring, second branches": (*WHOLE, SECOND),
}
EDGES = (64, 100)
VIEWS = tuple(View(edge, mirrored) for edge in EDGES for mirrored in (False, True))


def detector_of(name: str, *more: str) -> Detector:
    """Small, of weights that move boxes by a good part of their size and tell classes, masks and their IoU apart."""
    torch.manual_seed(0)
    detector = build_detector(resolve(name, [*SMALL, *more]), CLASSES)
    nn.init.normal_(detector.rpn.objectness.weight, std=0.3)
    nn.init.normal_(detector.rpn.deltas.weight, std=0.3)
    for stage in detector.stages:
        head = stage.box_head
        nn.init.normal_(head.regressor.weight, std=0.5)
        nn.init.normal_(head.regressor.bias, std=2.0)
        nn.init.normal_(head.classifier.weight, std=0.3)
        if stage.second_branch is not None:
            nn.init.normal_(stage.second_branch.classifier.weight, std=0.3)
        if stage.mask_head is not None:
            nn.init.normal_(stage.mask_head.predictor.weight, std=1.0)
    if detector.mask_iou is not None:
        nn.init.normal_(detector.mask_iou.predictor.weight, std=3.0)
        nn.init.constant_(detector.mask_iou.predictor.bias, 0.5)
    return detector.eval()


@pytest.fixture(scope="module", params=KINDS)
def detector(request: pytest.FixtureRequest) -> Detector:
    return detector_of(*KINDS[request.param])


def picture_of(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blots of colour."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


PICTURE = picture_of(61, 83)


def mirror(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(picture[:, ::-1])


@contextmanager
def calls(module: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """Arguments and result of every call of a module inside the block."""
    seen: list[tuple[Any, Any]] = []
    hook = module.register_forward_hook(lambda _module, inputs, output: seen.append((inputs, output)))
    yield seen
    hook.remove()


# ---------------------------------------------------------------------------------------------------------
# The whole merge, written out


def by_definition(detector: Detector, picture: np.ndarray, edges: tuple[int, ...]) -> RawDetections:
    """Section 25 in plain loops: the maps of all views are kept, boxes are lists of numbers."""
    height, width = picture.shape[:2]

    def onto_picture(box: list[float], h: int, w: int, mirrored: bool) -> list[float]:
        x1, y1, x2, y2 = box
        if mirrored:
            x1, x2 = w - x2, w - x1
        return [x1 * width / w, y1 * height / h, x2 * width / w, y2 * height / h]

    def into_view(box: list[float], h: int, w: int, mirrored: bool) -> list[float]:
        x1, y1, x2, y2 = (side * ratio for side, ratio in zip(box, 2 * [w / width, h / height], strict=True))
        return [0, w - x2, y1, w - x1, y2] if mirrored else [0, x1, y1, x2, y2]

    views = []
    for edge in edges:
        for mirrored in (False, True):
            h, w = (int(side * edge / max(height, width) + 0.5) for side in (height, width))
            pixels = cv2.resize(mirror(picture) if mirrored else picture, (w, h), interpolation=cv2.INTER_LINEAR)
            images = torch.zeros(1, 3, math.ceil(h / 32) * 32, math.ceil(w / 32) * 32, dtype=torch.uint8)
            images[0, :, :h, :w] = torch.from_numpy(pixels).permute(2, 0, 1)
            hws = torch.tensor([[h, w]])
            maps = list(detector.neck(detector.backbone(detector.normalized(images, hws))))
            context = None if detector.context is None else detector.context(maps[-1], hws)[1]
            views.append((h, w, mirrored, hws, ImageFeatures(maps, context)))

    pool: list[tuple[float, list[float]]] = []
    for h, w, mirrored, hws, features in views:
        own = detector.rpn.propose(detector.rpn(features.pyramid), hws, training=detector.rpn.training)
        assert 10 < own.valid.sum() <= 25
        for score, box in zip(own.scores[own.valid].tolist(), own.boxes[own.valid].tolist(), strict=True):
            pool.append((score, onto_picture(box, h, w, mirrored)))
    proposals = [box for _, box in best_first(pool, 0.7)[:25]]

    box_means = torch.zeros(())
    score_means = torch.zeros(())
    for h, w, mirrored, _, features in views:
        rois = torch.tensor([into_view(box, h, w, mirrored) for box in proposals])
        logits, second_logits = [], []
        for stage in detector.stages:
            said = stage.box_head(features.pool(detector.box_pooler), rois)
            logits.append(said.logits)
            if stage.second_branch is not None:
                second_logits.append(stage.second_branch(said.class_features))
            refined = stage.box_head.decode(said)
            refined = torch.minimum(refined.clamp(min=0), torch.tensor([w, h, w, h]))
            rois = torch.cat([rois[:, :1], refined[:, 0]], dim=1)
        branches = [logits, second_logits] if second_logits else [logits]
        own_scores = [stage.box_head.classification.scores(sum(b) / len(b)).double() for b in branches]
        laid_back = [[onto_picture(box, h, w, mirrored) for box in row] for row in refined.tolist()]
        box_means = box_means + torch.tensor(laid_back, dtype=torch.float64) / len(views)
        score_means = score_means + sum(own_scores) / len(own_scores) / len(views)
    assert score_means.shape == (25, CLASSES + 1)
    assert box_means.shape == (25, CLASSES if len(detector.stages) == 1 else 1, 4)

    pairs: list[tuple[float, list[float], int]] = []
    for label in range(CLASSES):
        column = box_means[:, label if box_means.shape[1] > 1 else 0].tolist()
        candidates = [(s, box) for s, box in zip(score_means[:, label].tolist(), column, strict=True) if s > 1e-4]
        pairs += [(score, box, label) for score, box in best_first(candidates, 0.5)]
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:40]

    labels = torch.tensor([label for _, _, label in pairs])
    masks: Any = 0
    ious: Any = 0
    for h, w, mirrored, _, features in views:
        rois = torch.tensor([into_view(box, h, w, mirrored) for _, box, _ in pairs])
        seen = features.pool(detector.mask_pooler)(rois)
        own_masks = detector.stages[-1].mask_head(seen, labels).sigmoid()
        if detector.mask_iou is not None:
            own_ious = [min(max(iou, 0.0), 1.0) for iou in detector.mask_iou(seen, own_masks, labels).tolist()]
            ious = ious + np.array(own_ious) / len(views)
        turned = own_masks.numpy()[:, :, ::-1] if mirrored else own_masks.numpy()
        masks = masks + turned.astype(np.float64) / len(views)
    scores = torch.tensor([score for score, _, _ in pairs], dtype=torch.float64)
    return RawDetections(
        image_hw=(height, width),
        boxes=torch.tensor([box for _, box, _ in pairs], dtype=torch.float64),
        scores=scores,
        labels=labels,
        masks=torch.from_numpy(masks),
        mask_scores=None if detector.mask_iou is None else scores * torch.from_numpy(ious),
    )


def best_first(found: list[tuple[float, list[float]]], iou: float) -> list[tuple[float, list[float]]]:
    """Greedy NMS."""
    kept: list[tuple[float, list[float]]] = []
    for score, box in sorted(found, key=lambda own: -own[0]):
        if all(overlap(box, other) <= iou for _, other in kept):
            kept.append((score, box))
    return kept


def overlap(one: list[float], other: list[float]) -> float:
    shared_w = max(min(one[2], other[2]) - max(one[0], other[0]), 0.0)
    shared_h = max(min(one[3], other[3]) - max(one[1], other[1]), 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - shared_w * shared_h
    return shared_w * shared_h / union if union > 0 else 0.0


@torch.no_grad()
def proposals_of(detector: Detector, batch: Batch) -> list[tuple[float, list[float]]]:
    found = detector.rpn.propose(
        detector.rpn(detector.extract_features(batch).pyramid), batch.image_sizes, training=detector.rpn.training
    )
    return list(zip(found.scores[found.valid].tolist(), found.boxes[found.valid].tolist(), strict=True))


@torch.no_grad()
def test_the_merge_is_its_definition(detector: Detector) -> None:
    ours, expected = detect_views(detector, PICTURE, VIEWS), by_definition(detector, PICTURE, EDGES)
    assert ours.image_hw == (61, 83)
    assert len(ours) == len(expected) > 20
    assert ours.labels.tolist() == expected.labels.tolist()
    assert len(set(ours.labels.tolist())) > 2
    compare(ours, expected, rtol=1e-4, atol=1e-4)
    assert (ours.mask_scores is None) == (detector.mask_iou is None)
    plain = detect_views(detector, PICTURE, VIEWS[:1])
    assert len(plain) != len(ours) or not torch.allclose(plain.scores, ours.scores, rtol=0.01)


def compare(ours: RawDetections, expected: RawDetections, *, rtol: float, atol: float) -> None:
    assert ours.boxes.dtype == ours.scores.dtype == ours.masks.dtype == torch.float32
    for field in ("boxes", "scores", "masks", "mask_scores"):
        one, other = getattr(ours, field), getattr(expected, field)
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------------------------------
# What must not change


def test_one_plain_view_is_plain_detection(detector: Detector) -> None:
    """Of a size that has another ratio in each axis; scores and masks are the same to the bit."""
    view = View(97, mirrored=False)
    batch = batch_of(PICTURE, fit_transform(97, 97), 32)
    assert batch.image_sizes.tolist() == [[71, 97]]
    proposals = proposals_of(detector, batch)
    assert len(best_first(proposals, 0.7)) < len(proposals)  # NMS over all levels at once would drop some
    expected = detector.detect(batch)[0]
    with calls(detector.backbone) as passes:
        ours = detect_views(detector, PICTURE, [view])
    assert len(passes) == 1
    assert 20 < len(ours) <= 40
    for field in ("scores", "labels", "masks"):
        assert torch.equal(getattr(ours, field), getattr(expected, field)), field
    assert (ours.mask_scores is None) == (expected.mask_scores is None) == (detector.mask_iou is None)
    assert ours.mask_scores is None or torch.equal(ours.mask_scores, expected.mask_scores)
    # In `detect` the ratio is rounded to float32 before it is applied, here only the result is.
    torch.testing.assert_close(ours.boxes, expected.boxes, rtol=3e-7, atol=1e-7)


def test_a_mirrored_view_is_the_view_of_a_mirrored_picture(detector: Detector) -> None:
    """To the bit but for the boxes, which are subtracted from the width and then rounded to float32."""
    ours = detect_views(detector, PICTURE, [View(97, mirrored=True)])
    expected = detect_views(detector, mirror(PICTURE), [View(97, mirrored=False)])
    assert 20 < len(ours) <= 40
    assert torch.equal(ours.scores, expected.scores)
    assert torch.equal(ours.labels, expected.labels)
    assert torch.equal(ours.masks, expected.masks.flip(-1))
    assert ours.mask_scores is None or torch.equal(ours.mask_scores, expected.mask_scores)
    x1, y1, x2, y2 = expected.boxes.double().T
    torch.testing.assert_close(ours.boxes.double(), torch.stack([83 - x2, y1, 83 - x1, y2], 1), rtol=0, atol=1e-5)


def test_all_views_of_a_mirrored_picture_give_the_mirrored_detections(detector: Detector) -> None:
    """The same views in another order, so sums are rounded differently."""
    ours = detect_views(detector, PICTURE, VIEWS)
    other = detect_views(detector, mirror(PICTURE), VIEWS)
    assert torch.equal(ours.labels, other.labels)
    torch.testing.assert_close(ours.scores, other.scores, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.masks, other.masks.flip(-1), rtol=1e-5, atol=1e-6)
    x1, y1, x2, y2 = other.boxes.T
    torch.testing.assert_close(ours.boxes, torch.stack([83 - x2, y1, 83 - x1, y2], 1), rtol=0, atol=1e-4)


def test_the_same_view_three_times_is_the_view() -> None:
    """If no two of its proposals overlap by more than the pool's NMS allows, whatever their levels."""
    detector = detector_of(*WHOLE)
    view = View(64, mirrored=True)
    batch = batch_of(PICTURE, view.transform, 32)
    apart = torch.tensor([box for _, box in best_first(proposals_of(detector, batch), 0.7)])
    assert 5 < len(apart) < len(proposals_of(detector, batch))
    few = Proposals(
        boxes=apart.unsqueeze(0),
        scores=torch.linspace(1, 0, len(apart)).unsqueeze(0),
        valid=torch.ones(1, len(apart), dtype=torch.bool),
    )
    detector.rpn.propose = lambda _output, _image_sizes, **_: few
    once, repeated = (detect_views(detector, PICTURE, [view] * many) for many in (1, 3))
    assert torch.equal(repeated.labels, once.labels)
    compare(repeated, once, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(32, 150), st.sampled_from([32, 64]))
@example(61, 89, 127, 32)  # here it makes a difference whether an image is mirrored before it is resized or after
def test_pixels_of_views(height: int, width: int, edge: int, divisor: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    plain, mirrored = (batch_of(picture, View(edge, side).transform, divisor) for side in (False, True))
    theirs = [batch_of(mirror(picture), View(edge, side).transform, divisor) for side in (True, False)]
    for ours, other in zip((plain, mirrored), theirs, strict=True):
        assert torch.equal(ours.images, other.images)
        assert torch.equal(ours.image_sizes, other.image_sizes)
        assert ours.original_sizes.tolist() == [[height, width]]
        h, w = ours.image_sizes[0].tolist()
        assert max(h, w) == edge
        assert abs(min(h, w) - max(min(height, width) * edge / max(height, width), 1)) <= 0.5
        assert [side % divisor for side in ours.images.shape[2:]] == [0, 0]
        assert not ours.images[:, :, h:].any()
        assert not ours.images[:, :, :, w:].any()
        assert not ours.valid.any()
    resized = cv2.resize(picture, plain.image_sizes[0].tolist()[::-1], interpolation=cv2.INTER_LINEAR)
    h, w = plain.image_sizes[0].tolist()
    assert np.array_equal(plain.images[0, :, :h, :w].permute(1, 2, 0).numpy(), resized)


# ---------------------------------------------------------------------------------------------------------
# Boxes on their way between view and picture


class Parrot:
    """A detector that proposes given boxes, remembers the RoIs that it is asked about and hands them back."""

    def __init__(self, boxes: Tensor, mirrored: bool, hw: tuple[int, int], picture_hw: tuple[int, int]) -> None:
        many = len(boxes)
        shown = Proposals(
            boxes=boxes.unsqueeze(0), scores=torch.ones(1, many), valid=torch.ones(1, many, dtype=torch.bool)
        )
        self.rpn = lambda _pyramid: None
        self.rpn.propose = lambda _output, _hws, **_: shown  # type: ignore[attr-defined]
        batch: Any = SimpleNamespace(image_sizes=torch.tensor([hw]), original_sizes=torch.tensor([picture_hw]))
        own: Any = self
        self.view = ViewFeatures(own, batch, mirrored)

    def extract_features(self, batch: Batch) -> Any:
        return SimpleNamespace(pyramid=[])

    def predict_boxes(self, features: Any, rois: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        self.rois = rois
        return rois[:, None, 1:], rois[:, :1]


@pytest.mark.parametrize(
    ("mirrored", "expected"),
    [(False, [[0, 0, 20, 10], [70, 20, 100, 60]]), (True, [[80, 0, 100, 10], [0, 20, 30, 60]])],
)
def test_boxes_by_hand(mirrored: bool, expected: list[list[float]]) -> None:
    """A view half as large, 50 pixels wide, whatever is padded to its right."""
    boxes = torch.tensor([[0.0, 0, 10, 5], [35, 10, 50, 30]])
    parrot = Parrot(boxes, mirrored, (30, 50), (60, 100))
    found, _ = parrot.view.proposals()
    assert found.tolist() == expected
    laid_back, _ = parrot.view.predict_boxes(found)
    assert parrot.rois.tolist() == [[0, *box] for box in boxes.tolist()]
    assert laid_back.tolist() == [[box] for box in expected]


sides = st.integers(1, 3000)
shares = st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), max_size=8)


@given(sides, sides, sides, sides, shares, st.booleans())
def test_there_and_back_a_box_is_the_same(
    h: int, w: int, height: int, width: int, boxes: list[tuple[float, ...]], mirrored: bool
) -> None:
    """To the bit, if it is not nearer than a thousandth of a pixel to the left or upper edge without touching it."""
    corners = torch.tensor(boxes).view(-1, 2, 2).sort(dim=1).values * torch.tensor([w, h])
    inside = torch.where(corners < 1e-3, 0.0, corners).minimum(torch.tensor([w, h])).flatten(1)
    parrot = Parrot(inside, mirrored, (h, w), (height, width))
    found, _ = parrot.view.proposals()
    assert found.dtype == torch.float64
    assert bool((found >= 0).all())
    assert bool((found <= torch.tensor([width, height, width, height])).all())
    assert bool((found[:, 2:] >= found[:, :2]).all())
    again, _ = parrot.view.predict_boxes(found)
    assert torch.equal(parrot.rois[:, 1:], inside)
    torch.testing.assert_close(again[:, 0], found)


def test_pool_by_hand() -> None:
    """Two views, three places; of the boxes at the first the second view has the better one."""
    one = torch.tensor([[0.0, 0, 10, 10], [50, 0, 60, 10]], dtype=torch.float64), torch.tensor([0.5, 0.4])
    other = torch.tensor([[0.0, 0, 10, 11], [0, 0, 10, 5.0]], dtype=torch.float64), torch.tensor([0.9, 0.8])
    assert pooled([one, other], 0.7, 10).tolist() == [[0, 0, 10, 11], [0, 0, 10, 5], [50, 0, 60, 10]]
    assert pooled([one, other], 0.95, 10).tolist()[2] == [0, 0, 10, 10]
    assert pooled([one, other], 0.7, 2).tolist() == [[0, 0, 10, 11], [0, 0, 10, 5]]
    nothing = torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0)
    assert torch.equal(pooled([one, nothing], 0.7, 10), one[0])
    assert pooled([nothing, nothing], 0.7, 10).shape == (0, 4)
    assert torch.equal(pooled([other], 0.1, 1), other[0])  # a single view's have had their NMS, and their limit


# ---------------------------------------------------------------------------------------------------------
# Nothing, next to nothing, and much


def test_without_proposals(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    none = Proposals(boxes=torch.zeros(1, 3, 4), scores=-torch.ones(1, 3), valid=torch.zeros(1, 3, dtype=torch.bool))
    monkeypatch.setattr(detector.rpn, "propose", lambda _output, _image_sizes, **_: none)
    require_empty(detect_views(detector, PICTURE, VIEWS), detector)
    require_empty(detect_views(detector, PICTURE, VIEWS[1:2]), detector)


def test_without_detections(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "score_threshold", 1.0)
    require_empty(detect_views(detector, PICTURE, VIEWS), detector)


def require_empty(found: RawDetections, detector: Detector) -> None:
    assert found.image_hw == (61, 83)
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
    assert found.masks.shape == (0, 28, 28)
    assert (found.mask_scores is None) == (detector.mask_iou is None)


def test_a_view_without_proposals_still_has_its_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that are not valid hold boxes all the same; they must not get into the pool."""
    detector = detector_of(*MASK_RCNN)
    propose = detector.rpn.propose
    widths: list[int] = []

    def only_of_the_small_one(output: Any, image_sizes: Tensor, *, training: bool) -> Proposals:
        own = propose(output, image_sizes, training=training)
        widths.append(int(image_sizes[0, 1]))
        small = torch.tensor(widths[-1] == 64)
        return Proposals(boxes=own.boxes, scores=own.scores, valid=own.valid & small)

    monkeypatch.setattr(detector.rpn, "propose", only_of_the_small_one)
    with calls(detector.stages[0].box_head.fc1) as heads:
        found = detect_views(detector, PICTURE, [View(64, mirrored=False), View(100, mirrored=False)])
    assert widths == [100, 64]
    assert len(heads) == 2  # both views judge
    assert {inputs[0].shape[0] for inputs, _ in heads} == {heads[0][0][0].shape[0]}
    assert 0 < heads[0][0][0].shape[0] <= 25
    assert 20 < len(found) <= 40


@pytest.mark.parametrize("hw", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_pictures_of_odd_shapes(detector: Detector, hw: tuple[int, int]) -> None:
    found = detect_views(detector, np.full((*hw, 3), 90, np.uint8), VIEWS)
    assert found.image_hw == hw
    assert bool(found.boxes.isfinite().all())
    assert bool((found.boxes >= 0).all())
    assert bool((found.boxes <= torch.tensor([hw[1], hw[0], hw[1], hw[0]])).all())


def test_a_diverged_model_finds_nothing() -> None:
    detector = detector_of(*MASK_RCNN)
    nn.init.constant_(detector.rpn.deltas.bias, math.nan)
    require_empty(detect_views(detector, PICTURE, VIEWS), detector)


def test_in_bfloat16(detector: Detector) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = detect_views(detector, PICTURE, VIEWS)
    assert 20 < len(found) <= 40
    assert found.boxes.dtype == found.scores.dtype == found.masks.dtype == torch.float32
    assert bool(found.masks.isfinite().all())
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)


@pytest.mark.parametrize("many", [1, 2, 3, 4])
def test_passes_and_what_is_kept_of_a_view(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """V views take 3·V - 2 passes, large ones first, and when one begins the maps of the one before are gone."""
    detector = detector_of(*WHOLE)
    seen, made = [], ViewFeatures.__init__
    alive: list[weakref.ref] = []

    def remember(self: ViewFeatures, *arguments: Any) -> None:
        assert not any(ref() is not None for ref in alive)
        made(self, *arguments)
        alive[:] = map(weakref.ref, self.features.pyramid)
        seen.append((int(self.image_sizes[0, 1]), self.mirrored))

    def forgotten(*_: Any) -> None:
        assert not any(ref() is not None for ref in alive)

    monkeypatch.setattr(ViewFeatures, "__init__", remember)
    hook = detector.backbone.register_forward_pre_hook(forgotten)
    with calls(detector.backbone) as passes:
        detect_views(detector, PICTURE, VIEWS[:many])
        passes_made = len(passes)
        passes.clear()
    hook.remove()
    assert passes_made == 3 * many - 2
    large_first = [(100, False), (100, True), (64, False), (64, True)]
    forth = [view for view in large_first if View(*view) in VIEWS[:many]]
    back = forth[::-1]
    assert seen == [*forth, *back[1:], *forth[1:]]


# ---------------------------------------------------------------------------------------------------------
# Recipe and command


def test_views_of_a_recipe() -> None:
    assert views_of(resolve("table1/seesaw")) == ()
    chosen = "test={tta: true, tta_long_edges: [100, 60], tta_flip: false}"
    assert views_of(resolve("table1/seesaw", [chosen])) == (View(100, mirrored=False), View(60, mirrored=False))
    row = views_of(resolve("table2/12-tta"))
    assert [view.long_edge for view in row] == [edge for edge in (1200, 1400, 1600, 1800, 2000) for _ in range(2)]
    assert [view.mirrored for view in row] == [False, True] * 5


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("demo-table2/12-tta", (120, 140, 160, 180, 200)),
        ("small/seesaw", (360, 420, 480, 540, 600)),  # 320 by at most 384
        ("own/fast", (800, 933, 1067, 1200, 1333)),  # 640 by at most 1066: a picture of 4 to 3 has 853
    ],
)
def test_sizes_of_views_follow_the_size_tested_at(name: str, edges: tuple[int, ...]) -> None:
    assert view_edges(resolve(name)) == edges


TINY = (
    "model.backbone={name: resnet18, frozen_stages: -1, pretrained: false, options: {channels: [8, 16, 24, 32]}}",
    "model.neck.channels=16",
    "model.rpn={pre_nms_train: 50, pre_nms_test: 50, post_nms_train: 40, post_nms_test: 20}",
    "model.box_head={width: 32, rois: 32, max_positive: 8}",
    "model.mask_head={channels: 8, convs: 1}",
    "data={batch_per_device: 2, workers: 0, short_edges: [64], test_short_edge: 64, long_edge: 64, mask_grid: 28}",
    "optimizer={name: adamw, lr: 0.001, weight_decay: 0.01, clip: 10}",
    "schedule={epochs: 1, milestones: []}",
    "test={tta: true, tta_long_edges: [48, 80], max_detections: 9}",
)
WITHOUT = ("--set", "test.tta=false")
VIEWS_OF_RUN = tuple(View(edge, mirrored) for edge in (48, 80) for mirrored in (False, True))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = SyntheticSettings(classes=4, train_images=6, val_images=3, size=64)
    return write_synthetic(tmp_path_factory.mktemp("set") / "data", made)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose recipe asks for test-time augmentation."""
    out = tmp_path_factory.mktemp("runs") / "tta"
    changes = [part for setting in TINY for part in ("--set", setting)]
    done = tailseg("train", "demo/seesaw", "--data", data, "--out", out, "--quiet", *changes)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def without_in_its_recipe(run: Path) -> Path:
    """The same model, of a recipe that does not ask for it."""
    read = load_model(run / "last.safetensors")
    recipe = read.recipe.model_copy(update={"test": read.recipe.test.model_copy(update={"tta": False})})
    detector = build_detector(recipe, len(read.categories))
    detector.load_state_dict(read.state)
    save_model(run / "plain.safetensors", detector, recipe, read.categories, step=0)
    return run / "plain.safetensors"


def tailseg(*arguments: object) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def detections(model: Path, data: Path, out: Path, *more: str) -> list[bytes]:
    done = tailseg("eval", model, "--data", data, "--out", out, "--quiet", *more)
    assert done.exit_code == 0, done.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(0 <= metrics[kind]["AP"] <= 1 for kind in ("bbox", "segm"))
    return sorted(map(orjson.dumps, orjson.loads((out / "detections.json").read_bytes())))


def test_training_evaluates_without_and_eval_with(
    run: Path, without_in_its_recipe: Path, data: Path, tmp_path: Path
) -> None:
    """What the recipe says, the flag and the setting are one."""
    model = run / "last.safetensors"
    in_training = sorted(map(orjson.dumps, orjson.loads((run / "detections.json").read_bytes())))
    assert detections(model, data, tmp_path / "without", *WITHOUT) == in_training
    averaged = detections(model, data, tmp_path / "with")
    assert len(averaged) > 0
    assert averaged != in_training
    assert detections(without_in_its_recipe, data, tmp_path / "flag", "--tta") == averaged
    assert detections(without_in_its_recipe, data, tmp_path / "set", "--set", "test.tta=true") == averaged
    assert detections(without_in_its_recipe, data, tmp_path / "plain") == in_training
    smaller = ("--set", "test.tta_long_edges=[48]", "--set", "test.tta_flip=false")
    one_view = detections(model, data, tmp_path / "one", *smaller)
    plain_sizes = ("--set", "data.test_short_edge=48", "--set", "data.long_edge=48")
    assert len(one_view) == len(detections(model, data, tmp_path / "small", *WITHOUT, *plain_sizes))
    assert one_view not in (averaged, in_training)


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_and_predict_agree(run: Path, data: Path, tmp_path: Path, workers: int) -> None:
    model = run / "last.safetensors"
    rows = [json.loads(row) for row in detections(model, data, tmp_path / "eval", "--set", f"data.workers={workers}")]
    content = orjson.loads((data / "val.json").read_bytes())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    paths = [data / "images" / name for name in names.values()]
    done = tailseg("predict", model, *paths, "--out", tmp_path / "predict", "--score", "0", "--quiet")
    assert done.exit_code == 0, done.output
    for image_id, name in names.items():
        own = [row for row in rows if row["image_id"] == image_id]
        written = json.loads((tmp_path / "predict" / name).with_suffix(".json").read_text())["detections"]
        assert len(own) == len(written) > 0
        for key in ("category_id", "segmentation", "score"):
            assert sorted(str(row[key]) for row in own) == sorted(
                str(row[key] if key != "score" else np.float32(row[key])) for row in written
            )


def test_predict_with_the_flag_and_settings(run: Path, without_in_its_recipe: Path, data: Path, tmp_path: Path) -> None:
    image = next((data / "images").iterdir())

    def scores(model: Path, out: str, *more: str) -> list[float]:
        done = tailseg("predict", model, image, "--out", tmp_path / out, "--score", "0", "--quiet", *more)
        assert done.exit_code == 0, done.output
        content = json.loads((tmp_path / out / image.name).with_suffix(".json").read_text())
        return [row["score"] for row in content["detections"]]

    averaged = scores(run / "last.safetensors", "recipe")
    plain = scores(without_in_its_recipe, "plain")
    assert averaged != plain
    assert scores(without_in_its_recipe, "flag", "--tta") == averaged
    assert scores(without_in_its_recipe, "set", "--set", "test.tta=true") == averaged
    assert scores(run / "last.safetensors", "without", *WITHOUT) == plain
    other = scores(without_in_its_recipe, "other", "--tta", "--set", "test.tta_long_edges=[56]")
    assert other not in (averaged, plain)
    assert scores(without_in_its_recipe, "even", "--tta", "--set", "test.tta_long_edges=[64]", "--set",
                  "test.tta_flip=false") == plain  # fmt: skip
    model = load(run / "last.safetensors", "cpu")
    assert model.predict(image).scores.tolist() == averaged
    expected = detect_views(model.detector, np.array(PillowImage.open(image).convert("RGB")), VIEWS_OF_RUN)
    assert expected.scores.tolist() == averaged


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("test.tta_long_edges=[48, 5]", "test.tta_long_edges.1: input should be greater than or equal to 32"),
        ("test.tta_long_edges=[]", "test.tta_long_edges: tuple should have at least 1 item"),
        ("test.tta_long_edges=1200", "test.tta_long_edges: input should be a valid tuple"),
        ("test.tta_flip=perhaps", "test.tta_flip: input should be a valid boolean"),
        ("test.tta_edges=[48]", "unknown key 'test.tta_edges'; the nearest valid key is 'test.tta_long_edges'"),
        ("model.neck.channels=8", "a trained model allows test., "),
    ],
)
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_faulty_settings(
    command: str, setting: str, sentence: str, run: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rest = ["--data", data] if command == "eval" else [next((data / "images").iterdir())]
    arguments = [command, run / "last.safetensors", *rest, "--out", tmp_path / "out", "--tta", "--set", setting]
    monkeypatch.setattr(sys, "argv", ["tailseg", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tailseg: --set ")
    assert sentence in line
    assert not (tmp_path / "out").exists()


def test_a_pyramid_grid_gets_images_that_halve_to_the_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 pixels in training's evaluation and in the plain one, 48 and 80 in the views, padded to multiples of 64."""
    shapes: list[tuple[int, ...]] = []
    forward = Backbone.forward

    def recorded(self: Backbone, images: Tensor) -> Any:
        if not self.training:
            shapes.append(tuple(images.shape))
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", recorded)
    grid = ("model.neck.kind=fpg", "model.neck.pathways=2", "data.test_short_edge=96", "data.long_edge=96")
    changes = [part for setting in (*TINY, *grid) for part in ("--set", setting)]
    done = tailseg("train", "demo/seesaw", "--data", data, "--out", tmp_path / "run", "--quiet", *changes)
    assert done.exit_code == 0, done.output
    assert shapes == [(2, 3, 128, 128), (1, 3, 128, 128)]
    shapes.clear()
    detections(tmp_path / "run" / "last.safetensors", data, tmp_path / "plain", *WITHOUT)
    assert shapes == [(2, 3, 128, 128), (1, 3, 128, 128)]
    shapes.clear()
    detections(tmp_path / "run" / "last.safetensors", data, tmp_path / "views")
    assert set(shapes) == {(1, 3, 64, 64), (1, 3, 128, 128)}
    assert len(shapes) == 3 * 10


def test_an_image_that_cannot_be_read(run: Path, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    sound = next((data / "images").iterdir())
    done = tailseg("predict", run / "last.safetensors", broken, sound, "--out", tmp_path / "out", "--tta", "--quiet")
    assert done.exit_code == 1
    assert done.output.startswith("1 picture, ")
    assert "1 not readable" in done.output
    assert str(broken) in str(done.exception)
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == [sound.stem] * 2
