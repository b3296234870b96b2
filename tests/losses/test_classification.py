"""Classifications against the recordings of whole sequences of batches, by hand, and with empty slots."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses import CLASSIFICATIONS, ClassStatistics, CrossEntropyClassification, SeesawClassification


def test_recorded_scores(recorded, check):
    seen = 0
    for case, inputs, _, outputs in recorded("classifier"):
        if case["kind"] == "seesaw_activation":
            scores = SeesawClassification(case["settings"]["num_classes"]).scores(inputs["logits"])
            check(case, "scores", scores, outputs["scores"])
            seen += 1
    assert seen == 2


def check_gradient(case, check, batch: str, grad: Tensor, inputs, outputs) -> None:
    if f"{batch}.grad" in outputs:
        check(case, f"{batch}.grad", grad, outputs[f"{batch}.grad"])
        return
    check(case, f"{batch}.grad_rows", grad[inputs[f"{batch}.rows"]], outputs[f"{batch}.grad_rows"])
    check(case, f"{batch}.grad_row_norms", grad.norm(dim=1), outputs[f"{batch}.grad_row_norms"])
    check(case, f"{batch}.grad_column_sums", grad.sum(0), outputs[f"{batch}.grad_column_sums"])


def weighted_losses(ours: SeesawClassification, logits: Tensor, labels: Tensor, weights: Tensor) -> list[Tensor]:
    """Sums of both losses with a weight a sample, put together from the per-sample losses."""
    classes = ours.num_classes
    positive = labels < classes
    ours.seesaw.count(labels.clamp(max=classes - 1), positive)
    per_sample = ours.seesaw.per_sample(logits[positive, :classes], labels[positive])
    objectness = F.cross_entropy(logits[:, classes:], (~positive).long(), reduction="none")
    return [(per_sample * weights[positive]).sum(), (objectness * weights).sum()]


@pytest.mark.parametrize("name", ["seesaw", "seesaw_lvis"])
def test_recorded_sequences(recorded, check, name):
    seen = 0
    for case, inputs, _, outputs in recorded(name):
        about = case["settings"]
        ours = SeesawClassification(about["num_classes"], p=about["p"], q=about["q"])
        for number, avg_factor in enumerate(about["avg_factor"]):
            batch = f"batch{number}"
            logits, labels = inputs[f"{batch}.logits"].clone().requires_grad_(), inputs[f"{batch}.labels"]
            if about["label_weights"]:
                classes, objectness = weighted_losses(ours, logits, labels, inputs[f"{batch}.weights"])
                scale = 1 / avg_factor
            else:
                losses = ours.loss(logits, labels, torch.ones_like(labels, dtype=torch.bool))
                classes, objectness = losses["classes"], losses["objectness"]
                scale = len(labels) / avg_factor  # ours divides by the number of RoIs
            check(case, f"{batch}.loss_cls_classes", classes * scale, outputs[f"{batch}.loss_cls_classes"])
            check(case, f"{batch}.loss_cls_objectness", objectness * scale, outputs[f"{batch}.loss_cls_objectness"])
            (grad,) = torch.autograd.grad((classes + objectness) * scale, logits)
            check_gradient(case, check, batch, grad, inputs, outputs)
            assert ours.seesaw.counts.tolist() == outputs[f"{batch}.cum_samples"][:-1].tolist()
        seen += 1
    assert seen >= 4


def test_objectness_by_hand():
    a, b = 1.5, -0.25  # logits of object and background
    ours = SeesawClassification(2, p=0.0)
    logits = torch.tensor([[0.0, 0.0, a, b]])
    probability = 1 / (1 + math.exp(b - a))
    scores = torch.tensor([[probability / 2, probability / 2, 1 - probability]])
    torch.testing.assert_close(ours.scores(logits), scores)
    one = torch.tensor([True])
    foreground, background = (ours.loss(logits, torch.tensor([label]), one) for label in (1, 2))
    assert foreground["objectness"].item() == pytest.approx(-math.log(probability), rel=1e-6)
    assert background["objectness"].item() == pytest.approx(-math.log(1 - probability), rel=1e-6)
    assert foreground["classes"].item() == pytest.approx(math.log(2), rel=1e-6)
    assert background["classes"].item() == 0


KINDS = [
    CrossEntropyClassification,
    SeesawClassification,
    lambda c: SeesawClassification(c, objectness=False),
    lambda c: SeesawClassification(c, q=2.0),
]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_probabilities(kind):
    torch.manual_seed(0)
    ours = kind(5)
    scores = ours.scores(torch.randn(30, ours.num_logits) * 4)
    assert scores.shape == (30, 6)
    assert (scores >= 0).all()
    torch.testing.assert_close(scores.sum(1), torch.ones(30))
    assert ours.scores(torch.zeros(0, ours.num_logits)).shape == (0, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_slots_change_nothing(kind):
    torch.manual_seed(0)
    full, part = kind(5), kind(5)
    logits, labels = torch.randn(12, full.num_logits), torch.arange(12) % 6
    valid = torch.arange(12) < 8
    padded = torch.where(valid[:, None], logits, 1e4).requires_grad_()
    whole = part.loss(logits[:8], labels[:8], valid[:8])
    losses = full.loss(padded, labels, valid)
    assert losses.keys() == whole.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], whole[name])
    sum(losses.values()).backward()
    assert (padded.grad[8:] == 0).all()
    assert (padded.grad[:8] != 0).any()
    for one, other in zip(full.buffers(), part.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_valid_gives_zero_with_a_gradient(kind, rows):
    ours = kind(4)
    logits = torch.randn(rows, ours.num_logits, requires_grad=True)
    losses = ours.loss(logits, torch.full((rows,), 4), torch.zeros(rows, dtype=torch.bool))
    sum(losses.values()).backward()
    assert all(value.item() == 0 for value in losses.values())
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [1, 4])  # of a class, and background
def test_a_logit_that_is_no_number_shows_in_the_loss(kind, label):
    ours, logits = kind(4), torch.zeros(3, kind(4).num_logits)
    logits[1] = float("nan")
    losses = ours.loss(logits, torch.tensor([0, label, 4]), torch.ones(3, dtype=torch.bool))
    assert all(value.isnan() for value in losses.values())


def test_cross_entropy_is_the_mean_over_valid_rois():
    ours, logits = CrossEntropyClassification(2), torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [9.0, 9.0, 0.0]])
    losses = ours.loss(logits, torch.tensor([2, 0, 1]), torch.tensor([True, True, False]))
    expected = (math.log(3) + math.log(math.exp(3) + 2) - 3) / 2
    assert losses["classes"].item() == pytest.approx(expected, rel=1e-6)
    assert ours.num_logits == 3


def test_only_valid_foreground_is_counted_and_only_in_training():
    ours = SeesawClassification(3)
    labels, valid = torch.tensor([0, 0, 2, 3, 3, 1]), torch.tensor([True, True, True, True, False, False])
    ours.loss(torch.zeros(6, 5), labels, valid)
    assert ours.seesaw.counts.tolist() == [2, 0, 1]
    ours.eval()
    ours.loss(torch.zeros(6, 5), labels, valid)
    assert ours.seesaw.counts.tolist() == [2, 0, 1]


def test_without_objectness_background_is_one_more_class():
    ours = SeesawClassification(3, objectness=False)
    labels, valid = torch.tensor([0, 3, 3]), torch.ones(3, dtype=torch.bool)
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.5]]).expand(3, -1)
    losses = ours.loss(logits, labels, valid)
    assert ours.num_logits == 4
    assert losses.keys() == {"classes"}
    assert ours.seesaw.counts.tolist() == [1, 0, 0, 2]
    # Background, seen twice, is spared nothing by the class seen once: S = (1/2)^0.8 for the three classes.
    e = [math.exp(z) for z in (2.0, 1.0, 0.0, 0.5)]
    background = math.log((e[0] + e[1] + e[2]) * 0.5**0.8 + e[3]) - 0.5
    foreground = math.log(sum(e)) - 2.0
    assert losses["classes"].item() == pytest.approx((foreground + 2 * background) / 3, rel=1e-6)
    assert torch.equal(ours.scores(logits), logits.softmax(1))


# ---------------------------------------------------------------------------------------------------------
# One check for all ten, before anything is counted


def made(name: str, num_classes: int = 5):
    kind = CLASSIFICATIONS[name]
    if not kind.needs_statistics:
        return kind(num_classes)
    counts = torch.arange(1, num_classes + 1)
    return kind(num_classes, statistics=ClassStatistics(num_images=9, images=counts, instances=3 * counts))


def refused(ours, logits: Tensor, labels: Tensor, valid: Tensor) -> str:
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    with pytest.raises(ValueError, match=f"^{type(ours).__name__} ") as error:
        ours.loss(logits, labels, valid)
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.named_buffers())
    return str(error.value)


@pytest.mark.parametrize("name", CLASSIFICATIONS)
@pytest.mark.parametrize(("label", "place"), [(6, 1), (255, 0), (-1, 2), (-100, 3)])
def test_a_label_out_of_range_is_named_and_nothing_is_counted(name, label, place):
    ours, labels = made(name), torch.tensor([0, 5, 4, 1])
    labels[place] = label
    sentence = refused(ours, torch.zeros(4, ours.num_logits), labels, torch.ones(4, dtype=torch.bool))
    assert sentence.endswith(f"expected labels in [0, 5] (5 is background), received {label} at position {place}")


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_other_shapes_and_types_are_refused(name):
    ours = made(name)
    width, valid, labels = ours.num_logits, torch.ones(4, dtype=torch.bool), torch.tensor([0, 5, 4, 1])
    logits = torch.zeros(4, width)
    for wrong in (logits[:, 1:], torch.zeros(4, width + 1), logits[:3], logits[None], logits[0]):
        assert f"expected logits (R, {width}), labels (R,) and valid (R,), received" in refused(
            ours, wrong, labels, valid
        )
    assert "received (4, " in refused(ours, logits, labels[:3], valid)
    assert "received (4, " in refused(ours, logits, labels, valid[:3])
    for dtype in (torch.int32, torch.float32, torch.uint8):
        assert f"expected int64 labels, received {dtype}; pass labels.long()" in refused(
            ours, logits, labels.to(dtype), valid
        )
    assert "received torch.int64, torch.bool" in refused(ours, logits.long(), labels, valid)
    assert "received torch.float32, torch.float32" in refused(ours, logits, labels, valid.float())
    assert all(value.isfinite() for value in ours.loss(logits, labels, valid).values())


@pytest.mark.parametrize("name", [name for name, kind in CLASSIFICATIONS.items() if kind.needs_statistics])
def test_missing_statistics_are_named_until_they_are_there(name):
    ours = CLASSIFICATIONS[name](5)
    case = (torch.zeros(2, ours.num_logits), torch.tensor([0, 5]), torch.ones(2, dtype=torch.bool))
    assert refused_statistics(ours, case) == refused_statistics(ours, case)
    ours.load_state_dict(made(name).state_dict())
    assert ours.statistics_known
    assert all(value.isfinite() for value in ours.loss(*case).values())
    by_hand = CLASSIFICATIONS[name](5)
    for buffer, filled in zip(by_hand.buffers(), made(name).buffers(), strict=True):
        buffer.copy_(filled)
    assert all(value.isfinite() for value in by_hand.loss(*case).values())


@pytest.mark.parametrize("name", [name for name, kind in CLASSIFICATIONS.items() if kind.needs_statistics])
def test_missing_statistics_are_named_by_a_compiled_loss_too(name):
    torch.compiler.reset()
    ours, loaded = (CLASSIFICATIONS[name](5) for _ in range(2))
    logits, labels = torch.zeros(2, ours.num_logits), torch.tensor([0, 5])
    compiled = torch.compile(ours, backend="eager")
    for _ in range(2):
        with pytest.raises(ValueError, match="without statistics; pass statistics=ClassStatistics"):
            compiled(logits, labels)
    loaded.load_state_dict(made(name).state_dict())
    assert torch.compile(loaded, backend="eager", fullgraph=True)(logits, labels).isfinite()


def refused_statistics(ours, case) -> str:
    with pytest.raises(ValueError, match="without statistics; pass statistics=ClassStatistics") as error:
        ours.loss(*case)
    return str(error.value)
