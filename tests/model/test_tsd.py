"""TSD's head against the recording, its losses against a float64 statement, and by hand."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import made
from torch import Tensor

from tailseg.layers.normalized import NormalizedLinear
from tailseg.losses import (
    CLASSIFICATIONS,
    ClassStatistics,
    CrossEntropyClassification,
    EqualizationV2Classification,
    SeesawClassification,
)
from tailseg.losses.classification import PRIOR_001, frozen_statistics
from tailseg.model.box_head import BoxPrediction, RoITargets
from tailseg.model.roi_features import RoIPooler, pyramid_rows, shifted_roi_align
from tailseg.model.tsd import TsdBoxHead, constraint_means, paired_iou, progressive_gaps

STDS = (0.1, 0.1, 0.2, 0.2)
CHANNELS = 4
# The parts of the recording's peer that hold a classifier or regressor of all classes are told apart below.
NAMES = {
    "shared_fc.0": "shared.0",
    "delta_c.0": "class_shift.0",
    "delta_c.2": "class_shift.2",
    "delta_r.0": "box_shift.0",
    "delta_r.2": "box_shift.2",
    "shared_fcs.0": "sibling_branch.0",
    "shared_fcs.1": "sibling_branch.2",
    "fc_cls": "sibling_classifier",
    "fc_reg": "sibling_regressor",
    "TSD_pc_fcs.0": "class_branch.0",
    "TSD_pc_fcs.1": "class_branch.2",
    "TSD_fc_cls": "classifier",
    "TSD_pr_fcs.0": "box_branch.0",
    "TSD_pr_fcs.1": "box_branch.2",
    "TSD_fc_reg": "regressor",
}


class Images:
    """Pools from a pyramid as a detector does, and remembers what it was asked for."""

    def __init__(self, pyramid: list[Tensor]) -> None:
        self.pyramid = pyramid
        self.plain = made(RoIPooler, 7)
        self.shifts: list[Tensor] = []

    def __call__(self, rois: Tensor, shifts: Tensor | None = None) -> Tensor:
        if shifts is None:
            return self.plain(self.pyramid, rois)
        self.shifts += shifts.chunk(2)  # of P_c, then of P_r
        return shifted_roi_align(pyramid_rows(self.pyramid), rois, shifts, 7)


def images_of(batch: int = 2) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images([torch.randn(batch, CHANNELS, 32 >> i, 32 >> i, generator=generator) for i in range(4)])


def some_targets(classes: int = 3) -> RoITargets:
    """Three images of four slots: two positives, a negative and an empty slot; no positive; a positive."""
    boxes = torch.tensor(
        [
            [[10.0, 10, 50, 60], [60, 20, 100, 100], [0, 0, 9, 9], [0, 0, 0, 0]],
            [[5.0, 5, 80, 90], [30, 30, 31, 35], [0, 0, 0, 0], [0, 0, 0, 0]],
            [[20.0, 0, 90, 44], [1, 2, 3, 4], [70, 70, 120, 120], [8, 0, 90, 128]],
        ]
    ).flatten(0, 1)
    positive = torch.tensor([True, True, False, False] + [False] * 4 + [True, False, False, False])
    moved = boxes + torch.tensor([3.0, -4, 5, 6])
    image = torch.arange(3.0).repeat_interleave(4).unsqueeze(1)
    valid = torch.tensor([True, True, True, False, True, True, False, False] + [True] * 4)
    return RoITargets(
        rois=torch.cat([image, boxes], dim=1),
        labels=torch.where(positive, torch.arange(12) % classes, classes),
        positive=positive,
        valid=valid,
        is_ground_truth=torch.zeros(12, dtype=torch.bool),
        objects=torch.zeros(12, dtype=torch.int64),
        boxes=torch.where(positive.unsqueeze(1), moved, boxes),
    )


def without_rows(targets: RoITargets) -> RoITargets:
    return RoITargets(**{name: getattr(targets, name)[:0] for name in RoITargets.__slots__})


def without_positives(targets: RoITargets, classes: int) -> RoITargets:
    return replace(
        targets,
        labels=torch.full_like(targets.labels, classes),
        positive=torch.zeros_like(targets.positive),
        boxes=targets.rois[:, 1:],
    )


def test_recorded_head(recorded, check):
    case, inputs, state, outputs = next(case for case in recorded("tsd") if case[0]["name"] == "head_aligned")
    build = case["settings"]["build"]
    head = made(
        TsdBoxHead,
        build["in_channels"],
        CrossEntropyClassification(build["num_classes"] - 1),
        width=build["fc_out_channels"],
        stds=tuple(build["target_stds"]),
    ).double()
    # The peer also has deltas of background; what they add to the recorded gradients needs their rows, too.
    for name in ("regressor", "sibling_regressor"):
        setattr(head, name, torch.nn.Linear(build["fc_out_channels"], 4 * build["num_classes"]).double())
    ours = {f"{NAMES[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in state.items()}
    for name in ("classifier", "sibling_classifier"):
        for part in ("weight", "bias"):
            ours[f"{name}.{part}"] = ours[f"{name}.{part}"].roll(-1, 0)
    head.load_state_dict({name: value.double() for name, value in ours.items()})
    fixed = inputs["fixed"].double().requires_grad_()
    pyramid = [inputs[f"feature{i}"].double().requires_grad_() for i in range(4)]
    images = Images(pyramid)
    images.plain = lambda _, __: fixed
    rois = inputs["rois"].double()
    prediction = head.train()(images, rois)
    delta_c, delta_r = (shifts / head.gamma for shifts in images.shifts)
    assert (delta_r == delta_r[:, :, :1, :1]).all()  # the box moves as a whole
    found = {
        "cls_score": prediction.sibling.logits.roll(1, 1),
        "bbox_pred": prediction.sibling.deltas.flatten(1),
        "TSD_cls_score": prediction.logits.roll(1, 1),
        "TSD_bbox_pred": prediction.deltas.flatten(1),
        "delta_c": delta_c.flatten(1),
        "delta_r": delta_r[:, :, 0, 0],
    }
    for name, value in found.items():
        check(case, name, value, outputs[name])
        torch.testing.assert_close(value, outputs[name], rtol=0, atol=1e-9)
    sides = (rois[:, 3:] - rois[:, 1:3]).repeat(1, 2)
    moved = rois[:, 1:] + 0.1 * outputs["delta_r"].repeat(1, 2) * sides
    torch.testing.assert_close(prediction.boxes, moved, rtol=0, atol=1e-9)
    assert torch.equal(prediction.sibling.boxes, rois[:, 1:])
    (sum(value.square().sum() for value in found.values()) / 2).backward()
    leaves = {"fixed": fixed} | {f"feature{i}": f for i, f in enumerate(pyramid)}
    for name, leaf in leaves.items():
        check(case, f"grad.{name}", leaf.grad, outputs[f"grad.{name}"])
    parameters = dict(head.named_parameters())
    norms = []
    for key in case["settings"]["parameters"]:
        layer, _, part = key.rpartition(".")
        norms.append(parameters[f"{NAMES[layer]}.{part}"].grad.norm())
    check(case, "param_grad_norms", torch.stack(norms), outputs["param_grad_norms"])


def recorded_targets(recorded):
    """The case's prediction (shift, logits and deltas are leaves), targets and what was recorded."""
    case, inputs, _, outputs = next(case for case in recorded("tsd") if case[0]["name"] == "targets")
    rows, positives = len(inputs["rois"]), case["settings"]["positives"]
    rois, boxes = inputs["rois"].clone(), inputs["boxes"].clone()
    rois[:, 3:] += 1  # its widths are x2 - x1 + 1
    boxes[:, 2:] += 1
    positive = torch.arange(rows) < positives
    labels = outputs["labels"] - 1
    targets = RoITargets(
        rois=rois,
        labels=torch.where(positive, labels, 5),
        positive=positive,
        valid=torch.ones_like(positive),
        is_ground_truth=torch.zeros_like(positive),
        objects=torch.zeros(rows, dtype=torch.int64),
        boxes=torch.cat([boxes, rois[positives:, 1:]]),
    )
    leaves = {n: inputs[n].clone().requires_grad_() for n in ("TSD_cls_score", "TSD_bbox_pred", "delta_r")}
    sides = (rois[:, 3:] - rois[:, 1:3]).repeat(1, 2)
    prediction = BoxPrediction(
        logits=leaves["TSD_cls_score"].roll(-1, 1),
        deltas=leaves["TSD_bbox_pred"].view(rows, 6, 4)[:, 1:],
        boxes=rois[:, 1:] + 0.1 * leaves["delta_r"].repeat(1, 2) * sides,
        class_features=torch.zeros(0),
        sibling=BoxPrediction(
            logits=inputs["cls_score"].roll(-1, 1),
            deltas=inputs["bbox_pred"].view(rows, 6, 4)[:, 1:],
            boxes=rois[:, 1:],
            class_features=torch.zeros(0),
        ),
    )
    return case, prediction, targets, leaves, outputs


