"""Federated loss against plain loops in float64 and a hand-worked case, and which classes a step draws."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from tailseg.losses.classification import ClassStatistics
from tailseg.losses.federated import FederatedClassification

IMAGES = (100, 0, 1, 9, 400, 25)
CLASSES = len(IMAGES)


def make(images: tuple[int, ...] = IMAGES, **options) -> FederatedClassification:
    counts = torch.tensor(images)
    statistics = ClassStatistics(num_images=500, images=counts, instances=counts)
    return FederatedClassification(len(images), statistics=statistics, **options)


def case(rows: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of any class and labels that leave some absent: 0, 2 and background."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64) * 3
    labels = torch.tensor([0, 2, CLASSES])[torch.randint(0, 3, (rows,), generator=generator)]
    return logits, labels, torch.rand(rows, generator=generator) < 0.7


def everyone(labels: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool)


def entropy(z: float, t: float) -> float:
    """Binary cross-entropy of a moderate logit."""
    return math.log1p(math.exp(-z)) if t else math.log1p(math.exp(z))


def test_by_hand():
    # Both classes that are present and no other: sampled is 3, and background is the third.
    ours = make(sampled=3)
    labels, valid = everyone([0, 2, CLASSES])
    logits = torch.tensor([[1.0, 50.0, -2.0, 50.0, 50.0, 50.0], [0.0] * 6, [0.0] * 6])
    first = math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))
    expected = (first + 4 * math.log(2)) / 3
    assert ours.loss(logits, labels, valid)["classes"].item() == pytest.approx(expected, rel=1e-6)
    scores = ours.scores(torch.tensor([[0.0, math.log(3), 0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.75, 0.5, 0.5, 0.5, 0.5, 0.0]]))
    assert ours.scores(torch.zeros(0, 6)).shape == (0, 7)


@pytest.mark.parametrize("sampled", [0, 3, 4, 5, 50])
def test_equals_plain_loops_over_the_classes_that_were_drawn(sampled):
    ours = make(sampled=sampled)
    for seed in range(4):
        logits, labels, valid = case(seed=seed)
        torch.manual_seed(seed)
        counted = ours.draw(labels, valid).tolist()
        torch.manual_seed(seed)
        loss = ours.loss(logits, labels, valid)["classes"]
        total = 0.0
        for r in range(len(labels)):
            for j in range(CLASSES):
                if valid[r] and counted[j]:
                    total += entropy(logits[r, j].item(), labels[r].item() == j)
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(total / valid.sum().item(), rel=1e-12)


def test_a_step_counts_as_many_classes_as_it_shall():
    torch.manual_seed(0)
    for sampled, labels, expected in (
        (3, [0, 0, 2], 3),
        (3, [0, 2, CLASSES], 2),  # background is one of the three
        (1, [0, 2, 3, CLASSES], 3),  # those present count all the same
        (0, [0], 1),
        (2, [CLASSES], 1),
        (2, [], 2),
        (50, [0], 5),  # all but the class without images
        (50, [1], 6),  # which counts where it is present
    ):
        for _ in range(20):
            counted = make(sampled=sampled).draw(*everyone(labels) if labels else (torch.zeros(0).long(),) * 2)
            assert counted.sum().item() == expected, (sampled, labels)
            assert set(counted.tolist()) <= {0.0, 1.0}


def test_present_classes_always_count_and_absent_ones_of_weight_0_never():
    ours = make(sampled=4)
    torch.manual_seed(0)
    for _ in range(300):
        counted = ours.draw(*everyone([2, 2, CLASSES])).tolist()
        assert counted[2] == 1
        assert counted[1] == 0
    labels = torch.tensor([2, 1])
    assert ours.draw(labels, torch.tensor([True, False]))[1] == 0  # not valid, so not present
    assert ours.draw(labels, torch.tensor([True, True]))[1] == 1


def test_draws_agree_with_sampling_without_replacement():
    images, drawn, rounds = (400, 100, 25, 4, 1), 2, 4000
    ours = make(images=images, sampled=drawn)
    torch.manual_seed(0)
    nobody = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    share = torch.stack([ours.draw(*nobody) for _ in range(rounds)]).double().mean(0)
    expected = [0.0] * len(images)
    for order in permutations(range(len(images)), drawn):
        chance, left = 1.0, sum(math.sqrt(n) for n in images)
        for j in order:
            chance *= math.sqrt(images[j]) / left
            left -= math.sqrt(images[j])
        for j in order:
            expected[j] += chance
    for ours_j, theirs_j in zip(share.tolist(), expected, strict=True):
        assert abs(ours_j - theirs_j) < 5 * math.sqrt(theirs_j * (1 - theirs_j) / rounds)


def test_power_0_draws_all_alike():
    ours = make(images=(1000, 1, 1, 1), sampled=1, power=0.0)
    torch.manual_seed(0)
    nobody = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
    share = torch.stack([ours.draw(*nobody) for _ in range(2000)]).mean(0)
    assert (share - 0.25).abs().max() < 0.05


def test_gradcheck_with_a_fixed_draw():
    ours = make(sampled=4)
    logits, labels, valid = case(rows=6)

    def loss(z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return ours.loss(z, labels, valid)["classes"]

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_classes_that_do_not_count_get_no_gradient():
    ours, (logits, labels, valid) = make(sampled=4), case()
    torch.manual_seed(1)
    counted = ours.draw(labels, valid) > 0
    torch.manual_seed(1)
    ours.loss(logits.requires_grad_(), labels, valid)["classes"].backward()
    assert (logits.grad[:, ~counted] == 0).all()
    assert (logits.grad[valid][:, counted] != 0).all()


def test_per_sample_gradients_by_function_transforms():
    ours = make(sampled=CLASSES + 1, power=0)  # all classes count, whatever is drawn
    logits, labels, _ = case()
    of_one = torch.func.grad(lambda z, y: ours(z[None], y[None]))
    rows = torch.func.vmap(of_one, randomness="same")(logits, labels)
    leaf = logits.clone().requires_grad_()
    (ours(leaf, labels) * len(labels)).backward()
    torch.testing.assert_close(rows, leaf.grad)


def test_a_fresh_classifier_starts_at_a_probability_of_a_hundredth():
    ours = make()
    assert torch.tensor(ours.initial_bias).sigmoid().item() == pytest.approx(0.01, rel=1e-5)
    assert ours.num_logits == CLASSES


def test_empty_slots_change_nothing():
    ours = make(sampled=4)
    logits, labels, _ = case()
    labels[8:] = 3  # a class that no valid RoI has
    valid = torch.arange(12) < 8
    padded = torch.where(valid[:, None], logits, 1e4).requires_grad_()
    before = ours.weights.clone()
    torch.manual_seed(0)
    whole = ours.loss(logits[:8], labels[:8], valid[:8])["classes"]
    torch.manual_seed(0)
    loss = ours.loss(padded, labels, valid)["classes"]
    torch.testing.assert_close(loss, whole)
    loss.backward()
    assert (padded.grad[8:] == 0).all()
    assert (padded.grad[:8] != 0).any(1).all()
    assert torch.equal(ours.weights, before)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_valid_gives_zero_with_a_gradient(rows):
    logits = torch.ones(rows, CLASSES, requires_grad=True)
    loss = make().loss(logits, torch.arange(rows), torch.zeros(rows, dtype=torch.bool))["classes"]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_low_precision_logits_are_computed_in_float32():
    ours, (logits, labels, valid) = make(), case()
    low = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, scores = ours.loss(low, labels, valid)["classes"], ours.scores(low)
    assert loss.dtype == scores.dtype == torch.float32
    assert torch.equal(loss, ours.loss(low.float(), labels, valid)["classes"])


def test_a_logit_that_is_not_a_number_is_seen_even_where_its_class_does_not_count():
    for column in range(CLASSES):
        logits = torch.zeros(2, CLASSES)
        logits[1, column] = torch.nan
        assert make(sampled=1).loss(logits, *everyone([0, CLASSES]))["classes"].isnan()


def test_without_statistics_it_has_no_loss_until_a_state_is_loaded():
    ours, known = FederatedClassification(CLASSES), make()
    logits, labels, valid = case()
    assert ours.weights.isnan().all()
    with pytest.raises(ValueError, match="was made without statistics; pass statistics=ClassStatistics"):
        ours.loss(logits, labels, valid)
    assert list(known.state_dict()) == ["weights"]
    assert known.weights.tolist() == [10, 0, 1, 3, 20, 5]
    ours.load_state_dict(known.state_dict())
    assert torch.equal(ours.loss(logits, labels, valid)["classes"], known.loss(logits, labels, valid)["classes"])


def test_impossible_arguments():
    counts = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="statistics of 3 classes, received 2"):
        FederatedClassification(3, statistics=ClassStatistics(num_images=5, images=counts, instances=counts))
    for option in ("sampled", "power"):
        with pytest.raises(ValueError, match="at least 0"):
            FederatedClassification(3, **{option: -1})
