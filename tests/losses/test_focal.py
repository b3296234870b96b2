"""Focal loss by hand, against loops and against torchvision's, and where powers of 1 - p lose their digits."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from tailseg.losses.focal import FocalClassification

OPTIONS = [(2.0, 0.25), (0.5, 0.25), (0.0, 0.25), (5.0, 0.9), (1.0, 0.0), (1.0, 1.0)]


def batch(seed: int, n: int = 20, classes: int = 4, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale
    return logits, torch.arange(n) % (classes + 1), torch.rand(n, generator=generator) < 0.7


@pytest.mark.parametrize(("gamma", "alpha"), OPTIONS)
def test_equals_its_definition(gamma, alpha):
    logits, labels, valid = batch(1)
    total = foreground = 0.0
    for z, label, counts in zip(logits.tolist(), labels.tolist(), valid.tolist(), strict=True):
        if not counts:
            continue
        foreground += label < 4
        for j, value in enumerate(z):
            p = 1 / (1 + math.exp(-value))
            p_t, alpha_t = (p, alpha) if j == label else (1 - p, 1 - alpha)
            total -= alpha_t * (1 - p_t) ** gamma * math.log(p_t)
    loss = FocalClassification(4, gamma=gamma, alpha=alpha).loss(logits, labels, valid)["classes"]
    assert loss.item() == pytest.approx(total / foreground, rel=1e-9)


@pytest.mark.parametrize(("gamma", "alpha"), OPTIONS)
def test_equals_torchvision(gamma, alpha):
    logits, labels, _ = batch(2)
    ours, theirs = logits.float().requires_grad_(), logits.float().requires_grad_()
    loss = FocalClassification(4, gamma=gamma, alpha=alpha).loss(ours, labels, torch.ones(20, dtype=torch.bool))
    expected = sigmoid_focal_loss(theirs, F.one_hot(labels, 5)[:, :4].float(), alpha, gamma, "sum") / 16
    torch.testing.assert_close(loss["classes"], expected, rtol=1e-5, atol=1e-6)
    loss["classes"].backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_by_hand():
    # Probabilities 3/4 and 1/2; the label is class 0, then background; one foreground RoI is the divisor.
    logits = torch.tensor([[math.log(3), 0.0]] * 2)
    loss = FocalClassification(2).loss(logits, torch.tensor([0, 2]), torch.tensor([True, True]))["classes"]
    positive = 0.25 * 0.25**2 * math.log(4 / 3)
    negative = 0.75 * 0.5**2 * math.log(2)
    mistaken = 0.75 * 0.75**2 * math.log(4)
    assert loss.item() == pytest.approx(positive + negative + mistaken + negative, rel=1e-6)


def test_without_focus_it_is_weighted_binary_cross_entropy():
    logits, labels, valid = batch(3)
    targets = F.one_hot(labels, 5)[:, :4].double()
    weights = torch.where(targets > 0, 0.3, 0.7).double() * valid[:, None]
    expected = F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum")
    loss = FocalClassification(4, gamma=0.0, alpha=0.3).loss(logits, labels, valid)["classes"]
    torch.testing.assert_close(loss, expected / (valid & (labels < 4)).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_extreme_logits_have_finite_gradients(gamma):
    steps = [0.0, 1e-3, 1.0, 20.0, 90.0, 1e3, 1e4]
    logits = torch.tensor([steps, [-z for z in steps]]).T.reshape(-1, 1).requires_grad_()
    for label in (0, 1):
        labels, valid = torch.full((14,), label), torch.ones(14, dtype=torch.bool)
        ours = FocalClassification(1, gamma=gamma)
        value = ours.loss(logits, labels, valid)["classes"]
        (grad,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert grad.isfinite().all()
        double = logits.detach().double().requires_grad_()
        exact = ours.loss(double, labels, valid)["classes"]
        torch.testing.assert_close(value, exact.float())
        torch.testing.assert_close(grad, torch.autograd.grad(exact, double)[0].float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradcheck(gamma):
    logits, labels, valid = batch(4, n=7)
    valid[0] = True
    ours = FocalClassification(4, gamma=gamma)
    assert torch.autograd.gradcheck(lambda z: ours.loss(z, labels, valid)["classes"], logits.requires_grad_())


def test_a_fresh_classifier_has_the_prior_and_a_small_loss():
    ours = FocalClassification(1203)
    assert (ours.num_classes, ours.num_logits) == (1203, 1203)
    assert ours.initial_bias == pytest.approx(-math.log(99), abs=1e-6)
    logits = torch.full((8, 1203), ours.initial_bias)
    assert ours.scores(logits)[:, :-1].mean().item() == pytest.approx(0.01, rel=1e-5)
    loss = ours.loss(logits, torch.tensor([5] * 2 + [1203] * 6), torch.ones(8, dtype=torch.bool))["classes"]
    assert loss.item() < 2  # with gamma = 0 it would be 37


def test_only_background_is_divided_by_one():
    logits, _, _ = batch(5, n=6)
    ours, labels = FocalClassification(4), torch.full((6,), 4)
    six = ours.loss(logits, labels, torch.ones(6, dtype=torch.bool))["classes"]
    each = [ours.loss(logits[r : r + 1], labels[:1], torch.tensor([True]))["classes"] for r in range(6)]
    torch.testing.assert_close(six, sum(each))


def test_scores_are_sigmoids_and_no_background():
    logits, _, _ = batch(6)
    scores = FocalClassification(4).scores(logits.bfloat16())
    assert scores.dtype == torch.float32
    assert torch.equal(scores[:, :4], logits.bfloat16().float().sigmoid())
    assert (scores[:, 4] == 0).all()
    assert FocalClassification(4).scores(torch.zeros(0, 4)).shape == (0, 5)


def test_empty_slots_change_nothing():
    ours = FocalClassification(4)
    logits, labels, _ = batch(7, n=12)
    valid = torch.arange(12) < 8
    padded = torch.where(valid[:, None], logits, 1e4).requires_grad_()
    loss = ours.loss(padded, labels, valid)["classes"]
    torch.testing.assert_close(loss, ours.loss(logits[:8], labels[:8], valid[:8])["classes"])
    loss.backward()
    assert (padded.grad[8:] == 0).all()
    assert (padded.grad[:8] != 0).all()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_valid_gives_zero_with_a_gradient(rows):
    logits = torch.randn(rows, 4, requires_grad=True)
    loss = FocalClassification(4).loss(logits, torch.full((rows,), 4), torch.zeros(rows, dtype=torch.bool))["classes"]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_low_precision_logits_are_computed_in_float32():
    ours = FocalClassification(4)
    logits, labels, valid = batch(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours.loss(logits.bfloat16(), labels, valid)["classes"]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ours.loss(logits.bfloat16().float(), labels, valid)["classes"])


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_a_logit_that_is_no_number_is_seen(gamma):
    logits, labels, valid = batch(9)
    valid[2] = True
    logits[2, 0] = torch.nan
    assert FocalClassification(4, gamma=gamma).loss(logits, labels, valid)["classes"].isnan()


def test_nothing_has_to_be_stored():
    ours = FocalClassification(4)
    assert not ours.state_dict()
    FocalClassification(4).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("options", [{"gamma": -1.0}, {"gamma": math.nan}, {"alpha": -0.1}, {"alpha": 1.1}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match="expected gamma >= 0 and alpha in"):
        FocalClassification(3, **options)
