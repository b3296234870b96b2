"""Group softmax against plain loops in float64 and a hand-worked case, and whom each group counts."""

import csv
import math

import pytest
import torch
from torch import Tensor

from tailseg.losses.classification import ClassStatistics
from tailseg.losses.group_softmax import GroupSoftmaxClassification

INSTANCES = (3, 5000, 10, 999, 9, 100, 1000, 50)  # of groups 0, 3, 1, 2, 0, 2, 3, 1
GROUPS = (0, 3, 1, 2, 0, 2, 3, 1)
CLASSES, FOREGROUND = 8, 4


def make(others_ratio: float = 8.0, instances: tuple[int, ...] = INSTANCES, **options) -> GroupSoftmaxClassification:
    counts = torch.tensor(instances)
    statistics = ClassStatistics(num_images=10**5, images=counts, instances=counts)
    return GroupSoftmaxClassification(len(instances), statistics=statistics, others_ratio=others_ratio, **options)


def case(rows: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, CLASSES + 1 + FOREGROUND + 1, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, CLASSES + 1, (rows,), generator=generator)
    return logits, labels, torch.rand(rows, generator=generator) < 0.8


def columns_of(group: int) -> list[int]:
    """Columns of a group's softmax, its others first."""
    members = [j for j in range(CLASSES) if GROUPS[j] == group] if group < FOREGROUND else [CLASSES]
    return [CLASSES + 1 + group, *members]


def log_probability(row: list[float], group: int, column: int) -> float:
    return row[column] - math.log(sum(math.exp(row[j]) for j in columns_of(group)))


def group_of(label: int) -> int:
    return GROUPS[label] if label < CLASSES else FOREGROUND


def by_loops(logits: Tensor, labels: list[int], rows: list[list[int]]) -> float:
    """The loss if group g counts rows[g]."""
    total = 0.0
    for group, counted in enumerate(rows):
        losses = []
        for r in counted:
            answer = labels[r] if group_of(labels[r]) == group else CLASSES + 1 + group
            losses.append(-log_probability(logits[r].tolist(), group, answer))
        total += sum(losses) / max(len(losses), 1)
    return total


def every_row(labels: list[int], valid: list[bool]) -> list[list[int]]:
    """All valid rows, in groups that have a row of their own."""
    rows = [r for r in range(len(labels)) if valid[r]]
    return [
        rows if group == FOREGROUND or any(group_of(labels[r]) == group for r in rows) else []
        for group in range(FOREGROUND + 1)
    ]


def test_lvis_falls_into_groups_of_200_412_334_and_257(shared):
    with (shared / "data" / "lvis_v1_categories.csv").open() as file:
        rows = list(csv.DictReader(file))
    images, instances = (torch.tensor([int(row[name]) for row in rows]) for name in ("image_count", "instance_count"))
    statistics = ClassStatistics(num_images=99388, images=images, instances=instances)
    ours = GroupSoftmaxClassification(1203, statistics=statistics)
    assert ours.groups.sum(0).tolist() == [200, 412, 334, 257]
    assert ours.groups.sum(1).eq(1).all()
    assert ours.num_logits == 1209
    assert ours.initial_bias == 0


def test_a_class_at_a_threshold_begins_the_next_group():
    ours = make()
    assert ours.groups.argmax(1).tolist() == list(GROUPS)
    assert ours.groups.dtype == torch.float32
    assert make(thresholds=(1000,)).groups.argmax(1).tolist() == [0, 1, 0, 0, 0, 0, 1, 0]
    assert make(thresholds=()).num_logits == CLASSES + 1 + 2


def test_by_hand():
    # Class 0 is rare, class 1 frequent: columns class 0, class 1, background, others of both, others of background.
    ours = make(instances=(5, 50), thresholds=(10,))
    assert ours.num_logits == 6
    logits = torch.tensor([[3.0, 1.0, 2.0, 1.0, 4.0, 6.0]]).log()
    one = torch.tensor([True])
    # Group of class 0: 3 of 3 + 1. Group of class 1 has no RoI. Background group: foreground, 6 of 2 + 6.
    loss = ours.loss(logits, torch.tensor([0]), one)["classes"].item()
    assert loss == pytest.approx(math.log(4 / 3) + math.log(8 / 6), rel=1e-6)
    # Of a background RoI alone no foreground group counts anything.
    loss = ours.loss(logits, torch.tensor([2]), one)["classes"].item()
    assert loss == pytest.approx(math.log(8 / 2), rel=1e-6)
    # Both together: class 0's group counts the background RoI as one of its others, (-ln 3/4 - ln 1/4) / 2.
    both = ours.loss(logits.expand(2, -1), torch.tensor([0, 2]), torch.tensor([True, True]))["classes"].item()
    expected = (math.log(4 / 3) + math.log(4)) / 2 + (math.log(8 / 6) + math.log(4)) / 2
    assert both == pytest.approx(expected, rel=1e-6)
    scores = torch.tensor([[3 / 4 * 6 / 8, 1 / 5 * 6 / 8, 2 / 8]])
    torch.testing.assert_close(ours.scores(logits), scores)


