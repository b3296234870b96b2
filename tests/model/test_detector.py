"""The whole detector: what holds for any small one, and a cascade against its parts put together by hand."""

import math
from functools import partial

import pytest
import torch
from tiny import made
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms

from tailseg.losses import CrossEntropyClassification, SeesawClassification
from tailseg.model import detector as detector_module
from tailseg.model import roi_features
from tailseg.model.backbone import Backbone
from tailseg.model.box_head import BoxHead, BoxPrediction, RoISampler
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector, Stage
from tailseg.model.fpn import FPN
from tailseg.model.mask_head import MaskHead
from tailseg.model.matching import Matcher
from tailseg.model.roi_features import ImageFeatures
from tailseg.model.rpn import RPN
from tailseg.recipes.resolve import resolve
from tailseg.structures import Batch, Proposals, RawDetections

LOSS_NAMES = {
    "loss_rpn_cls": "rpn_objectness",
    "loss_rpn_bbox": "rpn_box",
    "loss_cls_classes": "classes",
    "loss_cls_objectness": "objectness",
    "loss_bbox": "box",
    "loss_mask": "mask",
}


def assemble(
    backbone: Backbone, classes: int, channels: int, width: int, stages: int = 1, **options: object
) -> Detector:
    matcher = Matcher(positive_iou=0.5, negative_iou=0.5, low_quality_iou=0.5)
    return made(
        Detector,
        backbone,
        made(FPN, backbone.channels, channels),
        made(RPN, channels, **options),
        [
            made(
                Stage,
                made(RoISampler, matcher, classes),
                made(
                    BoxHead,
                    channels,
                    SeesawClassification(classes, p=0.8, q=2.0),
                    width=width,
                    normalized=True,
                    class_agnostic=stages > 1,
                ),
                made(MaskHead, channels, classes, channels=channels),
                weight=0.5**t,
                mask_weight=0.5**t,
            )
            for t in range(stages)
        ],
    )


def batch_of(images: list[Tensor], sizes: list[tuple[int, int]], **truth: Tensor) -> Batch:
    """Images (3, h, w) uint8, padded to ``sizes``' common multiple of 32; no objects unless given."""
    height, width = (math.ceil(max(i.shape[d] for i in images) / 32) * 32 for d in (1, 2))
    n = len(images)
    empty = {
        "boxes": torch.zeros(n, 1, 4),
        "labels": torch.zeros(n, 1, dtype=torch.int64),
        "valid": torch.zeros(n, 1, dtype=torch.bool),
        "masks": torch.zeros(n, 1, 8, 8, dtype=torch.uint8),
        "mask_frames": torch.zeros(n, 1, 4),
        "absent": torch.zeros(n, 0, dtype=torch.bool),
        "ignored": torch.zeros(n, 0, 0, dtype=torch.uint8),
    }
    return Batch(
        images=torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]),
        image_sizes=torch.tensor([i.shape[1:] for i in images]),
        original_sizes=torch.tensor(sizes),
        image_ids=torch.arange(n),
        **(empty | truth),
    )


def small_detector(seed: int = 0, classes: int = 5, **options: object) -> Detector:
    torch.manual_seed(seed)
    backbone = made(Backbone, "resnet18", options={"channels": (8, 16, 24, 32)})
    limits = {"pre_nms_train": 60, "pre_nms_test": 40, "post_nms_train": 50, "post_nms_test": 30}
    return assemble(backbone, classes, channels=16, width=24, **(limits | options))


