"""HTC-Lite, TSD and mask scoring in one detector: what reaches which head, what is added to it, what is learnt."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from tailseg.model import detector as detector_module
from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.model.mask_head import mask_targets
from tailseg.model.roi_features import pyramid_rows, shifted_roi_align
from tailseg.model.rpn import RpnOutput
from tailseg.recipes.resolve import resolve
from tailseg.structures import Batch, Proposals

CLASSES = 5
HWS = ((64, 90), (50, 96))
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
SMALL = [
    "model.backbone={name: resnet18, frozen_stages: 1, pretrained: false, options: {channels: [8, 16, 24, 32]}}",
    "model.neck.channels=16",
    "model.rpn={pre_nms_train: 60, post_nms_train: 50, pre_nms_test: 40, post_nms_test: 25}",
    "model.box_head={width: 24, rois: 64, max_positive: 24}",
    "model.mask_head={channels: 16, convs: 2, class_agnostic: false}",
    "model.mask_iou={channels: 8, width: 12}",
    "model.tsd.shift_width=12",
    "test.max_detections=40",
]
SEESAW = ["classifier={loss: seesaw, normalized: true}"]
CROSS_ENTROPY = ["classifier.loss=cross-entropy"]
HTC_LITE, WHOLE = "demo-table2/04-htc-lite", "demo-table2/06-mask-scoring"


def detector_of(name: str, *settings: str, seed: int = 0) -> Detector:
    """A row of the table, small, of weights that move boxes by a good part of their size and tell masks apart."""
    torch.manual_seed(seed)
    detector = build_detector(resolve(name, [*SMALL, *settings]), CLASSES)
    for stage in detector.stages:
        head = stage.box_head
        nn.init.normal_(head.regressor.weight, std=0.5)
        nn.init.normal_(head.regressor.bias, std=2.0)
        nn.init.normal_(head.classifier.weight, std=0.3)
        if stage.mask_head is not None:
            nn.init.normal_(stage.mask_head.predictor.weight, std=1.0)
    return detector


def batch_of(*objects: int) -> Batch:
    """Two images of noise with up to two objects each; each mask is the middle 6 of a box's 10 cells a side."""
    generator = torch.Generator().manual_seed(1)
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    for image, (h, w) in zip(images, HWS, strict=True):
        image[:, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[[5.0, 6, 40, 50], [30, 20, 80, 60]], [[0.0, 0, 60, 49], [10, 10, 40, 38]]])
    valid = torch.arange(2) < torch.tensor(objects).unsqueeze(1)
    masks = torch.zeros(2, 2, 10, 10, dtype=torch.uint8)
    masks[:, :, 2:8, 2:8] = 255
    return Batch(
        images=images,
        image_sizes=torch.tensor(HWS),
        original_sizes=torch.tensor([(128, 180), (50, 96)]),
        image_ids=torch.arange(2),
        boxes=boxes * valid[..., None],
        labels=torch.tensor([[0, 3], [4, 1]]) * valid,
        valid=valid,
        masks=masks * valid[..., None, None],
        mask_frames=boxes * valid[..., None],
        absent=torch.tensor([[False, True, True, False, False], [True, False, False, False, False]]),
        ignored=torch.zeros(2, 0, 0, dtype=torch.uint8),
    )


@contextmanager
def calls(module: nn.Module) -> Iterator[list[tuple[tuple, object]]]:
    """Arguments and result of every call of a module inside the block."""
    seen: list[tuple[tuple, object]] = []
    hook = module.register_forward_hook(lambda _module, inputs, output: seen.append((inputs, output)))
    yield seen
    hook.remove()


def run(detector: Detector, batch: Batch, training: bool) -> object:
    torch.manual_seed(3)
    return detector.train()(batch) if training else detector.eval().detect(batch)


def propose(boxes: Tensor, valid: Tensor) -> Callable[..., Proposals]:
    return lambda _output, _image_sizes, **_: Proposals(
        boxes=boxes, scores=torch.zeros_like(boxes[..., 0]), valid=valid
    )