def test_recorded_constraints(recorded, check):
    case, prediction, targets, leaves, outputs = recorded_targets(recorded)
    head = made(TsdBoxHead, 1, CrossEntropyClassification(5), width=4, stds=STDS)
    losses = head.loss(prediction, targets)
    check(case, "pc_cls_loss", losses["pc_classes"].expand(14), outputs["pc_cls_loss"].mean().expand(14))
    check(case, "pc_loc_loss", losses["pc_box"].expand(8), outputs["pc_loc_loss"].mean().expand(8))
    (losses["pc_classes"] + losses["pc_box"]).backward()
    for name, leaf in leaves.items():
        check(case, f"grad.{name}", leaf.grad, outputs[f"grad.{name}"])


def test_recorded_values_of_each_roi(recorded, check):
    case, prediction, targets, _, outputs = recorded_targets(recorded)
    head = made(TsdBoxHead, 1, CrossEntropyClassification(5), width=4, stds=STDS)
    scores = [head._label_scores(p, targets) for p in (prediction, prediction.sibling)]
    check(case, "pc_cls_loss", progressive_gaps(*scores, 0.3), outputs["pc_cls_loss"])
    overlaps = [head._overlaps(p, targets) for p in (prediction, prediction.sibling)]
    check(case, "pc_loc_loss", progressive_gaps(*overlaps, 0.3)[:8], outputs["pc_loc_loss"])