def small_batch(objects: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(1)
    sizes = [(64, 90), (50, 96)]
    images = [torch.randint(0, 256, (3, *hw), generator=generator, dtype=torch.uint8) for hw in sizes]
    if not objects:
        return batch_of(images, [(128, 180), (50, 96)])
    boxes = torch.tensor([[[5.0, 6, 40, 50], [30, 20, 80, 60]], [[0.0, 0, 60, 49], [0, 0, 0, 0]]])
    masks = torch.zeros(2, 2, 10, 10, dtype=torch.uint8)
    masks[:, :, 2:8, 2:8] = 255
    return batch_of(
        images,
        [(128, 180), (50, 96)],
        boxes=boxes,
        labels=torch.tensor([[0, 3], [4, 0]]),
        valid=torch.tensor([[True, True], [True, False]]),
        masks=masks,
        mask_frames=boxes,
    )


@pytest.mark.parametrize("objects", [True, False])
def test_gradients_are_finite_and_reach_everything_that_is_trained(objects):
    detector = small_detector().train()
    losses = detector(small_batch(objects))
    assert losses.keys() == set(LOSS_NAMES.values())
    assert all(torch.isfinite(value) and value.dim() == 0 for value in losses.values())
    if not objects:
        assert all(losses[name].item() == 0 for name in ("rpn_box", "classes", "box", "mask"))
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        frozen = name.startswith(("backbone.net.conv1", "backbone.net.bn1", "backbone.net.layer1"))
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) == frozen, name
        assert frozen or torch.isfinite(parameter.grad).all(), name
        # At first a residual branch ends in a scale of 0, so little of the backbone gets a gradient yet.
        if objects and (name.startswith(("neck", "rpn", "stages")) or "layer2.0.bn2" in name):
            assert (parameter.grad != 0).any(), name


def test_batch_norm_and_frozen_stages_do_not_move():
    detector = small_detector().train()
    before = {name: value.clone() for name, value in detector.backbone.named_buffers()}
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.1)
    frozen = {name: p.clone() for name, p in detector.named_parameters() if not p.requires_grad}
    sum(detector(small_batch()).values()).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in detector.backbone.named_buffers())
    assert frozen
    assert all(torch.equal(dict(detector.named_parameters())[name], value) for name, value in frozen.items())
    assert not detector.backbone.net["layer1"].training
    assert detector.training


def test_a_seed_decides_the_losses():
    def losses(seed: int) -> list[float]:
        detector = small_detector().train()
        detector.stages[0].sampler.num_samples, detector.stages[0].sampler.max_positive = 12, 3
        torch.manual_seed(seed)
        return [value.item() for value in detector(small_batch()).values()]

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


def test_the_form_for_devices_needs_no_objects(monkeypatch):
    monkeypatch.setattr(detector_module, "rows_to_compute", lambda valid: torch.arange(valid.numel()))
    detector = small_detector().train()
    losses = detector(small_batch(objects=False))
    assert losses["mask"].item() == 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


def test_padding_does_not_change_an_images_pixels():
    detector = small_detector()
    image = small_batch().images[:1, :, :64, :90]
    alone = detector.normalized(image, torch.tensor([[64, 90]]))
    for height, width in ((64, 96), (128, 160)):
        padded = F.pad(image, (0, width - 90, 0, height - 64), value=77)
        ours = detector.normalized(padded, torch.tensor([[64, 90]]))
        assert torch.equal(ours[:, :, :64, :90], alone)
        assert ours[:, :, 64:].abs().sum() == 0
        assert ours[:, :, :, 90:].abs().sum() == 0
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    for channel in range(3):
        expected = (image[0, channel].double() - mean[channel]) / std[channel]
        torch.testing.assert_close(alone[0, channel].double(), expected, rtol=1e-5, atol=1e-6)


def assert_sound(found: RawDetections, limit: int) -> None:
    height, width = found.image_hw
    assert len(found) <= limit
    assert (found.scores.diff() <= 0).all()
    assert (found.scores > 1e-4).all()
    assert ((found.labels >= 0) & (found.labels < 5)).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()
    assert found.masks.shape[1:] == (28, 28)
    assert ((found.masks >= 0) & (found.masks <= 1)).all()


@pytest.mark.parametrize("limit", [300, 4])
def test_detections_of_an_untrained_model(limit):
    detector = small_detector(post_nms_test=200, pre_nms_test=200).eval()
    detector.max_detections = limit
    batch = small_batch()
    found = detector.detect(batch)
    assert [f.image_hw for f in found] == [(128, 180), (50, 96)]  # of the image files
    for detections in found:
        assert_sound(detections, limit)
    assert limit > 100 or [len(f) for f in found] == [limit, limit]
    again = detector.detect(batch)
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(found, again, strict=True))


def test_detections_of_a_black_image():
    detector = small_detector().eval()
    (found,) = detector.detect(batch_of([torch.zeros(3, 64, 96, dtype=torch.uint8)], [(64, 96)]))
    assert_sound(found, 300)


def test_no_detection_is_a_normal_case():
    detector = small_detector().eval()
    detector.score_threshold = 2.0
    found = detector.detect(small_batch())
    assert [len(f) for f in found] == [0, 0]
    assert found[0].masks.shape == (0, 28, 28)