def moved(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...], hws: Tensor) -> Tensor:
    """Boxes (R, 4) moved by deltas (R, 4) and cut to their images (R, 2), in float64."""
    x1, y1, x2, y2 = boxes.double().T
    dx, dy, dw, dh = (deltas.double() * torch.tensor(stds, dtype=torch.float64)).T
    limit = math.log(1000 / 16)
    x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
    w, h = (x2 - x1) * dw.clamp(-limit, limit).exp(), (y2 - y1) * dh.clamp(-limit, limit).exp()
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)
    return torch.minimum(corners.clamp(min=0), hws.double().flip(1).repeat(1, 2))


class TestContext:
    """Its vector of an image and the RoIs of that image."""

    @pytest.mark.parametrize("training", [True, False])
    def test_every_plain_head_sees_its_images_vector_added(self, training):
        detector = detector_of(HTC_LITE)
        last = detector.stages[-1]
        first_layers = [stage.box_head.fc1 for stage in detector.stages]
        with (
            calls(detector.context) as encoded,
            calls(detector.neck) as necks,
            calls(detector.box_pooler) as pooled,
            calls(detector.mask_pooler) as mask_pooled,
            calls(first_layers[0]) as one,
            calls(first_layers[1]) as two,
            calls(first_layers[2]) as three,
            calls(last.mask_head) as masks,
        ):
            run(detector, batch_of(2, 1), training)
        ((coarsest, image_sizes), (_, vectors)) = encoded[0]
        assert image_sizes.tolist() == [[64, 90], [50, 96]]  # in pixels of the network, without the padding
        assert torch.equal(coarsest, necks[0][1][-1])
        assert vectors.shape == (2, 16)
        assert (vectors[0] - vectors[1]).abs().max() > 0.01 * vectors.abs().max()
        assert len(encoded) == 1
        assert len(pooled) == 3
        for (inputs, features), layer in zip(pooled, (one, two, three), strict=True):
            image = inputs[1][:, 0].long()
            assert set(image.tolist()) == {0, 1}
            expected = torch.stack([features[r] + vectors[i].view(16, 1, 1) for r, i in enumerate(image.tolist())])
            assert torch.equal(layer[0][0][0], expected.flatten(1))
        (((_, rois), features),) = mask_pooled
        expected = torch.stack([features[r] + vectors[int(i)].view(16, 1, 1) for r, i in enumerate(rois[:, 0])])
        assert torch.equal(masks[0][0][0], expected)

    @pytest.mark.parametrize("training", [True, False])
    def test_every_branch_of_tsd_and_the_mask_scoring_see_it(self, training):
        detector = detector_of(WHOLE)
        for stage in detector.stages:
            head = stage.box_head
            with (
                calls(detector.context) as encoded,
                calls(detector.neck) as necks,
                calls(detector.box_pooler) as pooled,
                calls(head.shared) as shared,
                calls(head) as heads,
                calls(head.class_shift) as class_shifts,
                calls(head.box_shift) as box_shifts,
                calls(head.class_branch) as class_branch,
                calls(head.box_branch) as box_branch,
                calls(detector.mask_pooler) as mask_pooled,
                calls(detector.mask_iou) as scoring,
            ):
                run(detector, batch_of(2, 1), training)
            vectors, rois = encoded[0][1][1], heads[0][0][1]
            added = vectors[rois[:, 0].long()][:, :, None, None]
            plain = next(features for inputs, features in pooled if torch.equal(inputs[1], rois))
            torch.testing.assert_close(shared[0][0][0], (plain + added).flatten(1))
            rows = pyramid_rows(necks[0][1])
            own = shifted_roi_align(rows, rois, class_shifts[0][1].view(-1, 2, 7, 7) * 0.1, 7)
            torch.testing.assert_close(class_branch[0][0][0], (own + added).flatten(1), rtol=1e-4, atol=1e-4)
            own = shifted_roi_align(rows, rois, box_shifts[0][1] * 0.1, 7)
            torch.testing.assert_close(box_branch[0][0][0], (own + added).flatten(1), rtol=1e-4, atol=1e-4)
            ((_, mask_rois), plain) = mask_pooled[0]
            assert torch.equal(scoring[0][0][0], plain + vectors[mask_rois[:, 0].long()][:, :, None, None])

    @pytest.mark.parametrize("weight", [3, 0.25])
    def test_its_loss_by_hand(self, weight):
        detector = detector_of(WHOLE, f"model.context.weight={weight}")
        with calls(detector.context) as encoded:
            losses = run(detector, batch_of(2, 1), True)
        p = encoded[0][1][0].detach().double().sigmoid()
        present = [{0, 3}, {4}]
        entropies = [
            -math.log(float(p[i, c]) if c in present[i] else 1 - float(p[i, c]))
            for i in range(2)
            for c in range(CLASSES)
        ]
        assert losses["context"].item() == pytest.approx(weight * sum(entropies) / 10, rel=1e-5)

    def test_classes_nobody_looked_for_may_be_left_out(self):
        """In the batch only classes 1 and 2 are verified absent from the first image, and 0 from the second."""
        detector = detector_of(WHOLE, "model.context.unlabelled=ignored")
        with calls(detector.context) as encoded:
            losses = run(detector, batch_of(2, 1), True)
        p = encoded[0][1][0].detach().double().sigmoid()
        said = [p[0, 0], p[0, 3], p[1, 4], 1 - p[0, 1], 1 - p[0, 2], 1 - p[1, 0]]
        expected = -3 * sum(math.log(float(value)) for value in said) / 6
        assert losses["context"].item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("name", [HTC_LITE, WHOLE])
    def test_the_heads_teach_it(self, name):
        detector = detector_of(name)
        losses = run(detector, batch_of(2, 1), True)
        names = [f"stage{t}.{kind}" for t in (1, 2, 3) for kind in ("classes", "box")] + ["stage3.mask"]
        names += ["stage3.mask_iou", "stage2.sibling_classes", "stage2.pc_box"] if name == WHOLE else []
        first, classifier = detector.context.convs[0].weight, detector.context.classifier.weight
        for loss in names:
            gradient, none = torch.autograd.grad(
                losses[loss], [first, classifier], retain_graph=True, allow_unused=True
            )
            assert gradient.abs().max() > 0, loss
            assert none is None, loss
        for loss in ("rpn_box", "rpn_objectness"):
            gradients = torch.autograd.grad(losses[loss], [first, classifier], retain_graph=True, allow_unused=True)
            assert gradients == (None, None)
        own = torch.autograd.grad(losses["context"], [first, classifier])
        assert all(gradient.abs().max() > 0 for gradient in own)

    @pytest.mark.parametrize("name", [HTC_LITE, WHOLE])
    def test_a_vector_of_zeros_is_none_and_any_other_changes_detections(self, name, monkeypatch):
        detector = detector_of(name)
        batch = batch_of(2, 1)
        found = run(detector, batch, False)
        encoder = detector.context
        detector.context = None
        without = run(detector, batch, False)
        detector.context = encoder
        monkeypatch.setattr(encoder, "forward", lambda coarsest, hws: (torch.zeros(2, CLASSES), torch.zeros(2, 16)))
        zero = run(detector, batch, False)
        for own, none, zeroed in zip(found, without, zero, strict=True):
            assert len(own) == len(none) == len(zeroed) == 40
            for field in ("boxes", "scores", "labels", "masks"):
                assert torch.equal(getattr(none, field), getattr(zeroed, field)), field
            assert (own.scores - none.scores).abs().max() > 1e-3
            assert not torch.allclose(own.boxes, none.boxes, atol=0.1)