@pytest.mark.parametrize("scale", [1.0, 15.0])
def test_equals_plain_loops_where_all_others_count(scale):
    logits, labels, valid = case()
    logits = logits * scale
    expected = by_loops(logits, labels.tolist(), every_row(labels.tolist(), valid.tolist()))
    loss = make(others_ratio=100.0).loss(logits, labels, valid)["classes"]
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_equals_plain_loops_where_no_others_count():
    logits, labels, valid = case(seed=1)
    rows = every_row(labels.tolist(), valid.tolist())
    for group in range(FOREGROUND):
        rows[group] = [r for r in rows[group] if group_of(labels[r].item()) == group]
    loss = make(others_ratio=0.0).loss(logits, labels, valid)["classes"].item()
    assert loss == pytest.approx(by_loops(logits, labels.tolist(), rows), rel=1e-12)


def test_equals_plain_loops_over_the_rows_that_were_drawn():
    ours = make(others_ratio=2.0)
    torch.manual_seed(0)
    for seed in range(5):
        logits, labels, valid = case(seed=seed)
        logits.requires_grad_()
        loss = ours.loss(logits, labels, valid)["classes"]
        (grad,) = torch.autograd.grad(loss, logits)
        # A row that a group counts has a gradient at the group's own others.
        rows = [grad[:, CLASSES + 1 + group].nonzero()[:, 0].tolist() for group in range(FOREGROUND + 1)]
        assert loss.item() == pytest.approx(by_loops(logits.detach(), labels.tolist(), rows), rel=1e-12)
        for group in range(FOREGROUND + 1):
            own = [r for r in range(40) if valid[r] and group_of(labels[r].item()) == group]
            others = [r for r in range(40) if valid[r] and group_of(labels[r].item()) != group]
            wanted = len(others) if group == FOREGROUND else min(2 * len(own), len(others))
            assert set(own) <= set(rows[group]) <= set(own) | set(others)
            assert len(rows[group]) == len(own) + wanted


def test_others_are_drawn_anew_and_evenly():
    ours = make(others_ratio=3.0)
    rows, rounds = 31, 2000
    labels = torch.tensor([0] + [CLASSES] * (rows - 1))
    own, valid = ours._members()[labels] > 0, torch.ones(rows, dtype=torch.bool)
    torch.manual_seed(0)
    drawn = torch.stack([ours._counted(own, valid)[:, 0] for _ in range(rounds)])
    assert drawn[:, 0].all()
    assert (drawn.sum(1) == 4).all()
    share = drawn[:, 1:].double().mean(0)  # expected 0.1, with a standard deviation of 0.0067
    assert (share - 0.1).abs().max() < 5 * 0.0067


def test_a_fraction_of_others_is_rounded_down():
    ours, valid = make(others_ratio=1.5), torch.ones(10, dtype=torch.bool)
    for own, expected in ((1, 2), (2, 5), (3, 7)):
        labels = torch.tensor([0] * own + [CLASSES] * (10 - own))
        assert ours._counted(ours._members()[labels] > 0, valid)[:, 0].sum().item() == expected


def test_scores_equal_plain_loops():
    logits, _, _ = case(rows=6)
    scores = make().scores(logits)
    for r, row in enumerate(logits.tolist()):
        foreground = math.exp(log_probability(row, FOREGROUND, CLASSES + 1 + FOREGROUND))
        for j in range(CLASSES):
            expected = math.exp(log_probability(row, GROUPS[j], j)) * foreground
            assert scores[r, j].item() == pytest.approx(expected, rel=1e-5)
        assert scores[r, CLASSES].item() == pytest.approx(1 - foreground, rel=1e-5, abs=1e-7)
    assert scores.shape == (6, CLASSES + 1)
    assert make().scores(torch.zeros(0, logits.shape[1])).shape == (0, CLASSES + 1)