@pytest.mark.parametrize("form", ["cpu", "device"])
def test_unused_proposals_give_no_detections(form, monkeypatch):
    if form == "device":
        monkeypatch.setattr(detector_module, "rows_to_compute", lambda valid: torch.arange(valid.numel()))
    detector = small_detector().eval()
    detector.score_threshold = 0.0
    boxes = torch.tensor([[0.0, 0, 30, 40], [50, 20, 90, 60]]).repeat(2, 1, 1)
    valid = torch.tensor([[True, False], [False, False]])
    proposals = Proposals(boxes=boxes, scores=torch.ones(2, 2), valid=valid)
    monkeypatch.setattr(detector.rpn, "propose", lambda output, image_sizes, **_: proposals)
    found = detector.detect(small_batch())
    assert [len(f) for f in found] == [5, 0]  # a box for every class
    assert found[0].boxes[:, 0].max() < 60  # image files are twice as large; the unused box starts at 100


def test_the_form_for_devices_gives_the_same_detections(monkeypatch):
    expected = small_detector().eval().detect(small_batch())
    monkeypatch.setattr(detector_module, "rows_to_compute", lambda valid: torch.arange(valid.numel()))
    for ours, theirs in zip(small_detector().eval().detect(small_batch()), expected, strict=True):
        assert len(ours) > 0
        assert torch.equal(ours.labels, theirs.labels)
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-6)


def test_boxes_are_in_pixels_of_the_image_file():
    detector = small_detector().eval()
    batch = small_batch()
    plain = batch_of([batch.images[0, :, :64, :90]], [(64, 90)])
    larger = batch_of([batch.images[0, :, :64, :90]], [(128, 270)])
    (one,), (other,) = detector.detect(plain), detector.detect(larger)
    torch.testing.assert_close(other.boxes, one.boxes * torch.tensor([3.0, 2.0, 3.0, 2.0]))
    assert torch.equal(one.masks, other.masks)


def test_neighbours_in_a_batch_do_not_change_detections():
    detector = small_detector().eval()
    batch = small_batch()
    together = detector.detect(batch)[1]
    alone = batch_of([F.pad(batch.images[1, :, :50, :96], (0, 0, 0, 14))], [(64, 96)])
    alone = detector.detect(
        Batch(**{
            name: getattr(alone, name)
            for name in ("images", "image_ids", "boxes", "labels", "valid", "masks", "mask_frames", "absent", "ignored")
        }, image_sizes=torch.tensor([[50, 96]]), original_sizes=torch.tensor([[50, 96]]))
    )[0]  # fmt: skip
    torch.testing.assert_close(together.boxes, alone.boxes, rtol=1e-4, atol=1e-3)
    assert torch.equal(together.labels, alone.labels)


STAGE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
STAGE_LOSSES = ("classes", "objectness", "box", "mask")


def cascade(seed: int = 0, **options: object) -> Detector:
    """Three stages that move boxes by a good part of their size, each with deltas of its own scale."""
    detector = small_detector(seed, stages=3, **options)
    for stage, stds in zip(detector.stages, STAGE_STDS, strict=True):
        stage.box_head.stds = stds
        torch.nn.init.normal_(stage.box_head.regressor.weight, std=1.0)
        torch.nn.init.normal_(stage.box_head.regressor.bias, std=3.0)
        torch.nn.init.normal_(stage.mask_head.predictor.weight, std=1.0)
    return detector


def moved(box: list[float], deltas: list[float], stds: tuple[float, ...], hw: tuple[int, int]) -> list[float]:
    """A box moved by deltas and cut to its image of size ``hw``, a number at a time."""
    x1, y1, x2, y2 = box
    dx, dy, dw, dh = (d * s for d, s in zip(deltas, stds, strict=True))
    limit = math.log(1000 / 16)
    w, h = ((x2 - x1) * math.exp(min(max(dw, -limit), limit)), (y2 - y1) * math.exp(min(max(dh, -limit), limit)))
    x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
    corners = ((x - w / 2, hw[1]), (y - h / 2, hw[0]), (x + w / 2, hw[1]), (y + h / 2, hw[0]))
    return [min(max(value, 0.0), limit) for value, limit in corners]


def all_moved(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...], hw: tuple[int, int]) -> Tensor:
    pairs = zip(boxes.double().tolist(), deltas.double().tolist(), strict=True)
    return torch.tensor([moved(box, delta, stds, hw) for box, delta in pairs]).view(-1, 4)


