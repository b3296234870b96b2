"""Whole models: checkpoints of mmdetection, converted, against its own recorded test runs and training steps.

Each stage is fed with the recorded output of the stage before, then all runs at once.
"""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.model import box_head as box_head_module
from tailseg.model import detector as detector_module
from tailseg.model import roi_features
from tailseg.model import rpn as rpn_module
from tailseg.model.box_head import BoxPrediction
from tailseg.model.boxes import encode
from tailseg.model.detector import EVERYTHING, Detector
from tailseg.model.matching import Sampled
from tailseg.model.roi_features import ImageFeatures
from tailseg.predict import load
from tailseg.structures import Batch, Proposals
from tailseg.zoo.conversion import convert, rename
from tailseg.zoo.mmdet import part_names, read_mmdet
from tailseg.zoo.mmdet_backbones import backbone_names

CLASSES = 37
NAMES = ("model_mask_rcnn", "model_cascade")
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
# What the issue of public checkpoints promises; the recordings' own bounds are up to five times as wide.
FEATURES, PIXELS, SCORES, MASKS, LOSSES = 1e-4, 0.01, 1e-4, 1e-3, 1e-4

LOSS_NAMES = {
    "loss_rpn_cls": "rpn_objectness",
    "loss_rpn_bbox": "rpn_box",
    "loss_cls_classes": "classes",
    "loss_cls_objectness": "objectness",
    "loss_bbox": "box",
    "loss_mask": "mask",
}


