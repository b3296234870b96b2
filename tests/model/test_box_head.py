"""RoI sampling, the box head's losses by hand, and its empty cases."""

import math

import pytest
import torch
from tiny import made

from tailseg.layers.normalized import NormalizedLinear
from tailseg.losses import CrossEntropyClassification, EqualizationV2Classification, SeesawClassification
from tailseg.losses.classification import PRIOR_001
from tailseg.model.box_head import BoxHead, BoxPrediction, Pool, RoISampler, RoITargets, boxes_to_refine
from tailseg.model.boxes import encode
from tailseg.model.matching import Matcher
from tailseg.structures import Proposals

HALF = Matcher(positive_iou=0.5, negative_iou=0.5, low_quality_iou=0.5)
STDS = (0.1, 0.1, 0.2, 0.2)


def proposals_of(boxes: torch.Tensor, valid: torch.Tensor) -> Proposals:
    return Proposals(boxes=boxes, scores=torch.rand(valid.shape), valid=valid)


def two_images() -> tuple[Proposals, torch.Tensor, torch.Tensor, torch.Tensor]:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40]], [[5, 5, 25, 45], [0, 0, 0, 0]]])
    labels, valid = torch.tensor([[3, 1], [2, 0]]), torch.tensor([[True, True], [True, False]])
    near = boxes.clone()
    near[..., 2] -= 1.0
    far = torch.tensor([100.0, 100, 120, 130]).expand(2, 3, 4) + torch.arange(3.0)[None, :, None]
    found = torch.cat([near, far], dim=1)
    usable = torch.tensor([[True] * 5, [True, False, True, True, False]])
    return proposals_of(found, usable), boxes, labels, valid


def test_sampler_labels_every_candidate():
    proposals, boxes, labels, valid = two_images()
    targets = made(RoISampler, HALF, num_classes=7, num_samples=512, max_positive=128)(proposals, boxes, labels, valid)
    assert targets.rois.shape == (14, 5)
    assert targets.rois[:, 0].tolist() == [0] * 7 + [1] * 7
    assert targets.positive.tolist() == [True] * 4 + [False] * 3 + [True] * 2 + [False] * 5
    assert targets.valid.tolist() == [True] * 7 + [True] * 4 + [False] * 3
    rows = {tuple(r): (lab, obj) for r, lab, obj in zip(
        targets.rois.tolist(), targets.labels.tolist(), targets.objects.tolist(), strict=True
    )}  # fmt: skip
    assert rows[0, 0, 0, 10, 10] == (3, 0)
    assert rows[0, 20, 20, 39, 40] == (1, 1)
    assert rows[1, 5, 5, 25, 45] == (2, 2)  # objects are numbered over the whole batch
    assert rows[1, 5, 5, 24, 45] == (2, 2)
    assert rows[1, 100, 100, 120, 130] == (7, 0)
    own = boxes.flatten(0, 1)[targets.objects]
    positive = targets.positive
    assert torch.equal(targets.boxes[positive], own[positive])
    assert torch.equal(targets.boxes[~positive], targets.rois[~positive, 1:])
    assert (targets.labels[~positive] == 7).all()


def test_sampler_limits():
    proposals, boxes, labels, valid = two_images()
    torch.manual_seed(0)
    targets = made(RoISampler, HALF, num_classes=7, num_samples=4, max_positive=1)(proposals, boxes, labels, valid)
    assert targets.positive.tolist() == [True, False, False, False] * 2
    assert targets.valid.tolist() == [True] * 4 + [True] * 3 + [False]