class TestCascade:
    """Three stages."""

    @pytest.mark.parametrize("objects", [True, False])
    def test_gradients_are_finite_and_reach_every_stage(self, objects):
        detector = cascade().train()
        losses = detector(small_batch(objects))
        names = {f"stage{t}.{name}" for t in (1, 2, 3) for name in STAGE_LOSSES}
        assert losses.keys() == {"rpn_objectness", "rpn_box"} | names
        assert all(torch.isfinite(value) and value.dim() == 0 for value in losses.values())
        if not objects:
            zero = [name for name in losses if name.endswith(("box", "classes", "mask"))]
            assert len(zero) == 10
            assert all(losses[name].item() == 0 for name in zero)
            assert all(losses[f"stage{t}.objectness"].item() > 0 for t in (1, 2, 3))
        sum(losses.values()).backward()
        for name, parameter in detector.named_parameters():
            if parameter.requires_grad:
                assert torch.isfinite(parameter.grad).all(), name
                if objects and name.startswith(("neck", "rpn", "stages")):
                    assert (parameter.grad != 0).any(), name

    def test_a_stage_is_not_taught_by_the_next(self):
        """Boxes are handed on as numbers: a stage's losses train that stage's heads alone, and what lies below."""
        detector = cascade().train()
        losses = detector(small_batch())
        groups = {t: list(stage.parameters()) for t, stage in enumerate(detector.stages, start=1)}
        for t in groups:
            own = sum(losses[f"stage{t}.{name}"] for name in STAGE_LOSSES)
            for other, parameters in groups.items():
                found = torch.autograd.grad(own, parameters, retain_graph=True, allow_unused=True)
                assert all((gradient is not None) == (other == t) for gradient in found)
            neck = torch.autograd.grad(own, list(detector.neck.parameters()), retain_graph=True, allow_unused=True)
            assert any(gradient is not None and (gradient != 0).any() for gradient in neck)
            below = torch.autograd.grad(own, list(detector.rpn.parameters()), retain_graph=True, allow_unused=True)
            assert all(gradient is None for gradient in below)

    def test_weights_of_the_stages(self):
        def losses(*weights: tuple[float, float]) -> dict[str, float]:
            detector = cascade().train()
            for stage, (weight, mask_weight) in zip(detector.stages, weights, strict=True):
                stage.weight, stage.mask_weight = weight, mask_weight
            torch.manual_seed(5)
            return {name: value.item() for name, value in detector(small_batch()).items()}

        plain = losses((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
        weighted = losses((1.0, 2.0), (0.5, 0.25), (3.0, 7.0))
        assert min(plain.values()) > 0
        factors = {name: weighted[name] / value for name, value in plain.items()}
        expected = {"rpn_objectness": 1.0, "rpn_box": 1.0}
        for t, (weight, mask_weight) in enumerate(((1.0, 2.0), (0.5, 0.25), (3.0, 7.0)), start=1):
            expected |= {f"stage{t}.{name}": mask_weight if name == "mask" else weight for name in STAGE_LOSSES}
        assert factors == pytest.approx(expected, rel=1e-5)

    def test_what_a_stage_hands_on(self):
        """Its RoIs, moved by its own deltas and cut to the image; ground-truth boxes are added again, not handed on."""
        detector = cascade().train()
        batch = small_batch()
        given, drawn, deltas = [], [], []
        for stage in detector.stages:
            stage.sampler.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0]))
            stage.sampler.register_forward_hook(lambda _module, _inputs, output: drawn.append(output))
            stage.box_head.register_forward_hook(lambda _module, _inputs, output: deltas.append(output.deltas))
        detector(batch)
        assert len(given) == len(drawn) == len(deltas) == 3
        first = given[0].valid.sum(1).tolist()
        outside = 0
        for t in (1, 2):
            proposals, before = given[t], drawn[t - 1]
            assert not proposals.boxes.requires_grad
            # All RoIs found a slot, so all proposals are still there, and nothing else is.
            assert proposals.valid.sum(1).tolist() == first
            slots = proposals.valid.shape[1]
            for image, hw in enumerate(((64, 90), (50, 96))):
                truth = batch.boxes[image][batch.valid[image]]
                rows = torch.arange(slots) + image * slots
                handed = proposals.valid[image]
                rois = before.rois[rows, 1:]
                is_truth = torch.tensor([any(torch.equal(roi, box) for box in truth) for roi in rois])
                assert torch.equal(handed, before.valid[rows] & ~is_truth)
                expected = all_moved(rois[handed], deltas[t - 1][rows][handed, 0], STAGE_STDS[t - 1], hw)
                ours = proposals.boxes[image][handed]
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
                outside += int((ours[:, 2] == hw[1]).sum() + (ours[:, 3] == hw[0]).sum())
                moves = (ours - rois[handed]).abs().amax(1)
                assert moves.median() > 1
        assert outside > 10  # some were cut

    def test_ground_truth_is_among_every_stages_rois(self):
        detector = cascade().train()
        drawn = []
        for stage in detector.stages:
            stage.sampler.register_forward_hook(lambda _module, _inputs, output: drawn.append(output))
        batch = small_batch()
        detector(batch)
        for targets in drawn:
            given = targets.is_ground_truth & targets.valid
            assert given.sum() == 3
            assert targets.positive[given].all()
            for image in range(2):
                own = given & (targets.rois[:, 0] == image)
                assert sorted(targets.rois[own, 1:].tolist()) == sorted(batch.boxes[image][batch.valid[image]].tolist())

    def test_refined_boxes_carry_no_gradient(self):
        detector = cascade().train()
        batch = small_batch()
        stage = detector.stages[0]
        boxes = torch.tensor([[0.0, 0, 30, 40], [50, 20, 90, 60]]).repeat(2, 1, 1)
        proposals = Proposals(boxes=boxes, scores=torch.ones(2, 2), valid=torch.tensor([[True, True], [True, False]]))
        targets = stage.sampler(proposals, batch.boxes, batch.labels, batch.valid)
        deltas = torch.zeros(len(targets.rois), 1, 4, requires_grad=True)
        none = torch.zeros(0)
        prediction = BoxPrediction(logits=none, deltas=deltas, boxes=targets.rois[:, 1:], class_features=none)
        refined = detector.refine_proposals(stage, prediction, targets, batch)
        assert not refined.boxes.requires_grad
        # No deltas: the proposals come back, cut to their images, and neither padding nor ground truth with them.
        assert refined.boxes[0][refined.valid[0]].sort(0).values.tolist() == [[0, 0, 30, 40], [50, 20, 90, 60]]
        assert refined.boxes[1][refined.valid[1]].tolist() == [[0, 0, 30, 40]]

    @pytest.mark.parametrize("with_masks", [(0, 1, 2), (0, 2)])
    def test_detections_by_hand(self, with_masks):
        """Boxes go from stage to stage; logits are averaged before they are scores, masks after they are."""
        detector = cascade(post_nms_test=25).eval()
        detector.max_detections = 40
        for t in range(3):
            if t not in with_masks:
                detector.stages[t].mask_head = None
        batch = small_batch()
        found = detector.detect(batch)
        with torch.no_grad():
            pyramid = detector.pyramid(batch.images, batch.image_sizes)
            proposals = detector.rpn.propose(detector.rpn(pyramid), batch.image_sizes, training=detector.rpn.training)
            for image, (hw, factor) in enumerate((((64, 90), 2.0), ((50, 96), 1.0))):
                boxes = proposals.boxes[image][proposals.valid[image]]
                logits = []
                for t, stage in enumerate(detector.stages):
                    rois = F.pad(boxes, (1, 0), value=image)
                    prediction = stage.box_head(partial(detector.box_pooler, pyramid), rois)
                    logits.append(prediction.logits.double())
                    boxes = all_moved(boxes, prediction.deltas[:, 0], STAGE_STDS[t], hw)
                mean = sum(logits) / 3
                objectness = mean[:, 5:].softmax(1)[:, 0]  # Seesaw: C classes, then foreground and background
                scores = mean[:, :5].softmax(1) * objectness[:, None]
                rows, labels = (scores > detector.score_threshold).nonzero().T
                kept = batched_nms(boxes[rows], scores[rows, labels].float(), labels, 0.5)[:40]
                rows, labels = rows[kept], labels[kept]
                rois = F.pad(boxes[rows], (1, 0), value=image)
                features = detector.mask_pooler(pyramid, rois)
                masks = [detector.stages[t].mask_head(features, labels).double().sigmoid() for t in with_masks]
                ours = found[image]
                assert len(ours) == 40
                torch.testing.assert_close(ours.scores.double(), scores[rows, labels], rtol=1e-4, atol=1e-6)
                assert torch.equal(ours.labels, labels)
                torch.testing.assert_close(ours.boxes, boxes[rows] * factor, rtol=1e-4, atol=1e-3)
                expected = sum(masks) / len(masks)
                torch.testing.assert_close(ours.masks.double(), expected, rtol=1e-3, atol=1e-3)
                # Other orders would give other numbers.
                assert (sum(own[:, :5].softmax(1) for own in logits) / 3 - mean[:, :5].softmax(1)).abs().max() > 1e-3
                assert (masks[0] - expected).abs().max() > 0.01

    def test_detections_lie_in_their_images(self):
        detector = cascade(post_nms_test=40).eval()
        for found in detector.detect(small_batch()):
            assert len(found) > 0
            assert_sound(found, 300)

    def test_no_proposal_is_a_normal_case(self, monkeypatch):
        detector = cascade().eval()
        none = Proposals(boxes=torch.zeros(2, 3, 4), scores=torch.zeros(2, 3), valid=torch.zeros(2, 3).bool())
        monkeypatch.setattr(detector.rpn, "propose", lambda output, image_sizes, **_: none)
        assert [len(found) for found in detector.detect(small_batch())] == [0, 0]
        losses = detector.train()(small_batch(objects=False))  # no RoI at all
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
        assert all(losses[f"stage{t}.{name}"].item() == 0 for t in (1, 2, 3) for name in STAGE_LOSSES)

    @pytest.mark.parametrize("objects", [True, False])
    def test_a_training_step_in_bf16(self, objects):
        plain = cascade().train()(small_batch(objects))
        detector = cascade().train()
        with torch.autocast("cpu", torch.bfloat16):
            losses = detector(small_batch(objects))
        assert all(value.dtype == torch.float32 for value in losses.values())
        assert losses.keys() == plain.keys()
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
        ours, theirs = sum(losses.values()).item(), sum(plain.values()).item()
        assert ours == pytest.approx(theirs, rel=0.05)

    def test_detections_in_bf16(self):
        detector = cascade().eval()
        with torch.autocast("cpu", torch.bfloat16):
            found = detector.detect(small_batch())
        for detections in found:
            assert_sound(detections, 300)
            assert detections.boxes.dtype == detections.scores.dtype == detections.masks.dtype == torch.float32

    def test_the_form_for_devices_gives_the_same_losses(self, monkeypatch):
        plain = cascade().train()(small_batch())
        monkeypatch.setattr(detector_module, "rows_to_compute", lambda valid: torch.arange(valid.numel()))
        detector = cascade().train()
        monkeypatch.setattr(roi_features, "pooled_by_table", lambda rois: False)
        for name, value in detector(small_batch()).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)