def test_recorded_box_targets(recorded):
    """The L1 losses are their distance from deltas of 0."""
    _, prediction, targets, _, outputs = recorded_targets(recorded)
    head = made(TsdBoxHead, 1, CrossEntropyClassification(5), width=4, stds=STDS)
    zeros = torch.zeros_like(prediction.deltas)
    sibling = replace(prediction.sibling, deltas=zeros)
    losses = head.loss(replace(prediction, deltas=zeros, sibling=sibling), targets)
    for name, key in (("box", "TSD_bbox_targets"), ("sibling_box", "bbox_targets")):
        expected = outputs[key][:8].double().abs().sum() / 14
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("sibling", "own", "gap"), [(0.9, 0.6, 0.4), (0.4, 0.5, 0.2), (0.4, 0.8, 0.0), (1, 1, 0)])
def test_gaps_by_hand(sibling, own, gap):
    value, reference = (torch.tensor([float(number)], requires_grad=True) for number in (own, sibling))
    found = progressive_gaps(value, reference, 0.3)
    assert found.item() == pytest.approx(gap, abs=1e-6)
    found.sum().backward()
    assert value.grad.item() == (-1 if gap > 0 else 0)
    assert reference.grad is None


def test_images_without_positives_put_a_zero_into_the_means():
    targets = some_targets()
    gaps = torch.arange(1.0, 13)
    means = constraint_means(gaps, gaps, targets)
    # Counted are rows 1, 2, 3 of the first image, none and a zero of the second, 9 to 12 of the third.
    assert means["pc_classes"].item() == pytest.approx((1 + 2 + 3 + 9 + 10 + 11 + 12) / 8)
    assert means["pc_box"].item() == pytest.approx((1 + 2 + 9) / 4)
    assert constraint_means(None, gaps, targets).keys() == {"pc_box"}
    nothing = constraint_means(gaps, gaps, without_positives(targets, 3))
    assert [value.item() for value in nothing.values()] == [0, 0]