def offset_to(iou: float, width: float) -> float:
    """How far a box of that width moves sideways to overlap with its old place by ``iou``."""
    return width * (1 - iou) / (1 + iou)


class TestMaskHead:
    """There is one, of the last stage."""

    @pytest.mark.parametrize("name", [HTC_LITE, WHOLE])
    def test_only_the_last_stage_has_one(self, name):
        detector = detector_of(name)
        assert [stage.mask_head is None for stage in detector.stages] == [True, True, False]
        losses = run(detector, batch_of(2, 2), True)
        masks = {key for key in losses if "mask" in key}
        assert masks == {"stage3.mask"} | ({"stage3.mask_iou"} if name == WHOLE else set())

    def test_the_last_stages_positives_teach_it(self, monkeypatch):
        """A box and copies of it moved sideways: the stricter a stage, the fewer of them are positive."""
        detector = detector_of(HTC_LITE, *CROSS_ENTROPY)
        for stage in detector.stages:
            nn.init.zeros_(stage.box_head.regressor.weight)  # boxes stay where they are
            nn.init.zeros_(stage.box_head.regressor.bias)
        batch = batch_of(1, 0)
        near = torch.tensor([5.0, 6, 40, 50]).repeat(4, 1)
        near[:, 0::2] += torch.tensor([offset_to(iou, 35) for iou in (0.45, 0.55, 0.65, 0.75)]).unsqueeze(1)
        boxes = torch.stack([near, near])
        monkeypatch.setattr(detector.rpn, "propose", propose(boxes, torch.ones(2, 4, dtype=torch.bool)))
        samplers = [stage.sampler for stage in detector.stages]
        with (
            calls(samplers[0]) as one,
            calls(samplers[1]) as two,
            calls(samplers[2]) as three,
            calls(detector.mask_pooler) as pooled,
            calls(detector.stages[2].mask_head) as masks,
        ):
            losses = run(detector, batch, True)
        assert [int(s[0][1].positive.sum()) for s in (one, two, three)] == [4, 3, 2]  # the annotated box is one
        ((_, rois), _) = pooled[0]
        expected = torch.cat([near[3:], near[:1] - torch.tensor([offset_to(0.45, 35), 0, offset_to(0.45, 35), 0])])
        assert sorted(rois[:, 0].tolist()) == [0, 0]
        ours = rois[rois[:, 1].argsort(descending=True), 1:]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
        (features, labels, live), logits = masks[0]
        assert len(features) == 2
        assert labels.tolist() == [0, 0]
        assert live.all()
        goal = mask_targets(rois[:, 1:], batch.masks[0, :1].expand(2, -1, -1), batch.mask_frames[0, :1].expand(2, -1))
        assert 0.2 < goal.mean() < 0.5
        entropy = F.binary_cross_entropy_with_logits(logits.double(), goal.double())
        assert losses["stage3.mask"].item() == pytest.approx(entropy.item(), rel=1e-5)