CASCADE = [
    "model.backbone={name: resnet18, pretrained: false, options: {channels: [8, 16, 24, 32]}}",
    "model.neck.channels=16",
    "model.rpn={pre_nms_train: 50, post_nms_train: 40, pre_nms_test: 30, post_nms_test: 20}",
    "model.box_head={class_agnostic: true, width: 24}",
    "model.mask_head={channels: 8, convs: 1}",
]


def test_a_stage_without_mask_weight_has_no_mask_head():
    stages = "model.stages=[{mask_weight: 0}, {iou: 0.6, weight: 0.5}, {iou: 0.7, mask_weight: 0, weight: 0.25}]"
    detector = build_detector(resolve("demo/seesaw", [*CASCADE, stages]), num_classes=5).train()
    assert [stage.mask_head is None for stage in detector.stages] == [True, False, True]
    assert {name.split(".")[1] for name in detector.state_dict() if ".mask_head." in name} == {"1"}
    losses = detector(small_batch())
    assert {name for name in losses if name.endswith("mask")} == {"stage2.mask"}
    assert len(losses) == 2 + 3 * 3 + 1
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert not parameter.requires_grad or torch.isfinite(parameter.grad).all(), name
    detector.eval()
    for found in detector.detect(small_batch()):
        assert len(found) > 0
        assert_sound(found, 300)
    # Its masks are those of the one head there is.
    with torch.no_grad():
        batch = small_batch()
        pyramid = detector.pyramid(batch.images, batch.image_sizes)
        rois, labels = torch.tensor([[0.0, 3, 4, 40, 50], [1, 0, 0, 30, 30]]), torch.tensor([1, 4])
        own = detector.stages[1].mask_head(detector.mask_pooler(pyramid, rois), labels).sigmoid()
        masks, ious = detector.predict_masks(ImageFeatures(pyramid), rois, labels)
        torch.testing.assert_close(masks, own)
        assert ious is None