def test_overlap_of_pairs_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 1, 1], [5, 5, 5, 5]], requires_grad=True)
    others = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 10], [2, 0, 3, 1], [5, 5, 5, 5]])
    overlaps = paired_iou(boxes, others)
    assert overlaps.tolist() == pytest.approx([1, 25 / 125, 0, 0])
    overlaps.sum().backward()
    assert torch.isfinite(boxes.grad).all()
    near = torch.tensor([[0.0, 0, 10, 10], [3, 2, 9, 30]], dtype=torch.float64, requires_grad=True)
    far = torch.tensor([[2.0, 1, 11, 12], [4, -3, 8, 14]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda b: paired_iou(b, far), near)


def expected_losses(prediction: BoxPrediction, targets: RoITargets, classes: int) -> dict[str, float]:
    """The section's losses of cross-entropy, L1 and deltas of one class or each, a RoI at a time in float64."""
    rows, positives = targets.valid.nonzero().flatten().tolist(), targets.positive.nonzero().flatten().tolist()
    sums: dict[str, float] = {}
    scores: dict[str, dict[int, float]] = {}
    overlaps: dict[str, dict[int, float]] = {}
    for prefix, p in (("", prediction), ("sibling_", prediction.sibling)):
        probabilities = p.logits.double().softmax(1)
        scores[prefix] = {r: probabilities[r, targets.labels[r]].item() for r in rows}
        sums[f"{prefix}classes"] = -sum(math.log(score) for score in scores[prefix].values()) / len(rows)
        overlaps[prefix], distance = {}, 0.0
        for r in positives:
            column = int(targets.labels[r]) if p.deltas.shape[1] > 1 else 0
            x1, y1, x2, y2 = p.boxes[r].tolist()
            u1, v1, u2, v2 = targets.boxes[r].tolist()
            w, h = x2 - x1, y2 - y1
            goal = [
                ((u1 + u2) / 2 - (x1 + x2) / 2) / w / 0.1,
                ((v1 + v2) / 2 - (y1 + y2) / 2) / h / 0.1,
                math.log((u2 - u1) / w) / 0.2,
                math.log((v2 - v1) / h) / 0.2,
            ]
            deltas = p.deltas[r, column].tolist()
            distance += sum(abs(a - b) for a, b in zip(deltas, goal, strict=True))
            cx, cy = (x1 + x2) / 2 + deltas[0] * 0.1 * w, (y1 + y2) / 2 + deltas[1] * 0.1 * h
            w, h = w * math.exp(deltas[2] * 0.2), h * math.exp(deltas[3] * 0.2)
            shared = max(0, min(cx + w / 2, u2) - max(cx - w / 2, u1))
            shared *= max(0, min(cy + h / 2, v2) - max(cy - h / 2, v1))
            overlaps[prefix][r] = shared / (w * h + (u2 - u1) * (v2 - v1) - shared)
        sums[f"{prefix}box"] = distance / len(rows)
    image = targets.rois[:, 0].tolist()
    busy = {image[r] for r in positives}
    idle = len(set(image) - busy)
    for name, values, own in (
        ("pc_classes", scores, [r for r in rows if image[r] in busy]),
        ("pc_box", overlaps, positives),
    ):
        gaps = [max(0, values["sibling_"][r] + min(1 - values["sibling_"][r], 0.3) - values[""][r]) for r in own]
        sums[name] = sum(gaps) / (len(own) + idle)
    return sums


@pytest.mark.parametrize("agnostic", [False, True])
def test_losses_by_brute_force(agnostic):
    torch.manual_seed(0)
    head = made(TsdBoxHead, CHANNELS, CrossEntropyClassification(3), width=16, class_agnostic=agnostic).train()
    with torch.no_grad():
        for layer in (head.regressor, head.sibling_regressor, head.classifier, head.sibling_classifier):
            layer.weight.mul_(100)  # so that boxes and classes differ
    targets = some_targets()
    prediction = head(images_of(3), targets.rois, targets.valid)
    losses = head.loss(prediction, targets)
    expected = expected_losses(prediction, targets, 3)
    assert losses.keys() == expected.keys()
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in expected.values())