def test_each_of_two_objects_with_one_box_has_itself():
    """Data with several labels an object: the proposals go to the first, but the second is learnt too."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [3, 3, 3, 9]]])  # and a box without area, which is ignored
    proposals = proposals_of(torch.tensor([[[0.0, 0, 9, 10], [50, 50, 60, 60]]]), torch.tensor([[True, True]]))
    matcher = Matcher(positive_iou=0.5, negative_iou=0.5)
    sampler = made(RoISampler, matcher, num_classes=7, num_samples=8, max_positive=8)
    targets = sampler(proposals, boxes, torch.tensor([[4, 5, 6]]), torch.tensor([[True, True, True]]))
    drawn = zip(targets.rois[targets.valid, 1:].tolist(), targets.labels[targets.valid].tolist(), strict=True)
    assert sorted((label, *box) for box, label in drawn) == [
        (4, 0, 0, 9, 10), (4, 0, 0, 10, 10), (5, 0, 0, 10, 10), (7, 50, 50, 60, 60)
    ]  # fmt: skip


def test_the_best_proposal_of_an_object_is_its_own_though_another_object_is_closer():
    """The low-quality step is among proposals alone: the objects themselves, put in front, take no part."""
    boxes = torch.tensor([[[0.0, 0, 100, 100], [0, 0, 100, 84]]])
    proposals = proposals_of(torch.tensor([[[0.0, 0, 100, 93], [0, 0, 100, 98]]]), torch.tensor([[True, True]]))
    # The first overlaps the objects by 0.93 and 0.903, the second by 0.98 and 0.857: it is the second object's best.
    targets = made(RoISampler, HALF, num_classes=7, num_samples=8, max_positive=8)(
        proposals, boxes, torch.tensor([[1, 2]]), torch.tensor([[True, True]])
    )
    labels = {tuple(roi[1:]): label for roi, label in zip(targets.rois.tolist(), targets.labels.tolist(), strict=True)}
    assert labels[0, 0, 100, 93] == 2
    assert labels[0, 0, 100, 98] == 1
    assert (labels[0, 0, 100, 100], labels[0, 0, 100, 84]) == (1, 2)


def test_sampler_without_objects():
    proposals, boxes, labels, valid = two_images()
    sampler = made(RoISampler, HALF, num_classes=7)
    targets = sampler(proposals, boxes, labels, torch.zeros_like(valid))
    assert not targets.positive.any()
    assert (targets.labels == 7).all()
    assert targets.valid.sum() == proposals.valid.sum()
    nothing = sampler(proposals_of(boxes[:, :0], valid[:, :0]), boxes, labels, torch.zeros_like(valid))
    assert not nothing.valid.any()


def pool_of(features: torch.Tensor) -> Pool:
    return lambda _rois, _shifts=None: features


def some_targets() -> RoITargets:
    rois = torch.tensor([[0.0, 0, 0, 10, 20], [0, 8, 8, 24, 24], [0, 1, 2, 3, 4], [0, 7, 7, 7, 7]])
    boxes = torch.tensor([[1.0, 0, 11, 10], [8, 8, 24, 24], [1, 2, 3, 4], [7, 7, 7, 7]])
    return RoITargets(
        rois=rois,
        labels=torch.tensor([1, 0, 2, 2]),
        positive=torch.tensor([True, True, False, False]),
        valid=torch.tensor([True, True, True, False]),
        is_ground_truth=torch.zeros(4, dtype=torch.bool),
        objects=torch.zeros(4, dtype=torch.int64),
        boxes=boxes,
    )


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_losses_by_hand(agnostic, beta):
    head = made(BoxHead, 1, CrossEntropyClassification(2), width=4, class_agnostic=agnostic, stds=STDS, box_beta=beta)
    logits = torch.zeros(4, 3, requires_grad=True)
    deltas = torch.zeros(4, 1 if agnostic else 2, 4)
    deltas[1, 0] = torch.tensor([0.5, -2.0, 0.0, 0.0])
    deltas[0, -1, 3] = -3.0
    deltas.requires_grad_()
    boxes, seen = some_targets().rois[:, 1:], torch.zeros(0)
    prediction = BoxPrediction(logits=logits, deltas=deltas, boxes=boxes, class_features=seen)
    losses = head.loss(prediction, some_targets())
    # First RoI: dx = 0.1 / 0.1 = 1, dy = -5 / 20 / 0.1 = -2.5, dh = ln 0.5 / 0.2; second: no shift is wanted.
    differences = [1.0, 2.5, 0.0, abs(-3 - math.log(0.5) / 0.2), 0.5, 2.0, 0.0, 0.0]
    if beta:
        differences = [d * d / 2 if d < 1 else d - 0.5 for d in differences]
    assert losses.keys() == {"classes", "box"}
    assert losses["classes"].item() == pytest.approx(math.log(3), rel=1e-6)
    assert losses["box"].item() == pytest.approx(sum(differences) / 3, rel=1e-5)
    sum(losses.values()).backward()
    assert torch.isfinite(deltas.grad).all()
    used = deltas.grad.abs().sum(2) > 0
    expected = [[True], [True], [False], [False]] if agnostic else [[False, True], [True, False]] + [[False] * 2] * 2
    assert used.tolist() == expected
    assert (logits.grad[3] == 0).all()


def test_no_positive_gives_no_box_loss():
    head = made(BoxHead, 1, SeesawClassification(2), width=4)
    targets = some_targets()
    empty = RoITargets(
        rois=targets.rois,
        labels=torch.full((4,), 2),
        positive=torch.zeros(4, dtype=torch.bool),
        valid=torch.zeros(4, dtype=torch.bool),
        is_ground_truth=targets.is_ground_truth,
        objects=targets.objects,
        boxes=targets.rois[:, 1:],
    )
    losses = head.loss(head(pool_of(torch.randn(4, 1, 7, 7)), targets.rois), empty)
    sum(losses.values()).backward()
    assert {name: value.item() for name, value in losses.items()} == {"classes": 0, "objectness": 0, "box": 0}
    assert all((p.grad == 0).all() for p in head.parameters())


@pytest.mark.parametrize(("agnostic", "columns"), [(False, 5), (True, 1)])
def test_forward_and_decode(agnostic, columns):
    torch.manual_seed(0)
    head = made(BoxHead, 3, SeesawClassification(5), width=8, normalized=True, class_agnostic=agnostic, stds=STDS)
    rois = torch.rand(6, 5)
    prediction = head(pool_of(torch.randn(6, 3, 7, 7)), rois)
    assert (prediction.logits.shape, prediction.deltas.shape) == ((6, 7), (6, columns, 4))
    assert torch.equal(prediction.boxes, rois[:, 1:])
    assert isinstance(head.classifier, NormalizedLinear)
    rois = torch.tensor([[0.0, 0, 10, 20], [5, 5, 8, 9]])
    wanted = torch.tensor([[2.0, 3, 9, 30], [4, 4, 9, 11]])
    deltas = encode(rois, wanted, STDS)[:, None].expand(-1, columns, -1)
    back = head.decode(
        BoxPrediction(logits=torch.zeros(2, 7), deltas=deltas, boxes=rois, class_features=torch.zeros(0))
    )
    torch.testing.assert_close(back, wanted[:, None].expand(-1, columns, -1))


@pytest.mark.parametrize("agnostic", [False, True])
def test_no_rois(agnostic):
    head = made(BoxHead, 2, CrossEntropyClassification(3), width=4, class_agnostic=agnostic)
    prediction = head(pool_of(torch.zeros(0, 2, 7, 7)), torch.zeros(0, 5))
    assert (prediction.logits.shape, prediction.deltas.shape) == ((0, 4), (0, 1 if agnostic else 3, 4))
    none = torch.zeros(0, dtype=torch.int64)
    targets = RoITargets(
        rois=torch.zeros(0, 5), labels=none, positive=none.bool(), valid=none.bool(), objects=none,
        is_ground_truth=none.bool(),
        boxes=torch.zeros(0, 4),
    )  # fmt: skip
    losses = head.loss(prediction, targets)
    sum(losses.values()).backward()
    assert all(value.item() == 0 for value in losses.values())
    assert all((p.grad == 0).all() for p in head.parameters())


def test_tau_norm_works_at_test_time_only():
    torch.manual_seed(0)
    head = made(BoxHead, 4, CrossEntropyClassification(5), width=16, tau_norm=1.0)
    with torch.no_grad():
        head.classifier.weight *= torch.tensor([3.0, 1, 0.2, 1, 1, 2])[:, None]
        head.classifier.bias += torch.arange(6.0)
    features = torch.randn(7, 4, 7, 7)
    plain = head.train()(pool_of(features), torch.zeros(7, 5)).logits
    rebalanced = head.eval()(pool_of(features), torch.zeros(7, 5)).logits
    hidden = torch.relu(head.fc2(torch.relu(head.fc1(features.flatten(1)))))
    norms = head.classifier.weight[:5].norm(dim=1)
    rows = head.classifier.weight[:5] / norms[:, None] * norms.mean()
    torch.testing.assert_close(rebalanced[:, :5], hidden @ rows.T + 2.0)  # 2 is the mean bias of the classes
    torch.testing.assert_close(rebalanced[:, 5], plain[:, 5])
    assert not torch.allclose(rebalanced[:, :5], plain[:, :5])
    assert head.classifier.bias.tolist() == list(range(6))  # the weights themselves stay


@pytest.mark.parametrize("normalized", [False, True])
def test_the_classifier_starts_at_the_bias_that_the_loss_asks_for(normalized):
    head = made(BoxHead, 4, EqualizationV2Classification(3), width=8, normalized=normalized)
    assert (head.classifier.bias == PRIOR_001).all()
    assert (made(BoxHead, 4, SeesawClassification(3), width=8, normalized=normalized).classifier.bias == 0).all()


def convolutional(seed: int = 0, convs: int = 2) -> BoxHead:
    torch.manual_seed(seed)
    head = made(BoxHead, 3, CrossEntropyClassification(4), width=8, convs=convs, class_agnostic=True)
    for norm in head.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return head


def test_convolutions_replace_a_hidden_layer():
    """Each is followed by batch norm over all cells of the rows and a ReLU; then comes one hidden layer."""
    head = convolutional().double()
    assert head.fc2 is None
    assert all(conv.bias is None for conv in head.convs)
    features = torch.randn(6, 3, 7, 7, dtype=torch.float64)
    for training in (True, False):
        hidden = features
        for conv, norm in zip(head.convs, head.norms, strict=True):
            hidden = torch.nn.functional.conv2d(hidden, conv.weight, padding=1)
            mean, var = norm.running_mean.clone(), norm.running_var.clone()
            if training:
                mean, var = hidden.mean(dim=(0, 2, 3)), hidden.var(dim=(0, 2, 3), unbiased=False)
            hidden = (hidden - mean.view(3, 1, 1)) / (var + 1e-5).sqrt().view(3, 1, 1)
            hidden = (hidden * norm.weight.view(3, 1, 1) + norm.bias.view(3, 1, 1)).relu()
        hidden = (hidden.flatten(1) @ head.fc1.weight.T + head.fc1.bias).relu()
        expected = hidden @ head.classifier.weight.T + head.classifier.bias
        rois = torch.zeros(6, 5, dtype=torch.float64)
        prediction = head.train(training)(pool_of(features), rois, torch.ones(6, dtype=torch.bool))
        torch.testing.assert_close(prediction.logits, expected)
        deltas = hidden @ head.regressor.weight.T + head.regressor.bias
        torch.testing.assert_close(prediction.deltas, deltas.view(6, 1, 4))


def test_rows_that_are_not_live_do_not_matter():
    """To the others, whatever is in them: predictions, gradients and running statistics are those without them."""
    live = torch.tensor([True, False, True, True, False])
    torch.manual_seed(1)
    features, rois = torch.randn(5, 3, 7, 7), torch.rand(5, 5)
    features[~live] *= 1e4
    upstream = torch.randn(3, 5)

    def step(rows: torch.Tensor, flags: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        head = convolutional().train()
        prediction = head(pool_of(features[rows]), rois[rows], flags)
        logits = prediction.logits if flags is None else prediction.logits[flags]
        parameters = [*head.convs.parameters(), *head.norms.parameters(), head.fc1.weight]
        gradients = torch.autograd.grad((logits * upstream).sum(), parameters)
        return logits, [*gradients, *head.norms.buffers()]

    ours, theirs = step(torch.arange(5), live), step(live.nonzero().flatten(), None)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    for own, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_live_row_leaves_the_statistics_alone(rows):
    head = convolutional().train()
    before = [norm.running_var.clone() for norm in head.norms]
    prediction = head(pool_of(torch.randn(rows, 3, 7, 7)), torch.zeros(rows, 5), torch.zeros(rows, dtype=torch.bool))
    assert prediction.logits.shape == (rows, 5)
    assert all(torch.equal(norm.running_var, old) for norm, old in zip(head.norms, before, strict=True))
    (prediction.logits.sum() * 0 + prediction.deltas.sum() * 0).backward()
    assert all((p.grad == 0).all() for p in head.parameters())


def test_the_box_that_the_next_stage_refines() -> None:
    """That of the RoI's own class where one is known, else of the likeliest, which background is not."""
    boxes = torch.arange(24.0).view(3, 2, 4)
    classification = CrossEntropyClassification(2)
    logits = torch.tensor([[0.0, 1, 9], [2, 1, 0], [2, 1, 0]])
    assert boxes_to_refine(boxes, logits, classification)[:, 0].tolist() == [4, 8, 16]
    labels = torch.tensor([2, 1, 0])  # 2: background
    assert boxes_to_refine(boxes, logits, classification, labels)[:, 0].tolist() == [4, 12, 16]
    assert torch.equal(boxes_to_refine(boxes[:, :1], logits, classification), boxes[:, 0])