def test_a_recipes_stages_reach_their_parts():
    stages = (
        "model.stages=[{weight: 2}, {iou: 0.6, stds: [0.05, 0.05, 0.1, 0.1], weight: 0.5, mask_weight: 3},"
        " {iou: 0.7, mask_weight: 0}]"
    )
    more = ["model.box_head.low_quality=false", "model.roi_pooling={sampling_ratio: 2, aligned: false}"]
    more += ["model.rpn.inside_image=true", "model.rpn.fitted_strides=true", "model.rpn.rounded_anchors=true"]
    more += ["model.mask_head.normalized=true", "model.mask_head.temperature=7", "test.min_size=0.5"]
    detector = build_detector(resolve("demo/seesaw", [*CASCADE, stages, *more]), num_classes=5)
    assert [(s.weight, s.mask_weight) for s in detector.stages] == [(2, 1), (0.5, 3), (1, 0)]
    matchers = [s.sampler.matcher for s in detector.stages]
    assert [(m.positive_iou, m.negative_iou, m.low_quality_iou) for m in matchers] == [
        (0.5, 0.5, None),
        (0.6, 0.6, None),
        (0.7, 0.7, None),
    ]
    assert [s.box_head.stds for s in detector.stages] == [STAGE_STDS[0], STAGE_STDS[1], STAGE_STDS[0]]
    for pooler in (detector.box_pooler, detector.mask_pooler):
        assert (pooler.sampling_ratio, pooler.aligned) == (2, False)
    assert (detector.rpn.inside_image, detector.rpn.fitted_strides) == (True, True)
    assert torch.equal(detector.rpn.base_anchors, detector.rpn.base_anchors.round())
    head = detector.stages[0].mask_head
    assert (head.normalized, head.temperature, detector.min_size) == (True, 7, 0.5)
    plain = build_detector(resolve("demo/seesaw", CASCADE), num_classes=5)
    assert plain.stages[0].sampler.matcher.low_quality_iou == 0.5
    assert plain.min_size is None