def test_box_loss_also_trains_the_shift_unless_its_target_is_detached():
    torch.manual_seed(0)
    targets, images = some_targets(), images_of(3)
    images.pyramid = [torch.zeros_like(f) for f in images.pyramid]  # P_r then acts through the target alone
    for detach in (False, True):
        head = made(TsdBoxHead, CHANNELS, CrossEntropyClassification(3), width=8, detach_targets=detach).train()
        losses = head.loss(head(images, targets.rois), targets)
        bias = head.box_shift[2].bias
        (gradient,) = torch.autograd.grad(losses["box"], bias, retain_graph=True)
        constrained = torch.autograd.grad(losses["pc_box"], bias)[0]
        assert (constrained != 0).any()  # the box is decoded from P_r either way
        if detach:
            assert (gradient == 0).all()
        else:
            # Features of 0 give shifts and deltas of 0. All three centres lie 4 to the right and 1 below: the loss
            # of each, |(goal - centre of P_r) / (0.1 w)|, falls by 0.1 / 0.1 with Δ. Nine RoIs are valid.
            assert gradient.tolist() == pytest.approx([-3 / 9, -3 / 9], rel=1e-5)


@pytest.mark.parametrize("loss", sorted(CLASSIFICATIONS))
def test_every_parameter_learns_with_every_loss(loss):
    torch.manual_seed(0)
    kind = CLASSIFICATIONS[loss]
    statistics = ClassStatistics(num_images=200, images=torch.tensor([9, 99, 1]), instances=torch.tensor([9, 999, 1]))
    classification = kind(3, **({"statistics": statistics} if kind.needs_statistics else {}))
    head = made(TsdBoxHead, CHANNELS, classification, width=16).train()
    targets, images = some_targets(), images_of(3)
    for features in images.pyramid:
        features.requires_grad_()
    losses = head.loss(head(images, targets.rois, targets.valid), targets)
    own = set(classification.loss(torch.zeros(12, classification.num_logits), targets.labels, targets.valid))
    assert losses.keys() == {*own, "box", *(f"sibling_{name}" for name in (*own, "box")), "pc_classes", "pc_box"}
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name
    assert (images.pyramid[0].grad != 0).any()


