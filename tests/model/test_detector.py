"""The whole detector: a recorded test run and training step, and what holds for any small one."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses import CrossEntropyClassification, SeesawClassification
from tailseg.model import detector as detector_module
from tailseg.model.backbone import Backbone
from tailseg.model.box_head import BoxHead, RoISampler
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector, Stage
from tailseg.model.fpn import FPN
from tailseg.model.mask_head import MaskHead
from tailseg.model.matching import Matcher
from tailseg.model.rpn import RPN, Proposals
from tailseg.recipe import resolve
from tailseg.structures import Batch, Detections

CLASSES = 37

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
    return Detector(
        backbone,
        FPN(backbone.channels, channels),
        RPN(channels, **options),
        [
            Stage(
                RoISampler(matcher, classes),
                BoxHead(
                    channels,
                    SeesawClassification(classes, p=0.8, q=2.0),
                    width=width,
                    normalized=True,
                    class_agnostic=stages > 1,
                ),
                MaskHead(channels, classes, channels=channels),
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
    }
    return Batch(
        images=torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]),
        image_hws=torch.tensor([i.shape[1:] for i in images]),
        original_hws=torch.tensor(sizes),
        image_ids=torch.arange(n),
        **(empty | truth),
    )


def small_detector(seed: int = 0, classes: int = 5, **options: object) -> Detector:
    torch.manual_seed(seed)
    backbone = Backbone("resnet18", options={"channels": (8, 16, 24, 32)})
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
        detector.stages[0].sampler.slots, detector.stages[0].sampler.max_positive = 12, 3
        torch.manual_seed(seed)
        return [value.item() for value in detector(small_batch()).values()]

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


def test_the_form_for_devices_needs_no_objects(monkeypatch):
    monkeypatch.setattr(detector_module, "live_rows", lambda valid: torch.arange(valid.numel()))
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


def assert_sound(found: Detections, limit: int) -> None:
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


def test_unused_proposals_give_no_detections(monkeypatch):
    detector = small_detector().eval()
    detector.score_threshold = 0.0
    boxes = torch.tensor([[0.0, 0, 30, 40], [50, 20, 90, 60]]).repeat(2, 1, 1)
    valid = torch.tensor([[True, False], [False, False]])
    proposals = Proposals(boxes=boxes, scores=torch.ones(2, 2), valid=valid)
    monkeypatch.setattr(detector.rpn, "propose", lambda output, image_hws: proposals)
    found = detector.detect(small_batch())
    assert [len(f) for f in found] == [5, 0]  # a box for every class
    assert found[0].boxes[:, 0].max() < 60  # image files are twice as large; the unused box starts at 100


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
            for name in ("images", "image_ids", "boxes", "labels", "valid", "masks", "mask_frames")
        }, image_hws=torch.tensor([[50, 96]]), original_hws=torch.tensor([[50, 96]]))
    )[0]  # fmt: skip
    torch.testing.assert_close(together.boxes, alone.boxes, rtol=1e-4, atol=1e-3)
    assert torch.equal(together.labels, alone.labels)


def test_parameters_of_the_published_model():
    detector = build_detector(resolve("table1/seesaw"), num_classes=1203)
    assert sum(p.numel() for p in detector.parameters()) == 50_441_347
    assert detector.stages[0].box_head.classification.seesaw.counts.shape == (1203,)
    assert detector.stages[0].box_head.classifier.weight.shape == (1205, 1024)


def test_cross_entropy_fits_the_same_detector():
    detector = small_detector()
    detector.stages[0].box_head = BoxHead(16, CrossEntropyClassification(5), width=24)
    losses = detector.train()(small_batch())
    assert losses.keys() == {"rpn_objectness", "rpn_box", "classes", "box", "mask"}
    assert losses["classes"].item() == pytest.approx(math.log(6), rel=0.1)
    (found, _) = detector.eval().detect(small_batch())
    assert_sound(found, 300)
