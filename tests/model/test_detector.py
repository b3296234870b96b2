"""The whole detector: a recorded test run and training step, and what holds for any small one."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.losses import CrossEntropyClassification, SeesawClassification
from tailseg.model import detector as detector_module
from tailseg.model import rpn as rpn_module
from tailseg.model.backbone import Backbone
from tailseg.model.box_head import BoxHead, RoISampler
from tailseg.model.boxes import encode
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.fpn import FPN
from tailseg.model.mask_head import MaskHead
from tailseg.model.matching import Matcher, Sampled
from tailseg.model.rpn import RPN, Proposals
from tailseg.recipe import resolve
from tailseg.structures import Batch, Detections

CLASSES = 37

THEIR_NAMES = {  # in the recording: here
    "backbone.": "backbone.net.",
    "neck.fpn_convs": "neck.output_convs",
    "rpn_head.rpn_conv": "rpn.conv",
    "rpn_head.rpn_cls": "rpn.objectness",
    "rpn_head.rpn_reg": "rpn.deltas",
    "roi_head.bbox_head.shared_fcs.0": "box_head.fc1",
    "roi_head.bbox_head.shared_fcs.1": "box_head.fc2",
    "roi_head.bbox_head.fc_cls": "box_head.classifier",
    "roi_head.bbox_head.fc_reg": "box_head.regressor",
    "roi_head.bbox_head.loss_cls.cum_samples": "box_head.classification.seesaw.counts",
    "roi_head.mask_head.conv_logits": "mask_head.predictor",
    "roi_head.mask_head": "mask_head",
}

LOSS_NAMES = {
    "loss_rpn_cls": "rpn_objectness",
    "loss_rpn_bbox": "rpn_box",
    "loss_cls_classes": "classes",
    "loss_cls_objectness": "objectness",
    "loss_bbox": "box",
    "loss_mask": "mask",
}


def own_name(name: str) -> str:
    if not name.startswith("backbone"):
        name = name.replace(".conv.", ".")
    for theirs, ours in THEIR_NAMES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def assemble(backbone: Backbone, classes: int, channels: int, width: int, **options: object) -> Detector:
    matcher = Matcher(positive_iou=0.5, negative_iou=0.5, low_quality_iou=0.5)
    classification = SeesawClassification(classes, p=0.8, q=2.0)
    return Detector(
        backbone,
        FPN(backbone.channels, channels),
        RPN(channels, **options),
        RoISampler(matcher, classes),
        BoxHead(channels, classification, width=width, normalized=True),
        MaskHead(channels, classes, channels=channels),
    )


@pytest.fixture
def recorded_model(shared) -> Detector:
    """The recorded detector: a ResNet-50 an eighth as wide (timm fixes the stem, so it is exchanged), 37 classes."""
    backbone = Backbone("resnet50", options={"channels": (8, 16, 32, 64)})
    net = backbone.net
    net["conv1"], net["bn1"] = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8)
    first = net["layer1"][0]
    first.conv1, first.downsample[0] = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 32, 1, bias=False)
    for part in (net["conv1"], net["bn1"], first):
        part.requires_grad_(False)
    backbone._frozen = [net["conv1"], net["bn1"], net["layer1"]]
    detector = assemble(backbone, CLASSES, channels=32, width=64)
    stored = torch.load(shared / "reference" / "model_mask_rcnn.pth", weights_only=True)["state_dict"]
    state = {own_name(key): value for key, value in stored.items()}
    counts = "box_head.classification.seesaw.counts"
    state[counts] = state[counts][:CLASSES].round().long()
    detector.load_state_dict(state)
    return detector


def matched_rows(
    ours: Tensor, theirs: Tensor, atol: float, labels: tuple[Tensor, Tensor] | None = None
) -> tuple[list[int], list[int]]:
    """Pairs of rows whose boxes (and labels) agree, each row used once: positions in ours and in theirs."""
    distance = (ours[:, None] - theirs[None]).abs().amax(dim=2)
    if labels is not None:
        distance = distance.where(labels[0][:, None] == labels[1][None], math.inf)
    pairs: dict[int, int] = {}
    for column in range(len(theirs)):
        row = int(distance[:, column].argmin())
        if distance[row, column] <= atol and row not in pairs:
            pairs[row] = column
    return list(pairs), list(pairs.values())


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


class TestRecordedTestRun:
    """One image, each stage fed with the recorded output of the stage before, then all at once."""

    @pytest.fixture
    def run(self, recorded, recorded_model):
        case, inputs, _, outputs = next(c for c in recorded("model_mask_rcnn") if c[0]["name"] == "test0")
        original = tuple(case["settings"]["original_shape"])
        batch = batch_of([inputs["image"].permute(2, 0, 1)], [original])
        pyramid = [outputs[f"p{i}"] for i in range(2, 7)]
        return case, outputs, batch, pyramid, recorded_model.eval()

    def test_pixels_and_pyramid(self, run, check):
        case, outputs, batch, _, detector = run
        with torch.no_grad():
            check(case, "tensor", detector.normalized(batch.images, batch.image_hws), outputs["tensor"])
            for i, features in enumerate(detector.features(batch), start=2):
                check(case, f"p{i}", features, outputs[f"p{i}"])

    def test_proposals(self, run):
        case, outputs, batch, pyramid, detector = run
        with torch.no_grad():
            found = detector.rpn.propose(detector.rpn(pyramid), batch.image_hws)
        tolerance = case["tolerance"]
        rows, columns = matched_rows(found.boxes[0], outputs["proposals"], tolerance["proposals"]["atol"])
        assert found.valid.all()
        assert len(rows) >= tolerance["proposals"]["share"] * 1000
        off = (found.scores[0][rows] - outputs["proposal_scores"][columns]).abs()
        assert off.max() <= tolerance["proposal_scores"]["atol"]

    def test_heads_on_recorded_proposals(self, run):
        case, outputs, batch, pyramid, detector = run
        tolerance = case["tolerance"]
        rois = F.pad(outputs["proposals"], (1, 0))
        with torch.no_grad():
            logits, deltas = detector.box_head(detector.box_pooler(pyramid, rois))
        assert (logits - outputs["cls_logits"]).abs().max() <= tolerance["cls_logits"]["atol"]
        first = deltas[:50].flatten(1) - outputs["deltas_of_first_rows"]
        assert first.abs().max() <= tolerance["deltas_of_first_rows"]["atol"]
        valid = torch.ones(1, 1000, dtype=torch.bool)
        proposals = Proposals(boxes=outputs["proposals"][None], scores=outputs["proposal_scores"][None], valid=valid)
        with torch.no_grad():
            (boxes,), (scores,), (labels,) = detector._detect_boxes(pyramid, proposals, batch.image_hws)
        self.assert_detections(case, outputs, boxes, scores, labels)

    @staticmethod
    def assert_detections(case, outputs, boxes, scores, labels) -> tuple[list[int], list[int]]:
        tolerance = case["tolerance"]
        rows, columns = matched_rows(boxes, outputs["boxes"], tolerance["boxes"]["atol"], (labels, outputs["labels"]))
        assert len(labels) == 300
        assert len(rows) >= tolerance["boxes"]["share"] * 300
        assert (scores[rows] - outputs["scores"][columns]).abs().max() <= tolerance["scores"]["atol"]
        return rows, columns

    def test_masks_of_recorded_boxes(self, run):
        case, outputs, _, pyramid, detector = run
        kept = case["settings"]["masks_kept"]
        rois = F.pad(outputs["boxes"][:kept], (1, 0))
        with torch.no_grad():
            masks = detector.mask_head(detector.mask_pooler(pyramid, rois), outputs["labels"][:kept]).sigmoid()
        assert (masks - outputs["mask_probs"]).abs().max() <= case["tolerance"]["mask_probs"]["atol"]

    def test_end_to_end(self, run):
        case, outputs, batch, _, detector = run
        (found,) = detector.detect(batch)
        tolerance = case["tolerance"]
        assert found.image_hw == tuple(case["settings"]["original_shape"])
        rows, columns = matched_rows(
            found.boxes,
            outputs["boxes_original"],
            tolerance["boxes_original"]["atol"],
            (found.labels, outputs["labels"]),
        )
        assert len(rows) >= tolerance["boxes_original"]["share"] * 300
        assert (found.scores[rows] - outputs["scores"][columns]).abs().max() <= tolerance["scores"]["atol"]
        pairs = [(r, c) for r, c in zip(rows, columns, strict=True) if c < case["settings"]["masks_kept"]]
        masks = torch.stack([found.masks[r] - outputs["mask_probs"][c] for r, c in pairs])
        assert len(pairs) >= tolerance["mask_probs"]["share"] * case["settings"]["masks_kept"]
        assert masks.abs().max() <= tolerance["mask_probs"]["atol"]


class TestRecordedTrainingStep:
    """The losses and gradients of two images, with the recorded anchors and proposals."""

    @pytest.fixture
    def run(self, recorded):
        return next(c for c in recorded("model_mask_rcnn") if c[0]["name"] == "train")

    @pytest.fixture
    def batch(self, run) -> Batch:
        case, inputs, _, _ = run
        images = [inputs[f"image{i}.pixels"].permute(2, 0, 1) for i in range(2)]
        boxes = [inputs[f"image{i}.boxes"] for i in range(2)]
        most = max(map(len, boxes))
        grids = torch.zeros(2, most, 320, 320, dtype=torch.uint8)  # a cell a pixel
        for i in range(2):
            masks = inputs[f"image{i}.masks"]
            rows, columns = (torch.arange(320).clamp(max=extent - 1) for extent in masks.shape[1:])
            grids[i, : len(masks)] = masks[:, rows][:, :, columns] * 255  # the image's edge is repeated
        pad = [most - len(b) for b in boxes]
        return batch_of(
            images,
            [tuple(about["original_shape"]) for about in case["settings"]["images"]],
            boxes=torch.stack([F.pad(b, (0, 0, 0, p)) for b, p in zip(boxes, pad, strict=True)]),
            labels=torch.stack([F.pad(inputs[f"image{i}.labels"], (0, pad[i])) for i in range(2)]),
            valid=torch.stack([torch.arange(most) < len(b) for b in boxes]),
            masks=grids,
            mask_frames=torch.tensor([0.0, 0.0, 320.0, 320.0]).expand(2, most, 4),
        )

    @pytest.fixture
    def detector(self, run, recorded_model, monkeypatch) -> Detector:
        """In training mode, with the recorded choice of anchors and the recorded proposals."""
        _, inputs, _, outputs = run

        def recorded_sample(matched: Tensor, slots: int, max_positive: int) -> Sampled:
            assert (slots, max_positive) == (256, 128)
            for i in range(2):  # ours may have drawn it: all positives are among the candidates, and so on
                positive, negative = (outputs[f"rpn.image{i}.{kind}"] for kind in ("positive", "negative"))
                assert torch.equal((matched[i] >= 0).nonzero().squeeze(1), positive)
                assert (matched[i][negative] == -1).all()
            index = torch.stack(
                [torch.cat([outputs[f"rpn.image{i}.positive"], outputs[f"rpn.image{i}.negative"]]) for i in range(2)]
            )
            counts = torch.tensor([[len(outputs[f"rpn.image{i}.positive"])] for i in range(2)])
            positive = torch.arange(256) < counts
            return Sampled(
                index=index,
                matched=torch.where(positive, matched.gather(1, index), 0),
                positive=positive,
                valid=torch.ones_like(positive),
            )

        found = [inputs[f"image{i}.proposals"] for i in range(2)]
        most = max(map(len, found))
        proposals = Proposals(
            boxes=torch.stack([F.pad(b, (0, 0, 0, most - len(b))) for b in found]),
            scores=torch.zeros(2, most),
            valid=torch.stack([torch.arange(most) < len(b) for b in found]),
        )
        monkeypatch.setattr(rpn_module, "sample", recorded_sample)
        monkeypatch.setattr(recorded_model.rpn, "propose", lambda output, image_hws: proposals)
        return recorded_model.train()

    def test_sampled_rois(self, run, batch, detector, check):
        case, _, _, outputs = run
        proposals = detector.rpn.propose(None, None)
        targets = detector.sampler(proposals, batch.boxes, batch.labels, batch.valid)
        labels, box_targets = outputs["stage0.labels"], outputs["stage0.box_targets"]
        start = 0
        for i in range(2):
            theirs, assigned = outputs[f"stage0.image{i}.rois"], outputs[f"stage0.image{i}.assigned"]
            own = (targets.rois[:, 0] == i) & targets.valid
            rows, columns = matched_rows(
                targets.rois[own][:, 1:],
                theirs,
                case["tolerance"][f"stage0.image{i}.rois"]["atol"],
                (targets.labels[own], labels[start : start + len(theirs)]),
            )
            assert len(rows) == len(theirs) == own.sum()  # nothing had to be left out, so the sets are equal
            order = torch.tensor(columns).argsort()
            rows = torch.tensor(rows)[order]
            objects = targets.objects[own][rows][: len(assigned)] - i * batch.boxes.shape[1]
            check(case, f"stage0.image{i}.assigned", objects, assigned)
            assert targets.positive[own][rows].sum() == len(assigned)
            chosen = targets.boxes[own][rows][: len(assigned)]
            deltas = encode(targets.rois[own][rows][: len(assigned), 1:], chosen, (0.1, 0.1, 0.2, 0.2))
            expected = box_targets[start : start + len(assigned)]
            assert (deltas - expected).abs().max() <= case["tolerance"]["stage0.box_targets"]["atol"]
            start += len(theirs)

    def test_losses_gradients_and_counts(self, run, batch, detector, check):
        case, _, _, outputs = run
        losses = detector(batch)
        assert losses.keys() == set(LOSS_NAMES.values())
        for theirs, ours in LOSS_NAMES.items():
            check(case, f"losses.{theirs}", losses[ours], outputs[f"losses.{theirs}"])
        total = sum(losses.values())
        check(case, "loss", total, outputs["loss"])
        total.backward()
        parameters = dict(detector.named_parameters())
        names = [own_name(name) for name in case["settings"]["grad_norms_of"]]
        norms = torch.stack([parameters[name].grad.norm() for name in names])
        check(case, "grad_norms", norms, outputs["grad_norms"])
        assert {name for name, p in parameters.items() if p.grad is not None} == set(names)
        counts = detector.box_head.classification.seesaw.counts
        assert counts.tolist() == outputs["stage0.cum_samples"][:CLASSES].tolist()

    def test_the_form_for_devices_gives_the_same(self, run, batch, detector, check, monkeypatch):
        case, _, _, outputs = run
        monkeypatch.setattr(detector_module, "live_rows", lambda valid: torch.arange(valid.numel()))
        for pooler in (detector.box_pooler, detector.mask_pooler):
            monkeypatch.setattr(pooler, "_level_by_level", pooler._at_every_level)
        losses = detector(batch)
        for theirs, ours in LOSS_NAMES.items():
            check(case, f"losses.{theirs}", losses[ours], outputs[f"losses.{theirs}"])


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
        if objects and (name.startswith(("neck", "rpn", "box_head", "mask_head")) or "layer2.0.bn2" in name):
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
        detector.sampler.slots, detector.sampler.max_positive = 12, 3
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
    assert detector.box_head.classification.seesaw.counts.shape == (1203,)
    assert detector.box_head.classifier.weight.shape == (1205, 1024)


def test_cross_entropy_fits_the_same_detector():
    detector = small_detector()
    detector.box_head = BoxHead(16, CrossEntropyClassification(5), width=24)
    losses = detector.train()(small_batch())
    assert losses.keys() == {"rpn_objectness", "rpn_box", "classes", "box", "mask"}
    assert losses["classes"].item() == pytest.approx(math.log(6), rel=0.1)
    (found, _) = detector.eval().detect(small_batch())
    assert_sound(found, 300)