def test_statistics_are_updated_once_a_step():
    torch.manual_seed(0)
    targets, images = some_targets(), images_of(3)
    head = made(
        TsdBoxHead, CHANNELS, SeesawClassification(3), width=8, normalized=True, constrain_classes=False
    ).train()
    assert isinstance(head.classifier, NormalizedLinear)
    assert isinstance(head.sibling_classifier, NormalizedLinear)
    losses = head.loss(head(images, targets.rois), targets)
    assert head.classification.seesaw.counts.tolist() == [1, 1, 1]  # rows 0, 1 and 8
    assert head.classification.training
    assert losses.keys() == {
        "classes", "objectness", "box", "sibling_classes", "sibling_objectness", "sibling_box", "pc_box"
    }  # fmt: skip

    balanced = EqualizationV2Classification(3)
    alone = EqualizationV2Classification(3).train()
    head = made(TsdBoxHead, CHANNELS, balanced, width=8).train()
    assert (head.sibling_classifier.bias == PRIOR_001).all()
    prediction = head(images, targets.rois)
    head.loss(prediction, targets)
    alone.loss(prediction.logits, targets.labels, targets.valid)
    assert torch.equal(balanced.positive_gradients, alone.positive_gradients)
    assert torch.equal(balanced.negative_gradients, alone.negative_gradients)


def test_frozen_statistics_restores_every_mode():
    classification = SeesawClassification(2).train()
    classification.seesaw.eval()
    with frozen_statistics(classification):
        assert not classification.training
        assert not classification.seesaw.training
    assert classification.training
    assert not classification.seesaw.training


def test_the_sibling_is_for_training_only():
    torch.manual_seed(0)
    head = made(TsdBoxHead, CHANNELS, CrossEntropyClassification(3), width=8, class_agnostic=True)
    targets, images = some_targets(), images_of(3)
    trained = head.train()(images, targets.rois)
    tested = head.eval()(images, targets.rois)
    assert tested.sibling is None
    assert torch.equal(tested.logits, trained.logits)
    assert torch.equal(tested.deltas, trained.deltas)
    assert head.loss(tested, targets).keys() == {"classes", "box"}
    head.sibling_branch = head.sibling_classifier = head.sibling_regressor = None  # not even looked at
    assert torch.equal(head(images, targets.rois).logits, trained.logits)


def test_decoded_boxes_start_at_the_moved_roi_and_are_not_clipped():
    head = made(TsdBoxHead, CHANNELS, CrossEntropyClassification(2), width=8, class_agnostic=True, stds=STDS)
    boxes = torch.tensor([[-30.0, 5, 10, 15]])
    deltas = torch.tensor([[[5.0, -10, 0, math.log(2) / 0.2]]])
    none = torch.zeros(0)
    decoded = head.decode(BoxPrediction(logits=none, deltas=deltas, boxes=boxes, class_features=none))
    torch.testing.assert_close(decoded, torch.tensor([[[-10.0, -10, 30, 10]]]))


def test_shifts_may_start_at_zero():
    torch.manual_seed(0)
    targets = some_targets()
    for zero in (False, True):
        images = images_of(3)
        head = made(TsdBoxHead, CHANNELS, CrossEntropyClassification(2), width=8, zero_init_shifts=zero)
        prediction = head(images, targets.rois)
        assert [shifts.shape for shifts in images.shifts] == [(12, 2, 7, 7)] * 2
        assert all((shifts == 0).all() == zero for shifts in images.shifts)
        assert torch.equal(prediction.boxes, targets.rois[:, 1:]) == zero


def test_initial_weights():
    torch.manual_seed(0)
    head = made(TsdBoxHead, 16, CrossEntropyClassification(40), width=128)
    for layer in (head.shared[0], head.class_shift[0], head.class_shift[2], head.box_branch[2], head.sibling_branch[0]):
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.05)
        assert (layer.bias == 0).all()
    for layer in (head.classifier, head.sibling_classifier):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    for layer in (head.regressor, head.sibling_regressor):
        assert layer.weight.std().item() == pytest.approx(0.001, rel=0.05)


def test_tau_norm_works_at_test_time_only():
    torch.manual_seed(0)
    images, rois = images_of(3), some_targets().rois
    head = made(TsdBoxHead, CHANNELS, CrossEntropyClassification(3), width=8, tau_norm=1.0)
    with torch.no_grad():
        head.classifier.weight *= torch.tensor([3.0, 1, 0.2, 1])[:, None]
    plain, tested = head.train()(images, rois).logits, head.eval()(images, rois).logits
    norms = head.classifier.weight[:3].norm(dim=1)
    torch.testing.assert_close(tested[:, :3], plain[:, :3] * norms.mean() / norms)  # biases are 0
    torch.testing.assert_close(tested[:, 3], plain[:, 3])


