"""Seesaw Loss by hand, against the recording and against its C x C definition, and what its counts promise."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses import SeesawLoss
from tailseg.losses.seesaw import log_seesaw_factors

RATES = [(0.8, 0.0), (0.8, 2.0), (0.0, 0.0), (0.3, 1.0), (2.0, 0.5)]


def with_counts(counts: list[int], **options: float) -> SeesawLoss:
    loss = SeesawLoss(len(counts), **options).eval()
    loss.counts.copy_(torch.tensor(counts))
    return loss


def by_definition(logits: Tensor, labels: Tensor, counts: Tensor, p: float, q: float, eps: float = 1e-2) -> Tensor:
    """-ln of e^{z_i} / (Σ_{j≠i} S_ij e^{z_j} + e^{z_i}) in float64, with the whole matrix of S."""
    z, n = logits.double(), counts.clamp(min=1).double()
    ratio = n[None, :] / n[:, None]
    mitigation = torch.where(ratio < 1, ratio**p, torch.ones_like(ratio))  # (C, C)
    factor = mitigation[labels]
    if q > 0:
        prob = z.detach().softmax(dim=1)
        excess = prob / prob.gather(1, labels[:, None]).clamp(min=eps)
        factor = factor * torch.where(excess > 1, excess**q, torch.ones_like(excess))
    own = F.one_hot(labels, len(counts)).bool()
    factor = torch.where(own, 1.0, factor)
    top = z.detach().amax(dim=1, keepdim=True)
    terms = (z - top).exp()
    return ((factor * terms).sum(1) / terms.gather(1, labels[:, None])[:, 0]).log()


def case(seed: int, n: int = 40, classes: int = 9, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, classes, (n,), generator=generator)
    counts = (10 ** (torch.rand(classes, generator=generator) * 5)).long() - 1  # 0 among them
    return logits, labels, counts


def test_weights_by_hand():
    counts = torch.tensor([1000, 10, 1])
    factors = log_seesaw_factors(torch.zeros(3, 3), torch.arange(3), counts, p=0.8).exp()
    expected = torch.tensor([[1, 0.0251189, 0.0039811], [1, 1, 0.1584893], [1, 1, 1]])
    torch.testing.assert_close(factors, expected, rtol=0, atol=1e-6)


def test_losses_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, -1)
    loss = with_counts([1000, 10, 1], p=0.8, reduction="none")
    expected = torch.tensor([0.009732, 1.328821, 2.407606])
    torch.testing.assert_close(loss(logits, torch.arange(3)), expected, rtol=0, atol=1e-6)


def test_compensation_by_hand():
    # Two equally frequent classes with probabilities 0.8 and 0.2: the ratio 4, squared, weighs the wrong one.
    loss = with_counts([5, 5], p=0.8, q=2.0, reduction="none")
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
    expected = torch.tensor([1 + 0.2 / 0.8, 1 + 16 * 0.8 / 0.2]).log()
    torch.testing.assert_close(loss(logits, torch.tensor([0, 1])), expected)


@pytest.mark.parametrize(("p", "q"), RATES)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_equals_its_definition(p, q, scale):
    logits, labels, counts = case(1, scale=scale)
    loss = with_counts(counts.tolist(), p=p, q=q, reduction="none")
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses, expected = loss(ours, labels), by_definition(theirs, labels, counts, p, q)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(-1, 2, len(labels), dtype=torch.float64)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_a_shifted_softmax():
    logits, labels, counts = case(2)
    loss = with_counts(counts.tolist(), reduction="sum")
    logits.requires_grad_()
    loss(logits, labels).backward()
    factors = log_seesaw_factors(logits.detach(), labels, counts, 0.8)
    expected = (logits.detach() + factors).softmax(1) - F.one_hot(labels, 9)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("p", "q"), [(0.8, 0.0), (1.5, 0.0), (0.0, 0.0)])
def test_gradcheck(p, q):
    # With q > 0 the factors depend on the logits but carry no gradient, so differences would not agree.
    logits, labels, counts = case(3, n=6, classes=5, scale=1.0)
    loss = with_counts(counts.tolist(), p=p, q=q)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_exponents_it_is_cross_entropy(reduction):
    logits, labels, counts = case(4, scale=20.0)
    loss = with_counts(counts.tolist(), p=0.0, q=0.0, reduction=reduction)
    expected = F.cross_entropy(logits, labels, reduction=reduction)
    torch.testing.assert_close(loss(logits, labels), expected, rtol=1e-12, atol=1e-12)


def test_equal_counts_are_cross_entropy_and_unseen_classes_count_as_one():
    logits, labels, _ = case(5)
    for counts in ([7] * 9, [0] * 9, [0, 1, 0, 1, 1, 1, 0, 0, 1]):
        loss = with_counts(counts, p=0.8)
        torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels), rtol=1e-12, atol=1e-12)
    unseen = with_counts([0, 1000, 1], p=0.8, reduction="none")(logits[:, :3], labels % 3)
    seen = with_counts([1, 1000, 1], p=0.8, reduction="none")(logits[:, :3], labels % 3)
    assert torch.equal(unseen, seen)


@pytest.mark.parametrize(("p", "q"), RATES)
def test_extreme_logits_stay_finite(p, q):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [0.0, 0.0, 1e4]])
    logits = logits.repeat_interleave(3, dim=0).requires_grad_()
    labels = torch.arange(3).repeat(4)
    loss = with_counts([10**9, 3, 0], p=p, q=q, reduction="none")
    losses = loss(logits, labels)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logits.grad).all()
    assert (losses >= 0).all()
    log_factors = log_seesaw_factors(logits.detach().double(), labels, loss.counts, p, q)
    exact = F.cross_entropy(logits.detach().double() + log_factors, labels, reduction="none")
    torch.testing.assert_close(losses, exact.float(), rtol=1e-6, atol=1e-3)  # 1e4 has a spacing of 1e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_gives_zero_with_a_gradient(reduction):
    loss = SeesawLoss(4, q=2.0, reduction=reduction)
    logits = torch.zeros(0, 4, requires_grad=True)
    value = loss(logits, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert logits.grad.shape == (0, 4)
    assert loss.counts.tolist() == [0, 0, 0, 0]


def test_reductions_agree():
    logits, labels, counts = case(6)
    none, total, mean = (with_counts(counts.tolist(), reduction=r)(logits, labels) for r in ("none", "sum", "mean"))
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(none.mean(), mean)


def test_counts_grow_before_the_loss_and_in_training_only():
    loss = SeesawLoss(3, reduction="none")
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 2])
    first = loss(logits, labels)
    assert loss.counts.tolist() == [3, 0, 1]
    assert loss.counts.dtype == torch.int64
    expected = by_definition(logits, labels, torch.tensor([3, 0, 1]), 0.8, 0.0).float()
    torch.testing.assert_close(first, expected)
    loss.eval()
    loss(logits, labels)
    loss.per_sample(logits, labels)
    assert loss.counts.tolist() == [3, 0, 1]
    loss.train()
    loss(logits, labels)
    assert loss.counts.tolist() == [6, 0, 2]


def test_counts_are_exact_beyond_float32():
    loss = SeesawLoss(2)
    loss.counts.copy_(torch.tensor([2**40, 2**24]))
    loss.count(torch.tensor([0, 1, 1]))
    assert loss.counts.tolist() == [2**40 + 1, 2**24 + 2]


def test_invalid_samples_are_not_counted():
    loss = SeesawLoss(3)
    loss.count(torch.tensor([0, 1, 1, 2]), torch.tensor([True, False, True, False]))
    assert loss.counts.tolist() == [1, 1, 0]


def test_counts_are_summed_over_processes(monkeypatch):
    def another_process(increment: Tensor) -> None:
        increment += torch.tensor([10, 0, 5])

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", another_process)
    together, alone = SeesawLoss(3), SeesawLoss(3, sync_counts=False)
    for loss in (together, alone):
        loss.count(torch.tensor([0, 1]))
        loss.count(torch.tensor([0]))
    assert together.counts.tolist() == [22, 1, 10]
    assert alone.counts.tolist() == [2, 1, 0]


def test_counts_are_part_of_the_state():
    loss = SeesawLoss(3)
    loss.count(torch.tensor([0, 0, 2]))
    other = SeesawLoss(3)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert other.counts.tolist() == [2, 0, 1]
    assert list(loss.state_dict()) == ["counts"]
    assert list(loss.parameters()) == []


def test_low_precision_logits_are_computed_in_float32():
    logits, labels, counts = case(7)
    loss = with_counts(counts.tolist(), q=2.0)
    low = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(low, labels)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(low.float(), labels))


@pytest.mark.parametrize(
    "options",
    [{"num_classes": 0}, {"p": -0.1}, {"q": -1.0}, {"eps": 0.0}, {"eps": 1.5}, {"reduction": "max"}],
)
def test_impossible_arguments(options):
    with pytest.raises(ValueError, match="expected"):
        SeesawLoss(**({"num_classes": 3} | options))


@pytest.mark.parametrize(("logits", "labels"), [((4, 2), (4,)), ((3,), (3,)), ((4, 3), (5,)), ((4, 3), (4, 1))])
def test_impossible_shapes(logits, labels):
    with pytest.raises(ValueError, match=r"expected logits \(N, 3\)"):
        SeesawLoss(3)(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))