class TestMaskScoring:
    """Masks are ranked by box score times predicted IoU."""

    def test_mask_scores_by_hand_and_nothing_else_changes(self):
        detector = detector_of(WHOLE)
        nn.init.normal_(detector.mask_iou.predictor.weight, std=3.0)
        nn.init.constant_(detector.mask_iou.predictor.bias, 0.5)
        batch = batch_of(2, 1)
        with calls(detector.mask_iou) as scoring, calls(detector.stages[2].mask_head) as masks:
            found = run(detector, batch, False)
        ((features, probabilities, labels), ious) = scoring[0]
        assert len(scoring) == len(masks) == 1
        assert torch.equal(features, masks[0][0][0])
        assert torch.equal(probabilities, masks[0][1].sigmoid())
        assert ious.min() < 0  # so that both bounds are tried
        assert ious.max() > 1
        assert torch.equal(labels, torch.cat([f.labels for f in found]))
        factors = [min(max(iou, 0.0), 1.0) for iou in ious.tolist()]
        scores = torch.cat([f.scores for f in found]).tolist()
        ours = torch.cat([f.mask_scores for f in found]).tolist()
        assert ours == pytest.approx([s * f for s, f in zip(scores, factors, strict=True)], rel=1e-6)
        detector.mask_iou = None
        for scored, plain in zip(found, run(detector, batch, False), strict=True):
            assert plain.mask_scores is None
            for field in ("boxes", "scores", "labels", "masks"):
                assert torch.equal(getattr(scored, field), getattr(plain, field)), field
            assert (scored.scores.diff() <= 0).all()
            assert (scored.mask_scores.diff() > 0).any()  # the order is that of the boxes

    @pytest.mark.parametrize("weight", [0.5, 4])
    def test_its_loss_by_hand(self, weight, monkeypatch):
        """Full masks on the annotated boxes: 16 x 16 of 28 x 28 cells are right, whatever the object."""
        detector = detector_of(WHOLE, f"model.mask_iou.weight={weight}")
        nn.init.zeros_(detector.stages[2].mask_head.predictor.weight)
        nn.init.constant_(detector.stages[2].mask_head.predictor.bias, 4.0)
        none = torch.zeros(2, 3, dtype=torch.bool)
        monkeypatch.setattr(detector.rpn, "propose", propose(torch.zeros(2, 3, 4), none))
        with calls(detector.mask_iou) as scoring:
            losses = run(detector, batch_of(2, 1), True)
        ((_, masks, labels), predicted) = scoring[0]
        assert sorted(labels.tolist()) == [0, 3, 4]
        assert masks.min() > 0.9
        errors = [(iou - 16 * 16 / (28 * 28)) ** 2 for iou in predicted.tolist()]
        assert losses["stage3.mask_iou"].item() == pytest.approx(weight * sum(errors) / 3, rel=1e-4)

    def test_it_also_teaches_the_mask_head(self):
        detector = detector_of(WHOLE)
        losses = run(detector, batch_of(2, 1), True)
        heads = [detector.mask_iou.convs[0].weight, detector.stages[2].mask_head.convs[0].weight]
        gradients = torch.autograd.grad(losses["stage3.mask_iou"], heads, retain_graph=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        (none,) = torch.autograd.grad(losses["stage3.mask"], heads[:1], allow_unused=True)
        assert none is None


def loss_names(settings: list[str], constrained: bool = True) -> set[str]:
    classes = ["classes", "objectness"] if settings == SEESAW else ["classes"]
    own = [*classes, "box", *(f"sibling_{name}" for name in [*classes, "box"]), "pc_box"]
    own += ["pc_classes"] if constrained else []
    names = {f"stage{t}.{name}" for t in (1, 2, 3) for name in own}
    return names | {"rpn_objectness", "rpn_box", "context", "stage3.mask", "stage3.mask_iou"}


class TestTsd:
    """TSD in all three stages."""

    @pytest.mark.parametrize("classifier", [SEESAW, CROSS_ENTROPY])
    @pytest.mark.parametrize("constrained", [True, False])
    def test_losses(self, classifier, constrained):
        detector = detector_of(WHOLE, *classifier, f"model.tsd.constrain_classes={constrained}")
        losses = run(detector, batch_of(2, 1), True)
        assert losses.keys() == loss_names(classifier, constrained)
        for name, value in losses.items():
            assert value.shape == ()
            assert value.dtype == torch.float32
            assert torch.isfinite(value), name
            assert value > 0, name

    def test_weights_of_the_stages(self):
        plain = detector_of(WHOLE, *SEESAW)
        for stage in plain.stages:
            stage.weight = 1.0
        ones = run(plain, batch_of(2, 1), True)
        weighted = run(detector_of(WHOLE, *SEESAW), batch_of(2, 1), True)  # by the recipe: 1, 0.5, 0.25
        factors = {name: (weighted[name] / value).item() for name, value in ones.items()}
        expected = {"stage2": 0.5, "stage3": 0.25}
        for name, factor in factors.items():
            is_mask = name in ("stage3.mask", "stage3.mask_iou")
            assert factor == pytest.approx(1 if is_mask else expected.get(name.split(".")[0], 1), rel=1e-4), name

    def test_what_a_stage_hands_on(self):
        """RoIs moved as a whole, then by the deltas, then cut to the image."""
        detector = detector_of(WHOLE)
        heads, samplers = ([getattr(s, part) for s in detector.stages] for part in ("box_head", "sampler"))
        for t in (1, 2):
            with (
                calls(samplers[t - 1]) as drawn,
                calls(samplers[t]) as given,
                calls(heads[t - 1]) as before,
                calls(heads[t - 1].box_shift) as shifts,
            ):
                run(detector, batch_of(2, 1), True)
            targets, proposals = drawn[0][1], given[0][0][0]
            rois = targets.rois[:, 1:]
            sides = (rois[:, 2:] - rois[:, :2]).double()
            whole = rois.double() + (0.1 * shifts[0][1].double() * sides).repeat(1, 2)
            assert (whole - rois).abs().median() > 0.1
            image_sizes = torch.tensor(HWS)[targets.rois[:, 0].long()]
            expected = moved(whole, before[0][1].deltas[:, 0], STDS[t - 1], image_sizes)
            handed = proposals.valid.flatten()
            assert handed.sum() > 20
            ours = proposals.boxes.flatten(0, 1)
            assert not ours.requires_grad
            torch.testing.assert_close(ours[handed].double(), expected[handed], rtol=1e-4, atol=1e-3)
            assert torch.equal(handed, targets.valid & ~targets.is_ground_truth)
            assert torch.isin(ours[handed], torch.tensor([0.0, 64, 90, 50, 96])).any()  # some were cut

    @pytest.mark.parametrize("classifier", [SEESAW, CROSS_ENTROPY])
    def test_detections_by_hand(self, classifier):
        """Logits are averaged over the stages before they are scores; the last stage's boxes are those of its P_r."""
        detector = detector_of(WHOLE, *classifier)
        heads = [stage.box_head for stage in detector.stages]
        with calls(heads[0]) as one, calls(heads[1]) as two, calls(heads[2]) as three:
            found = run(detector, batch_of(2, 1), False)
        predictions = [seen[0][1] for seen in (one, two, three)]
        rois = three[0][0][1]
        image = rois[:, 0].long()
        image_sizes = torch.tensor(HWS)[image]
        for t in (1, 2):
            before, seen = predictions[t - 1], (one, two, three)[t][0][0][1]
            expected = moved(before.boxes, before.deltas[:, 0], STDS[t - 1], image_sizes)
            torch.testing.assert_close(seen[:, 1:].double(), expected, rtol=1e-4, atol=1e-3)
        mean = sum(p.logits.double() for p in predictions) / 3
        scores = mean.softmax(1)[:, :CLASSES]
        if classifier == SEESAW:  # C classes, then object and background
            scores = mean[:, :CLASSES].softmax(1) * mean[:, CLASSES:].softmax(1)[:, :1]
        boxes = moved(predictions[2].boxes, predictions[2].deltas[:, 0], STDS[2], image_sizes)
        for i, factor in ((0, 2.0), (1, 1.0)):
            rows, labels = ((scores > 1e-4) & (image == i).unsqueeze(1)).nonzero().T
            kept = batched_nms(boxes[rows].float(), scores[rows, labels].float(), labels, 0.5)[:40]
            rows, labels = rows[kept], labels[kept]
            assert torch.equal(found[i].labels, labels)
            torch.testing.assert_close(found[i].scores.double(), scores[rows, labels], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found[i].boxes.double(), boxes[rows] * factor, rtol=1e-4, atol=1e-3)

    def test_the_sibling_is_left_out_at_test_time(self):
        detector = detector_of(WHOLE)
        counts = {}
        for training in (True, False):
            ran = []
            for stage in detector.stages:
                for part in (stage.box_head.sibling_branch, stage.box_head.sibling_classifier):
                    part.register_forward_hook(lambda *_args, ran=ran: ran.append(1))
            run(detector, batch_of(2, 1), training)
            counts[training] = len(ran)
        assert counts == {True: 6, False: 0}

    def test_seesaw_counts_each_stages_positives_once_a_step(self):
        detector = detector_of(WHOLE, *SEESAW)
        counts = [stage.box_head.classification.seesaw.counts for stage in detector.stages]
        before = [c.clone() for c in counts]
        for steps in (1, 2):
            samplers = [stage.sampler for stage in detector.stages]
            with calls(samplers[0]) as one, calls(samplers[1]) as two, calls(samplers[2]) as three:
                run(detector, batch_of(2, 1), True)
            for own, start, seen in zip(counts, before, (one, two, three), strict=True):
                targets = seen[0][1]
                drawn = torch.bincount(targets.labels[targets.positive], minlength=CLASSES)
                assert drawn.sum() >= 3
                assert (own - start).tolist() == drawn.tolist(), steps
                start.copy_(own)
        run(detector, batch_of(2, 1), False)
        assert all(torch.equal(own, start) for own, start in zip(counts, before, strict=True))


def assert_learns(detector: Detector, losses: dict[str, Tensor]) -> None:
    for name, value in losses.items():
        assert value.dtype == torch.float32, name
        assert torch.isfinite(value), name
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


class TestWhole:
    """The last row of the table, under two losses."""

    @pytest.mark.parametrize("classifier", [SEESAW, CROSS_ENTROPY])
    @pytest.mark.parametrize("objects", [(2, 1), (0, 2), (0, 0)])
    @pytest.mark.parametrize("bf16", [False, True])
    def test_everything_that_is_trained_gets_a_finite_gradient(self, classifier, objects, bf16):
        detector = detector_of(WHOLE, *classifier)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = run(detector, batch_of(*objects), True)
        assert losses.keys() == loss_names(classifier)
        if objects == (0, 0):
            for name, value in losses.items():
                nothing = name.endswith(("box", "mask", "mask_iou", "pc_classes"))
                nothing |= classifier == SEESAW and name.endswith("classes")
                assert (value.item() == 0) == nothing, name
        assert_learns(detector, losses)
        if bf16:
            plain = run(detector_of(WHOLE, *classifier), batch_of(*objects), True)
            ours, theirs = (sum(value.item() for value in found.values()) for found in (losses, plain))
            assert ours == pytest.approx(theirs, rel=0.1)

    @pytest.mark.parametrize("classifier", [SEESAW, CROSS_ENTROPY])
    @pytest.mark.parametrize("objects", [(0, 2), (0, 0)])
    def test_no_proposals(self, classifier, objects, monkeypatch):
        detector = detector_of(WHOLE, *classifier)
        for slots in (0, 3):
            none = propose(torch.zeros(2, slots, 4), torch.zeros(2, slots, dtype=torch.bool))
            monkeypatch.setattr(detector.rpn, "propose", none)
            assert_learns(detector, run(detector, batch_of(*objects), True))
            found = run(detector, batch_of(*objects), False)
            assert [len(f) for f in found] == [0, 0]
            assert [f.mask_scores.shape for f in found] == [(0,), (0,)]

    @pytest.mark.parametrize(("name", "settings"), [(HTC_LITE, ["model.box_head.convs=1"]), (WHOLE, SEESAW)])
    def test_slots_that_stay_empty_are_not_seen(self, name, settings, monkeypatch):
        """Four proposals an image by themselves, and beside as many places that hold none: the same is learnt."""
        corners = torch.tensor([[4.0, 5], [30, 18], [50, 2], [11, 20]])
        boxes = torch.cat([corners, corners + torch.tensor([36.0, 29])], dim=1).repeat(2, 1, 1)
        padded = torch.cat([boxes, torch.tensor([7.0, 3, 60, 44]).expand(2, 4, 4)], dim=1)
        runs = []
        for given in (boxes, padded):
            detector = detector_of(name, *settings)
            valid = torch.arange(given.shape[1]).expand(2, -1) < 4
            monkeypatch.setattr(detector.rpn, "propose", propose(given, valid))
            with calls(detector.stages[0].sampler) as drawn:
                losses = run(detector, batch_of(2, 1), True)
            runs.append((losses, dict(detector.named_buffers()), drawn[0][1].valid))
        (plain, buffers, full), (losses, padded_buffers, slots) = runs
        assert (len(full), len(slots)) == (12, 20)
        assert full.sum() == slots.sum() == 11
        for key, value in losses.items():
            torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
        for key, value in padded_buffers.items():
            torch.testing.assert_close(value, buffers[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")

    def test_detections_in_bf16(self):
        detector = detector_of(WHOLE, *SEESAW)
        plain = run(detector, batch_of(2, 1), False)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(detector, batch_of(2, 1), False)
        for ours, theirs in zip(found, plain, strict=True):
            assert len(ours) == 40
            for field in ("boxes", "scores", "masks", "mask_scores"):
                assert getattr(ours, field).dtype == torch.float32, field
                assert getattr(ours, field).isfinite().all(), field
            assert ours.scores.mean().item() == pytest.approx(theirs.scores.mean().item(), rel=0.1)

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("demo-table2/02-sync-bn", []),
            ("demo-table2/03-carafe", CROSS_ENTROPY),
            (HTC_LITE, ["model.box_head.convs=1"]),
            (WHOLE, SEESAW),
        ],
    )
    @pytest.mark.parametrize("objects", [(2, 1), (0, 0)])
    def test_the_form_for_devices_gives_the_same(self, name, settings, objects, monkeypatch):
        """Losses, gradients and batch statistics: of slots without an object nothing may be seen."""
        plain, detector = detector_of(name, *settings), detector_of(name, *settings)
        assert len(plain.stages[-1].mask_head.norms) == 2
        expected = run(plain, batch_of(*objects), True)
        torch.stack(list(expected.values())).sum().backward()
        as_on_devices(detector, monkeypatch)
        with calls(detector.stages[-1].mask_head) as masks:
            losses = run(detector, batch_of(*objects), True)
        live = masks[0][0][2]
        assert len(live) == 2 * 24  # the most positives of each image
        assert int(live.sum()) < 2 * 24
        assert losses.keys() == expected.keys()
        for key, value in losses.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
        torch.stack(list(losses.values())).sum().backward()
        for (key, ours), theirs in zip(detector.named_parameters(), plain.parameters(), strict=True):
            if theirs.requires_grad:
                assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-6, key
        for (key, ours), theirs in zip(detector.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")

    def test_the_form_for_devices_detects_the_same(self, monkeypatch):
        detector = detector_of(WHOLE, *SEESAW)
        found = detector.rpn.propose

        def some(output: RpnOutput, image_sizes: Tensor, *, training: bool) -> Proposals:
            proposals = found(output, image_sizes, training=training)
            return replace(proposals, valid=proposals.valid & (torch.arange(proposals.valid.shape[1]) % 3 > 0))

        monkeypatch.setattr(detector.rpn, "propose", some)
        plain = run(detector, batch_of(2, 1), False)
        as_on_devices(detector, monkeypatch)
        for ours, theirs in zip(run(detector, batch_of(2, 1), False), plain, strict=True):
            assert torch.equal(ours.labels, theirs.labels)
            for field in ("boxes", "scores", "masks", "mask_scores"):
                torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-4, atol=1e-4)

    def test_another_image_in_the_batch_changes_no_detection(self):
        """Neither through the context nor through the padding."""
        detector = detector_of(WHOLE)
        both = batch_of(0, 0)
        together = run(detector, both, False)[1]
        own = {
            name: getattr(both, name)[1:]
            for name in ("images", "image_sizes", "original_sizes", "image_ids", "boxes", "labels", "valid", "masks")
        }
        rest = {"mask_frames": both.mask_frames[1:], "absent": both.absent[1:]}
        alone = run(detector, replace(both, **own, **rest), False)[0]
        assert torch.equal(together.labels, alone.labels)
        for field in ("boxes", "scores", "mask_scores"):
            torch.testing.assert_close(getattr(together, field), getattr(alone, field), rtol=1e-3, atol=1e-3)


def as_on_devices(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the ways that do not wait for a device to count."""
    monkeypatch.setattr(detector_module, "rows_to_compute", lambda valid: torch.arange(valid.numel()))
    for pooler in (detector.box_pooler, detector.mask_pooler):
        monkeypatch.setattr(pooler, "_level_by_level", pooler._at_every_level)