def test_bfloat16_autocast():
    torch.manual_seed(0)
    targets, images = some_targets(), images_of(3)
    head = made(TsdBoxHead, CHANNELS, SeesawClassification(3), width=16, normalized=True).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = head(images, targets.rois, targets.valid)
        losses = head.loss(prediction, targets)
    for value in (prediction.deltas, prediction.boxes, *images.shifts, *losses.values()):
        assert value.dtype == torch.float32
    exact = head(images, targets.rois, targets.valid)
    torch.testing.assert_close(prediction.boxes, exact.boxes, rtol=0, atol=1.0)
    torch.testing.assert_close(prediction.logits.float(), exact.logits, rtol=0, atol=1.5)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_slots_that_were_not_filled_count_nowhere():
    torch.manual_seed(0)
    head = made(TsdBoxHead, CHANNELS, CrossEntropyClassification(3), width=8).train()
    targets = some_targets()
    prediction = head(images_of(3), targets.rois)
    logits = prediction.logits.detach().requires_grad_()
    deltas = prediction.deltas.detach().requires_grad_()
    sibling = replace(prediction.sibling, logits=prediction.sibling.logits.detach().requires_grad_())
    losses = head.loss(replace(prediction, logits=logits, deltas=deltas, sibling=sibling), targets)
    sum(losses.values()).backward()
    for leaf in (logits, sibling.logits):
        assert (leaf.grad.abs().sum(1) > 0).tolist() == targets.valid.tolist()
    assert (deltas.grad.flatten(1).abs().sum(1) > 0).tolist() == targets.positive.tolist()


@pytest.mark.parametrize("case", ["no positive", "no rows"])
def test_empty_cases_give_zeros_with_a_graph(case):
    torch.manual_seed(0)
    head = made(TsdBoxHead, CHANNELS, CrossEntropyClassification(3), width=8).train()
    targets = some_targets()
    targets = without_positives(targets, 3) if case == "no positive" else without_rows(targets)
    prediction = head(images_of(3), targets.rois, targets.valid)
    losses = head.loss(prediction, targets)
    zero = {"box", "sibling_box", "pc_classes", "pc_box"} if case == "no positive" else losses.keys()
    assert all(losses[name].item() == 0 and losses[name].requires_grad for name in zero)
    sum(losses[name] for name in zero).backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    none = {name for name, gradient in gradients.items() if gradient is None}
    # Of the losses that are 0 without positives none needs the sibling's logits' gradient.
    assert none == (set() if case == "no rows" else {"sibling_classifier.weight", "sibling_classifier.bias"})
    assert all((gradient == 0).all() for name, gradient in gradients.items() if name not in none)
    assert head.decode(prediction).shape == (len(targets.rois), 3, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_does_not_wait():
    torch.manual_seed(0)
    head = made(TsdBoxHead, CHANNELS, SeesawClassification(3), width=16, normalized=True).train()
    targets, images = some_targets(), images_of(3)
    expected = head.loss(head(images, targets.rois, targets.valid), targets)
    head, images.pyramid = head.cuda(), [features.cuda() for features in images.pyramid]
    targets = RoITargets(**{name: getattr(targets, name).cuda() for name in RoITargets.__slots__})

    def step() -> dict[str, Tensor]:
        head.classification.seesaw.counts.zero_()
        losses = head.loss(head(images, targets.rois, targets.valid), targets)
        torch.autograd.grad(torch.stack(list(losses.values())).sum(), list(head.parameters()))
        return losses

    step()  # constants are copied and kernels loaded the first time
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].cpu(), value, rtol=1e-2, atol=1e-3)  # matrices may run in TF32