@pytest.fixture(scope="module")
def converted(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The recorded checkpoints as model files."""
    folder = tmp_path_factory.mktemp("converted")
    for name in NAMES:
        convert(read_mmdet(shared / "reference" / f"{name}.pth"), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in NAMES}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def detector(converted, name) -> Detector:
    return load(converted[name], device="cpu").detector


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


def with_image(boxes: Tensor) -> Tensor:
    return F.pad(boxes, (1, 0))


class TestRecordedTestRun:
    """One image."""

    @pytest.fixture
    def run(self, recorded, name, detector):
        case, inputs, _, outputs = next(c for c in recorded(name) if c[0]["name"] == "test0")
        original = tuple(case["settings"]["original_shape"])
        batch = batch_of([inputs["image"].permute(2, 0, 1)], [original])
        pyramid = [outputs[f"p{i}"] for i in range(2, 7)]
        return case, outputs, batch, pyramid, detector

    def test_pixels_and_pyramid(self, run, check):
        case, outputs, batch, _, detector = run
        with torch.no_grad():
            check(case, "tensor", detector.normalized(batch.images, batch.image_sizes), outputs["tensor"])
            for i, features in enumerate(detector.pyramid(batch.images, batch.image_sizes), start=2):
                check(case, f"p{i}", features, outputs[f"p{i}"])
                expected = outputs[f"p{i}"]
                assert (features - expected).norm() <= FEATURES * expected.norm()
                assert (features - expected).abs().max() <= FEATURES * expected.abs().max()

    def test_proposals(self, run):
        case, outputs, batch, pyramid, detector = run
        with torch.no_grad():
            found = detector.rpn.propose(detector.rpn(pyramid), batch.image_sizes, training=detector.rpn.training)
        rows, columns = matched_rows(found.boxes[0], outputs["proposals"], PIXELS)
        assert found.valid.all()
        assert len(rows) >= case["tolerance"]["proposals"]["share"] * 1000
        assert (found.scores[0][rows] - outputs["proposal_scores"][columns]).abs().max() <= SCORES

    def test_heads_on_recorded_proposals(self, run):
        case, outputs, batch, pyramid, detector = run
        valid = torch.ones(1, len(outputs["proposals"]), dtype=torch.bool)
        proposals = Proposals(boxes=outputs["proposals"][None], scores=outputs["proposal_scores"][None], valid=valid)
        seen: list[BoxPrediction] = []
        for stage in detector.stages:
            stage.box_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with torch.no_grad():
            (boxes,), (scores,), (labels,) = detector._detect_boxes(
                ImageFeatures(pyramid), proposals, batch.image_sizes, EVERYTHING
            )
        self.assert_detections(outputs, boxes, scores, labels, "boxes")
        tolerance = case["tolerance"]
        if len(seen) == 1:
            assert (seen[0].logits - outputs["cls_logits"]).abs().max() <= tolerance["cls_logits"]["atol"]
            first = seen[0].deltas[:50].flatten(1) - outputs["deltas_of_first_rows"]
            assert first.abs().max() <= tolerance["deltas_of_first_rows"]["atol"]
        else:
            mean = torch.stack([one.logits for one in seen]).mean(0)
            assert (mean - outputs["mean_cls_logits"]).abs().max() <= tolerance["mean_cls_logits"]["atol"]
            # Boxes, logits and deltas of the last stage, whose own RoIs must be the recorded ones.
            rois = outputs["last_rois"][:, -4:]
            with torch.no_grad():
                last = detector.stages[-1].box_head(partial(detector.box_pooler, pyramid), with_image(rois))
            assert (last.deltas[:, 0] - outputs["last_deltas"]).abs().max() <= tolerance["last_deltas"]["atol"]
            assert (seen[2].deltas[:, 0] - outputs["last_deltas"]).abs().max() <= tolerance["last_deltas"]["atol"]

    @staticmethod
    def assert_detections(outputs, boxes, scores, labels, key) -> tuple[list[int], list[int]]:
        rows, columns = matched_rows(boxes, outputs[key], PIXELS, (labels, outputs["labels"]))
        assert len(labels) == 300
        assert len(rows) >= 0.98 * 300
        assert (scores[rows] - outputs["scores"][columns]).abs().max() <= SCORES
        return rows, columns

    def test_masks_of_recorded_boxes(self, run):
        case, outputs, _, pyramid, detector = run
        kept = case["settings"]["masks_kept"]
        with torch.no_grad():
            rois, labels = with_image(outputs["boxes"][:kept]), outputs["labels"][:kept]
            masks, _ = detector.predict_masks(ImageFeatures(pyramid), rois, labels)
        assert (masks - outputs["mask_probs"]).abs().max() <= MASKS

    def test_end_to_end(self, run):
        case, outputs, batch, _, detector = run
        (found,) = detector.detect(batch)
        assert found.image_hw == tuple(case["settings"]["original_shape"])
        # Boxes of the file's size: its pixels are 1.6 times finer than those of the bound.
        rows, columns = matched_rows(
            found.boxes, outputs["boxes_original"], PIXELS / 0.64, (found.labels, outputs["labels"])
        )
        assert len(rows) >= 0.98 * 300
        assert (found.scores[rows] - outputs["scores"][columns]).abs().max() <= SCORES
        pairs = [(r, c) for r, c in zip(rows, columns, strict=True) if c < case["settings"]["masks_kept"]]
        masks = torch.stack([found.masks[r] - outputs["mask_probs"][c] for r, c in pairs])
        assert len(pairs) >= 0.98 * case["settings"]["masks_kept"]
        assert masks.abs().max() <= MASKS


def evenly(matched: Tensor, slots: int, max_positive: int) -> Sampled:
    """The recordings' stand-in for chance: of more candidates than wanted, those at even distances are taken."""

    def chosen(candidates: Tensor, wanted: int) -> Tensor:
        places = torch.linspace(0, len(candidates) - 1, wanted).round().long()
        return candidates[places] if len(candidates) > wanted else candidates

    index, positive, valid = ([], [], [])
    for row in matched:
        front = chosen((row >= 0).nonzero().squeeze(1), max_positive)
        back = chosen((row == -1).nonzero().squeeze(1), slots - len(front))
        used = len(front) + len(back)
        index.append(F.pad(torch.cat([front, back]), (0, slots - used)))
        positive.append(torch.arange(slots) < len(front))
        valid.append(torch.arange(slots) < used)
    index, positive, valid = torch.stack(index), torch.stack(positive), torch.stack(valid)
    own = torch.where(positive, matched.gather(1, index), 0)
    return Sampled(index=index, matched=own, positive=positive, valid=valid)


class TestRecordedTrainingStep:
    """The losses and gradients of two images, with the recorded proposals and way of sampling."""

    @pytest.fixture
    def run(self, recorded, name):
        return next(c for c in recorded(name) if c[0]["name"] == "train")

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
    def detector(self, run, detector, monkeypatch) -> Detector:
        """In training mode, with the recorded way of sampling and the recorded proposals."""
        _, inputs, _, outputs = run

        def recorded_anchors(matched: Tensor, slots: int, max_positive: int) -> Sampled:
            drawn = evenly(matched, slots, max_positive)
            for i in range(2):
                for kind, chosen in (("positive", drawn.positive[i]), ("negative", ~drawn.positive[i])):
                    assert torch.equal(drawn.index[i][chosen], outputs[f"rpn.image{i}.{kind}"])
            return drawn

        found = [inputs[f"image{i}.proposals"] for i in range(2)]
        most = max(map(len, found))
        proposals = Proposals(
            boxes=torch.stack([F.pad(b, (0, 0, 0, most - len(b))) for b in found]),
            scores=torch.zeros(2, most),
            valid=torch.stack([torch.arange(most) < len(b) for b in found]),
        )
        monkeypatch.setattr(rpn_module, "sample", recorded_anchors)
        monkeypatch.setattr(box_head_module, "sample", evenly)
        monkeypatch.setattr(detector.rpn, "propose", lambda output, image_sizes, **_: proposals)
        return detector.train()

    @staticmethod
    def loss_names(detector) -> dict[str, str]:
        """Their name -> ours."""
        if len(detector.stages) == 1:
            return LOSS_NAMES
        names = {key: LOSS_NAMES[key] for key in ("loss_rpn_cls", "loss_rpn_bbox")}
        for theirs, ours in LOSS_NAMES.items():
            if theirs not in names:
                names |= {f"s{t}.{theirs}": f"stage{t + 1}.{ours}" for t in range(3)}
        return names

    def test_sampled_rois_of_every_stage(self, run, batch, detector, check):
        case, _, _, outputs = run
        seen = []
        for stage in detector.stages:
            stage.sampler.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with torch.no_grad():
            detector(batch)
        assert len(seen) == len(detector.stages)
        for t, targets in enumerate(seen):
            start = 0
            for i in range(2):
                own = (targets.rois[:, 0] == i) & targets.valid
                rois = outputs[f"stage{t}.image{i}.rois"]
                check(case, f"stage{t}.image{i}.rois", targets.rois[own][:, 1:], rois)
                assigned = outputs[f"stage{t}.image{i}.assigned"]
                positive = own & targets.positive
                objects = targets.objects[positive] - i * batch.boxes.shape[1]
                check(case, f"stage{t}.image{i}.assigned", objects, assigned)
                labels = outputs[f"stage{t}.labels"][start : start + len(rois)]
                assert torch.equal(targets.labels[own], labels)
                deltas = encode(targets.rois[positive][:, 1:], targets.boxes[positive], STDS[t])
                expected = outputs[f"stage{t}.box_targets"][start : start + len(assigned)]
                assert (deltas - expected).abs().max() <= case["tolerance"][f"stage{t}.box_targets"]["atol"]
                start += len(rois)

    def test_losses_gradients_and_counts(self, run, batch, detector, check):
        case, _, _, outputs = run
        losses = detector(batch)
        names = self.loss_names(detector)
        assert losses.keys() == set(names.values())
        for theirs, ours in names.items():
            expected = outputs[f"losses.{theirs}"]
            assert (losses[ours] - expected).abs() <= LOSSES * expected.abs(), ours
        total = sum(losses.values())
        check(case, "loss", total, outputs["loss"])
        total.backward()
        parameters = dict(detector.named_parameters())
        theirs = case["settings"]["grad_norms_of"]
        places, unknown = rename(theirs, backbone_names({}) | part_names(len(detector.stages)))
        assert not unknown
        own = {name: place for place, name in places.items()}
        norms = torch.stack([parameters[own[name]].grad.norm() for name in theirs])
        check(case, "grad_norms", norms, outputs["grad_norms"])
        assert {name for name, p in parameters.items() if p.grad is not None} == set(places)
        for t, stage in enumerate(detector.stages):
            counts = stage.box_head.classification.seesaw.counts
            assert counts.tolist() == outputs[f"stage{t}.cum_samples"][:CLASSES].tolist()

    def test_the_form_for_devices_gives_the_same(self, run, batch, detector, monkeypatch):
        _, _, _, outputs = run
        monkeypatch.setattr(detector_module, "rows_to_compute", lambda valid: torch.arange(valid.numel()))
        monkeypatch.setattr(roi_features, "pooled_by_table", lambda rois: False)
        losses = detector(batch)
        for theirs, ours in self.loss_names(detector).items():
            expected = outputs[f"losses.{theirs}"]
            assert (losses[ours] - expected).abs() <= LOSSES * expected.abs(), ours