def test_small_boxes_are_no_detections(monkeypatch):
    """The bound is in pixels of the network's image, whatever the size of the file."""
    detector = small_detector(stages=2).eval()
    detector.score_threshold = 0.0
    for stage in detector.stages:
        torch.nn.init.zeros_(stage.box_head.regressor.weight)  # boxes stay where they are
    boxes = torch.tensor([[[0.0, 0, 30, 40], [50, 20, 55, 60], [10, 10, 60, 16]]]).repeat(2, 1, 1)
    proposals = Proposals(boxes=boxes, scores=torch.ones(2, 3), valid=torch.ones(2, 3).bool())
    monkeypatch.setattr(detector.rpn, "propose", lambda output, image_sizes, **_: proposals)
    counts = {}
    for size in (None, 0.0, 4.9, 5.0, 6.0, 40.0):
        detector.min_size = size
        counts[size] = [len(found) // 5 for found in detector.detect(small_batch())]  # 5 classes
    assert counts == {None: [3, 3], 0.0: [3, 3], 4.9: [3, 3], 5.0: [2, 2], 6.0: [1, 1], 40.0: [0, 0]}


def test_parameters_of_the_published_model():
    detector = build_detector(resolve("table1/seesaw"), num_classes=1203)
    assert sum(p.numel() for p in detector.parameters()) == 50_441_347
    assert detector.stages[0].box_head.classification.seesaw.counts.shape == (1203,)
    assert detector.stages[0].box_head.classifier.weight.shape == (1205, 1024)


def test_cross_entropy_fits_the_same_detector():
    detector = small_detector()
    detector.stages[0].box_head = made(BoxHead, 16, CrossEntropyClassification(5), width=24)
    losses = detector.train()(small_batch())
    assert losses.keys() == {"rpn_objectness", "rpn_box", "classes", "box", "mask"}
    assert losses["classes"].item() == pytest.approx(math.log(6), rel=0.1)
    (found, _) = detector.eval().detect(small_batch())
    assert_sound(found, 300)
