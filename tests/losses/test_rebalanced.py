"""Class-balanced, LDAM and logit-adjusted cross-entropy by hand, against loops over classes, and where they meet."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailseg.losses.classification import ClassStatistics
from tailseg.losses.rebalanced import (
    ClassBalancedClassification,
    LDAMClassification,
    LogitAdjustmentClassification,
)

INSTANCES = [4000, 900, 35, 1, 0]
KINDS = [ClassBalancedClassification, LDAMClassification, LogitAdjustmentClassification]


def statistics(instances: list[int]) -> ClassStatistics:
    counts = torch.tensor(instances)
    return ClassStatistics(num_images=5000, images=counts, instances=counts)


def made(kind: type, instances: list[int] = INSTANCES, **options: float):
    return kind(len(instances), statistics=statistics(instances), **options)


def batch(seed: int, n: int = 24, classes: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes + 1, generator=generator, dtype=torch.float64) * scale
    return logits, torch.arange(n) % (classes + 1), torch.rand(n, generator=generator) < 0.7


def cross_entropy(z: list[float], label: int) -> float:
    top = max(z)
    return top + math.log(sum(math.exp(value - top) for value in z)) - z[label]


def class_balanced(z: list[float], label: int, instances: list[int], beta: float) -> float:
    weights = [(1 - beta) / (1 - beta ** max(n, 1)) for n in instances]
    mean = sum(weights) / len(weights)
    return cross_entropy(z, label) * (weights[label] / mean if label < len(instances) else 1)


def ldam(z: list[float], label: int, instances: list[int], max_margin: float, scale: float) -> float:
    counts = [max(n, 1) for n in instances]
    margins = [max_margin * (min(counts) / n) ** 0.25 for n in counts] + [0]
    return cross_entropy([v - scale * margins[j] if j == label else v for j, v in enumerate(z)], label)


def logit_adjustment(z: list[float], label: int, instances: list[int], tau: float) -> float:
    counts = [max(n, 1) for n in instances]
    shifts = [tau * math.log(len(counts) * n / sum(counts)) for n in counts] + [0]
    return cross_entropy([value + shift for value, shift in zip(z, shifts, strict=True)], label)


CASES = [
    (ClassBalancedClassification, class_balanced, {"beta": 0.999}),
    (ClassBalancedClassification, class_balanced, {"beta": 0.9}),
    (ClassBalancedClassification, class_balanced, {"beta": 0.0}),
    (LDAMClassification, ldam, {"max_margin": 0.5, "scale": 20.0}),
    (LDAMClassification, ldam, {"max_margin": 0.2, "scale": 1.0}),
    (LogitAdjustmentClassification, logit_adjustment, {"tau": 1.0}),
    (LogitAdjustmentClassification, logit_adjustment, {"tau": 0.6}),
]


@pytest.mark.parametrize(("kind", "definition", "options"), CASES)
def test_equals_its_definition(kind, definition, options):
    logits, labels, valid = batch(1)
    ours = made(kind, **options)
    rows = [r for r in range(len(labels)) if valid[r]]
    expected = sum(definition(logits[r].tolist(), int(labels[r]), INSTANCES, **options) for r in rows) / len(rows)
    assert ours.loss(logits, labels, valid)["classes"].item() == pytest.approx(expected, rel=1e-6)
    assert (ours.num_classes, ours.num_logits, ours.initial_bias) == (5, 6, 0.0)


def test_class_balanced_by_hand():
    # β = 1/2: effective numbers 1 and 7/4, weights 1 and 4/7, over their mean 14/11 and 8/11.
    ours = made(ClassBalancedClassification, [1, 3], beta=0.5)
    torch.testing.assert_close(ours.weights, torch.tensor([14 / 11, 8 / 11]))
    # At equal logits each RoI loses ln 3; the divisor is the number of RoIs and not 14/11 + 8/11 + 1 + 1.
    losses = ours.loss(torch.zeros(4, 3), torch.tensor([0, 2, 2, 0]), torch.tensor([True] * 4))
    assert losses["classes"].item() == pytest.approx(math.log(3) * (2 * 14 / 11 + 2) / 4, rel=1e-6)


def test_ldam_by_hand():
    ours = made(LDAMClassification, [16, 1, 0], max_margin=0.5, scale=10.0)
    torch.testing.assert_close(ours.relative_margins, torch.tensor([0.5, 1.0, 1.0]))
    one = torch.tensor([True])
    losses = [ours.loss(torch.zeros(1, 4), torch.tensor([label]), one)["classes"].item() for label in range(4)]
    expected = [math.log(3 * math.exp(margin) + 1) for margin in (2.5, 5, 5, 0)]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_logit_adjustment_by_hand():
    # Shares 3/4 and 1/4 of two classes: factors 3/2 and 1/2 beside background's 1.
    ours = made(LogitAdjustmentClassification, [3, 1])
    one = torch.tensor([True])
    losses = [ours.loss(torch.zeros(1, 3), torch.tensor([label]), one)["classes"].item() for label in range(3)]
    assert losses == pytest.approx([math.log(2), math.log(6), math.log(3)], rel=1e-6)


def test_logit_adjustment_keeps_the_share_of_background():
    torch.manual_seed(0)
    counts = (10 ** (torch.rand(50) * 4)).long().tolist()
    one = torch.tensor([True])
    loss = made(LogitAdjustmentClassification, counts).loss(torch.zeros(1, 51), torch.tensor([50]), one)
    assert loss["classes"].item() == pytest.approx(math.log(51), rel=1e-5)


def test_weights_hold_for_beta_next_to_one():
    instances = [10**6, 10, 0]
    for beta in (1 - 1e-9, 1 - 2**-53):  # all but 1 / n; in float32 both β would be 1
        weights = made(ClassBalancedClassification, instances, beta=beta).weights.double()
        inverse = torch.tensor([1e-6, 0.1, 1.0], dtype=torch.float64)
        torch.testing.assert_close(weights, inverse / inverse.mean(), rtol=1e-3, atol=0)
    assert made(ClassBalancedClassification).weights.mean().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "instances", "options"),
    [
        (ClassBalancedClassification, [70] * 5, {}),
        (ClassBalancedClassification, INSTANCES, {"beta": 0.0}),
        (LogitAdjustmentClassification, [70] * 5, {}),
        (LogitAdjustmentClassification, [0, 1, 1, 0, 1], {"tau": 2.0}),
        (LogitAdjustmentClassification, INSTANCES, {"tau": 0.0}),
        (LDAMClassification, INSTANCES, {"max_margin": 0.0}),
    ],
)
def test_cross_entropy_is_a_special_case(kind, instances, options):
    logits, labels, valid = batch(2)
    expected = F.cross_entropy(logits[valid], labels[valid])
    torch.testing.assert_close(made(kind, instances, **options).loss(logits, labels, valid)["classes"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_a_plain_softmax(kind):
    logits, _, _ = batch(3)
    scores = made(kind).scores(logits.bfloat16())
    assert scores.dtype == torch.float32
    assert torch.equal(scores, logits.bfloat16().float().softmax(1))
    assert made(kind).scores(torch.zeros(0, 6)).shape == (0, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    logits, labels, valid = batch(4, n=7)
    valid[0] = True
    ours = made(kind)
    assert torch.autograd.gradcheck(lambda z: ours.loss(z, labels, valid)["classes"], logits.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_empty_slots_change_nothing(kind):
    ours = made(kind)
    logits, labels, _ = batch(5, n=12)
    valid = torch.arange(12) < 8
    padded = torch.where(valid[:, None], logits, 1e4).requires_grad_()
    loss = ours.loss(padded, labels, valid)["classes"]
    torch.testing.assert_close(loss, ours.loss(logits[:8], labels[:8], valid[:8])["classes"])
    loss.backward()
    assert (padded.grad[8:] == 0).all()
    assert (padded.grad[:8] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_valid_gives_zero_with_a_gradient(kind, rows):
    logits = torch.randn(rows, 6, requires_grad=True)
    loss = made(kind).loss(logits, torch.full((rows,), 5), torch.zeros(rows, dtype=torch.bool))["classes"]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_logits_are_computed_in_float32(kind):
    ours = made(kind)
    logits, labels, valid = batch(6)
    low = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours.loss(low, labels, valid)["classes"]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ours.loss(low.float(), labels, valid)["classes"])


@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits_have_finite_gradients(kind):
    logits = torch.tensor([[1e4, -1e4, 0, 0, -1e4, 1e4]]).repeat(6, 1).requires_grad_()
    loss = made(kind).loss(logits, torch.arange(6), torch.ones(6, dtype=torch.bool))["classes"]
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_that_is_no_number_is_seen(kind):
    logits, labels, valid = batch(7)
    valid[2] = True
    logits[2, 0] = torch.nan
    assert made(kind).loss(logits, labels, valid)["classes"].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_without_statistics_there_is_no_loss_until_a_state_is_loaded(kind):
    logits, labels, valid = batch(8)
    known, unknown = made(kind), kind(5)
    with pytest.raises(ValueError, match="was made without statistics; pass statistics=ClassStatistics"):
        unknown.loss(logits, labels, valid)
    assert all(buffer.isnan().all() and buffer.shape == (5,) for buffer in unknown.buffers())
    unknown.load_state_dict(known.state_dict())
    assert len(known.state_dict()) == 1
    assert isinstance(known, nn.Module)
    assert torch.equal(unknown.loss(logits, labels, valid)["classes"], known.loss(logits, labels, valid)["classes"])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ClassBalancedClassification, {"beta": 1.0}),
        (ClassBalancedClassification, {"beta": -0.1}),
        (LDAMClassification, {"max_margin": -0.5}),
        (LDAMClassification, {"scale": 0.0}),
        (LDAMClassification, {"scale": math.nan}),
        (LogitAdjustmentClassification, {"tau": -1.0}),
    ],
)
def test_impossible_options(kind, options):
    with pytest.raises(ValueError, match=f"expected {'beta' if 'beta' in options else ''}.*received"):
        made(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_another_number_of_classes(kind):
    with pytest.raises(ValueError, match="expected statistics of 4 classes, received 5"):
        kind(4, statistics=statistics(INSTANCES))
