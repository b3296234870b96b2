"""EQL and EQL v2 against the recordings, plain loops in float64 and by hand, and what their state promises."""

import csv
import math

import pytest
import torch
from torch import Tensor

from tailseg.losses.classification import PRIOR_001, ClassStatistics
from tailseg.losses.equalization import EqualizationClassification, EqualizationV2Classification


def statistics_of(frequencies: Tensor) -> ClassStatistics:
    images = (frequencies.double() * 10**9).round().long()
    return ClassStatistics(num_images=10**9, images=images, instances=images)


def eql(classes: int) -> EqualizationClassification:
    """Every other class is rare."""
    frequencies = torch.tensor([0.5 if j % 2 else 0.0001 for j in range(classes)])
    return EqualizationClassification(classes, statistics=statistics_of(frequencies))


def eql_v2(classes: int) -> EqualizationV2Classification:
    """Some gradients have been seen, so that weights differ; class 0 has had none."""
    ours = EqualizationV2Classification(classes)
    ours.positive_gradients.copy_(torch.arange(classes) * 0.5)
    ours.negative_gradients.copy_(torch.arange(classes) * 0.1 * torch.arange(classes))
    return ours


KINDS = [eql, eql_v2]


def case(outputs: int, classes: int, rows: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, outputs, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, classes + 1, (rows,), generator=generator)
    return logits, labels, torch.rand(rows, generator=generator) < 0.7


def entropy(z: float, t: float) -> float:
    """Binary cross-entropy of a moderate logit."""
    return math.log1p(math.exp(-z)) if t else math.log1p(math.exp(z))


def test_eql_recorded_sequences(recorded, check):
    seen = 0
    for case, inputs, _, outputs in recorded("eql"):
        if case["kind"] != "eql_sequence":
            continue
        about = case["settings"]
        ours = EqualizationClassification(
            about["num_classes"], statistics=statistics_of(inputs["frequencies"]), threshold=about["lambda"]
        )
        for number in range(about["batches"]):
            batch = f"batch{number}"
            logits, labels = inputs[f"{batch}.logits"].clone().requires_grad_(), inputs[f"{batch}.labels"]
            loss = ours.loss(logits, labels, torch.ones_like(labels, dtype=torch.bool))["classes"]
            check(case, f"{batch}.loss", loss, outputs[f"{batch}.loss"])
            check(case, f"{batch}.grad", torch.autograd.grad(loss, logits)[0], outputs[f"{batch}.grad"])
        seen += 1
    assert seen == 2


def test_eql_v2_recorded_sequence(recorded, check):
    seen = 0
    for case, inputs, _, outputs in recorded("eql"):
        if case["kind"] != "eqlv2_sequence":
            continue
        about = case["settings"]
        options = {name: about[name] for name in ("gamma", "mu", "alpha")}
        ours = EqualizationV2Classification(about["num_classes"], **options)
        for number in range(about["batches"]):
            batch = f"batch{number}"
            logits, labels = inputs[f"{batch}.logits"].clone().requires_grad_(), inputs[f"{batch}.labels"]
            loss = ours.loss(logits, labels, torch.ones_like(labels, dtype=torch.bool))["classes"]
            check(case, f"{batch}.loss", loss, outputs[f"{batch}.loss"])
            check(case, f"{batch}.grad", torch.autograd.grad(loss, logits)[0], outputs[f"{batch}.grad"])
            check(case, f"{batch}.pos_grad", ours.positive_gradients, outputs[f"{batch}.pos_grad"])
            check(case, f"{batch}.neg_grad", ours.negative_gradients, outputs[f"{batch}.neg_grad"])
            check(case, f"{batch}.pos_neg", ours.ratios(), outputs[f"{batch}.pos_neg"])
        check(case, "scores", ours.scores(inputs["batch0.logits"]), outputs["scores"])
        seen += 1
    assert seen == 1