def test_gradcheck_where_all_others_count():
    logits, labels, valid = case(rows=7)
    ours = make(others_ratio=100.0)
    assert torch.autograd.gradcheck(lambda z: ours.loss(z, labels, valid)["classes"], logits.requires_grad_())


def test_groups_far_apart_stay_finite():
    logits = torch.full((3, CLASSES + FOREGROUND + 2), -1e4)
    logits[:, 1] = 1e4
    logits.requires_grad_()
    ours = make()
    loss = ours.loss(logits, torch.tensor([0, 1, CLASSES]), torch.ones(3, dtype=torch.bool))["classes"]
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    # Class 0, class 4 and the others of their group are level, although another group of the row lies far above.
    # Background and its group's others are level too. At 1e4 float32 has a spacing of 1e-3.
    assert ours.scores(logits.detach())[0, 0].item() == pytest.approx(1 / 3 * 1 / 2, rel=1e-3)


def test_empty_slots_change_nothing():
    ours = make()
    logits, labels, _ = case(rows=12)
    valid = torch.arange(12) < 8
    padded = torch.where(valid[:, None], logits, 1e4).requires_grad_()
    before = ours.groups.clone()
    torch.manual_seed(0)
    whole = ours.loss(logits[:8], labels[:8], valid[:8])["classes"]
    torch.manual_seed(0)  # slots after the others take random numbers after theirs
    loss = ours.loss(padded, labels, valid)["classes"]
    torch.testing.assert_close(loss, whole)
    loss.backward()
    assert (padded.grad[8:] == 0).all()
    assert (padded.grad[:8] != 0).any(1).all()
    assert torch.equal(ours.groups, before)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_valid_gives_zero_with_a_gradient(rows):
    logits = case(rows)[0].requires_grad_()
    loss = make().loss(logits, torch.arange(rows), torch.zeros(rows, dtype=torch.bool))["classes"]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_group_without_classes_or_rois_adds_nothing():
    ours = make(instances=(5000,) * CLASSES)  # all in the last group
    logits, labels, valid = case()
    logits.requires_grad_()
    loss = ours.loss(logits, labels, valid)["classes"]
    loss.backward()
    assert loss.isfinite()
    assert (logits.grad[:, CLASSES + 1 : CLASSES + FOREGROUND] == 0).all()
    assert (logits.grad[:, CLASSES + FOREGROUND] != 0).any()


def test_low_precision_logits_are_computed_in_float32():
    ours = make(others_ratio=100.0)
    logits, labels, valid = case()
    low = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, scores = ours.loss(low, labels, valid)["classes"], ours.scores(low)
    assert loss.dtype == scores.dtype == torch.float32
    assert torch.equal(loss, ours.loss(low.float(), labels, valid)["classes"])
    assert torch.equal(scores, ours.scores(low.float()))


def test_a_logit_that_is_not_a_number_is_seen():
    for column in range(CLASSES + FOREGROUND + 2):
        for row in range(3):
            logits = torch.zeros(3, CLASSES + FOREGROUND + 2)
            logits[row, column] = torch.nan
            loss = make().loss(logits, torch.tensor([0, 1, CLASSES]), torch.ones(3, dtype=torch.bool))["classes"]
            assert loss.isnan(), (row, column)


def test_without_statistics_it_has_no_loss_until_a_state_is_loaded():
    ours, known = GroupSoftmaxClassification(CLASSES, others_ratio=100.0), make(others_ratio=100.0)
    logits, labels, valid = case()
    assert ours.groups.isnan().all()
    with pytest.raises(ValueError, match="was made without statistics; pass statistics=ClassStatistics"):
        ours.loss(logits, labels, valid)
    assert list(known.state_dict()) == ["groups"]
    ours.load_state_dict(known.state_dict())
    assert torch.equal(ours.loss(logits, labels, valid)["classes"], known.loss(logits, labels, valid)["classes"])
    assert torch.equal(ours.scores(logits), known.scores(logits))


def test_impossible_arguments():
    counts = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="statistics of 3 classes, received 2"):
        GroupSoftmaxClassification(3, statistics=ClassStatistics(num_images=5, images=counts, instances=counts))
    for thresholds in ((10, 10), (100, 10)):
        with pytest.raises(ValueError, match="rising thresholds"):
            GroupSoftmaxClassification(3, thresholds=thresholds)
    with pytest.raises(ValueError, match="others_ratio"):
        GroupSoftmaxClassification(3, others_ratio=-1.0)