def test_eql_by_hand():
    ours = EqualizationClassification(2, statistics=statistics_of(torch.tensor([0.5, 0.0001])))
    logits, one = torch.tensor([[1.0, -2.0]]), torch.tensor([True])
    assert ours.spared.tolist() == [0, 1]
    assert ours.num_logits == 2
    # Foreground of class 0 leaves rare class 1 alone: ln(1 + 1/e). Background pushes both.
    foreground, background = (ours.loss(logits, torch.tensor([label]), one)["classes"].item() for label in (0, 2))
    assert foreground == pytest.approx(0.313262, abs=1e-6)
    assert background == pytest.approx(1.440190, abs=1e-6)
    # A rare class's own RoI counts for itself and for the frequent class.
    own = ours.loss(logits, torch.tensor([1]), one)["classes"].item()
    assert own == pytest.approx(math.log1p(math.e) + math.log1p(math.exp(2)), rel=1e-6)


def test_eql_v2_by_hand():
    ours = EqualizationV2Classification(2)
    logits, all_valid = torch.tensor([[0.0, math.log(3), 0.0]]), torch.tensor([True])
    # Nothing seen: all weights are 1. Probabilities 1/2, 3/4 and 1/2 of background.
    loss = ours.loss(logits, torch.tensor([0]), all_valid)["classes"].item()
    assert loss == pytest.approx(2 * math.log(2) + math.log(4), rel=1e-6)
    torch.testing.assert_close(ours.positive_gradients, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(ours.negative_gradients, torch.tensor([0.0, 0.75]))
    # Class 0 never was a negative: a huge ratio, weights 1. Class 1 never was a positive: its positives weigh nearly 5.
    share = 1 / (1 + math.exp(12 * 0.8))
    loss = ours.loss(logits, torch.tensor([1]), all_valid)["classes"].item()
    expected = 2 * math.log(2) + (1 + 4 * (1 - share)) * math.log(4 / 3)
    assert loss == pytest.approx(expected, rel=1e-6)
    scores = ours.scores(torch.tensor([[0.0, math.log(3), math.log(4)]]))
    torch.testing.assert_close(scores, torch.tensor([[0.5 * 0.2, 0.75 * 0.2, 0.8]]))


def test_eql_equals_plain_loops():
    ours, classes = eql(5), 5
    logits, labels, valid = case(classes, classes)
    total = 0.0
    for r in range(len(labels)):
        if not valid[r]:
            continue
        for j in range(classes):
            spared = labels[r] < classes and labels[r] != j and j % 2 == 0
            total += 0.0 if spared else entropy(logits[r, j].item(), labels[r] == j)
    loss = ours.loss(logits, labels, valid)["classes"]
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(total / valid.sum().item(), rel=1e-12)


def test_eql_v2_equals_plain_loops_over_batches():
    classes = 5
    ours = EqualizationV2Classification(classes, gamma=3.0, mu=0.5, alpha=2.0)
    seen = [[0.0] * classes, [0.0] * classes]  # as positive, as negative
    for seed in range(3):
        logits, labels, valid = case(classes + 1, classes, seed=seed)
        total, gained = 0.0, [[0.0] * classes, [0.0] * classes]
        for r in range(len(labels)):
            if not valid[r]:
                continue
            for j in range(classes + 1):
                z, t = logits[r, j].item(), labels[r].item() == j
                weight = 1.0
                if j < classes:
                    positive, negative = seen[0][j], seen[1][j]
                    ratio = positive / (negative + 1e-10) if positive or negative else 100.0
                    f = 1 / (1 + math.exp(-3.0 * (ratio - 0.5)))
                    weight = 1 + 2.0 * (1 - f) if t else f
                    gained[0 if t else 1][j] += weight * abs(1 / (1 + math.exp(-z)) - t)
                total += weight * entropy(z, t)
        loss = ours.loss(logits, labels, valid)["classes"].item()
        assert loss == pytest.approx(total / valid.sum().item(), rel=1e-6)  # gradients are kept in float32
        seen = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(seen, gained, strict=True)]
        torch.testing.assert_close(ours.positive_gradients, torch.tensor(seen[0]))
        torch.testing.assert_close(ours.negative_gradients, torch.tensor(seen[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    ours = kind(4).eval()
    logits, labels, valid = case(ours.num_logits, 4, rows=7)
    assert torch.autograd.gradcheck(lambda z: ours.loss(z, labels, valid)["classes"], logits.requires_grad_())


def test_lvis_has_815_classes_that_eql_spares(shared):
    with (shared / "data" / "lvis_v1_categories.csv").open() as file:
        images = torch.tensor([int(row["image_count"]) for row in csv.DictReader(file)])
    ours = EqualizationClassification(
        1203, statistics=ClassStatistics(num_images=99388, images=images, instances=images)
    )
    assert ours.spared.sum().item() == 815
    assert ours.spared.dtype == torch.float32


def test_scores_have_a_column_of_background():
    logits = torch.tensor([[0.0, math.log(3)]])
    torch.testing.assert_close(eql(2).scores(logits), torch.tensor([[0.5, 0.75, 0.0]]))
    for kind in KINDS:
        ours = kind(5)
        scores = ours.scores(torch.randn(30, ours.num_logits, generator=torch.Generator().manual_seed(0)) * 30)
        assert scores.shape == (30, 6)
        assert ((scores >= 0) & (scores <= 1)).all()
        assert ours.scores(torch.zeros(0, ours.num_logits)).shape == (0, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_classifier_starts_at_a_probability_of_a_thousandth(kind):
    ours = kind(1203)
    assert ours.initial_bias == PRIOR_001
    start = torch.full((4, ours.num_logits), ours.initial_bias)
    assert torch.allclose(start.sigmoid(), torch.tensor(0.001), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_slots_change_nothing(kind):
    full, part = kind(5), kind(5)
    logits, labels, _ = case(full.num_logits, 5, rows=12)
    valid = torch.arange(12) < 8
    padded = torch.where(valid[:, None], logits.float(), 1e4).requires_grad_()
    whole = part.loss(logits[:8].float(), labels[:8], valid[:8])["classes"]
    loss = full.loss(padded, labels, valid)["classes"]
    torch.testing.assert_close(loss, whole)
    loss.backward()
    assert (padded.grad[8:] == 0).all()
    assert (padded.grad[:8] != 0).any(1).all()
    for one, other in zip(full.buffers(), part.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_valid_gives_zero_with_a_gradient(kind, rows):
    ours, before = kind(4), kind(4)
    logits = torch.randn(rows, ours.num_logits, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = ours.loss(logits, torch.full((rows,), 4), torch.zeros(rows, dtype=torch.bool))["classes"]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    for one, other in zip(ours.buffers(), before.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_logits_are_computed_in_float32(kind):
    ours, plain = kind(5), kind(5)
    logits, labels, valid = case(ours.num_logits, 5)
    low = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, scores = ours.loss(low, labels, valid)["classes"], ours.scores(low)
    assert loss.dtype == scores.dtype == torch.float32
    assert torch.equal(loss, plain.loss(low.float(), labels, valid)["classes"])
    for one, other in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_that_is_not_a_number_is_seen(kind):
    for column in range(kind(4).num_logits):
        ours = kind(4)  # anew: EQL v2 keeps what it saw
        logits = torch.zeros(3, ours.num_logits)
        logits[1, column] = torch.nan
        assert ours.loss(logits, torch.tensor([0, 1, 4]), torch.ones(3, dtype=torch.bool))["classes"].isnan()


def test_without_statistics_eql_has_no_loss_until_a_state_is_loaded():
    ours, known = EqualizationClassification(3), eql(3)
    labels, valid = torch.tensor([0, 3]), torch.ones(2, dtype=torch.bool)
    assert ours.spared.isnan().all()
    with pytest.raises(ValueError, match="was made without statistics; pass statistics=ClassStatistics"):
        ours.loss(torch.zeros(2, 3), labels, valid)
    assert list(known.state_dict()) == ["spared"]
    ours.load_state_dict(known.state_dict())
    assert torch.equal(
        ours.loss(torch.ones(2, 3), labels, valid)["classes"], known.loss(torch.ones(2, 3), labels, valid)["classes"]
    )


def test_gradients_seen_are_part_of_the_state():
    ours, other = EqualizationV2Classification(3), EqualizationV2Classification(3)
    logits, labels, valid = case(4, 3)
    ours.loss(logits, labels, valid)
    other.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == ["positive_gradients", "negative_gradients"]
    assert torch.equal(other.ratios(), ours.ratios())
    assert torch.equal(other.loss(logits, labels, valid)["classes"], ours.loss(logits, labels, valid)["classes"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_keep_growing_in_a_model_of_low_precision(dtype):
    ours, same = EqualizationV2Classification(3), EqualizationV2Classification(3)
    for one in (ours, same):
        one.positive_gradients.fill_(48_776.25)
        one.negative_gradients.fill_(8_192.25)
    ours.to(dtype)
    logits, labels, valid = case(4, 3)
    logits = logits.to(dtype)
    assert torch.equal(ours.loss(logits, labels, valid)["classes"], same.loss(logits, labels, valid)["classes"])
    for name, sums in ours.state_dict().items():
        assert sums.dtype == torch.float32
        assert torch.equal(sums, same.state_dict()[name])
        assert (sums > {"positive_gradients": 48_776.25, "negative_gradients": 8_192.25}[name]).all()
    assert ours.double().ratios().dtype == torch.float64


def test_gradients_are_collected_in_training_only_and_without_a_graph():
    ours = EqualizationV2Classification(3).eval()
    logits, labels, valid = case(4, 3)
    ours.loss(logits, labels, valid)
    assert ours.ratios().tolist() == [100, 100, 100]
    ours.train()
    loss = ours.loss(logits.requires_grad_(), labels, valid)["classes"]
    assert (ours.positive_gradients > 0).all()
    assert (ours.negative_gradients > 0).all()
    assert ours.positive_gradients.dtype == ours.negative_gradients.dtype == torch.float32
    assert not ours.positive_gradients.requires_grad
    loss.backward()  # although the statistics have changed since


def test_gradients_are_summed_over_processes_in_one_call(monkeypatch):
    calls = []

    def twice(increment: Tensor) -> None:
        calls.append(tuple(increment.shape))
        increment *= 2

    logits, labels, valid = case(4, 3)
    alone, together = EqualizationV2Classification(3), EqualizationV2Classification(3)
    alone.loss(logits, labels, valid)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", twice)
    together.loss(logits, labels, valid)
    assert len(calls) == 1
    torch.testing.assert_close(together.positive_gradients, 2 * alone.positive_gradients)
    torch.testing.assert_close(together.negative_gradients, 2 * alone.negative_gradients)
    asked_not_to = EqualizationV2Classification(3)
    asked_not_to.sync_counts = False
    asked_not_to.loss(logits, labels, valid)
    assert len(calls) == 1
    assert torch.equal(asked_not_to.positive_gradients, alone.positive_gradients)


def test_impossible_arguments():
    with pytest.raises(ValueError, match="statistics of 3 classes, received 2"):
        EqualizationClassification(3, statistics=statistics_of(torch.tensor([0.5, 0.1])))
    with pytest.raises(ValueError, match="threshold in"):
        EqualizationClassification(3, threshold=2.0)
    for option in ("gamma", "mu", "alpha"):
        with pytest.raises(ValueError, match="at least 0"):
            EqualizationV2Classification(3, **{option: -1.0})
